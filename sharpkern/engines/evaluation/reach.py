"""What a closure reaches: the modules, tensors, generators and containers that a call of it may read or write.

A closure reaches the variables it has closed over, the globals that its code names, the object that it is a method of,
what a `functools.partial` holds, and everything that these hold in turn: containers, attributes of modules and of
objects of the user's own classes, hooks. Libraries are not looked into, nor are attributes of Python modules, frames of
generators, or arrays of NumPy.
"""

import os
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from types import (
    BuiltinFunctionType,
    BuiltinMethodType,
    CellType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sharpkern
from sharpkern._undo import is_library_file

# They may be changed in place; a tuple may hold what can be.
CONTAINERS = frozenset((dict, OrderedDict, defaultdict, Counter, list, set, deque))
_RECORDS = (type(None), bool, int, float, complex, str, bytes, np.generic)
_PLAIN = (*_RECORDS, type, ModuleType, BuiltinFunctionType, BuiltinMethodType)
# How far the globals that functions name are followed to tell closures apart.
_DEEP = 3
_OWN = os.path.dirname(sharpkern.__file__)
# A longer list is a data set: its members are noted, and not looked into.
_LONG = 4096
# So much is looked at: what holds more than this is no state of a loss.
_MOST = 100_000


class Reached:
    """Everything that some roots reach, each thing once.

    Attributes:
        modules: with those inside of them.
        tensors: parameters among them, whether of the modules or not.
        containers: dictionaries, lists, sets and deques; attributes of objects and of modules.
        generators: of random numbers.
        cells: variables that functions have closed over.
        names: (globals, name) of the variables that functions name.
        schedules: containers in which schedules of torch's pipelines and their stages hold what they do next, which
            all ranks have to agree on.
    """

    def __init__(self, *roots: object) -> None:
        self.modules: list[nn.Module] = []
        self.tensors: list[Tensor] = []
        self.containers: list[Any] = []
        self.generators: list[object] = []
        self.cells: list[CellType] = []
        self.names: list[tuple[dict[str, Any], str]] = []
        self.schedules: list[Any] = []
        # They are held, so that no other object takes the place of one that is gone.
        self._seen: dict[int, object] = {}
        self._functions: list[object] = []
        self.add(*roots)

    def add(self, *roots: object) -> None:
        """Enter what more roots reach, but for what the functions among it reach."""
        # What is called is looked into, whatever library it is of; so is what it is a method of.
        owners = [getattr(root, "__self__", root) for root in roots]
        self._walk([*roots, *(getattr(owner, "__dict__", None) for owner in owners if not isinstance(owner, _PLAIN))])

    def _walk(self, things: Iterable[Any]) -> None:
        waiting, seen = deque(things), self._seen
        while waiting and len(seen) < _MOST:
            thing = waiting.popleft()
            if id(thing) in seen:
                continue
            if type(thing) in CONTAINERS:
                # The most of what modules hold, and most of them empty.
                seen[id(thing)] = thing
                self.containers.append(thing)
                if thing and len(thing) <= _LONG:
                    waiting.extend(thing.values() if isinstance(thing, dict) else thing)
                continue
            if isinstance(thing, _PLAIN):
                continue
            seen[id(thing)] = thing
            if isinstance(thing, (FunctionType, MethodType, partial)):
                self._functions.append(thing)
            else:
                waiting.extend(self._inside(thing))

    def follow(self) -> None:
        """Enter what the functions reach that have been found."""
        while self._functions:
            functions, self._functions = self._functions, []
            for function in functions:
                self._walk(self._inside(function))

    def _inside(self, thing: Any) -> Iterable[object]:
        """Enter one thing, and return what it holds."""
        if isinstance(thing, Tensor):
            self.tensors.append(thing)
            return ()
        if isinstance(thing, nn.Module):
            self.modules.append(thing)
            return self._attributes(thing)
        if isinstance(thing, tuple):
            return thing if len(thing) <= _LONG else ()
        if isinstance(thing, FunctionType):
            return self._of_function(thing)
        if isinstance(thing, MethodType):
            return thing.__self__, thing.__func__
        if isinstance(thing, partial):
            return thing.func, thing.args, thing.keywords
        if is_generator(thing):
            self.generators.append(thing)
            return ()
        if isinstance(thing, SimpleNamespace) or not _of_library(type(thing)):
            return self._attributes(thing)
        if _is_schedule(thing):
            for part in (thing, *getattr(thing, "_stages", [getattr(thing, "_stage", thing)])):
                self.schedules += [vars(part), *(one for one in vars(part).values() if type(one) in CONTAINERS)]
        return ()

    def _attributes(self, thing: Any) -> Iterator[object]:
        yield getattr(thing, "__dict__", None)
        for kind in type(thing).__mro__:
            if not _of_library(kind):
                yield from (value for value in vars(kind).values() if isinstance(value, FunctionType))
                slots = vars(kind).get("__slots__", ())
                yield from (getattr(thing, name, None) for name in ([slots] if isinstance(slots, str) else slots))

    def _of_function(self, function: FunctionType) -> Iterator[object]:
        for cell in function.__closure__ or ():
            self.cells.append(cell)
            yield from contents_of(cell)
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        if function.__dict__:
            yield function.__dict__
        if _is_library_file(function.__code__.co_filename):
            return
        scope = function.__globals__
        for name in _names_in(function.__code__):
            if name in scope:
                self.names.append((scope, name))
                yield scope[name]


def _is_schedule(thing: object) -> bool:
    module = sys.modules.get("torch.distributed.pipelining.schedules")
    return module is not None and isinstance(thing, module._PipelineSchedule)


def contents_of(cell: CellType) -> tuple[Any, ...]:
    """Return what a cell holds, nothing where it is empty yet."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def is_record(things: Iterable[object]) -> bool:
    """Whether all things are numbers or text, which nothing can be changed in."""
    return all(isinstance(thing, _RECORDS) for thing in things)


def is_generator(thing: object) -> bool:
    """Whether a thing is a generator of random numbers: torch's, NumPy's or Python's."""
    return isinstance(thing, (torch.Generator, random.Random)) or (
        # Of a class with a slot of that name it is no text.
        str(type(thing).__module__).startswith("numpy.random") and hasattr(thing, "bit_generator")
    )


_TELLING = (FunctionType, MethodType, partial, nn.Module, bool, str)


def fingerprint(loss_fn: Callable[..., object]) -> object:
    """Return what tells closures apart whose findings must not be shared: their code, and whose code they call.

    Batches do not count: a new closure over the next batch is the same. Functions that it holds count by their code,
    modules by identity, and flags and names, which may choose a branch, by value.
    """
    return _fingerprint(loss_fn, frozenset())


def _fingerprint(thing: Any, above: frozenset[int]) -> object:
    if id(thing) in above:
        return "itself"
    above |= {id(thing)}
    if isinstance(thing, FunctionType):
        held = [content for cell in thing.__closure__ or () for content in contents_of(cell)]
        held += [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
        if len(above) <= _DEEP and not _is_library_file(thing.__code__.co_filename):
            named = [thing.__globals__.get(name) for name in _names_in(thing.__code__)]
            held += [one for one in named if isinstance(one, _TELLING)]
        return thing.__code__, tuple(_fingerprint(one, above) for one in held)
    if isinstance(thing, MethodType):
        return _fingerprint(thing.__func__, above), _fingerprint(thing.__self__, above)
    if isinstance(thing, partial):
        held = [thing.func, *thing.args, *thing.keywords.values()]
        return tuple(_fingerprint(one, above) for one in held)
    if isinstance(thing, (bool, str, bytes, type(None))):
        return thing
    if isinstance(thing, (nn.Module, type, ModuleType)):
        return id(thing)
    call = type(thing).__call__ if callable(thing) else None
    if isinstance(call, FunctionType):
        # An object that is called; `functools.update_wrapper` and the like leave the function that counts in it.
        held = [one for one in getattr(thing, "__dict__", {}).values() if callable(one)]
        return type(thing), tuple(_fingerprint(one, above) for one in held)
    return type(thing)


@lru_cache(maxsize=4096)
def _names_in(code: CodeType) -> tuple[str, ...]:
    """Return the names that a function's code, and that of the functions inside of it, may look up as globals."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(dict.fromkeys(_names_in(constant)))
    return tuple(names)


def _is_library_file(path: str) -> bool:
    return is_library_file(path) or path.startswith(_OWN)


def _of_library(kind: type) -> bool:
    """Whether a class is of a library, and not of the user: what its objects hold is the library's own affair."""
    return _looked_up(kind)


@lru_cache(maxsize=4096)
def _looked_up(kind: Any) -> bool:
    module = sys.modules.get(kind.__module__)
    path = getattr(module, "__file__", None)
    return (
        kind.__module__ == "builtins"
        or (path is None and module is not sys.modules.get("__main__"))
        or (path is not None and _is_library_file(path))
    )
