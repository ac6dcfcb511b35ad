"""RMSprop: g / (√(v − a²) + ε) through momentum where there is any, with v = αv + (1 − α)g² and a = αa + (1 − α)g.

a is of the centered variant alone. Square root and division are rounded as IEEE 754 asks.

Source: the update rule that torch.optim.RMSprop documents.
"""

import triton
import triton.language as tl

from .._launch import load_tile

STATE = ("square_avg", "grad_avg", "momentum_buffer")
TOGETHER = ()
NUMBERS = ("alpha", "1 - alpha", "eps", "momentum")


@triton.jit
def update(
    g, square_avg, grad_avg, momentum_buffer, numbers, offsets, inside, FLAG: tl.constexpr, MASKED: tl.constexpr
):
    """Return the update of a tile; an average or a buffer that is not there yet is zero. The flag is centered."""
    lerp = tl.load(numbers + 1)

    v = tl.zeros_like(g)
    if square_avg is not None:
        v = load_tile(square_avg + offsets, inside, MASKED) * tl.load(numbers)
    v = tl.fma(lerp * g, g, v)
    if FLAG:
        a = tl.zeros_like(g)
        if grad_avg is not None:
            a = load_tile(grad_avg + offsets, inside, MASKED)
        # As torch.lerp, from the nearer end.
        a = tl.where(lerp < 0.5, tl.fma(g - a, lerp, a), g - (g - a) * (1.0 - lerp))
        v = tl.fma(-a, a, v)
    b = tl.div_rn(g, tl.sqrt_rn(v) + tl.load(numbers + 2))
    if momentum_buffer is not None:
        b = tl.fma(load_tile(momentum_buffer + offsets, inside, MASKED), tl.load(numbers + 3), b)
    return b
