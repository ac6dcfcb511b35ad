"""Move all parameters of a model in place: θ ← θ₀ + αΔθ, from a backup or from higher-precision masters.

One launch covers every tensor of equal dtypes and alignment, so that a whole model takes one to three. A program walks
one chunk of one tensor; which one, it reads from a table. Moves 2 + 2 + 2 bytes per element with bf16 operands.

θ is computed from θ₀ at every call and never from its last value: errors cannot add up, and α = 0 restores θ₀.

Source: Kalra et al. 2026, Def. 2.1 (θ − ηΔθ at every probe of the line search).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    Case,
    Config,
    choose,
    chunk_of,
    grid,
    lane,
    load_tile,
    on_device,
    operand,
    options,
    perturbed,
    store_tile,
    tables,
)
from ._operands import check_alpha, check_lists, check_no_overlap

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
    row, start, num = chunk_of(pid, rows, chunks, CHUNK)
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


def axpy_(theta: Sequence[Tensor], base: Sequence[Tensor], delta: Sequence[Tensor], alpha: Tensor) -> None:
    """Write θ ← θ₀ + αΔθ into all tensors of a model, with fp32 arithmetic and one rounding.

    Args:
        theta: written; dense tensors of any shape and size, float32, float16 or bfloat16, all on one CUDA device.
        base: θ₀, tensor by tensor the shape and strides of ``theta``, any of the three dtypes (fp32 masters, say).
        delta: Δθ, likewise.
        alpha: signed step size (−η along an update), [1] float32 on the device.

    Raises:
        TypeError: if a dtype is none of the three, or alpha is no float32 tensor.
        ValueError: if the lists differ in length, a device, shape or stride does not fit, or an output shares memory
            with another operand.

    Memory:
        Tables of 40 bytes per tensor and 8 per 64 Ki elements (16 Ki in models below 4 M), kept for the next call.

    Determinism:
        Elementwise; the same bits on every run, and θ₀ bit for bit where α = 0 and the dtypes agree.
    """
    check_lists(theta=theta, base=base, delta=delta)
    if not theta:
        return
    if check_alpha(alpha, theta[0]) != 1:
        raise ValueError(f"alpha must hold one step size, got {alpha.numel()}; call once per step size")
    check_no_overlap(theta, [*base, *delta, alpha])
    config = choose(_CONFIGS, theta[0], sum(tensor.numel() for tensor in theta))
    chunk = _TILES * config.block
    rows, batches, _ = tables(chunk, theta, base, delta)
    with on_device(theta[0]):
        for batch in batches:
            _axpy_kernel[grid(len(batch.chunks), config)](
                rows,
                batch.chunks,
                alpha,
                *batch.dtypes,
                batch.aligned,
                CHUNK=chunk,
                BLOCK=config.threads * lane(batch.dtypes[0]),
                **options(config, theta[0]),
            )
    # Autograd does not see a kernel write: without this a backward through the old values would pass unnoticed.
    torch.autograd.graph.increment_version(theta)
