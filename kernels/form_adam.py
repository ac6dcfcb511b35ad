"""Weights perturbed along the Adam or AdamW update, straight from the optimizer's state: no Δθ is ever stored.

out[k] = θ + α_k (m̂ / (√v̂ + ε) + γθ), with the moments after a gradient that the optimizer has not seen yet:

    m = β₁m + (1 − β₁)g,   v = β₂v + (1 − β₂)g²,   m̂ = m / (1 − β₁ᵗ),   v̂ = v / (1 − β₂ᵗ)

The moments are updated in registers and never written. L2 decay (Adam) enters g instead of the update. With bf16
weights and gradients and fp32 moments 12 + 2K bytes move per element for K step sizes. The order of operations is that
of torch's own step, square root and division are rounded as IEEE 754 asks.

Source: the update rules that torch.optim.Adam and torch.optim.AdamW document; Kalra et al. 2026, Def. 2.1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Case, Config, choose, load_tile, on_device, options, perturbed, store_tile
from ._operands import check_alpha, check_floats, check_layout, check_scalars, output

_CONFIGS = (
    Case(None, None, 1 << 18, Config(block=512, threads=64)),
    Case(None, None, None, Config(block=2048, threads=256)),
)

_NUM_SCALARS = 7


@triton.jit
def _adam_update(
    theta,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    scalars,
    offsets,
    inside,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return m̂/(√v̂ + ε) + γθ for one tile; an absent moment is zero, an absent gradient is in the moments already."""
    rate1 = tl.load(scalars)
    beta2 = tl.load(scalars + 1)
    rate2 = tl.load(scalars + 2)
    inverse_correction1 = tl.load(scalars + 3)
    root_correction2 = tl.load(scalars + 4)
    eps = tl.load(scalars + 5)
    weight_decay = tl.load(scalars + 6)

    if exp_avg is None:
        m = tl.zeros_like(theta)
        v = tl.zeros_like(theta)
    else:
        m = load_tile(exp_avg + offsets, inside, MASKED)
        v = load_tile(exp_avg_sq + offsets, inside, MASKED)
    if grad is not None:
        g = load_tile(grad + offsets, inside, MASKED)
        if MAXIMIZE:
            g = -g
        if not DECOUPLED:
            g = tl.fma(theta, weight_decay, g)
        # As torch.lerp, from the nearer end: β₁ = 0 gives g itself.
        m = tl.where(rate1 < 0.5, tl.fma(g - m, rate1, m), g - (g - m) * (1.0 - rate1))
        v = tl.fma(rate2 * g, g, v * beta2)
    if max_exp_avg_sq is not None:
        v = tl.maximum(v, load_tile(max_exp_avg_sq + offsets, inside, MASKED), propagate_nan=tl.PropagateNan.ALL)
    update = tl.div_rn(m * inverse_correction1, tl.div_rn(tl.sqrt_rn(v), root_correction2) + eps)
    if DECOUPLED:
        update = tl.fma(theta, weight_decay, update)
    return update


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
    scalars,
    n,
    offsets,
    K: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    MASKED: tl.constexpr,
):
    inside = offsets < n
    w = load_tile(theta + offsets, inside, MASKED)
    update = _adam_update(
        w, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, scalars, offsets, inside, DECOUPLED, MAXIMIZE, MASKED
    )
    out += offsets
    for k in tl.static_range(K):
        store_tile(out, perturbed(w, update, tl.load(alpha + k)), inside, MASKED)
        out += out_stride


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
    scalars,
    n,
    K: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    # fmt: off
    if start + BLOCK <= n:
        _form_adam_tile(
            out, out_stride, theta, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, alpha, scalars, n, offsets,
            K, DECOUPLED, MAXIMIZE, MASKED=False,
        )
    else:
        _form_adam_tile(
            out, out_stride, theta, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, alpha, scalars, n, offsets,
            K, DECOUPLED, MAXIMIZE, MASKED=True,
        )
    # fmt: on


def adam_scalars(
    step: float,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the hyperparameters of one parameter group as `form_adam` reads them, computed in fp64 and rounded once.

    Args:
        step: t, the number of the step that the moments belong to: one more than the optimizer has taken, if its state
            does not hold the gradient yet.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: γ.
        device: where the kernel will run.

    Returns:
        Tensor: [7] float32.
    """
    beta1, beta2 = betas
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    numbers = [1 - beta1, beta2, 1 - beta2, 1 / correction1, correction2**0.5, eps, weight_decay]
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def form_adam(
    theta: Tensor,
    grad: Tensor | None,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    alpha: Tensor,
    scalars: Tensor,
    *,
    max_exp_avg_sq: Tensor | None = None,
    decoupled: bool = True,
    maximize: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return θ + α_k Δθ for K step sizes, Δθ the Adam or AdamW update that the next step would make.

    Args:
        theta: the parameter or its master, any shape and size, float32, float16 or bfloat16, CUDA, without gaps.
        grad: g, shape and strides of ``theta``; None if the moments hold it already.
        exp_avg: m, likewise; None before the first step.
        exp_avg_sq: v, likewise; None together with ``exp_avg``.
        alpha: signed step sizes (−η along the update), [K] float32, K ≤ 16.
        scalars: hyperparameters from `adam_scalars`, [7] float32 on the device.
        max_exp_avg_sq: the largest v so far, for amsgrad.
        decoupled: AdamW's weight decay; False for Adam's L2 decay, which needs ``grad``.
        maximize: whether the optimizer ascends.
        dtype: of the result, that of ``theta`` by default; ignored when ``out`` is given.
        out: written and returned if given, [K, *theta.shape], each slice with the strides of ``theta``.

    Returns:
        Tensor: [K, *theta.shape]. Where α_k = 0, slice k is θ, bit for bit, if the dtype is that of ``theta``.

    Raises:
        TypeError: if a dtype is none of the three.
        ValueError: if a device, shape or stride does not fit, ``out`` overlaps an operand, or only one moment, or
            neither moments nor gradient, are given.

    Memory:
        Allocates the result, if ``out`` is None. The state is read and never written.

    Determinism:
        Elementwise; the same bits on every run.
    """
    if (exp_avg is None) != (exp_avg_sq is None) or (exp_avg is None and grad is None):
        raise ValueError(
            f"exp_avg and exp_avg_sq must both be given or, with a gradient, both be None, got {exp_avg is not None} "
            f"and {exp_avg_sq is not None} with gradient {grad is not None}; pass the optimizer's state"
        )
    operands = {
        "theta": theta,
        "grad": grad,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "max_exp_avg_sq": max_exp_avg_sq,
    }
    check_floats(**operands)
    check_layout(**operands)
    check_scalars(scalars, _NUM_SCALARS, "adam_scalars", theta)
    num_steps = check_alpha(alpha, theta)
    out = output(out, theta, num_steps, dtype, [*operands.values(), alpha, scalars])
    n = theta.numel()
    if n == 0:
        return out
    config = choose(_CONFIGS, out, n)
    with on_device(theta):
        _form_adam_kernel[(triton.cdiv(n, config.block),)](
            out,
            out.stride(0),
            *operands.values(),
            alpha,
            scalars,
            n,
            K=num_steps,
            DECOUPLED=decoupled,
            MAXIMIZE=maximize,
            BLOCK=config.block,
            **options(config, theta),
        )
    torch.autograd.graph.increment_version(out)
    return out
