"""The update of any optimizer, with no formula for it: one step on a copy of everything that it holds."""

import functools
import inspect
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpkern._undo import Trace, alone, undone
from sharpkern.directions.copies import copy_on
from sharpkern.directions.optimizer_state import ParamState
from sharpkern.directions.parts import AROUND_STEP, is_partitioned
from sharpkern.tensors.random_state import note_streams

Result = TypeVar("Result")

# Of the hooks that run at every optimizer's step. The module is no attribute of its package.
_TORCHS_OWN = sys.modules[torch.optim.Optimizer.__module__]
_REGISTRIES = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


# Their steps move each parameter by itself, so that one copied parameter at a time is enough.
_ONE_BY_ONE = {
    getattr(torch.optim, name, None) for name in "Adadelta Adafactor Adagrad Adamax ASGD Muon NAdam RAdam Rprop".split()
}


def shadow_step(optimizer: Optimizer, slots: Sequence[ParamState]) -> Iterator[tuple[ParamState, Tensor]]:
    """Yield θ − θ′ of parameters, θ′ being what the next step would make of them; to be called `undisturbed`.

    The optimizer is copied with its state and the optimizers that it wraps, its parameters replaced by stand-ins, and
    the step of its class runs on the copy. Hooks stay behind, and so does a ``step`` patched onto the instance, as
    learning-rate schedulers do. In 16 bits θ − θ′ would be lost to rounding: such parameters, their gradients and state
    are widened to float32.
    """
    kind = type(optimizer)
    if is_partitioned(optimizer):
        raise TypeError(
            f"optimizer must step all parameters that this rank holds, got {kind.__name__}, whose step needs the "
            f"others; {AROUND_STEP}"
        )
    parameters = list(inspect.signature(kind.step).parameters.values())[1:]
    if any(p.default is p.empty and p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD} for p in parameters):
        raise TypeError(
            f"optimizer must step without a closure, got {kind.__name__}, whose step needs one; {AROUND_STEP}"
        )
    if kind not in _ONE_BY_ONE:
        yield from zip(slots, _stepped(optimizer, slots), strict=True)
        return
    for slot in slots:
        if slot.held.grad is not None:
            yield from zip([slot], _stepped(_of_one(optimizer, slot), [slot]), strict=True)


def _of_one(optimizer: Optimizer, slot: ParamState) -> Optimizer:
    """Return the optimizer as if it held one parameter only; its state is the same, not a copy."""
    one: Optimizer = object.__new__(type(optimizer))
    state = {slot.held: optimizer.state[slot.held]} if slot.held in optimizer.state else {}
    groups = [{**slot.group, "params": [slot.held]}]
    one.__dict__.update(vars(optimizer), state=defaultdict(dict, state), param_groups=groups)
    return one


def _stepped(optimizer: Optimizer, slots: Sequence[ParamState]) -> list[Tensor]:
    """Return θ − θ′ of all parameters of an optimizer."""
    kind = type(optimizer)
    try:
        stand_ins = [_stand_in(slot) for slot in slots]
        shadows = copy_on(optimizer, [slot.held for slot in slots], stand_ins)
        with torch.no_grad():
            kind.step(shadows[0])
            return [
                # Into the stand-in's own memory, which nothing else needs any more.
                after.detach().neg_().add_(slot.theta)
                for slot, after in zip(slots, _after(shadows, stand_ins), strict=True)
            ]
    except Exception as error:
        if _is_out_of_memory(error):
            raise
        raise TypeError(
            f"optimizer must be able to step on a copy of itself, got {kind.__name__}, which fails with "
            f"{type(error).__name__}: {error}; {AROUND_STEP}"
        ) from error


def undisturbed(devices: Iterable[torch.device], steps: Callable[[], Result]) -> Result:
    """Run steps on copies so that they leave no trace, and meet what the real ones will meet, one after the other.

    Random numbers are those that the real steps will draw, and the streams are put back. Step hooks registered for all
    optimizers do not run, and an enclosing autocast, outside of which steps are taken, is off.
    """
    found = set(devices)
    with alone:
        trace = Trace()
        trace.add(*note_streams(found))
        # Other registries take their place: the hooks themselves stay where they are, and one of them may be what runs
        # now.
        registries = {name: getattr(_TORCHS_OWN, name) for name in _REGISTRIES}
        trace.add(*(functools.partial(setattr, _TORCHS_OWN, name, registry) for name, registry in registries.items()))
        enabled = [
            kind
            for kind in sorted({"cpu", *(device.type for device in found)})
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        ]
        trace.add(*(functools.partial(torch.set_autocast_enabled, kind, True) for kind in enabled))

        def aside() -> Result:
            for name in registries:
                setattr(_TORCHS_OWN, name, OrderedDict())
            for kind in enabled:
                torch.set_autocast_enabled(kind, False)
            return steps()

        return undone(aside, trace)


def _stand_in(slot: ParamState) -> nn.Parameter:
    """Return a parameter of the same value and gradient that the step may write."""
    theta = slot.theta
    dtype = torch.promote_types(theta.dtype, torch.float32)
    stand_in = nn.Parameter(theta.to(dtype, copy=True), requires_grad=slot.held.requires_grad)
    if slot.held.grad is not None:
        stand_in.grad = slot.gradient().to(dtype, copy=True)
    return stand_in


def _after(shadows: Sequence[Optimizer], stand_ins: Sequence[nn.Parameter]) -> Iterator[Tensor]:
    """Yield what the step left in the master copy that the optimizer keeps, or else in the stand-in."""
    for stand_in in stand_ins:
        states = [getattr(shadow, "state", {}).get(stand_in) for shadow in shadows]
        masters = [state["master_param"] for state in states if isinstance(state, dict) and "master_param" in state]
        yield masters[0] if masters else stand_in


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU torch has no type of its own for it.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
