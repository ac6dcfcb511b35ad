"""The four sums that a measurement needs, of every tensor of a model in one pass: Δθᵀg, |Δθ|², |θ|² and |g|².

θ, Δθ and g are read once: 6 bytes per element with bf16 operands, where four separate dot products read 10. Products
and sums are fp64. The first stage sums each chunk of each tensor, the second the chunks of each tensor; both in a fixed
order and without atomic additions, so that a second run gives the same bits.

Source: Kalra et al. 2026, Def. 2.2 (directional sharpness divides by Δθᵀg).
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._accepts import check_lists
from ._launch import Case, Config, Launcher, choose, grid, lane, load_tile, on_device, options
from ._tables import chunk_of, operand, sums_of_chunks, tables

# Blocks are those of 16-bit operands, half as long where all are fp32: a thread takes 16 bytes of the narrowest.
_CONFIGS = (
    Case(None, None, 1 << 22, Config(block=512, threads=64)),
    # 4096 elements per tile would need more registers than leave room for a second program.
    Case(None, None, None, Config(block=2048, threads=256)),
)

# Blocks that one program walks: 64 Ki elements with the large configuration.
_TILES = 32


@triton.jit
def _lane_sums(a, b, BLOCK: tl.constexpr, LANE: tl.constexpr):
    """Return the fp64 sums of a·b over LANE neighbours each: products of two fp32 numbers are exact in fp64.

    One thread holds those neighbours, so that it needs no other before the end of the chunk.
    """
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
    row, start, num = chunk_of(pid, rows, chunks, 3, CHUNK)
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
    # In the order of the lists, whatever launch this is.
    partial += 4 * (tl.load(row + 4) + start // CHUNK)
    tl.store(partial, tl.sum(dg))
    tl.store(partial + 1, tl.sum(dd))
    tl.store(partial + 2, tl.sum(tt))
    tl.store(partial + 3, tl.sum(gg))


@Launcher
def reduce(theta: Sequence[Tensor], delta: Sequence[Tensor], grad: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Launch `sharpkern.ops.reduce`; tables of about the size of the sums of chunks are kept for the next call."""
    check_lists(theta=theta, delta=delta, grad=grad)
    if not theta:
        return lambda: torch.zeros(0, 4, dtype=torch.float64)
    numel = sum(tensor.numel() for tensor in theta)
    config = choose(_CONFIGS, theta[0].device, theta[0].element_size(), numel)
    chunk = _TILES * config.block
    found = tables(chunk, theta, delta, grad)
    programs = [grid(len(batch.chunks), config) for batch in found.batches]

    def launch() -> Tensor:
        partial = torch.empty(found.num_chunks, 4, dtype=torch.float64, device=theta[0].device)
        with on_device(theta[0]):
            for batch, size in zip(found.batches, programs, strict=True):
                _chunk_sums_kernel[size](
                    partial,
                    found.rows,
                    batch.chunks,
                    *batch.dtypes,
                    batch.aligned,
                    CHUNK=chunk,
                    BLOCK=config.threads * lane(*batch.dtypes),
                    LANE=lane(*batch.dtypes),
                    **options(config, theta[0]),
                )
        return sums_of_chunks(partial, found, chunk)

    return launch
