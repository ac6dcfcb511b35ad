"""Optimizers whose next step is a formula of their state, with every option that it has; see sharpkern.ops.rules."""

import contextlib
from typing import Any

import torch

from sharpkern.ops.rules import rule_of

SGD, ADAM, ADAMW, RMSPROP = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop

RULES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {}),
    "SGD, decay": (SGD, {"weight_decay": 0.1}),
    "SGD, momentum": (SGD, {"momentum": 0.9}),
    "SGD, dampening": (SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True}),
    "SGD, Nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "AdamW": (ADAMW, {"weight_decay": 0.1}),
    "AdamW, maximize": (ADAMW, {"weight_decay": 0.0, "maximize": True}),
    "Adam, decay": (ADAM, {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}),
    "Adam, amsgrad": (ADAM, {"amsgrad": True, "weight_decay": 0.1}),
    "Adam, no first moment": (ADAM, {"betas": (0.0, 0.99)}),
    "RMSprop": (RMSPROP, {}),
    "RMSprop, decay": (RMSPROP, {"weight_decay": 0.1, "alpha": 0.4, "eps": 1e-6}),
    "RMSprop, momentum": (RMSPROP, {"momentum": 0.9, "maximize": True}),
    "RMSprop, centered": (RMSPROP, {"centered": True}),
    "RMSprop, all": (RMSPROP, {"momentum": 0.9, "centered": True, "weight_decay": 0.1, "maximize": True}),
}

# A machine that is lent with a GPU rarely has it.
with contextlib.suppress(ModuleNotFoundError):
    from lion_pytorch import Lion

    RULES |= {
        "Lion": (Lion, {"weight_decay": 0.1}),
        "Lion, betas": (Lion, {"betas": (0.4, 0.7)}),
        "Lion, decoupled": (Lion, {"weight_decay": 0.003, "decoupled_weight_decay": True}),
    }

# One of each with everything that its update can have.
FULLEST = {
    name: RULES[name] for name in ("AdamW", "Adam, amsgrad", "SGD, Nesterov", "Lion", "RMSprop, all") if name in RULES
}


def reading(
    parameter: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    rate: float = 1.0,
    grad_factor: float = 1.0,
    weight_decay: float | None = None,
) -> tuple[list[Any], tuple[float, ...], dict[str, bool]]:
    """Rule, parameter, gradient and state as the operations take them, the numbers, and the options."""
    rule, group, state = rule_of(optimizer), optimizer.param_groups[0], optimizer.state.get(parameter, {})
    assert rule is not None
    read = rule.read(optimizer, group, state, float(state.get("step", 0)))
    decay = read.weight_decay if weight_decay is None else weight_decay
    numbers = (decay, -grad_factor if group.get("maximize") else grad_factor, rate, *read.numbers)
    options = {"decoupled": read.decoupled, "flag": read.flag}
    return [rule.name, parameter.detach(), parameter.grad, read.state], numbers, options
