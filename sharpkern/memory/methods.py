"""The ways to get losses at θ − ηΔθ, run for what they take: the engines' own code, and what is done without them."""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharpkern.directions.from_optimizer import steps_by_rule
from sharpkern.directions.optimizer_state import read_slots
from sharpkern.directions.parts import parts_of
from sharpkern.directions.residence import in_bf16
from sharpkern.directions.shadow_step import shadow_step, undisturbed
from sharpkern.distributed.sharding import local, local_as
from sharpkern.engines.inplace import Backup
from sharpkern.engines.session import Session, in_session
from sharpkern.memory.counter import PeakBytes
from sharpkern.memory.training_state import ACTIVATIONS, BACKWARD, TrainingState
from sharpkern.ops.rules import rule_of
from sharpkern.ops.update import ParamUpdate, StoredUpdate

COPIES, DIRECTION = "copies", "direction"


@dataclass(frozen=True)
class Method:
    """One way.

    Attributes:
        name: for people.
        run: on a scene, for the counter to see.
        measures: gradients and the optimizer's state are there while it runs.
        direction: where Δθ is, as `MethodMemory` says it.
        num_steps: step sizes of one pass.
        sharded: whether it can be had of shards.
    """

    name: str
    run: Callable[[TrainingState, PeakBytes], None]
    measures: bool = True
    direction: str = ""
    num_steps: int = 1
    sharded: bool = False


def methods(num_steps: int, *, from_state: bool, in_bf16: bool = False) -> list[Method]:
    """Return all ways, with those whose Δθ is worked out of the optimizer's state, and those that keep it in bf16."""
    found = [
        Method("plain forward", _forward, measures=False, sharded=True),
        Method("forward and backward", _training, measures=False, sharded=True),
        Method("clone and dictionary", _clone_and_dictionary, direction="resident"),
        Method("deep copy", _deep_copy, direction="resident"),
    ]
    for direction in ("resident", *(["state"] if from_state else []), *(["bf16"] if in_bf16 else [])):
        found += [
            Method("in place", _Engine("inplace", direction, 1), direction=direction, sharded=True),
            Method(
                "in place, from the host",
                _Engine("inplace", direction, 1, "host"),
                direction=direction,
                sharded=True,
            ),
            Method("virtual", _Engine("virtual", direction), direction=direction),
            Method(
                f"batched, {num_steps} at a time",
                _Engine("batched", direction, num_steps),
                direction=direction,
                num_steps=num_steps,
            ),
        ]
    return found


def _forward(scene: TrainingState, counter: PeakBytes) -> None:
    with torch.no_grad(), counter.under(ACTIVATIONS):
        scene.loss(counter)


def _training(scene: TrainingState, counter: PeakBytes) -> None:
    with counter.under(ACTIVATIONS):
        loss = scene.loss(counter)
    with counter, counter.under(BACKWARD):
        loss.backward()
    for parameter in scene.parameters:
        parameter.grad = None


def _clone_and_dictionary(scene: TrainingState, counter: PeakBytes) -> None:
    """The published method: update and weights in dictionaries, θ − ηΔθ built from both at every probe.

    The update is in the weights' dtype, which is the least that it can take.
    """
    parameters = {name: p.detach() for name, p in scene.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        with counter, counter.under(DIRECTION):
            update = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        with counter, counter.under(COPIES):
            weights = {name: parameter.clone() for name, parameter in parameters.items()}
            moved = {name: torch.sub(weights[name], update[name], alpha=1e-3) for name in weights}
            for name, parameter in parameters.items():
                parameter.copy_(moved[name])
            del moved
        with counter.under(ACTIVATIONS):
            scene.loss(counter)


def _deep_copy(scene: TrainingState, counter: PeakBytes) -> None:
    with torch.no_grad():
        with counter, counter.under(DIRECTION):
            update = [torch.zeros_like(parameter) for parameter in scene.parameters]
        with counter, counter.under(COPIES):
            # By hand: what counts bytes sees a tensor's own deep copy twice or not at all.
            copies: dict[int, Any] = {id(b): b.clone() for b in scene.model.buffers()}
            copies |= {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in scene.model.parameters()}
            moved = copy.deepcopy(scene.model, copies)
            for parameter, delta in zip((p for p in moved.parameters() if p.requires_grad), update, strict=True):
                parameter.add_(delta, alpha=-1e-3)
        with counter.under(ACTIVATIONS):
            scene.loss(counter, moved)


@dataclass(frozen=True)
class _Engine:
    """Losses by an engine, along a direction that is in memory or worked out of the optimizer's state."""

    name: str
    direction: str
    num_steps: int = 2
    backup: Backup = "device"

    def __call__(self, scene: TrainingState, counter: PeakBytes) -> None:
        def loss_fn() -> Tensor:
            with counter.under(ACTIVATIONS):
                return scene.loss(counter)

        with _gradients(scene), counter, torch.no_grad():
            with counter.under(DIRECTION):
                moves = _moves(scene, self.direction)

            def evaluate(session: Session) -> None:
                with session.open(session.target(loss_fn), self.name, backup=self.backup) as engine:
                    engine.losses([1e-3 * (k + 1) for k in range(self.num_steps)])

            with counter.under(COPIES):
                in_session(evaluate, scene.model, _Planned(scene.parameters, moves), [], reduce=_no_number)


@dataclass(frozen=True)
class _Planned:
    """What moves, in place of a direction, which would read numbers that fake tensors do not have."""

    parameters: Sequence[nn.Parameter]
    planned: Sequence[tuple[Tensor, ParamUpdate]]
    slope: float | None = None
    norm_sq: float = 1.0
    lr: float | None = None

    def bind(self, model: nn.Module) -> "_Planned":
        """It is the model's own."""
        return self

    def moves(self) -> Sequence[tuple[Tensor, ParamUpdate]]:
        """Every parameter with its move."""
        return self.planned


@contextmanager
def _gradients(scene: TrainingState) -> Iterator[None]:
    for parameter, gradient in zip(scene.parameters, scene.gradients, strict=False):
        parameter.grad = gradient
    try:
        yield
    finally:
        for parameter in scene.parameters:
            parameter.grad = None


def _moves(scene: TrainingState, direction: str) -> list[tuple[Tensor, ParamUpdate]]:
    """θ + αΔθ of every parameter, made as `Direction.from_optimizer` makes it."""
    if scene.optimizer is None:
        shards = [(p, local(p)) for p in scene.parameters]
        return [(p, StoredUpdate(mine, torch.zeros_like(mine))) for p, mine in shards]
    optimizer = scene.optimizer
    (slots,) = read_slots(parts_of(optimizer), None, None)
    rule = rule_of(optimizer)
    moves: list[ParamUpdate]
    if rule is None:
        with _copies_of_fakes():
            deltas = undisturbed((slot.held.device for slot in slots), lambda: list(shadow_step(optimizer, slots)))
        moves = [StoredUpdate(local(slot.theta), local_as(delta, slot.held)) for slot, delta in deltas]
    else:
        steps = steps_by_rule(rule, optimizer, slots, slots[0].lr)
        dtypes = in_bf16(slots) if direction == "bf16" else [step.dtype for step in steps]
        moves = [
            step if dtype is None or direction == "state" else StoredUpdate(step.base, step.update(dtype=dtype))
            for step, dtype in zip(steps, dtypes, strict=True)
        ]
    # Engines know by identity what needs no master.
    return [
        (slot.parameter, move if slot.master is not None else move.at(local(slot.parameter)))
        for slot, move in zip(slots, moves, strict=True)
    ]


@contextmanager
def _copies_of_fakes() -> Iterator[None]:
    """Let fake tensors be copied with what holds them: a deep copy asks where they lie, which they warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)
        yield


def _no_number(loss: Tensor) -> Tensor:
    """Stand in for the loss, which has no value."""
    return torch.zeros(())
