"""A copy of an optimizer, and of those that it wraps, with other tensors in the place of its parameters."""

import contextlib
import copy
import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sharpkern.directions.parts import contents, optimizers_within

# A ``step`` on the instance is a scheduler's patch; the scale of the gradients is gone from the stand-ins.
_LEFT_BEHIND = frozenset({"step", "grad_scale", "found_inf"})


def copy_on(optimizer: Optimizer, parameters: Iterable[Tensor], stand_ins: Iterable[nn.Parameter]) -> list[Optimizer]:
    """Return a copy of an optimizer that holds stand-ins wherever it holds its parameters.

    Hooks stay behind, and so does a ``step`` patched onto the instance, as learning-rate schedulers do. State of a
    parameter's own dtype is cast to that of its stand-in.
    """
    originals = [optimizer, *optimizers_within(optimizer)]
    for one in originals:
        _refuse_ways_back(one)
    pairs = list(zip(parameters, stand_ins, strict=True))
    stand_in_of = {id(parameter): stand_in for parameter, stand_in in pairs}
    # Torch's own way to copy an optimizer keeps nothing but groups and state.
    shadows: list[Optimizer] = [object.__new__(type(one)) for one in originals]
    memo: dict[int, Any] = {id(one): shadow for one, shadow in zip(originals, shadows, strict=True)}
    memo.update(stand_in_of)
    for parameter, stand_in in pairs:
        # Marks that some optimizers read, such as muP's shapes.
        stand_in.__dict__.update(copy.deepcopy(parameter.__dict__, memo))
    # Deepcopy has no way with these.
    for value in (value for one in originals for value in contents(vars(one))):
        if id(value) not in memo and (copied := _copied(value)) is not None:
            memo[id(value)] = copied
    for one, shadow in zip(originals, shadows, strict=True):
        for name, value in vars(one).items():
            if name.endswith("_hooks"):
                shadow.__dict__[name] = OrderedDict()
            elif name not in _LEFT_BEHIND:
                shadow.__dict__[name] = copy.deepcopy(value, memo)
    dtypes = {id(new): (old.dtype, new.dtype) for old, new in pairs if old.dtype != new.dtype}
    # All that was copied stands there, however deep; under its own number what the copies are of.
    for thing in [thing for key, thing in memo.items() if key != id(memo)]:
        _rename(thing, stand_in_of)
        if isinstance(thing, MutableMapping):
            if dtypes:
                _widen(thing, dtypes)
            # The numbers are the same without a graph, which parameters of their own cannot be part of.
            if isinstance(thing, dict) and "differentiable" in thing:
                thing["differentiable"] = False
    return shadows


def _copied(value: object) -> object | None:
    """Return a copy of what cannot be copied as anything else is; None of all other things."""
    if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
        # Quantised state may have no clone.
        return _rebuilt(value)
    if isinstance(value, Tensor) and not value.is_leaf:
        # What a differentiable step has left is part of a graph.
        return value.detach().clone()
    if isinstance(value, types.GeneratorType) and value.gi_frame is None:
        # The names that it gave were read already.
        return value
    return None


def _rebuilt(tensor: Tensor) -> Tensor:
    """Return a tensor of a subclass made anew, of copies of the tensors that it is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.detach().clone()
    names, context = tensor.__tensor_flatten__()
    parts = {name: getattr(tensor, name) for name in names}
    # A DTensor has its mesh among them.
    parts = {name: _rebuilt(part) if isinstance(part, Tensor) else part for name, part in parts.items()}
    rebuilt: Tensor = type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())
    return rebuilt


def _refuse_ways_back(optimizer: Optimizer) -> None:
    """Raise if an optimizer reaches tensors by functions or weak references: those of a copy are the run's own."""
    for name, attribute in vars(optimizer).items():
        if name.endswith("_hooks") or name in _LEFT_BEHIND:
            continue
        for value in contents(attribute):
            if any(isinstance(thing, (Tensor, nn.Module, Optimizer)) for thing in _reached(value)):
                kind = "reference" if isinstance(value, weakref.ref) else "function"
                raise ValueError(f"'{name}' holds a {kind} of the run's own tensors, which no copy of it can replace")


def _reached(value: object) -> Iterator[object]:
    """Yield what a weak reference or a function refers to: what it closes over, its defaults, and globals by name."""
    if isinstance(value, weakref.ref):
        yield value()
    function = value.func if isinstance(value, functools.partial) else value
    if isinstance(function, types.FunctionType):
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):
                yield from contents(cell.cell_contents)
        yield from contents([function.__defaults__, function.__kwdefaults__])
        for name in function.__code__.co_names:
            yield from contents(function.__globals__.get(name))


def _rename(thing: Any, stand_ins: Mapping[int, nn.Parameter]) -> None:
    """Replace parameters by their stand-ins in a container that knows them by ``id``, or weakly."""

    def new(value: Any) -> Any:
        if type(value) is int:
            return id(stand_ins[value]) if value in stand_ins else value
        return stand_ins.get(id(value), value)

    if isinstance(thing, MutableMapping):
        items = [(new(key), new(value)) for key, value in thing.items()]
        if any(new(key) is not key or new(value) is not value for key, value in thing.items()):
            thing.clear()
            thing.update(items)
    elif isinstance(thing, list):
        thing[:] = map(new, thing)
    elif isinstance(thing, set):
        members = set(map(new, thing))
        thing.clear()
        thing.update(members)


def _widen(states: MutableMapping[Any, Any], dtypes: Mapping[int, tuple[torch.dtype, torch.dtype]]) -> None:
    """Cast what a mapping keeps for stand-ins of another dtype than their parameters'."""
    for key, state in list(states.items()):
        narrow, wide = dtypes.get(key if type(key) is int else id(key), (None, None))
        holder: MutableMapping[Any, Any] = state if isinstance(state, MutableMapping) else states
        for name in list(state) if isinstance(state, MutableMapping) else [key]:
            if wide and isinstance(holder[name], Tensor) and holder[name].dtype is narrow:
                holder[name] = holder[name].to(wide)
