"""What a loss evaluation may touch besides the parameters, kept at entry and put back: the measurement leaves no trace.

A closure advances random streams, BatchNorm statistics and step counters, caches tensors on modules, fills ``.grad``.
`preserved` notes all of it once; `Guard.rewind` goes back to that state before every evaluation, so that every step
size sees the same dropout masks and the same running statistics, and leaving the block goes back for good.
"""

import re
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from sharpkern.engines.table import storage_pointer
from sharpkern.fakes import is_fake
from sharpkern.randomness import note_generators, note_streams, torch_states
from sharpkern.shards import local

_CONTAINERS = (dict, OrderedDict, list, set, deque)
_AUTOCAST_DEVICES = ("cpu", "cuda")
# Reentrant checkpoints warn that no gradients will come of a pass, which has none.
_FALSE_ALARM = (
    "ignore",
    re.compile("None of the inputs have requires_grad=True"),
    UserWarning,
    re.compile(r"torch\.utils\.checkpoint"),
    0,
)

Undo = Callable[[], object]


class Guard:
    """The state of a model's surroundings at the moment it was made.

    Args:
        model: its modules' flags, buffers, plain attributes and hooks are noted.
        parameters: whose ``.grad`` and ``requires_grad`` are noted besides the model's own.

    Attributes:
        parameters: the model's and those given, each once.
        devices: of these and of the model's buffers.

    Memory: one copy of the buffers and of tensors kept as plain module attributes.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[Tensor] = ()) -> None:
        self.parameters = list({id(p): p for p in (*model.parameters(), *parameters)}.values())
        self._gradients = {id(p): p.grad for p in self.parameters}
        self._contents, self._containers, generators = _note_modules(model, self.parameters)
        self.devices = {tensor.device for tensor in (*self.parameters, *(tensor for tensor, _ in self._contents))}
        self._undo: list[Undo] = [
            *note_streams(self.devices),
            *note_generators(generators),
            _note_autocast(),
            _note_requires_grad(self.parameters),
        ]
        self._streams = torch_states(self.devices)

    def hide_gradients(self) -> None:
        """Take ``.grad`` out of the closure's reach, for closures that begin with ``zero_grad()``."""
        for parameter in self.parameters:
            parameter.grad = None

    def rewind(self) -> None:
        """Put random streams, buffers, module attributes and flags back to where they were at entry."""
        _each(*self._undo, self._restore_contents, self._restore_containers)

    def restore(self) -> None:
        """As `rewind`, and put every ``.grad`` back: the same tensor object as at entry."""
        _each(self.rewind, self._restore_gradients)

    def _restore_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = self._gradients[id(parameter)]

    def _restore_contents(self) -> None:
        for tensor, content in self._contents:
            _restore_content(tensor, content)

    def _restore_containers(self) -> None:
        for container, saved in self._containers:
            # Most are the hook tables of modules without hooks.
            if (container or saved) and not _same_members(container, saved):
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(saved)

    def had_gradient(self, parameter: Tensor) -> bool:
        """Whether a parameter came with a gradient other than zero."""
        gradient = self._gradients.get(id(parameter))
        return gradient is not None and not is_fake(gradient) and bool(gradient.any())

    def drew_random_numbers(self) -> bool:
        """Whether torch's random streams have moved since the last rewind, as with dropout."""
        states = zip(torch_states(self.devices), self._streams, strict=True)
        return not all(torch.equal(now, then) for now, then in states)

    def version_counters(self) -> ExitStack:
        """Context that leaves the buffers' version counters alone, so that a backward begun before still works."""
        stack = ExitStack()
        for buffer, _ in self._contents:
            if not buffer.is_inference():
                stack.enter_context(_unsafe_preserve_version_counter(buffer))
        return stack


@contextmanager
def preserved(model: nn.Module, parameters: Iterable[Tensor] = (), *, grad: bool = False) -> Iterator[Guard]:
    """Run a block of loss evaluations that leaves no trace.

    Args:
        model: the model that is evaluated.
        parameters: parameters besides the model's own.
        grad: leave autograd on, for Hessian-vector products by `torch.autograd.grad`; off by default.

    Yields:
        Guard: call `Guard.rewind` before every evaluation.

    Memory: one copy of the model's buffers.
    """
    guard = Guard(model, parameters)
    with guard.version_counters():
        try:
            guard.hide_gradients()
            with torch.set_grad_enabled(grad), _no_false_alarm():
                yield guard
        finally:
            _finish(guard.restore)


@contextmanager
def _no_false_alarm() -> Iterator[None]:
    """Keep one warning silent, and all that Python remembers of warnings already given as it is.

    After `warnings.catch_warnings` every warning that is given once in a run is given once more.
    """
    # A list that the interpreter reads anew for every warning.
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    filters.insert(0, _FALSE_ALARM)
    try:
        yield
    finally:
        if _FALSE_ALARM in filters:
            filters.remove(_FALSE_ALARM)


def _finish(restore: Undo) -> None:
    """Run a restore to its end, also when the user interrupts it a second time."""
    try:
        restore()
    except KeyboardInterrupt:
        restore()
        raise


def _each(*steps: Undo) -> None:
    """Take every step, also when one of them fails; then raise what the first of those raised."""
    failures: list[BaseException] = []
    for step in steps:
        try:
            step()
        except BaseException as failure:
            failures.append(failure)
    if failures:
        raise failures[0]


def _note_modules(
    model: nn.Module, parameters: list[Tensor]
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Any, Any]], list[Any]]:
    """Every buffer and tensor attribute with its contents, every container of attributes with its own, everything else.

    Lists and dictionaries that are attributes are looked into. Aliases of parameters are left alone: the engines write
    those, or do not.
    """
    aliases = {storage_pointer(local(parameter)) for parameter in parameters} - {None}
    tensors: dict[int, Tensor] = {}
    containers: list[tuple[Any, Any]] = []
    others: list[Any] = []
    for module in model.modules():
        attributes = vars(module)
        held = [attributes, *(value for value in attributes.values() if type(value) in _CONTAINERS)]
        containers.extend((container, container.copy()) for container in held)
        for container in held:
            for value in container.values() if isinstance(container, dict) else container:
                if not isinstance(value, Tensor):
                    others.append(value)
                elif not isinstance(value, nn.Parameter) and storage_pointer(local(value)) not in aliases:
                    tensors.setdefault(id(value), value)
    shards = [local(tensor) for tensor in tensors.values()]
    return [(shard, shard.detach().clone()) for shard in shards], containers, others


def _same_members(container: Any, saved: Any) -> bool:
    """Whether both hold the same objects in the same order, without calling any object's ``==``."""
    if len(container) != len(saved):
        return False
    if isinstance(container, dict):
        return all(a is b and container[a] is saved[b] for a, b in zip(container, saved, strict=True))
    if isinstance(container, set):
        return {id(member) for member in container} == {id(member) for member in saved}
    return all(a is b for a, b in zip(container, saved, strict=True))


def _restore_content(tensor: Tensor, content: Tensor) -> None:
    if tensor.layout is not torch.strided:
        with torch.no_grad():
            tensor.detach().copy_(content)
        return
    # An expanded tensor has several elements at one address: write each address once.
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
        tensor.detach()[once].copy_(content[once])


def _note_autocast() -> Undo:
    cache = torch.is_autocast_cache_enabled()
    states = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _AUTOCAST_DEVICES]

    def undo() -> None:
        torch.set_autocast_cache_enabled(cache)
        for kind, enabled, dtype in states:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)

    return undo


def _note_requires_grad(parameters: list[Tensor]) -> Undo:
    flags = [parameter.requires_grad for parameter in parameters]

    def undo() -> None:
        for parameter, flag in zip(parameters, flags, strict=True):
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)

    return undo
