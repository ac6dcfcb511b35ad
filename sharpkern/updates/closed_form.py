"""The next step of SGD, Adam and AdamW as a formula of their state, without taking it.

Each formula follows the order of operations of torch's own step, so that θ − ηΔθ is what the step writes: bit for bit
with SGD, up to a few units in the last place with Adam, where torch divides after the learning rate has entered.
The state is read and never written, and where it does not exist yet the values it would start from are used.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sharpkern import ops
from sharpkern.moves import OptimizerStep
from sharpkern.shards import local, local_as
from sharpkern.updates.slots import Slot

Formula = Callable[[Slot, Mapping[str, Any], float, float], OptimizerStep]


def sgd_step(slot: Slot, state: Mapping[str, Any], step: float, rate: float) -> OptimizerStep:
    """Return the update of ``torch.optim.SGD`` per unit learning rate: g + γθ, through momentum where there is any.

    Args:
        slot: the parameter with its gradient and group.
        state: ``optimizer.state`` of this parameter, or an empty mapping before the first step.
        step: how many steps the optimizer has taken; SGD does not count.
        rate: what the update is multiplied by.

    Returns:
        The move, on the parameter's master where there is one.

    Source:
        The update rule that ``torch.optim.SGD`` documents.
    """
    group = slot.group
    momentum = float(group["momentum"])
    numbers = {
        "weight_decay": float(group["weight_decay"]),
        "momentum": momentum,
        "dampening": float(group["dampening"]),
        "nesterov": bool(group["nesterov"]),
        "grad_factor": _grad_factor(slot),
        "rate": rate,
    }
    buffer = state.get("momentum_buffer") if momentum != 0 else None
    return OptimizerStep(ops.form_sgd, ops.sgd_sums, local(slot.theta), _shards(slot, buffer), numbers)


def adam_step(
    slot: Slot, state: Mapping[str, Any], step: float, rate: float, *, decoupled: bool = False
) -> OptimizerStep:
    """Return the update of Adam(W) per unit learning rate: m̂/(√v̂ + ε) + γθ, the current gradient already in m and v.

    Args:
        slot: the parameter with its gradient and group.
        state: ``optimizer.state`` of this parameter, or an empty mapping before the first step.
        step: how many steps the optimizer has taken.
        rate: what the update is multiplied by.
        decoupled: whether γ decays the weights directly where the group does not say so itself (torch 2.6 has no such
            entry in its groups).

    Returns:
        The move, on the parameter's master where there is one.

    Source:
        The update rules that ``torch.optim.Adam`` and ``torch.optim.AdamW`` document.
    """
    group = slot.group
    beta1, beta2 = group["betas"]
    correction1, correction2 = _bias_corrections(step, beta1, beta2, group)
    numbers = {
        "beta1": float(beta1),
        "beta2": float(beta2),
        "correction1": correction1,
        "correction2": correction2,
        "eps": float(group["eps"]),
        "weight_decay": float(group["weight_decay"]),
        "decoupled": bool(group.get("decoupled_weight_decay", decoupled)),
        "grad_factor": _grad_factor(slot),
        "rate": rate,
    }
    largest = state.get("max_exp_avg_sq") if group["amsgrad"] else None
    tensors = _shards(slot, state.get("exp_avg"), state.get("exp_avg_sq"), largest)
    return OptimizerStep(_form_adam, _adam_sums, local(slot.theta), tensors, numbers)


CLOSED_FORMS: Mapping[type[torch.optim.Optimizer], Formula] = {
    torch.optim.SGD: sgd_step,
    torch.optim.Adam: adam_step,
    torch.optim.AdamW: functools.partial(adam_step, decoupled=True),
}
"""The formula by exact optimizer type: a subclass may do anything in its step."""


def _form_adam(
    theta: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    max_exp_avg_sq: Tensor | None,
    alpha: Tensor | None,
    **options: Any,
) -> Tensor:
    return ops.form_adam(theta, grad, exp_avg, exp_avg_sq, alpha, max_exp_avg_sq=max_exp_avg_sq, **options)


def _adam_sums(
    theta: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    max_exp_avg_sq: Tensor | None,
    **options: Any,
) -> Tensor:
    return ops.adam_sums(theta, grad, exp_avg, exp_avg_sq, max_exp_avg_sq=max_exp_avg_sq, **options)


def _shards(slot: Slot, *state: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return what this rank holds of gradient and state: all of it where nothing is sharded."""
    assert slot.held.grad is not None
    tensors = (slot.held.grad.detach(), *state)
    return tuple(None if tensor is None else local_as(tensor, slot.held) for tensor in tensors)


def _grad_factor(slot: Slot) -> float:
    """Return what undoes the loss scale, negative where the optimizer ascends."""
    return (-1 if slot.climbs else 1) / slot.scale


def _bias_corrections(
    step: float, beta1: float | Tensor, beta2: float | Tensor, group: Mapping[str, Any]
) -> tuple[float, float]:
    """Return 1 − β₁ᵗ and 1 − β₂ᵗ for the step about to be taken, in the precision in which torch computes them."""
    count: float | Tensor = step + 1
    if (group["capturable"] and not group["fused"]) or group.get("differentiable"):
        # These variants compute with the step as a tensor, in float32, where 1 − β₂ᵗ loses up to four digits early on.
        count = torch.tensor(step, dtype=torch.float32) + 1
    return float(1 - beta1**count), float(1 - beta2**count)
