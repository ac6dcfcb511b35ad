"""Lion: sign(β₁m + (1 − β₁)g), the momentum as it was before the step.

Source: Chen et al. 2023, Algorithm 2, as lion-pytorch writes it.
"""

import triton
import triton.language as tl

from .._launch import load_tile

STATE = ("exp_avg",)
TOGETHER = ()
NUMBERS = ("beta1", "1 - beta1")


@triton.jit
def update(g, exp_avg, _second, _third, numbers, offsets, inside, FLAG: tl.constexpr, MASKED: tl.constexpr):
    """Return the update of a tile; a momentum that is not there yet is zero. There is no flag."""
    m = tl.zeros_like(g)
    if exp_avg is not None:
        m = load_tile(exp_avg + offsets, inside, MASKED) * tl.load(numbers)
    m = tl.fma(g, tl.load(numbers + 1), m)
    return tl.where(m > 0.0, 1.0, tl.where(m < 0.0, -1.0, 0.0))
