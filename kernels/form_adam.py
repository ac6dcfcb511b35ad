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
from ._operands import check_numbers, check_step


@triton.jit
def _adam_update(
    theta,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    numbers,
    offsets,
    inside,
    DECAYED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return Δθ of one tile; an absent moment is zero, an absent gradient is in the moments already."""
    lerp1 = tl.load(numbers)
    beta2 = tl.load(numbers + 1)
    lerp2 = tl.load(numbers + 2)
    inverse_correction1 = tl.load(numbers + 3)
    root_correction2 = tl.load(numbers + 4)
    eps = tl.load(numbers + 5)
    weight_decay = tl.load(numbers + 6)
    grad_factor = tl.load(numbers + 7)
    rate = tl.load(numbers + 8)

    if grad is not None:
        g = load_tile(grad + offsets, inside, MASKED) * grad_factor
        if DECAYED and not DECOUPLED:
            g = tl.fma(theta, weight_decay, g)
    if exp_avg is None:
        m = tl.zeros_like(g)
        v = tl.zeros_like(g)
    else:
        m = load_tile(exp_avg + offsets, inside, MASKED)
        v = load_tile(exp_avg_sq + offsets, inside, MASKED)
    if grad is not None:
        # As torch.lerp, from the nearer end: β₁ = 0 gives g itself.
        m = tl.where(lerp1 < 0.5, tl.fma(g - m, lerp1, m), g - (g - m) * (1.0 - lerp1))
        v = tl.fma(lerp2 * g, g, v * beta2)
    if max_exp_avg_sq is not None:
        v = tl.maximum(v, load_tile(max_exp_avg_sq + offsets, inside, MASKED), propagate_nan=tl.PropagateNan.ALL)
    update = tl.div_rn(m * inverse_correction1, tl.div_rn(tl.sqrt_rn(v), root_correction2) + eps)
    if DECAYED and DECOUPLED:
        update = tl.fma(theta, weight_decay, update)
    return update * rate


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
    update = _adam_update(
        w, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, numbers, offsets, inside, DECAYED, DECOUPLED, MASKED
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
    *,
    max_exp_avg_sq: Tensor | None = None,
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
    _check(grad, exp_avg, exp_avg_sq, correction1, correction2)
    check_numbers(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, grad_factor=grad_factor, rate=rate)
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
    # fmt: off
    numbers = device_numbers(
        1 - beta1, beta2, 1 - beta2, 1 / correction1, correction2**0.5, eps, weight_decay, grad_factor, rate, like=theta
    )
    # fmt: on
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
            numbers,
            n,
            K=num_steps,
            DECAYED=weight_decay != 0,
            DECOUPLED=decoupled,
            BLOCK=config.block,
            **options(config, theta),
        )
    torch.autograd.graph.increment_version(out)
    return out


def _check(
    grad: Tensor | None, exp_avg: Tensor | None, exp_avg_sq: Tensor | None, correction1: float, correction2: float
) -> None:
    """Refuse a state from which no update follows.

    Raises:
        TypeError: if a correction is no Python number.
        ValueError: if a moment, or everything, is missing, or the number of steps cannot be right.
    """
    if (exp_avg is None) != (exp_avg_sq is None) or (exp_avg is None and grad is None):
        raise ValueError(
            f"exp_avg and exp_avg_sq must both be given or, with a gradient, both be None, got {exp_avg is not None} "
            f"and {exp_avg_sq is not None} with gradient {grad is not None}; pass the optimizer's state"
        )
    check_numbers(correction1=correction1, correction2=correction2)
    for name, correction in (("correction1", correction1), ("correction2", correction2)):
        if correction <= 0:
            raise ValueError(f"{name} must be positive, got {correction}; count steps from 1")
