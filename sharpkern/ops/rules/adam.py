"""Adam and AdamW: m̂/(√v̂ + ε), the current gradient already in m and v.

Source: the update rules that ``torch.optim.Adam`` and ``torch.optim.AdamW`` document.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpkern.ops.optimizer_steps import form_step, step_sums
from sharpkern.ops.registry import Backend
from sharpkern.ops.rules import RULES, Reading, Rule


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
    backend: Backend = "auto",
) -> Tensor:
    """Return θ + α_k Δθ, Δθ = rate·(m̂/(√v̂ + ε) + γθ) the update that the next Adam or AdamW step would make.

    Args:
        theta: θ, as `sharpkern.ops.form_step` takes it.
        grad: the gradient that the optimizer has not seen yet; None if the state holds it.
        exp_avg: m, the shape of ``theta``; None before the first step.
        exp_avg_sq: v, likewise.
        alpha: signed steps, [K]; None for Δθ itself, K = 1.
        max_exp_avg_sq: the largest v so far, for amsgrad.
        beta1: β₁.
        beta2: β₂.
        correction1: 1 − β₁ᵗ of the step about to be taken.
        correction2: 1 − β₂ᵗ.
        eps: ε.
        weight_decay: γ.
        decoupled: AdamW's decay of θ; False for Adam's, which enters the gradient.
        grad_factor: what the gradient is multiplied by first: one over the loss scale, negative to maximize.
        rate: what Δθ is multiplied by: the group's learning rate over that of the reference group.
        dtype: of the result; that of ``theta`` by default.
        out: written and returned if given.
        backend: see `sharpkern.ops`.

    Returns:
        Tensor: [K, *theta.shape].

    Raises:
        TypeError: what `form_step` raises.
        ValueError: what `form_step` raises, or if a correction is not positive, or one moment alone is given.
    """
    corrections = {"correction1": correction1, "correction2": correction2}
    numbers = (weight_decay, grad_factor, rate, *_numbers(beta1=beta1, beta2=beta2, eps=eps, **corrections))
    state = (exp_avg, exp_avg_sq, max_exp_avg_sq)
    return form_step(
        "adam", theta, grad, state, alpha, numbers, decoupled=decoupled, dtype=dtype, out=out, backend=backend
    )


def adam_sums(
    theta: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    *,
    max_exp_avg_sq: Tensor | None = None,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    grad_factor: float = 1.0,
    rate: float = 1.0,
    backend: Backend = "auto",
    **numbers: float,
) -> Tensor:
    """Return Δθᵀg and |Δθ|², [2] float64, of the update that the next Adam or AdamW step would make.

    Args:
        theta: θ, as `sharpkern.ops.step_sums` takes it.
        grad: the gradient that the optimizer has not seen yet.
        exp_avg: m; None before the first step.
        exp_avg_sq: v, likewise.
        max_exp_avg_sq: the largest v so far, for amsgrad.
        weight_decay: γ.
        decoupled: as `form_adam` takes it.
        grad_factor: likewise.
        rate: likewise.
        backend: see `sharpkern.ops`.
        **numbers: the other hyperparameters of `form_adam`.

    Returns:
        Tensor: [2] float64 on the device.

    Raises:
        TypeError: what `step_sums` raises.
        ValueError: what `step_sums` raises, or if a correction is not positive, or one moment alone is given.
    """
    state = (exp_avg, exp_avg_sq, max_exp_avg_sq)
    given = (weight_decay, grad_factor, rate, *_numbers(**numbers))
    return step_sums("adam", theta, grad, state, given, decoupled=decoupled, backend=backend)


def _numbers(*, beta1: float, beta2: float, correction1: float, correction2: float, eps: float) -> tuple[float, ...]:
    for name, correction in (("correction1", correction1), ("correction2", correction2)):
        if not math.isfinite(correction):
            raise ValueError(f"{name} must be finite, got {correction}; look at the optimizer's group and step")
        if correction <= 0:
            raise ValueError(f"{name} must be positive, got {correction}; count steps from 1")
    return 1 - beta1, beta2, 1 - beta2, 1 / correction1, correction2**0.5, eps


def _read(optimizer: Any, group: Mapping[str, Any], state: Mapping[str, Any], step: float) -> Reading:
    beta1, beta2 = group["betas"]
    count: float | Tensor = step + 1
    if (group["capturable"] and not group["fused"]) or group.get("differentiable"):
        # These variants compute with the step as a tensor, in float32, where 1 − β₂ᵗ loses up to four digits early on.
        count = torch.tensor(step, dtype=torch.float32) + 1
    corrections = {"correction1": float(1 - beta1**count), "correction2": float(1 - beta2**count)}
    largest = state.get("max_exp_avg_sq") if group["amsgrad"] else None
    return Reading(
        state=(state.get("exp_avg"), state.get("exp_avg_sq"), largest),
        numbers=_numbers(beta1=float(beta1), beta2=float(beta2), eps=float(group["eps"]), **corrections),
        weight_decay=float(group["weight_decay"]),
        # torch 2.6 has no such entry in its groups.
        decoupled=bool(group.get("decoupled_weight_decay", type(optimizer).__name__ == "AdamW")),
    )


def _update(
    grad: Tensor | None, state: Sequence[Tensor | None], numbers: Sequence[float], flag: bool, onto: Tensor | None
) -> Tensor:
    m, v, largest = state
    lerp1, beta2, lerp2, inverse_correction1, root_correction2, eps = numbers
    is_new = grad is not None or largest is not None
    if grad is not None:
        m = (torch.zeros_like(grad) if m is None else m).lerp(grad, lerp1)
        v = (torch.zeros_like(grad) if v is None else v * beta2).addcmul_(grad, grad, value=lerp2)
    assert m is not None
    assert v is not None
    if largest is not None:
        v = torch.maximum(v, largest)
    denominator = (v.sqrt_() if is_new else v.sqrt()).div_(root_correction2).add_(eps)
    return (torch.zeros_like(m) if onto is None else onto).addcdiv_(m, denominator, value=inverse_correction1)


RULES["adam"] = Rule(
    name="adam",
    optimizers=("torch.optim.adam.Adam", "torch.optim.adamw.AdamW"),
    state=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    numbers=("1 - beta1", "beta2", "1 - beta2", "1 / correction1", "correction2 ** 0.5", "eps"),
    read=_read,
    update=_update,
    together=("exp_avg", "exp_avg_sq"),
)
