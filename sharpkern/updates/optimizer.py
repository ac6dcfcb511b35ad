"""What the next ``optimizer.step()`` would do to each parameter, per unit learning rate."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from sharpkern.errors import NoUpdateError
from sharpkern.ops import inner_product, total
from sharpkern.updates.closed_form import CLOSED_FORMS, Formula
from sharpkern.updates.shadow_step import shadow_step
from sharpkern.updates.slots import Slot, read_slots


@dataclass(frozen=True, eq=False)
class Update:
    """The update of one parameter per unit of the reference learning rate.

    Attributes:
        slot: the parameter as the optimizer holds it.
        tensor: its Δθ.
        slope: its share of Δθᵀg, 0-dim, or None where it moves without a gradient.
    """

    slot: Slot
    tensor: Tensor
    slope: Tensor | None


def optimizer_update(
    optimizer: torch.optim.Optimizer, masters: Mapping[nn.Parameter, Tensor] | None, scaler: GradScaler | None
) -> tuple[list[Update], float]:
    """Return the update that the next step would make, per unit learning rate of the reference group.

    Args:
        optimizer: any torch optimizer whose parameters hold their gradients.
        masters: higher-precision copies by model parameter, or None.
        scaler: the loss scaler, or None.

    Returns:
        The updates of all parameters that would move, and the learning rate of the reference group: the first with a
        positive rate and a gradient. Other groups move by their own ratio to it.

    Raises:
        TypeError: if an argument or a parameter is of a kind that is not supported, or the step cannot run on a copy.
        ValueError: if there is no gradient, no positive learning rate, or a gradient that is sparse or not finite.

    Memory:
        One tensor of each parameter's size for SGD, Adam and AdamW, plus temporaries of one parameter; see
        `shadow_step` for the others.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; "
            "for anything else use Direction.between(before, after, lr)"
        )
    optimizer, slots = read_slots(optimizer, masters, scaler)
    lr = _reference_lr(slots)
    formula = CLOSED_FORMS.get(type(optimizer))
    updates = list(_by_formula(formula, optimizer, slots, lr) if formula else _by_shadow_step(optimizer, slots, lr))
    # A gradient that is not finite leaves no slope finite, whatever the update makes of it: one read tells of all.
    if not math.isfinite(total(update.slope for update in updates if update.slope is not None)):
        _refuse_nonfinite_gradients(slots)
    return updates, lr


def _by_formula(
    formula: Formula, optimizer: torch.optim.Optimizer, slots: Sequence[Slot], reference_lr: float
) -> Iterator[Update]:
    """Yield the closed-form update of every parameter that has a gradient and a positive learning rate."""
    for slot in slots:
        if slot.held.grad is None or slot.lr == 0:
            continue
        gradient = slot.gradient()
        # .get: the state is a defaultdict, and indexing it would create an entry before the first step.
        tensor = formula(slot.theta, gradient, optimizer.state.get(slot.held, {}), slot.group)
        if slot.lr != reference_lr:
            tensor.mul_(slot.lr / reference_lr)
        yield Update(slot, tensor, inner_product(tensor, gradient))


def _by_shadow_step(optimizer: torch.optim.Optimizer, slots: Sequence[Slot], reference_lr: float) -> Iterator[Update]:
    """Yield the update of every parameter that a step on a copy of everything moves."""
    for slot, displacement in zip(slots, shadow_step(optimizer, slots), strict=True):
        if displacement.any():
            tensor = displacement.div_(reference_lr)
            slope = None if slot.held.grad is None else inner_product(tensor, slot.gradient())
            yield Update(slot, tensor, slope)


def _reference_lr(slots: Sequence[Slot]) -> float:
    """Return the learning rate of the first group that has a positive one and a gradient."""
    rates = [slot.lr for slot in slots if slot.held.grad is not None]
    if not rates:
        raise ValueError(
            f"optimizer must hold a gradient, got none in {len(slots)} parameters; call Direction.from_optimizer after "
            "loss.backward() and before zero_grad() (where it holds masters: after the gradients were copied to them)"
        )
    reference = next((lr for lr in rates if lr > 0), None)
    if reference is None:
        raise NoUpdateError(
            "optimizer must have a positive learning rate in a group with a gradient, got 0 in all of them; measure "
            "when the schedule has started, or use Direction.from_gradients(model)"
        )
    return reference


def _refuse_nonfinite_gradients(slots: Sequence[Slot]) -> None:
    """Raise on the first gradient that is not finite."""
    for slot in slots:
        if slot.held.grad is not None and not slot.held.grad.isfinite().all():
            remedy = (
                "skip this measurement: GradScaler will skip the step" if slot.scale != 1 else "find what overflowed"
            )
            raise NoUpdateError(f"the gradient of {slot.label} must be finite, got nan or inf; {remedy}")
