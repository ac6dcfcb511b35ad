"""Weights perturbed along the Adam or AdamW update, straight from the optimizer's state: no Δθ is ever stored.

out[k] = θ + α_k Δθ,   Δθ = r (m̂ / (√v̂ + ε) + γθ), with the moments after a gradient that the optimizer has not seen:

    m = β₁m + (1 − β₁)fg,   v = β₂v + (1 − β₂)(fg)²,   m̂ = m / (1 − β₁ᵗ),   v̂ = v / (1 − β₂ᵗ)

f undoes a loss scale or turns a gradient round, r is the group's share of the learning rate. The moments are updated in
registers and never written. L2 decay (Adam) enters g instead of the update. With bf16 weights and gradients and fp32
moments 12 + 2K bytes move per element for K step sizes. The order of operations is that of torch's own step, square
root and division are rounded as IEEE 754 asks.

Source: the update rules that torch.optim.Adam and torch.optim.AdamW document; Kalra et al. 2026, Def. 2.1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import STREAMING, choose, device_numbers, grid, load_tile, on_device, options, store_steps
from ._operands import check_step
from ._updates import adam_numbers, adam_update, check_moments


@triton.jit
def _form_adam_tile(
    out,
    out_stride,
    theta,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    alpha,
    numbers,
    n,
    offsets,
    K: tl.constexpr,
    DECAYED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MASKED: tl.constexpr,
):
    inside = offsets < n
    w = None
    if theta is not None:
        w = load_tile(theta + offsets, inside, MASKED)
    g = None
    if grad is not None:
        g = load_tile(grad + offsets, inside, MASKED)
    update = adam_update(
        w, g, exp_avg, exp_avg_sq, max_exp_avg_sq, numbers, offsets, inside, DECAYED, DECOUPLED, MASKED
    )
    store_steps(out + offsets, out_stride, w, update, alpha, inside, K, MASKED)


@triton.jit
def _form_adam_kernel(
    out,
    out_stride,
    theta,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    alpha,
    numbers,
    n,
    K: tl.constexpr,
    DECAYED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    # fmt: off
    if start + BLOCK <= n:
        _form_adam_tile(
            out, out_stride, theta, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, alpha, numbers, n, offsets,
            K, DECAYED, DECOUPLED, MASKED=False,
        )
    else:
        _form_adam_tile(
            out, out_stride, theta, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, alpha, numbers, n, offsets,
            K, DECAYED, DECOUPLED, MASKED=True,
        )
    # fmt: on


def form_adam(
    theta: Tensor,
    grad: Tensor | None,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    alpha: Tensor | None,
    max_exp_avg_sq: Tensor | None = None,
    *,
    beta1: float,
    beta2: float,
    correction1: float,
    correction2: float,
    eps: float,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    grad_factor: float = 1.0,
    rate: float = 1.0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return θ + α_k Δθ for K step sizes, Δθ the Adam or AdamW update that the next step would make; or Δθ itself.

    Args:
        theta: the parameter or its master, any shape and size, float32, float16 or bfloat16, CUDA, without gaps.
        grad: g, shape and strides of ``theta``; None if the moments hold it already.
        exp_avg: m, likewise; None before the first step.
        exp_avg_sq: v, likewise; None together with ``exp_avg``.
        alpha: signed step sizes (−η along the update), [K] float32, K ≤ 16; None for Δθ.
        max_exp_avg_sq: the largest v so far, for amsgrad.
        beta1: β₁.
        beta2: β₂.
        correction1: 1 − β₁ᵗ, t the number of the step that the moments will belong to.
        correction2: 1 − β₂ᵗ.
        eps: ε.
        weight_decay: γ.
        decoupled: AdamW's weight decay; False for Adam's L2 decay, which needs ``grad``.
        grad_factor: f, multiplies g before anything else: 1 / loss scale, its negative where the optimizer ascends.
        rate: r, multiplies Δθ: the group's learning rate over the one that α is in units of.
        dtype: of the result, that of ``theta`` by default; ignored when ``out`` is given.
        out: written and returned if given, [K, *theta.shape], each slice with the strides of ``theta``.

    Returns:
        Tensor: [K, *theta.shape]. Where α_k = 0, slice k is θ, bit for bit, if the dtype is that of ``theta``.
        Δθ, [1, *theta.shape], without ``alpha``; θ is then read for its decay only.

    Raises:
        TypeError: if a dtype is none of the three, or a hyperparameter no Python number.
        ValueError: if a device, shape or stride does not fit, ``out`` overlaps an operand, a hyperparameter is not
            finite or a correction not positive, or only one moment, or neither moments nor gradient, are given.

    Memory:
        Allocates the result, if ``out`` is None. The state is read and never written.

    Determinism:
        Elementwise; the same bits on every run.
    """
    check_moments(grad, exp_avg, exp_avg_sq)
    numbers = adam_numbers(
        beta1=beta1,
        beta2=beta2,
        correction1=correction1,
        correction2=correction2,
        eps=eps,
        weight_decay=weight_decay,
        grad_factor=grad_factor,
        rate=rate,
    )
    operands = {
        "theta": theta,
        "grad": grad,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "max_exp_avg_sq": max_exp_avg_sq,
    }
    out, num_steps = check_step(operands, alpha, dtype, out)
    n = theta.numel()
    if n == 0:
        return out
    config = choose(STREAMING, out, n)
    with on_device(theta):
        _form_adam_kernel[grid(triton.cdiv(n, config.block), config)](
            out,
            out.stride(0),
            None if alpha is None and weight_decay == 0 else theta,
            grad,
            exp_avg,
            exp_avg_sq,
            max_exp_avg_sq,
            alpha,
            device_numbers(*numbers, like=theta),
            n,
            K=num_steps,
            DECAYED=weight_decay != 0,
            DECOUPLED=decoupled,
            BLOCK=config.block,
            **options(config, theta),
        )
    torch.autograd.graph.increment_version(out)
    return out
