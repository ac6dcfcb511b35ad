"""The update of any optimizer, with no formula for it: one step on a copy of everything that it holds."""

import contextlib
import copy
import functools
import inspect
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sharpkern._undo import Trace, alone, undone
from sharpkern.randomness import note_streams
from sharpkern.updates.parts import AROUND_STEP, contents, optimizers_within
from sharpkern.updates.slots import Slot

Result = TypeVar("Result")

# Of the hooks that run at every optimizer's step. The module is no attribute of its package.
_TORCHS_OWN = sys.modules[torch.optim.Optimizer.__module__]
_REGISTRIES = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


def shadow_step(optimizer: torch.optim.Optimizer, slots: Sequence[Slot]) -> list[Tensor]:
    """Return θ − θ′ of every parameter, θ′ being what the next step would make of it; to be called `undisturbed`.

    The optimizer is copied with its state and the optimizers that it wraps, its parameters replaced by stand-ins, and
    the step of its class runs on the copy. Hooks stay behind, and so does a ``step`` patched onto the instance, as
    learning-rate schedulers do. In 16 bits θ − θ′ would be lost to rounding: such parameters, their gradients and state
    are widened to float32.

    Args:
        optimizer: the optimizer, left as it is.
        slots: its parameters.

    Returns:
        One new tensor for each slot: its shape and device, in the dtype of the master or of the stand-in. In float32
        the difference carries a relative error of about 1e-7·|θ|/|θ − θ′|.

    Raises:
        TypeError: if the step needs a closure, or cannot run on a copy.

    Memory:
        A copy of parameters, gradients and state, and what the step itself allocates; of these the result, one tensor
        per parameter, is kept.
    """
    kind = type(optimizer)
    parameters = list(inspect.signature(kind.step).parameters.values())[1:]
    if any(p.default is p.empty and p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD} for p in parameters):
        raise TypeError(
            f"optimizer must step without a closure, got {kind.__name__}, whose step needs one; {AROUND_STEP}"
        )
    try:
        stand_ins = [_stand_in(slot) for slot in slots]
        shadow, inside = _copy_of(optimizer, slots, stand_ins)
        with torch.no_grad():
            kind.step(shadow)
            return [
                # Into the stand-in's own memory, which nothing else needs any more.
                after.detach().neg_().add_(slot.theta)
                for slot, after in zip(slots, _after([shadow, *inside], stand_ins), strict=True)
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

    Args:
        devices: that the parameters are on.
        steps: calls `shadow_step`.

    Returns:
        What ``steps`` returns.
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


def _stand_in(slot: Slot) -> nn.Parameter:
    """Return a parameter of the same value and gradient that the step may write."""
    theta = slot.theta
    dtype = torch.promote_types(theta.dtype, torch.float32)
    stand_in = nn.Parameter(theta.to(dtype, copy=True), requires_grad=slot.held.requires_grad)
    if slot.held.grad is not None:
        stand_in.grad = slot.gradient().to(dtype, copy=True)
    return stand_in


def _copy_of(
    optimizer: torch.optim.Optimizer, slots: Sequence[Slot], stand_ins: Sequence[nn.Parameter]
) -> tuple[torch.optim.Optimizer, list[torch.optim.Optimizer]]:
    """Return a copy of the optimizer, and of those it wraps, with stand-ins wherever they hold their parameters."""
    originals = [optimizer, *optimizers_within(optimizer)]
    for one in originals:
        _refuse_functions_of_the_run(one)
    # Torch's own way to copy an optimizer keeps nothing but groups and state.
    shadows: list[torch.optim.Optimizer] = [object.__new__(type(one)) for one in originals]
    memo: dict[int, Any] = {id(one): shadow for one, shadow in zip(originals, shadows, strict=True)}
    memo.update({id(slot.held): stand_in for slot, stand_in in zip(slots, stand_ins, strict=True)})
    for slot, stand_in in zip(slots, stand_ins, strict=True):
        # Marks that some optimizers read, such as muP's shapes.
        stand_in.__dict__.update(copy.deepcopy(slot.held.__dict__, memo))
    # What a differentiable step has left is part of a graph, which nothing else than a step can copy.
    memo.update(
        (id(value), value.detach().clone())
        for one in originals
        for value in contents(vars(one))
        if isinstance(value, Tensor) and not value.is_leaf and id(value) not in memo
    )
    # The gradients' scale is already gone from the stand-ins.
    left_behind = {"step", "grad_scale", "found_inf"}
    for one, shadow in zip(originals, shadows, strict=True):
        for name, value in one.__dict__.items():
            if name.endswith("_hooks"):
                shadow.__dict__[name] = OrderedDict()
            elif name not in left_behind:
                shadow.__dict__[name] = copy.deepcopy(value, memo)
        # The numbers are the same without a graph, which parameters of their own cannot be part of.
        for settings in (shadow.__dict__.get("defaults", {}), *shadow.__dict__.get("param_groups", ())):
            if "differentiable" in settings:
                settings["differentiable"] = False
    dtypes = {
        stand_in: slot.held.dtype
        for slot, stand_in in zip(slots, stand_ins, strict=True)
        if stand_in.dtype != slot.held.dtype
    }
    if dtypes:
        for shadow in shadows:
            for value in shadow.__dict__.values():
                if isinstance(value, MutableMapping):
                    _widen(value, dtypes)
    return shadows[0], shadows[1:]


def _refuse_functions_of_the_run(optimizer: torch.optim.Optimizer) -> None:
    """Raise if an optimizer holds a function that reaches tensors by itself: a copy would call it on the run's own."""
    for name, attribute in vars(optimizer).items():
        if name == "step" or name.endswith("_hooks"):
            continue
        for value in contents(attribute):
            function = value.func if isinstance(value, functools.partial) else value
            if isinstance(function, types.FunctionType) and any(
                isinstance(thing, (Tensor, nn.Module, torch.optim.Optimizer)) for thing in _reached(function)
            ):
                raise ValueError(f"'{name}' holds a function of the run's own tensors, which no copy of it can replace")


def _reached(function: types.FunctionType) -> Iterator[object]:
    """Yield what a function refers to: what it closes over, its defaults, and globals by name."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):
            yield from contents(cell.cell_contents)
    yield from contents([function.__defaults__, function.__kwdefaults__])
    for name in function.__code__.co_names:
        yield from contents(function.__globals__.get(name))


def _widen(states: MutableMapping[Any, Any], dtypes: Mapping[nn.Parameter, torch.dtype]) -> None:
    """Cast state tensors of a parameter's own dtype to that of its stand-in, in a mapping from stand-ins."""
    for stand_in, narrow in dtypes.items():
        state = states.get(stand_in)
        holder: MutableMapping[Any, Any] = state if isinstance(state, MutableMapping) else states
        names: list[Any] = list(state) if isinstance(state, MutableMapping) else [stand_in] * (state is not None)
        for name in names:
            if isinstance(holder[name], Tensor) and holder[name].dtype is narrow:
                holder[name] = holder[name].to(stand_in.dtype)


def _after(shadows: Sequence[torch.optim.Optimizer], stand_ins: Sequence[nn.Parameter]) -> Iterator[Tensor]:
    """Yield what the step left in the master copy that the optimizer keeps, or else in the stand-in."""
    for stand_in in stand_ins:
        states = [getattr(shadow, "state", {}).get(stand_in) for shadow in shadows]
        masters = [state["master_param"] for state in states if isinstance(state, dict) and "master_param" in state]
        yield masters[0] if masters else stand_in


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU torch has no type of its own for it.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
