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

from ._launch import Case, Config, batches, choose, load_tile, on_device, operand, options
from ._operands import check_lists

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
    dg, dd, tt, gg, theta, delta, grad, inside, BLOCK: tl.constexpr, LANE: tl.constexpr, MASKED: tl.constexpr
):
    """Return the four sums with those of one more tile added."""
    t = load_tile(theta, inside, MASKED)
    d = load_tile(delta, inside, MASKED)
    g = load_tile(grad, inside, MASKED)
    return (
        dg + _lane_sums(d, g, BLOCK, LANE),
        dd + _lane_sums(d, d, BLOCK, LANE),
        tt + _lane_sums(t, t, BLOCK, LANE),
        gg + _lane_sums(g, g, BLOCK, LANE),
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

    dg = tl.zeros([BLOCK // LANE], tl.float64)
    dd = tl.zeros([BLOCK // LANE], tl.float64)
    tt = tl.zeros([BLOCK // LANE], tl.float64)
    gg = tl.zeros([BLOCK // LANE], tl.float64)
    # The last tile of a tensor is the only one that needs a mask, and the mask would narrow the loads of the others.
    full = num // BLOCK * BLOCK
    for first in range(0, full, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        t, d, g = theta + offsets, delta + offsets, grad + offsets
        dg, dd, tt, gg = _add_tile(dg, dd, tt, gg, t, d, g, offsets < num, BLOCK, LANE, MASKED=False)
    if full < num:
        offsets = full + tl.arange(0, BLOCK)
        t, d, g = theta + offsets, delta + offsets, grad + offsets
        dg, dd, tt, gg = _add_tile(dg, dd, tt, gg, t, d, g, offsets < num, BLOCK, LANE, MASKED=True)
    partial += pid
    tl.store(partial, tl.sum(dg))
    tl.store(partial + partial_stride, tl.sum(dd))
    tl.store(partial + 2 * partial_stride, tl.sum(tt))
    tl.store(partial + 3 * partial_stride, tl.sum(gg))


@triton.jit
def _total_kernel(total, partial, num, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    partial += pid * num
    sums = tl.zeros([BLOCK], tl.float64)
    for first in range(0, num, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        sums += tl.load(partial + offsets, mask=offsets < num, other=0.0)
    tl.store(total + pid, tl.sum(sums))


def reduce(theta: Sequence[Tensor], delta: Sequence[Tensor], grad: Sequence[Tensor]) -> Tensor:
    """Return Δθᵀg, |Δθ|², |θ|² and |g|², summed over all tensors of a model.

    Args:
        theta: parameters, dense tensors of any shape and size, float32, float16 or bfloat16, all on one CUDA device.
        delta: Δθ, tensor by tensor the shape and strides of ``theta``, any of the three dtypes.
        grad: g, likewise.

    Returns:
        Tensor: [4] float64 on the device, in this order; zeros, on the CPU, for empty lists.

    Raises:
        TypeError: if a dtype is none of the three.
        ValueError: if the lists differ in length, or a device, shape or stride does not fit.

    Memory:
        32 bytes per 64 Ki elements, and tables of the same size that are kept for the next call.

    Determinism:
        The same bits on every run with the same lists on the same architecture.
    """
    check_lists(theta=theta, delta=delta, grad=grad)
    if not theta:
        return torch.zeros(4, dtype=torch.float64)
    config = choose(_CONFIGS, theta[0], sum(tensor.numel() for tensor in theta))
    chunk = _TILES * config.block
    groups = batches(chunk, theta, delta, grad)
    num_chunks = sum(len(batch.chunks) for batch in groups)
    partial = torch.empty(4, num_chunks, dtype=torch.float64, device=theta[0].device)
    total = torch.zeros(4, dtype=torch.float64, device=theta[0].device)
    with on_device(theta[0]):
        first = 0
        for batch in groups:
            _chunk_sums_kernel[(len(batch.chunks),)](
                partial[:, first:],
                num_chunks,
                batch.rows,
                batch.chunks,
                *batch.dtypes,
                batch.aligned,
                CHUNK=chunk,
                BLOCK=config.block,
                LANE=_LANE,
                **options(config, theta[0]),
            )
            first += len(batch.chunks)
        if num_chunks:
            _total_kernel[(4,)](
                total, partial, num_chunks, BLOCK=_TOTAL_CONFIG.block, **options(_TOTAL_CONFIG, theta[0])
            )
    return total
