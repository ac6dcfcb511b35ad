"""Adam and AdamW: m̂ / (√v̂ + ε), with m = β₁m + (1 − β₁)g, v = β₂v + (1 − β₂)g², m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ).

Square root and division are rounded as IEEE 754 asks. Without a gradient the moments hold it already.

Source: the update rules that torch.optim.Adam and torch.optim.AdamW document.
"""

import triton
import triton.language as tl

from .._launch import load_tile

STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
TOGETHER = STATE[:2]
NUMBERS = ("1 - beta1", "beta2", "1 - beta2", "1 / correction1", "correction2 ** 0.5", "eps")


@triton.jit
def update(g, exp_avg, exp_avg_sq, max_exp_avg_sq, numbers, offsets, inside, FLAG: tl.constexpr, MASKED: tl.constexpr):
    """Return the update of a tile; a moment that is not there yet is zero. There is no flag."""
    lerp1 = tl.load(numbers)
    beta2 = tl.load(numbers + 1)
    lerp2 = tl.load(numbers + 2)
    inverse_correction1 = tl.load(numbers + 3)
    root_correction2 = tl.load(numbers + 4)
    eps = tl.load(numbers + 5)

    if exp_avg is None:
        m = tl.zeros_like(g)
        v = tl.zeros_like(g)
    else:
        m = load_tile(exp_avg + offsets, inside, MASKED)
        v = load_tile(exp_avg_sq + offsets, inside, MASKED)
    if g is not None:
        # As torch.lerp, from the nearer end: β₁ = 0 gives g itself.
        m = tl.where(lerp1 < 0.5, tl.fma(g - m, lerp1, m), g - (g - m) * (1.0 - lerp1))
        v = tl.fma(lerp2 * g, g, v * beta2)
    if max_exp_avg_sq is not None:
        v = tl.maximum(v, load_tile(max_exp_avg_sq + offsets, inside, MASKED), propagate_nan=tl.PropagateNan.ALL)
    return tl.div_rn(m * inverse_correction1, tl.div_rn(tl.sqrt_rn(v), root_correction2) + eps)
