"""What the next ``optimizer.step()`` would do to each parameter, per unit learning rate."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from sharpkern import ops
from sharpkern.directions.optimizer_state import ParamState, read_slots
from sharpkern.directions.parts import Optimizers, Part, check_steps, parts_of
from sharpkern.directions.residence import kept_as
from sharpkern.directions.shadow_step import shadow_step, undisturbed
from sharpkern.directions.shared_memory import summed
from sharpkern.distributed.deepspeed import step_gradients
from sharpkern.distributed.flat import is_flat
from sharpkern.distributed.sharding import local, local_as, over_shards, whole
from sharpkern.errors import NoUpdateError
from sharpkern.ops.reductions import columns_to_host, slopes_and_norms, to_host
from sharpkern.ops.rules import Reading, Rule, rule_of
from sharpkern.ops.together import sums_of_steps, updates_of
from sharpkern.ops.update import LazyUpdate
from sharpkern.ops.whole_steps import updates_with_sums


@dataclass(frozen=True, eq=False)
class Update:
    """The update of one parameter per unit of the reference learning rate.

    Attributes:
        slot: the parameter as the optimizer holds it.
        source: its Δθ, or the step that it can be worked out of.
        slope: its share of Δθᵀg, g being the gradient of what falls; or None where it moves without a gradient.
        norm_sq: its |Δθ|².
    """

    slot: ParamState
    source: Tensor | LazyUpdate
    slope: float | None
    norm_sq: float


# A parameter, its Δθ or the step that it can be worked out of, and Δθᵀg and |Δθ|², [2], where they are known.
Moving = tuple[ParamState, Tensor | LazyUpdate, Tensor | None]


@dataclass(frozen=True, eq=False)
class NextStep:
    """The update that the next step would make, per unit learning rate of the reference group.

    Attributes:
        updates: of each parameter that may move.
        lr: that learning rate, None where there is nothing to move.
        is_share: it is this rank's share of an update, as of FSDP1's parameters: then there may be nothing to move.
        of_pieces: what moves are no parameters of a model, but tensors that DeepSpeed makes them of.
        clip: what clipping will multiply the gradient by, None where it has or nobody knows of it.
    """

    updates: Sequence[Update]
    lr: float | None
    is_share: bool
    of_pieces: bool = False
    clip: float | None = None


def optimizer_update(
    optimizer: Optimizers,
    masters: Mapping[nn.Parameter, Tensor] | None,
    scaler: GradScaler | None,
    resident: bool | None,
    is_share: bool = False,
    clip: float | None = None,
) -> NextStep:
    """Return the update that the next step would make of gradients that it will multiply by ``clip``."""
    parts = parts_of(optimizer)
    known = next((part.wrapped for part in parts if part.wrapped is not None), None)
    if known is None:
        found = _update_of(parts, masters, scaler, resident, is_share, 1.0 if clip is None else clip)
        return dataclasses.replace(found, clip=clip)
    if len(parts) > 1 or masters or scaler is not None:
        raise TypeError(
            "optimizer must be that of a DeepSpeed engine alone, got others beside it, masters or a scaler; pass "
            "engine.optimizer, which knows of its masters and its loss scale"
        )
    with step_gradients(known) as clip:
        found = _update_of(parts, None, None, resident, known.group() is not None)
    return dataclasses.replace(found, of_pieces=True, clip=clip)


def _update_of(
    parts: Sequence[Part],
    masters: Mapping[nn.Parameter, Tensor] | None,
    scaler: GradScaler | None,
    resident: bool | None,
    is_share: bool,
    clip: float = 1.0,
) -> NextStep:
    """Return the update of gradients that the parameters hold, once they are multiplied by ``clip``."""
    check_steps(parts)
    slots_of = [
        slots if clip == 1 else [dataclasses.replace(slot, scale=slot.scale / clip) for slot in slots]
        for slots in read_slots(parts, masters, scaler)
    ]
    slots = [slot for each in slots_of for slot in each]
    is_share = is_share or any(is_flat(slot.held) for slot in slots)
    stepped = [slot for slot in slots if slot.held.grad is not None or (is_share and slot.held.requires_grad)]
    if is_share and not stepped:
        return NextStep((), None, True)
    lr = _reference_lr(stepped, len(slots))
    rules = [rule_of(part.optimizer) for part in parts]

    def steps() -> list[Moving]:
        moving: list[Moving] = []
        for part, rule, own in zip(parts, rules, slots_of, strict=True):
            if rule is None:
                moving += _by_shadow_step(part.optimizer, own, lr)
            else:
                moving += _by_rule(rule, part.optimizer, own, lr, resident)
        return moving

    moving = undisturbed((slot.held.device for slot in slots), steps) if None in rules else steps()
    updates = _with_sums(moving)
    slopes = [update.slope for update in updates if update.slope is not None]
    # A gradient that is not finite leaves no slope finite, whatever the update makes of it; zeros leave none but zero.
    if not math.isfinite(sum(slopes)):
        _refuse_nonfinite_gradients(slots)
    elif not any(slopes) and not is_share:
        _refuse_zero_gradients(slots)
    return NextStep(updates, lr, is_share)


def _by_rule(
    rule: Rule,
    optimizer: torch.optim.Optimizer,
    slots: Sequence[ParamState],
    reference_lr: float,
    resident: bool | None,
) -> list[Moving]:
    """Return the closed-form update of every parameter that has a gradient and a positive learning rate."""
    slots = [slot for slot in slots if slot.held.grad is not None and slot.lr > 0]
    steps = steps_by_rule(rule, optimizer, slots, reference_lr)
    found: dict[int, tuple[Tensor, Tensor | None]] = {}
    kept = {i: dtype for i, dtype in enumerate(kept_as(slots, steps, resident)) if dtype is not None}
    by_kernels = {i: dtype for i, dtype in kept.items() if ops.has_kernels(steps[i].base.device)}
    by_torch = [i for i in kept if i not in by_kernels]
    found |= zip(by_torch, updates_with_sums([steps[i] for i in by_torch]), strict=True)
    try:
        deltas = updates_of([steps[i] for i in by_kernels], list(by_kernels.values()))
        found |= ((i, (delta, None)) for i, delta in zip(by_kernels, deltas, strict=True))
    except torch.OutOfMemoryError:
        # What is free may lie in pieces.
        if resident:
            raise
    return [(slot, *found.get(i, (step, None))) for i, (slot, step) in enumerate(zip(slots, steps, strict=True))]


def steps_by_rule(
    rule: Rule, optimizer: torch.optim.Optimizer, slots: Sequence[ParamState], reference_lr: float
) -> list[LazyUpdate]:
    """Return the step of every slot as a formula of the optimizer's state; nothing of a slot's own size is read."""
    # .get: the state is a defaultdict, and indexing it would create an entry before the first step.
    states = [optimizer.state.get(slot.held, {}) for slot in slots]
    counts = to_host([torch.as_tensor(state.get("step", 0.0)) for state in states])
    return [
        _step(slot, rule.name, rule.read(optimizer, slot.group, state, count), slot.lr / reference_lr)
        for slot, state, count in zip(slots, states, counts, strict=True)
    ]


def _step(slot: ParamState, rule: str, reading: Reading, rate: float) -> LazyUpdate:
    """Return the step of what this rank holds of a parameter, from its master where there is one."""
    assert slot.held.grad is not None
    state = (None if tensor is None else local_as(tensor, slot.held) for tensor in reading.state)
    # What undoes the loss scale, negative where the optimizer ascends.
    grad_factor = (-1 if slot.climbs else 1) / slot.scale
    return LazyUpdate(
        rule,
        local(slot.theta),
        local_as(slot.held.grad.detach(), slot.held),
        tuple(state),
        (reading.weight_decay, grad_factor, rate, *reading.numbers),
        reading.decoupled,
        reading.flag,
    )


def _by_shadow_step(optimizer: torch.optim.Optimizer, slots: Sequence[ParamState], reference_lr: float) -> list[Moving]:
    """Return the update of every parameter that a step on a copy of everything moves."""
    return [
        (slot, local_as(displacement, slot.held).div_(reference_lr), None)
        for slot, displacement in shadow_step(optimizer, slots)
        if whole(displacement.any())
    ]


def _with_sums(moving: Sequence[Moving]) -> list[Update]:
    """Return the updates with their slopes and norms, read back at once; memory that parameters share moves as one."""
    slots = [slot for slot, *_ in moving]
    known = {id(source): sums for _, source, sums in moving if sums is not None}
    sources = summed(
        [slot.parameter for slot in slots],
        [source for _, source, _ in moving],
        labels=[slot.label for slot in slots],
        masters=[slot.master for slot in slots],
    )
    stored = [
        (source, slot)
        for slot, source in zip(slots, sources, strict=True)
        if isinstance(source, Tensor) and id(source) not in known
    ]
    # What moves without a gradient has no slope: any tensor of its shape will do.
    gradients = [
        source if slot.held.grad is None else local_as(slot.held.grad.detach(), slot.held) for source, slot in stored
    ]
    lazy = [source for source in sources if isinstance(source, LazyUpdate) and id(source) not in known]
    known |= zip(map(id, lazy), sums_of_steps(lazy), strict=True)
    known |= zip(
        (id(source) for source, _ in stored), slopes_and_norms([source for source, _ in stored], gradients), strict=True
    )
    slopes, norms = columns_to_host(over_shards([slot.held for slot in slots], [known[id(one)] for one in sources]))
    # Of what falls: the gradient as it is stored may be scaled, and of what the optimizer climbs.
    factors = [None if slot.held.grad is None else (-1 if slot.climbs else 1) / slot.scale for slot in slots]
    return [
        Update(slot, source, None if factor is None else slope * factor, norm_sq)
        for slot, source, factor, slope, norm_sq in zip(slots, sources, factors, slopes, norms, strict=True)
    ]


def _reference_lr(stepped: Sequence[ParamState], num_slots: int) -> float:
    """Return the learning rate of the first group that has a positive one and a gradient, perhaps on another rank."""
    rates = [slot.lr for slot in stepped]
    if not rates:
        raise ValueError(
            f"optimizer must hold a gradient, got none in {num_slots} parameters; call Direction.from_optimizer after "
            "loss.backward() and before zero_grad(), and not inside of a loss_fn (where it holds masters: after the "
            "gradients were copied to them; where hooks step inside of backward(): use Direction.between around it)"
        )
    reference = next((lr for lr in rates if lr > 0), None)
    if reference is None:
        raise NoUpdateError(
            "optimizer must have a positive learning rate in a group with a gradient, got 0 in all of them; measure "
            "when the schedule has started, or use Direction.from_gradients(model)"
        )
    return reference


def _refuse_nonfinite_gradients(slots: Sequence[ParamState]) -> None:
    """Raise on the first gradient that is not finite."""
    for slot in slots:
        if slot.held.grad is not None and not whole(slot.held.grad.isfinite().all()):
            remedy = "skip this measurement: GradScaler will skip the step"
            if slot.scale == 1:
                remedy = "find what overflowed, or skip this measurement where a GradScaler will skip the step"
            raise NoUpdateError(f"the gradient of {slot.label} must be finite, got nan or inf; {remedy}")


def _refuse_zero_gradients(slots: Sequence[ParamState]) -> None:
    """Raise if no gradient has an element other than zero: momentum may still move the weights, but by no slope."""
    gradients = [slot.held.grad for slot in slots if slot.held.grad is not None]
    if not any(bool(whole(gradient.any())) for gradient in gradients):
        raise NoUpdateError(
            f"optimizer must hold a gradient other than zero, got {len(gradients)} and all gradients are zero: measure "
            "between backward() and zero_grad(), and check that the loss depends on the optimizer's parameters"
        )
