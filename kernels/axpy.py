"""Move all parameters of a model in place: θ ← θ₀ + αΔθ, from a backup or from higher-precision masters.

One launch covers every tensor of equal dtypes and alignment, so that a whole model takes one to three. A program walks
one chunk of one tensor; which one, it reads from a table. Moves 2 + 2 + 2 bytes per element with bf16 operands.

θ is computed from θ₀ at every call and never from its last value: errors cannot add up, and α = 0 restores θ₀.

Source: Kalra et al. 2026, Def. 2.1 (θ − ηΔθ at every probe of the line search).
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._accepts import check_alpha, check_lists, check_no_overlap
from ._launch import (
    Again,
    Case,
    Config,
    Launcher,
    are_aligned,
    choose,
    grid,
    lane,
    load_tile,
    on_device,
    options,
    perturbed,
    store_tile,
)
from ._tables import chunk_of, operand, tables

# Blocks are those of 16-bit parameters, half as long where they are fp32: a thread writes 16 bytes.
_CONFIGS = (
    Case(None, None, 1 << 22, Config(block=512, threads=64)),
    Case(None, None, None, Config(block=2048, threads=256)),
)

# Blocks that one program walks: 64 Ki elements with the large configuration.
_TILES = 32


@triton.jit
def _axpy_tile(theta, base, delta, alpha, inside, MASKED: tl.constexpr):
    w = load_tile(base, inside, MASKED)
    d = load_tile(delta, inside, MASKED)
    store_tile(theta, perturbed(w, d, alpha), inside, MASKED)


@triton.jit
def _axpy_kernel(
    rows,
    chunks,
    alpha,
    THETA: tl.constexpr,
    BASE: tl.constexpr,
    DELTA: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row, start, num = chunk_of(pid, rows, chunks, 3, CHUNK)
    theta = operand(row, 0, start, THETA, ALIGNED)
    base = operand(row, 1, start, BASE, ALIGNED)
    delta = operand(row, 2, start, DELTA, ALIGNED)
    alpha = tl.load(alpha)

    # The last tile of a tensor is the only one that needs a mask, and the mask would narrow the loads of the others.
    full = num // BLOCK * BLOCK
    for first in range(0, full, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        _axpy_tile(theta + offsets, base + offsets, delta + offsets, alpha, offsets < num, MASKED=False)
    if full < num:
        offsets = full + tl.arange(0, BLOCK)
        _axpy_tile(theta + offsets, base + offsets, delta + offsets, alpha, offsets < num, MASKED=True)


@Launcher
def axpy_(
    theta: Sequence[Tensor], base: Sequence[Tensor], delta: Sequence[Tensor], alpha: Tensor
) -> Callable[..., None]:
    """Launch `sharpkern.ops.axpy_`; tables of 40 bytes per tensor and 8 per chunk are kept for the next call."""
    check_lists(theta=theta, base=base, delta=delta)
    if not theta:
        return lambda **_: None
    if check_alpha(alpha, theta[0]) != 1:
        raise ValueError(f"alpha must hold one step size, got {alpha.numel()}; call once per step size")
    check_no_overlap(theta, [*base, *delta, alpha])
    numel = sum(tensor.numel() for tensor in theta)
    config = choose(_CONFIGS, theta[0].device, theta[0].element_size(), numel)
    chunk = _TILES * config.block
    found = tables(chunk, theta, base, delta)
    launches = [
        (Again(_axpy_kernel, grid(len(batch.chunks), config), options(config, theta[0])), batch)
        for batch in found.batches
    ]

    def launch(alpha: Tensor = alpha) -> None:
        with on_device(theta[0]):
            for again, batch in launches:
                block = config.threads * lane(batch.dtypes[0])
                again(
                    found.rows,
                    batch.chunks,
                    alpha,
                    *batch.dtypes,
                    batch.aligned,
                    chunk,
                    block,
                    aligned=are_aligned(alpha),
                )
        # Autograd does not see a kernel write: without this a backward through the old values would pass unnoticed.
        torch.autograd.graph.increment_version(theta)

    return launch
