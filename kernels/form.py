"""Perturbed weights for several step sizes at once: out[k] = W + α_k D.

W and D are read once for all K step sizes: with bf16 operands 4 + 2K bytes move per element, K single calls move 6K.
Arithmetic is fp32 with one fused multiply-add; the result is rounded once, to nearest even or stochastically.

Stochastic rounding gives each element one random number for all step sizes (common random numbers), so that the
difference between two of them is the step's and not the rounding's. It keeps displacements too small for the dtype on
average: E[out[k]] = W + α_k D.

Source: Kalra et al. 2026, Def. 2.1 (W − ηΔθ at every probe of the line search).
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._accepts import check_alpha, check_floats, check_layout, check_output, empty_steps
from ._launch import (
    STREAMING,
    Again,
    Launcher,
    are_aligned,
    choose,
    grid,
    load_tile,
    on_device,
    options,
    perturbed,
    store_tile,
)


@triton.jit
def _scrambled(bits):
    """Return 32 well mixed bits for 32 different ones: the finalizer of MurmurHash3."""
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def _round_to_bf16(x, random):
    """Return fp32 values that bf16 holds exactly: the neighbour further from zero with probability of its nearness."""
    # The lower 16 bits are what bf16 lacks: a carry out of them moves the magnitude up by one unit.
    raised = (x.to(tl.int32, bitcast=True) + random) & -65536
    return tl.where(x == x, raised.to(tl.float32, bitcast=True), x)


@triton.jit
def _form_tile(
    out, out_stride, W, D, alpha, n, offsets, seed, K: tl.constexpr, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr
):
    inside = offsets < n
    w = load_tile(W + offsets, inside, MASKED)
    d = load_tile(D + offsets, inside, MASKED)
    if STOCHASTIC:
        # Above 2³² elements the upper half of the offset enters as a part of the key.
        key = _scrambled((offsets >> 32).to(tl.uint32) ^ seed.to(tl.uint32))
        random = (_scrambled(offsets.to(tl.uint32) ^ key) & 0xFFFF).to(tl.int32)
    out += offsets
    for k in tl.static_range(K):
        x = perturbed(w, d, tl.load(alpha + k))
        if STOCHASTIC:
            x = _round_to_bf16(x, random)
        store_tile(out, x, inside, MASKED)
        out += out_stride


@triton.jit(do_not_specialize=["n", "seed"])
def _form_kernel(out, out_stride, W, D, alpha, n, seed, K: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        _form_tile(out, out_stride, W, D, alpha, n, offsets, seed, K, STOCHASTIC, MASKED=False)
    else:
        _form_tile(out, out_stride, W, D, alpha, n, offsets, seed, K, STOCHASTIC, MASKED=True)


@Launcher
def form(
    W: Tensor,
    D: Tensor,
    alpha: Tensor,
    *,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    out: Tensor | None = None,
) -> Callable[..., Tensor]:
    """Launch `sharpkern.ops.form`."""
    check_floats(W=W, D=D)
    check_layout(W=W, D=D)
    num_steps = check_alpha(alpha, W)
    dtype = check_output(out, W, num_steps, dtype, [W, D, alpha])
    _check_seed(seed, dtype)
    n = W.numel()
    config = choose(STREAMING, W.device, dtype.itemsize, n)
    again = Again(_form_kernel, grid(triton.cdiv(n, config.block), config), options(config, W))

    def launch(alpha: Tensor = alpha, out: Tensor | None = out) -> Tensor:
        result = empty_steps(W, num_steps, dtype) if out is None else out
        if n == 0:
            return result
        # Of one step size the distance to the next is nothing to compile another kernel for.
        stride = 0 if num_steps == 1 else result.stride(0)
        with on_device(W):
            again(
                result,
                stride,
                W,
                D,
                alpha,
                n,
                seed or 0,
                num_steps,
                seed is not None,
                config.block,
                aligned=are_aligned(result, alpha),
            )
        torch.autograd.graph.increment_version(result)
        return result

    return launch


def _check_seed(seed: int | None, dtype: torch.dtype) -> None:
    """Refuse stochastic rounding where it is not defined."""
    if seed is None:
        return
    if dtype != torch.bfloat16:
        raise TypeError(f"seed must be None unless the result is bfloat16, got a result of {dtype}; leave it out")
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed must be in [0, 2**31), got {seed}; reduce it modulo 2**31")
