"""RMSprop: the gradient over the root of its mean square, centered or not, through momentum where there is any.

Source: the update rule that ``torch.optim.RMSprop`` documents.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpkern.ops.rules import RULES, Reading, Rule


def _read(optimizer: Any, group: Mapping[str, Any], state: Mapping[str, Any], step: float) -> Reading:
    alpha, momentum, centered = float(group["alpha"]), float(group["momentum"]), bool(group["centered"])
    mean = state.get("grad_avg") if centered else None
    buffer = state.get("momentum_buffer") if momentum > 0 else None
    return Reading(
        state=(state.get("square_avg"), mean, buffer),
        numbers=(alpha, 1 - alpha, float(group["eps"]), momentum),
        weight_decay=float(group["weight_decay"]),
        flag=centered,
    )


def _update(
    grad: Tensor | None, state: Sequence[Tensor | None], numbers: Sequence[float], flag: bool, onto: Tensor | None
) -> Tensor:
    assert grad is not None
    (square, mean, buffer), (alpha, rest, eps, momentum) = state, numbers
    square = (torch.zeros_like(grad) if square is None else square * alpha).addcmul_(grad, grad, value=rest)
    if flag:
        mean = (torch.zeros_like(grad) if mean is None else mean).lerp(grad, rest)
        square.addcmul_(mean, mean, value=-1)
    root = square.sqrt_().add_(eps)
    update = grad / root if buffer is None else (buffer * momentum).addcdiv_(grad, root)
    return update if onto is None else onto.add_(update)


RULES["rmsprop"] = Rule(
    name="rmsprop",
    optimizers=("torch.optim.rmsprop.RMSprop",),
    state=("square_avg", "grad_avg", "momentum_buffer"),
    numbers=("alpha", "1 - alpha", "eps", "momentum"),
    read=_read,
    update=_update,
)
