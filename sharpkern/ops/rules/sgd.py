"""SGD: the gradient, through momentum where there is any.

Source: the update rule that ``torch.optim.SGD`` documents.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpkern.ops.optimizer_steps import form_step, step_sums
from sharpkern.ops.registry import Backend
from sharpkern.ops.rules import RULES, Reading, Rule


def form_sgd(
    theta: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    alpha: Tensor | None,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    grad_factor: float = 1.0,
    rate: float = 1.0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return θ + α_k Δθ, Δθ = rate·(g + γθ, through momentum) the update that the next SGD step would make.

    Args:
        theta: θ, as `sharpkern.ops.form_step` takes it.
        grad: the gradient.
        momentum_buffer: the buffer before the step; None without momentum and before the first step.
        alpha: signed steps, [K]; None for Δθ itself, K = 1.
        weight_decay: γ.
        momentum: μ.
        dampening: τ.
        nesterov: whether the optimizer looks ahead.
        grad_factor: what the gradient is multiplied by first: one over the loss scale, negative to maximize.
        rate: what Δθ is multiplied by: the group's learning rate over that of the reference group.
        dtype: of the result; that of ``theta`` by default.
        out: written and returned if given.
        backend: see `sharpkern.ops`.

    Returns:
        Tensor: [K, *theta.shape].

    Raises:
        TypeError: what `form_step` raises.
        ValueError: what `form_step` raises.
    """
    numbers = (weight_decay, grad_factor, rate, momentum, 1 - dampening)
    state = (momentum_buffer,)
    return form_step("sgd", theta, grad, state, alpha, numbers, flag=nesterov, dtype=dtype, out=out, backend=backend)


def sgd_sums(
    theta: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    grad_factor: float = 1.0,
    rate: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """Return Δθᵀg and |Δθ|², [2] float64, of the update that the next SGD step would make.

    Args:
        theta: θ, as `sharpkern.ops.step_sums` takes it.
        grad: the gradient.
        momentum_buffer: the buffer before the step; None without momentum and before the first step.
        weight_decay: as `form_sgd` takes it.
        momentum: likewise.
        dampening: likewise.
        nesterov: likewise.
        grad_factor: likewise.
        rate: likewise.
        backend: see `sharpkern.ops`.

    Returns:
        Tensor: [2] float64 on the device.

    Raises:
        TypeError: what `step_sums` raises.
        ValueError: what `step_sums` raises.
    """
    numbers = (weight_decay, grad_factor, rate, momentum, 1 - dampening)
    return step_sums("sgd", theta, grad, (momentum_buffer,), numbers, flag=nesterov, backend=backend)


def _read(optimizer: Any, group: Mapping[str, Any], state: Mapping[str, Any], step: float) -> Reading:
    momentum = float(group["momentum"])
    return Reading(
        state=(state.get("momentum_buffer") if momentum != 0 else None,),
        numbers=(momentum, 1 - float(group["dampening"])),
        weight_decay=float(group["weight_decay"]),
        flag=bool(group["nesterov"]),
    )


def _update(
    grad: Tensor | None, state: Sequence[Tensor | None], numbers: Sequence[float], flag: bool, onto: Tensor | None
) -> Tensor:
    assert grad is not None
    (stored,), (momentum, undamped) = state, numbers
    # The first step takes the gradient as the buffer, without dampening.
    buffer = grad if stored is None else (stored * momentum).add_(grad, alpha=undamped)
    update = grad.add(buffer, alpha=momentum) if flag else buffer
    return update if onto is None else onto.add_(update)


RULES["sgd"] = Rule(
    name="sgd",
    optimizers=("torch.optim.sgd.SGD",),
    state=("momentum_buffer",),
    numbers=("momentum", "1 - dampening"),
    read=_read,
    update=_update,
)
