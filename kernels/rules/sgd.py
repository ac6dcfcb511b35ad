"""SGD: b = μb + (1 − τ)g (the first step: b = g), and b, or g + μb with Nesterov's momentum.

Source: the update rule that torch.optim.SGD documents.
"""

import triton
import triton.language as tl

from .._launch import load_tile

STATE = ("momentum_buffer",)
TOGETHER = ()
NUMBERS = ("momentum", "1 - dampening")


@triton.jit
def update(g, momentum_buffer, _second, _third, numbers, offsets, inside, FLAG: tl.constexpr, MASKED: tl.constexpr):
    """Return the update of a tile; the flag is Nesterov's momentum."""
    momentum = tl.load(numbers)
    undamped = tl.load(numbers + 1)

    b = g
    if momentum_buffer is not None:
        b = tl.fma(g, undamped, load_tile(momentum_buffer + offsets, inside, MASKED) * momentum)
    if FLAG:
        b = tl.fma(b, momentum, g)
    return b
