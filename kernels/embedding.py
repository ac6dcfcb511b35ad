"""Embedding look-up with perturbed weights: out[k, t] = W[i_t] + α_k D[i_t].

Only the rows that occur are read, and once for all K step sizes: 4 + 2K bytes per element of the output with bf16
operands. The full perturbed table is never formed. Arithmetic is fp32 with one fused multiply-add.

Source: Kalra et al. 2026, Def. 2.1 (W − ηΔθ at every probe of the line search).
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._accepts import check_alpha, check_device, check_dtype, check_floats, check_rows
from ._launch import Case, Config, Launcher, choose, grid, load_tile, on_device, options, perturbed, store_tile

# Bounded by the length of a row.
_CONFIGS = (
    Case(None, None, 513, Config(block=512, threads=64)),
    Case(None, None, None, Config(block=1024, threads=128)),
)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["indices"])
def _embedding_kernel(
    out, out_stride, indices, W, W_stride, D, D_stride, alpha, num_rows, length, K: tl.constexpr, BLOCK: tl.constexpr
):
    pid = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(length, BLOCK)
    token = pid // parts
    columns = (pid % parts) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < length

    index = tl.load(indices + token).to(tl.int64)
    known = (index >= 0) & (index < num_rows)
    row = tl.where(known, index, 0)
    w = load_tile(W + row * W_stride + columns, inside, True)
    d = load_tile(D + row * D_stride + columns, inside, True)
    out += token * length + columns
    for k in tl.static_range(K):
        x = perturbed(w, d, tl.load(alpha + k))
        store_tile(out, tl.where(known, x, float("nan")), inside, True)
        out += out_stride


@Launcher
def embedding(
    indices: Tensor, W: Tensor, D: Tensor, alpha: Tensor, *, dtype: torch.dtype | None = None
) -> Callable[[], Tensor]:
    """Launch `sharpkern.ops.embedding`; indices are copied if not contiguous."""
    check_floats(W=W, D=D)
    check_device(W=W, indices=indices)
    check_rows(W=W, D=D)
    if indices.dtype not in {torch.int64, torch.int32}:
        raise TypeError(f"indices must be int64 or int32, got {indices.dtype}; convert them")
    num_steps = check_alpha(alpha, W)
    dtype = dtype or W.dtype
    check_dtype(dtype)
    num_rows, length = W.shape
    config = choose(_CONFIGS, W.device, W.element_size(), length)
    programs = grid(indices.numel() * triton.cdiv(length, config.block), config)

    def launch() -> Tensor:
        out = torch.empty(num_steps, *indices.shape, length, dtype=dtype, device=W.device)
        if num_rows == 0:
            # The kernel reads row 0 for an index that is not there.
            return out.fill_(math.nan)
        if out.numel() == 0:
            return out
        with on_device(W):
            _embedding_kernel[programs](
                out,
                indices.numel() * length,
                indices.contiguous(),
                W,
                W.stride(0),
                D,
                D.stride(0),
                alpha,
                num_rows,
                length,
                K=num_steps,
                BLOCK=config.block,
                **options(config, W),
            )
        return out

    return launch
