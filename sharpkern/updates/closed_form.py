"""Δθ of SGD, Adam and AdamW from their state, without taking a step.

Each formula follows the order of operations of torch's own step, so that θ − ηΔθ is what the step writes: bit for bit
with SGD, up to a few units in the last place with Adam, where torch divides after the learning rate has entered.
The state is read and never written, and where it does not exist yet the values it would start from are used.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Formula = Callable[[Tensor, Tensor, Mapping[str, Any], Mapping[str, Any]], Tensor]


def sgd_direction(theta: Tensor, grad: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """Return the update of ``torch.optim.SGD`` per unit learning rate: g + γθ, through momentum where there is any.

    Args:
        theta: the parameter, or its higher-precision master.
        grad: its gradient, unscaled, same shape.
        state: ``optimizer.state`` of this parameter, or an empty mapping before the first step.
        group: its parameter group.

    Returns:
        A new tensor of the shape of ``theta``, in the widest dtype of parameter and state.

    Memory:
        Allocates the result; with momentum one temporary of the same size.

    Source:
        The update rule that ``torch.optim.SGD`` documents.
    """
    stored = state.get("momentum_buffer")
    dtype = _widest(theta, stored)
    # maximize ascends: the sign of the gradient turns before decay and momentum see it.
    update = (-grad if group["maximize"] else grad).to(dtype, copy=True)
    if group["weight_decay"] != 0:
        update.add_(theta, alpha=float(group["weight_decay"]))
    momentum = group["momentum"]
    if momentum == 0:
        return update
    # The first step takes the gradient as the buffer, without dampening.
    buffer = update
    if stored is not None:
        buffer = stored.to(dtype, copy=True).mul_(momentum).add_(update, alpha=1 - group["dampening"])
    return update.add_(buffer, alpha=momentum) if group["nesterov"] else buffer


def adam_direction(
    theta: Tensor, grad: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], *, decoupled: bool = False
) -> Tensor:
    """Return the update of Adam(W) per unit learning rate: m̂/(√v̂ + ε) + γθ, the current gradient already in m and v.

    Args:
        theta: the parameter, or its higher-precision master.
        grad: its gradient, unscaled, same shape.
        state: ``optimizer.state`` of this parameter, or an empty mapping before the first step.
        group: its parameter group.
        decoupled: whether γ decays the weights directly where the group does not say so itself (torch 2.6 has no such
            entry in its groups).

    Returns:
        A new tensor of the shape of ``theta``, in the widest dtype of parameter and state.

    Memory:
        Allocates the result and two or three temporaries of the same size.

    Source:
        The update rules that ``torch.optim.Adam`` and ``torch.optim.AdamW`` document.
    """
    beta1, beta2 = (float(beta) for beta in group["betas"])
    weight_decay = float(group["weight_decay"])
    decoupled = group.get("decoupled_weight_decay", decoupled)
    dtype = _widest(theta, state.get("exp_avg"), state.get("exp_avg_sq"))
    theta = theta.to(dtype)
    grad = (-grad if group["maximize"] else grad).to(dtype)
    if weight_decay != 0 and not decoupled:
        grad = grad.add(theta, alpha=weight_decay)

    m = _copy_or_zeros(state.get("exp_avg"), theta).lerp_(grad, 1 - beta1)
    v = _copy_or_zeros(state.get("exp_avg_sq"), theta).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if group["amsgrad"] and "max_exp_avg_sq" in state:
        v = torch.maximum(v, state["max_exp_avg_sq"].to(dtype), out=v)

    correction1, correction2 = _bias_corrections(state.get("step", 0.0), beta1, beta2, group)
    denominator = v.sqrt_().div_(correction2**0.5).add_(float(group["eps"]))
    decay = theta.mul(weight_decay) if decoupled and weight_decay != 0 else torch.zeros_like(theta)
    return decay.addcdiv_(m, denominator, value=1 / correction1)


CLOSED_FORMS: Mapping[type[torch.optim.Optimizer], Formula] = {
    torch.optim.SGD: sgd_direction,
    torch.optim.Adam: adam_direction,
    torch.optim.AdamW: functools.partial(adam_direction, decoupled=True),
}
"""The formula by exact optimizer type: a subclass may do anything in its step."""


def _bias_corrections(
    step: Tensor | float, beta1: float, beta2: float, group: Mapping[str, Any]
) -> tuple[float, float]:
    """Return 1 − β₁ᵗ and 1 − β₂ᵗ for the step about to be taken, in the precision in which torch computes them."""
    if group["capturable"] and not group["fused"]:
        # This variant keeps the step on the device, in float32, where 1 − β₂ᵗ loses up to four digits early on.
        step = torch.as_tensor(step, dtype=torch.float32) + 1
        return float(1 - beta1**step), float(1 - beta2**step)
    step = float(step) + 1
    return 1 - beta1**step, 1 - beta2**step


def _widest(theta: Tensor, *states: Tensor | None) -> torch.dtype:
    """Return the dtype in which parameter and state meet."""
    return functools.reduce(torch.promote_types, (state.dtype for state in states if state is not None), theta.dtype)


def _copy_or_zeros(stored: Tensor | None, theta: Tensor) -> Tensor:
    """Return a state tensor as a copy that may be written, in the dtype of ``theta``, or the zeros it starts from."""
    return torch.zeros_like(theta) if stored is None else stored.to(theta.dtype, copy=True)
