"""Lion: the sign of the gradient and the momentum before the step.

Source: Chen et al. 2023, Algorithm 2, as lion-pytorch writes it.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpkern.ops.rules import RULES, Reading, Rule


def _covers(optimizer: Any) -> bool:
    """Its Triton step may round otherwise, and "maximize" means nothing to it."""
    stock = getattr(sys.modules.get(type(optimizer).__module__), "update_fn", None)
    says_maximize = any(group.get("maximize") for group in optimizer.param_groups) or hasattr(optimizer, "maximize")
    return optimizer.update_fn is stock and not says_maximize


def _read(optimizer: Any, group: Mapping[str, Any], state: Mapping[str, Any], step: float) -> Reading:
    beta1, weight_decay = float(group["betas"][0]), float(group["weight_decay"])
    if getattr(optimizer, "decoupled_wd", False):
        weight_decay /= float(optimizer._init_lr)
    return Reading((state.get("exp_avg"),), (beta1, 1 - beta1), weight_decay, decoupled=True)


def _update(
    grad: Tensor | None, state: Sequence[Tensor | None], numbers: Sequence[float], flag: bool, onto: Tensor | None
) -> Tensor:
    assert grad is not None
    (m,), (beta1, rest) = state, numbers
    update = (torch.zeros_like(grad) if m is None else m * beta1).add_(grad, alpha=rest).sign_()
    return update if onto is None else onto.add_(update)


RULES["lion"] = Rule(
    name="lion",
    optimizers=("lion_pytorch.lion_pytorch.Lion",),
    state=("exp_avg",),
    numbers=("beta1", "1 - beta1"),
    read=_read,
    update=_update,
    covers=_covers,
)
