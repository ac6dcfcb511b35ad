"""Which optimizers make one update together: those of lists and containers, and what stands behind a wrapper."""

import inspect
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from sharpkern.distributed.deepspeed import Wrapped, wrapped

Optimizers = Optimizer | Sequence[Optimizer]
"""What stands for one step: an optimizer, a container of several, or a list of them."""

BETWEEN = (
    "before = {p: p.detach().clone() for p in model.parameters()}; optimizer.step(); "
    "direction = Direction.between(before, model, lr), to be measured with the weights of before"
)
"""The way out where a step cannot be foreseen."""

AROUND_STEP = (
    "take the direction around the real step, with sharpkern.integrations.around_step.AroundStep or by hand: " + BETWEEN
)
"""The same where the step has torch's hooks."""

# Wrappers whose step is that of the optimizer inside. Their packages are looked up where they are loaded already.
_ADD_NOTHING = (
    ("accelerate.optimizer", "AcceleratedOptimizer"),
    # Its own step does nothing: the engine has taken it.
    ("accelerate.utils.deepspeed", "DeepSpeedOptimizerWrapper"),
    ("lightning.pytorch.core.optimizer", "LightningOptimizer"),
    ("pytorch_lightning.core.optimizer", "LightningOptimizer"),
    ("lightning.fabric.wrappers", "_FabricOptimizer"),
    ("lightning_fabric.wrappers", "_FabricOptimizer"),
)
# What the step of a container mentions that does nothing but hand it on, evaluating a closure before at most.
_HANDING_ON = frozenset(
    "step optimizers chained_optimizers values items torch enable_grad no_grad super list enumerate zip".split()
)
# Methods of optimizers that climb to θ + e for a second gradient, the way there and the way back, and their names.
_CLIMBS = frozenset("first_step ascent_step ascent ascend climb perturb perturb_weights".split())
_DESCENDS = frozenset(
    "second_step descent_step descent descend restore restore_weights unperturb un_perturb unperturb_weights".split()
)
_SHARPNESS_AWARE = re.compile("SAM(?![a-z])|[Ss]harpness_?[Aa]ware")


class Place(NamedTuple):
    """A parameter where an optimizer holds it.

    Attributes:
        group_number: of its group, from 0.
        number: of the parameter in that group, from 0.
        mover: the optimizer that moves it: the innermost one where several are wrapped.
        group: of the mover.
        parameter: the parameter.
    """

    group_number: int
    number: int
    mover: Optimizer
    group: Mapping[str, Any]
    parameter: nn.Parameter

    @property
    def climbs(self) -> bool:
        """Whether it is moved to where the loss rises: what falls is then minus the loss."""
        return bool(self.group.get("maximize", getattr(self.mover, "maximize", False)))

    @property
    def has_lr(self) -> bool:
        """Whether it has a learning rate; without one the optimizer finds its own step."""
        return self.group.get("lr") is not None

    def lr(self, where: str = "") -> float:
        """Return the learning rate, or 1.0 to count in steps where there is none."""
        lr = float(self.group["lr"]) if self.has_lr else 1.0
        if not 0 <= lr < math.inf:
            raise ValueError(
                f"lr of group {self.group_number}{where} must be a finite number >= 0, got {lr:g}; check what sets it"
            )
        return lr


@dataclass(frozen=True, eq=False)
class Part:
    """One of the optimizers that make an update together.

    Attributes:
        optimizer: whose step counts.
        holders: wrappers and containers around it: a loss scaler may know one of these in its place.
    """

    optimizer: Optimizer
    holders: tuple[Any, ...] = ()

    @property
    def wrapped(self) -> Wrapped | None:
        """What is known of DeepSpeed's wrapper around it, if there is one."""
        return next((holder for holder in self.holders if isinstance(holder, Wrapped)), None)

    def places(self) -> Iterator[Place]:
        """Yield every parameter, in the order of the groups.

        Where the optimizer wraps another, the learning rate in use is in a group of that one: the wrapper's own groups
        may be the same, or copies that no scheduler knows of. Only torch's ZeroRedundancyOptimizer hands its own on.
        """
        movers = {
            id(parameter): (inner, group)
            for inner in ([] if is_partitioned(self.optimizer) else optimizers_within(self.optimizer))
            for group in getattr(inner, "param_groups", ())
            for parameter in group["params"]
        }
        for g, group in enumerate(self.optimizer.param_groups):
            for i, parameter in enumerate(group["params"]):
                mover, its_group = movers.get(id(parameter), (self.optimizer, group))
                yield Place(g, i, mover, its_group, parameter)


def parts_of(optimizers: object) -> list[Part]:
    """Return the optimizers whose steps make up one update."""
    parts = list(_parts(optimizers, ()))
    if not parts:
        raise ValueError("optimizer must hold at least one optimizer, got an empty list; pass those of the loop")
    return parts


def check_steps(parts: Sequence[Part]) -> None:
    """Refuse optimizers whose step is not one step from one gradient at θ."""
    for part in parts:
        for one in (*part.holders, part.optimizer, *optimizers_within(part.optimizer)):
            _refuse_several_gradients(one)
            _refuse_step_in_backward(one)


def is_partitioned(optimizer: object) -> bool:
    """Whether each rank steps some of the parameters, and tells the others."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    kind = getattr(module, "ZeroRedundancyOptimizer", None)
    return kind is not None and isinstance(optimizer, kind)


def optimizers_within(optimizer: object) -> list[Optimizer]:
    """Return the optimizers that an optimizer holds, and those that these hold: the outermost first."""
    found: dict[int, Optimizer] = {}
    waiting = [optimizer]
    while waiting:
        attributes = getattr(waiting.pop(), "__dict__", {})
        # Not among the tensors of its state, of which there are many.
        for value in contents([value for name, value in attributes.items() if name not in ("state", "param_groups")]):
            if isinstance(value, Optimizer) and value is not optimizer and id(value) not in found:
                found[id(value)] = value
                waiting.append(value)
    return list(found.values())


def contents(value: object) -> Iterator[Any]:
    """Yield a value, and what stands in it where it is a list, a tuple or a dictionary."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting.extend(reversed(value.values()))
        elif isinstance(value, (list, tuple)):
            waiting.extend(reversed(value))
        else:
            yield value


def _parts(optimizers: object, holders: tuple[Any, ...]) -> Iterator[Part]:
    members = members_of(optimizers)
    if members is not None:
        for member in members:
            yield from _parts(member, (*holders, optimizers))
        return
    known = wrapped(optimizers)
    if known is not None:
        yield from _parts(known.inner, (*holders, known))
        return
    if not isinstance(optimizers, Optimizer):
        _refuse_several_gradients(optimizers)
        _refuse_step_in_backward(optimizers)
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer or a list of them, got {type(optimizers).__name__}; pass the "
            f"one inside of it if that does the whole step, otherwise take the direction around it: {BETWEEN}"
        )
    yield Part(optimizers, holders)


def members_of(optimizer: object) -> Sequence[object] | None:
    """Return what a list, a container or a wrapper that adds nothing holds; None of anything else."""
    if isinstance(optimizer, (list, tuple)):
        return optimizer
    for module, name in _ADD_NOTHING:
        kind = getattr(sys.modules.get(module), name, None)
        # A subclass with a step of its own may do anything in it.
        if kind is not None and isinstance(optimizer, kind) and type(optimizer).step is kind.step:
            return (optimizer.optimizer,)
    for name in ("optimizers", "chained_optimizers"):
        held = getattr(optimizer, name, None)
        members = list(held.values()) if isinstance(held, dict) else held
        if not isinstance(members, (list, tuple)) or not members or not callable(getattr(optimizer, "step", None)):
            continue
        # One whose step does more takes it on a copy of all, as any other wrapper.
        if isinstance(optimizer, Optimizer) and not _hands_on(type(optimizer)):
            continue
        if all(isinstance(member, Optimizer) or members_of(member) for member in members):
            return members
    return None


def _hands_on(kind: type) -> bool:
    """Whether the step of a container, and of the classes that it is derived from, only steps what it holds."""
    steps = [
        inspect.unwrap(vars(base)["step"]) for base in kind.__mro__ if base is not Optimizer and "step" in vars(base)
    ]
    return all(isinstance(step, FunctionType) and _names(step.__code__) <= _HANDING_ON for step in steps)


def _names(code: CodeType) -> set[str]:
    """Return the globals and attributes that a function mentions, and those inside of it."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def _refuse_several_gradients(optimizer: object) -> None:
    """Raise if an optimizer takes its gradient at θ + e and its step from θ."""
    methods = {name for name in _CLIMBS | _DESCENDS if callable(getattr(optimizer, name, None))}
    inside = optimizers_within(optimizer)
    groups = getattr(optimizer, "param_groups", ())
    # The radius of the climb. Adadelta and SophiaG have a rho of another meaning, also inside of a wrapper.
    has_rho = _has_rho(optimizer) or any("rho" in group for group in groups)
    has_radius = has_rho and bool(inside) and not any(map(_has_rho, inside))
    is_named_so = _SHARPNESS_AWARE.search(type(optimizer).__name__)
    if is_named_so or has_radius or (methods & _CLIMBS and methods & _DESCENDS):
        raise TypeError(
            f"optimizer must take one gradient a step, got {type(optimizer).__name__}, which is sharpness-aware: its "
            "step starts at θ, and its second gradient is of θ + e; take the direction around the whole step: before = "
            "{p: p.detach().clone() for p in model.parameters()} ahead of the first gradient, direction = "
            "Direction.between(before, model, lr) after the second step, to be measured with the weights of before"
        )


def _refuse_step_in_backward(optimizer: object) -> None:
    """Raise if an optimizer steps while gradients are computed."""
    if any("InBackward" in kind.__name__ for kind in type(optimizer).__mro__):
        raise TypeError(
            f"optimizer must step after the backward pass, got {type(optimizer).__name__}, which steps inside of it; "
            "take the direction around the backward pass: before = {p: p.detach().clone() for p in "
            "model.parameters()}; loss.backward(); direction = Direction.between(before, model, lr), which is measured "
            "with the weights of before"
        )


def _has_rho(optimizer: object) -> bool:
    return hasattr(optimizer, "rho") or "rho" in (getattr(optimizer, "defaults", None) or {})
