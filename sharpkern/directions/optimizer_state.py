"""What an optimizer holds for each parameter: gradient, loss scale, master copy, group. Everything is only read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState

from sharpkern.directions.parts import Part, optimizers_within
from sharpkern.distributed.sharding import is_sharded, partial_placement


@dataclass(frozen=True, eq=False)
class ParamState:
    """One parameter as the optimizer holds it.

    Attributes:
        label: what errors call it.
        held: the tensor in the optimizer's group; its gradient and state belong to this one.
        parameter: the model's parameter it stands for; another tensor only where the optimizer holds the masters.
        master: higher-precision copy that ``parameter`` is the rounding of, or None.
        group: its parameter group.
        lr: the group's learning rate.
        scale: what the loss was multiplied by when the gradient was taken.
        climbs: whether the optimizer maximizes, so that what falls is minus the loss.
    """

    label: str
    held: Tensor
    parameter: nn.Parameter
    master: Tensor | None
    group: Mapping[str, Any]
    lr: float
    scale: float
    climbs: bool

    @property
    def theta(self) -> Tensor:
        """The values that the update starts from, in the best precision there is; shape and device of ``held``."""
        return (self.held if self.master is None else self.master).detach()

    def gradient(self) -> Tensor:
        """Return the gradient without the loss scale, which is removed in the precision of ``theta``."""
        assert self.held.grad is not None
        grad = self.held.grad.detach()
        return grad if self.scale == 1 else grad.to(self.theta.dtype) * (1 / self.scale)


def read_slots(
    parts: Sequence[Part], masters: Mapping[nn.Parameter, Tensor] | None, scaler: GradScaler | None
) -> list[list[ParamState]]:
    """Return every parameter of some optimizers with what belongs to it."""
    masters = _checked_masters(masters or {})
    seen: dict[int, int] = {}
    slots = []
    for k, part in enumerate(parts):
        where = f" of optimizer {k}" if len(parts) > 1 else ""
        slots.append(list(_slots(part, where, masters, scaler)))
        for slot in slots[-1]:
            if seen.setdefault(id(slot.held), k) != k:
                raise ValueError(
                    f"{slot.label} must stand in one optimizer, got it in optimizer {seen[id(slot.held)]} too; give "
                    "each parameter to the one that steps it"
                )
    if masters and not seen.keys() & {id(tensor) for pair in masters.items() for tensor in pair}:
        raise ValueError(
            "masters must belong to parameters that the optimizer holds, or be what it holds, got neither; "
            "build the optimizer and the mapping from the same tensors"
        )
    return slots


def check_parameter(label: str, parameter: Tensor) -> None:
    """Refuse a parameter that no direction can be formed for."""
    if not parameter.is_floating_point():
        raise TypeError(
            f"{label} must be real and floating-point, got {parameter.dtype}; "
            "keep complex weights as real ones and use torch.view_as_complex in the forward pass"
        )
    if parameter.is_meta:
        raise ValueError(f"{label} must hold values, got a meta tensor; load the weights before measuring")
    partial = partial_placement(parameter)
    if partial is not None:
        raise TypeError(
            f"{label} must be sharded or replicated, got a DTensor placed as {partial}; redistribute it before training"
        )


def check_gradient(label: str, gradient: Tensor) -> None:
    """Refuse a gradient that is not a dense tensor."""
    if gradient.layout is not torch.strided:
        raise ValueError(
            f"the gradient of {label} must be dense, got {gradient.layout}; build the embedding with sparse=False"
        )


def _slots(
    part: Part, where: str, masters: Mapping[nn.Parameter, Tensor], scaler: GradScaler | None
) -> Iterator[ParamState]:
    """Yield a slot for each parameter, its master found by the mapping either way, or in the state."""
    scale = _loss_scale(part, scaler)
    parameter_of = {id(master): parameter for parameter, master in masters.items()}
    pieces = {} if part.wrapped is None else {id(piece.master): piece for piece in part.wrapped.pieces()}
    seen: set[int] = set()
    parameter: nn.Parameter
    master: Tensor | None
    for place in part.places():
        held, mover = place.parameter, place.mover
        lr = place.lr(where)
        label = f"parameter {place.number} of group {place.group_number}{where} (shape {list(held.shape)})"
        if id(held) in seen:
            raise ValueError(
                f"{label} must stand in the optimizer once, got it twice; pass tied weights as "
                "model.parameters() gives them"
            )
        seen.add(id(held))
        if held.grad is not None:
            check_gradient(label, held.grad)
        elif not held.is_floating_point():
            continue
        check_parameter(label, held)
        if id(held) in pieces:
            piece = pieces[id(held)]
            parameter, master = cast(nn.Parameter, piece.weight), held if piece.has_master else None
        elif id(held) in parameter_of:
            parameter, master = parameter_of[id(held)], held
        else:
            # .get: the state is a defaultdict, and indexing it would create an entry.
            parameter, master = held, masters.get(held, mover.state.get(held, {}).get("master_param"))
        yield ParamState(label, held, parameter, master, place.group, lr, scale, place.climbs)


def _checked_masters(masters: Mapping[nn.Parameter, Tensor]) -> Mapping[nn.Parameter, Tensor]:
    """Return ``masters`` if each is a floating-point tensor of the shape and on the device of its parameter."""
    for parameter, master in masters.items():
        if not isinstance(parameter, nn.Parameter):
            raise TypeError(
                f"masters must have the model's parameters as keys, got {type(parameter).__name__}; "
                "pass {parameter: fp32 tensor}"
            )
        alike = (master.shape, master.device, is_sharded(master)) == (
            parameter.shape,
            parameter.device,
            is_sharded(parameter),
        )
        if not master.is_floating_point() or not alike:
            raise ValueError(
                "masters must be floating-point, of their parameter's shape and on its device, "
                f"{list(parameter.shape)} on {parameter.device}, got {master.dtype}, {list(master.shape)} on "
                f"{master.device}; pass each parameter's own copy"
            )
    return masters


def _loss_scale(part: Part, scaler: GradScaler | None) -> float:
    """Return what the gradients are still multiplied by, from what the scaler and the optimizer say of each other."""
    ours = (*part.holders, part.optimizer, *optimizers_within(part.optimizer))
    # A fused step divides by this attribute itself. Inside scaler.step() it holds the whole scale, beside found_inf.
    own_scale = getattr(part.optimizer, "grad_scale", None)
    scale = 1.0 if own_scale is None else float(own_scale)
    if scaler is None:
        # Accelerate's wrapper carries the scaler of the run.
        carried = (getattr(holder, "scaler", None) for holder in part.holders)
        scaler = next((one for one in carried if isinstance(one, GradScaler)), None)
    if scaler is None:
        return scale
    if not isinstance(scaler, GradScaler):
        raise TypeError(
            f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}; "
            "with another loss scaler unscale the gradients first and leave scaler out"
        )
    if not scaler.is_enabled() or hasattr(part.optimizer, "found_inf"):
        return scale
    states = scaler._per_optimizer_states  # there is no public way to ask
    stages = {states[id(one)]["stage"] for one in ours if id(one) in states}
    if OptState.STEPPED in stages:
        raise ValueError(
            "scaler must not have stepped this optimizer since its last update, got one that has; "
            "call Direction.from_optimizer before scaler.step(optimizer)"
        )
    return scale if OptState.UNSCALED in stages else scale * scaler.get_scale()
