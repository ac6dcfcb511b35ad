"""The four sums that a measurement needs, of a whole model in one pass: Δθᵀg, |Δθ|², |θ|² and |g|².

θ, Δθ and g are read once: 6 bytes per element with bf16 operands, where four separate dot products read 10. Products
and sums are fp64. The first stage sums each chunk of each tensor, the second the chunks; both in a fixed order and
without atomic additions, so that a second run gives the same bits.

Source: Kalra et al. 2026, Def. 2.2 (directional sharpness divides by Δθᵀg).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    Case,
    Config,
    batches,
    check_floats,
    check_layout,
    choose,
    load_tile,
    on_device,
    operand,
    options,
)

_CONFIGS = (
    Case(None, None, 1 << 22, Config(block=512, threads=64)),
    # 4096 elements per tile would need more registers than leave room for a second program.
    Case(None, None, None, Config(block=2048, threads=256)),
)

# Tiles that one program walks: 64 Ki elements with the large configuration.
_TILES = 32

# Elements that one thread adds up before it needs its neighbours: a 16-byte load of bf16.
_LANE = 8

_TOTAL_CONFIG = Config(block=1024, threads=128)


@triton.jit
def _lane_sums(a, b, BLOCK: tl.constexpr, LANE: tl.constexpr):
    """Return the fp64 sums of a·b over LANE neighbours each: products of two fp32 numbers are exact in fp64."""
    return tl.sum(tl.reshape(a.to(tl.float64) * b.to(tl.float64), [BLOCK // LANE, LANE]), axis=1)


@triton.jit
def _add_tile(
    sums, theta, delta, grad, inside, BLOCK: tl.constexpr, LANE: tl.constexpr, MASKED: tl.constexpr
):
    slope, delta_sq, theta_sq, grad_sq = sums
    t = load_tile(theta, inside, MASKED)
    d = load_tile(delta, inside, MASKED)
    g = load_tile(grad, inside, MASKED)
    return (
        slope + _lane_sums(d, g, BLOCK, LANE),
        delta_sq + _lane_sums(d, d, BLOCK, LANE),
        theta_sq + _lane_sums(t, t, BLOCK, LANE),
        grad_sq + _lane_sums(g, g, BLOCK, LANE),
    )


@triton.jit
def _chunk_sums_kernel(
    partial,
    partial_stride,
    rows,
    chunks,
    THETA: tl.constexpr,
    DELTA: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row = rows + 4 * tl.load(chunks + 2 * pid)
    start = tl.load(chunks + 2 * pid + 1).to(tl.int64) * CHUNK
    num = tl.minimum(tl.load(row + 3) - start, CHUNK).to(tl.int32)
    theta = operand(row, 0, start, THETA, ALIGNED)
    delta = operand(row, 1, start, DELTA, ALIGNED)
    grad = operand(row, 2, start, GRAD, ALIGNED)

    zeros = tl.zeros([BLOCK // LANE], tl.float64)
    sums = (zeros, zeros, zeros, zeros)
    full = num // BLOCK * BLOCK
    for first in range(0, full, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        sums = _add_tile(sums, theta + offsets, delta + offsets, grad + offsets, offsets < num, BLOCK, LANE, False)
    if full < num:
        offsets = full + tl.arange(0, BLOCK)
        sums = _add_tile(sums, theta + offsets, delta + offsets, grad + offsets, offsets < num, BLOCK, LANE, True)
    partial += pid
    for quantity in tl.static_range(4):
        tl.store(partial, tl.sum(sums[quantity]))
        partial += partial_stride


@triton.jit
def _total_kernel(total, partial, num, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    partial += pid * num
    sums = tl.zeros([BLOCK], tl.float64)
    for first in range(0, num, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        sums += tl.load(partial + offsets, mask=offsets < num, other=0.0)
    tl.store(total + pid, tl.sum(sums))
