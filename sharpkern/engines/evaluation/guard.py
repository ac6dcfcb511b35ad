"""What a loss evaluation may touch besides the parameters, kept at entry and put back: the measurement leaves no trace.

A closure advances random streams, BatchNorm statistics and step counters, caches tensors on modules, fills ``.grad``,
and may do the same to what it reaches outside of the model. A `Guard` notes all of it once; `Guard.rewind` goes back to
that state before every evaluation, so that every step size sees the same dropout masks and the same running statistics,
and `Guard.restore` goes back for good.
"""

import operator
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from sharpkern._undo import Step, Trace, note_autocast
from sharpkern.distributed.sharding import local
from sharpkern.engines.evaluation.parametrizations import empty_cache, note_cache
from sharpkern.engines.evaluation.reach import Reached, contents_of, is_record
from sharpkern.tensors.fake import is_fake
from sharpkern.tensors.random_state import note_generators, note_streams, seed_streams, stream_states
from sharpkern.tensors.storage import Owners, storage_pointer

# The closure that is being evaluated, if one is.
evaluating: list[object] = []

# Tensors outside of the model that take more are copied when a call is about to write them, and not before.
_LARGE = 2**26


class Guard:
    """The state of a model's and a closure's surroundings at the moment it was made.

    Attributes:
        trace: as given; whatever else is changed in the block is added to it.
        parameters: the model's, those given and those of other modules that are reached, each once.
        aliases: other tensors in reach that lie in their memory.
        devices: of the parameters and of the tensors that are noted.
    """

    def __init__(
        self,
        trace: Trace,
        model: nn.Module,
        parameters: Iterable[Tensor] = (),
        closures: Sequence[Callable[..., object]] = (),
    ) -> None:
        self.trace = trace
        reached = Reached(model)
        num_attributes = len(reached.containers)
        reached.follow()
        num_tensors, num_hooks = len(reached.tensors), len(reached.containers)
        reached.add(*closures)
        reached.follow()
        others = [p for module in reached.modules for p in module._parameters.values() if p is not None]
        self.parameters = list({id(p): p for p in (*model.parameters(), *parameters, *others)}.values())
        self._gradients = {id(p): p.grad for p in self.parameters}
        self._tensors = self._kept_tensors(reached.tensors, num_tensors)
        self._uncopied = [kept for kept in self._tensors if kept.content is None]
        self.devices = {tensor.device for tensor in (*self.parameters, *(kept.tensor for kept in self._tensors))}
        containers = [(container, container.copy()) for container in reached.containers]
        # Lists that a hook fills are the model's, as its attributes are; what hooks count is as of closures.
        hooks = containers[num_attributes:num_hooks]
        self._own_containers = containers[:num_attributes] + [kept for kept in hooks if not isinstance(kept[0], dict)]
        # One rank that fails must not leave its stages elsewhere than those of others.
        self._own_containers += [(container, container.copy()) for container in reached.schedules]
        # Most are the hook tables of modules without hooks.
        self._empty = [container for container, saved in self._own_containers if not saved]
        self._own_containers = [kept for kept in self._own_containers if kept[1]]
        self._other_containers = [kept for kept in hooks if isinstance(kept[0], dict)] + containers[num_hooks:]
        self._cells = [(cell, contents_of(cell)) for cell in reached.cells]
        self._names = [(scope, name, scope[name]) for scope, name in reached.names]
        self._undo: list[Step] = [
            *note_streams(self.devices),
            *note_generators(reached.generators),
            note_autocast(),
            _note_requires_grad(self.parameters),
            *(kept.restore for kept in self._tensors),
            empty_cache,
        ]
        self._put_cache_back = note_cache()
        self._generators = reached.generators
        self._streams = self.stream_states()
        # So that a backward begun before still works.
        self._versions = [
            _unsafe_preserve_version_counter(kept.tensor) for kept in self._tensors if not kept.tensor.is_inference()
        ]

    def hide_gradients(self) -> None:
        """Take ``.grad`` out of the closure's reach, for closures that begin with ``zero_grad()``."""
        for parameter in self.parameters:
            parameter.grad = None

    def rewind(self) -> None:
        """Put random streams, buffers, attributes, variables and flags back to where they were at entry."""
        # Not among the others: a guard that holds its own methods would live until the garbage collector comes by.
        _each([*self._undo, self._restore_containers, self._restore_variables])

    def reseed(self, seed: int) -> None:
        """Give the random streams other numbers than they had at entry, until `rewind`: dropout draws other masks."""
        seed_streams(f"other masks {seed}", self.devices, self._generators)

    def restore(self) -> None:
        """As `rewind`, and put back every ``.grad``, the same tensor object as at entry, and the version counters."""
        versions = (versions.__exit__ for versions in self._versions)
        _each([self.rewind, self._restore_gradients, self._put_cache_back, *versions])

    def before_write(self, written: Sequence[Tensor]) -> None:
        """Copy the large tensors whose memory is about to be written, unless that has been done."""
        if self._uncopied:
            pointers = {storage_pointer(tensor) for tensor in written}
            for kept in [kept for kept in self._uncopied if storage_pointer(kept.tensor) in pointers]:
                kept.copy()
                self._uncopied.remove(kept)

    @property
    def copies_late(self) -> bool:
        """Whether large tensors are copied only when a call is about to write them."""
        return bool(self._uncopied)

    def gradient_of(self, parameter: Tensor) -> Tensor | None:
        """The gradient that a parameter came with."""
        return self._gradients.get(id(parameter))

    def had_gradient(self, parameter: Tensor) -> bool:
        """Whether a parameter came with a gradient other than zero."""
        gradient = self.gradient_of(parameter)
        return gradient is not None and not is_fake(gradient) and bool(gradient.any())

    def drew_random_numbers(self) -> bool:
        """Whether random streams, or generators in reach, have moved since the last rewind, as with dropout."""
        return self.stream_states() != self._streams

    def stream_states(self) -> list[object]:
        """State of the random streams, and of the generators in reach."""
        return stream_states(self.devices, self._generators)

    def _kept_tensors(self, tensors: Sequence[Tensor], num_own: int) -> list["_Kept"]:
        """Note the tensors that are no parameters, nor aliases of one: the engines write those, or do not."""
        aliased = Owners((local(parameter), parameter) for parameter in self.parameters)
        self.aliases = [one for one in tensors if not isinstance(one, nn.Parameter) and aliased.of(local(one))]
        aliases = set(map(id, self.aliases))
        return [
            _Kept(local(tensor), now=index < num_own or tensor.layout is not torch.strided or tensor.nbytes <= _LARGE)
            for index, tensor in enumerate(tensors)
            if not isinstance(tensor, nn.Parameter) and id(tensor) not in aliases
        ]

    def _restore_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = self._gradients[id(parameter)]

    def _restore_containers(self) -> None:
        if any(self._empty):
            for container in self._empty:
                container.clear()
        for container, saved in self._own_containers:
            if not _same_members(container, saved):
                _refill(container, saved)
        for container, saved in self._other_containers:
            if not _same_members(container, saved):
                _refill(container, _with_records(container, saved))

    def _restore_variables(self) -> None:
        for cell, saved in self._cells:
            now = contents_of(cell)
            if saved and not is_record((*now, *saved)) and (not now or now[0] is not saved[0]):
                cell.cell_contents = saved[0]
            elif not saved and not is_record(now):
                del cell.cell_contents
        for scope, name, value in self._names:
            bound = scope.get(name)
            if bound is not value and not is_record((bound, value)):
                scope[name] = value


class _Kept:
    """A tensor with what it held: a copy of its contents, and the memory that it lay in."""

    def __init__(self, tensor: Tensor, *, now: bool) -> None:
        self.tensor = tensor
        # Of the same memory: where the tensor is given other memory, or another shape, this one keeps what it was.
        self._alias = tensor.detach()
        self.content: Tensor | None = None
        if now:
            self.copy()

    def copy(self) -> None:
        # FSDP1 frees memory that it leaves the tensors of.
        is_freed = storage_pointer(self.tensor) == 0 and self.tensor.numel() > 0
        self.content = None if is_freed else self._alias.clone()

    def restore(self) -> None:
        if not _lies_alike(self.tensor, self._alias):
            self.tensor.data = self._alias
        if self.content is not None:
            _restore_content(self.tensor, self.content)


def _each(steps: Iterable[Step]) -> None:
    """Take every step, also when one of them fails; then raise what the first of those raised."""
    failures: list[BaseException] = []
    for step in steps:
        try:
            step()
        except BaseException as failure:
            failures.append(failure)
    if failures:
        raise failures[0]


def _refill(container: Any, saved: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(saved)


def _with_records(container: Any, saved: Any) -> Any:
    """What a container goes back to: numbers and text that a closure has noted are the user's own record and stay."""
    if isinstance(container, dict):
        records = {key: now for key, now in container.items() if is_record((now, saved.get(key)))}
        return {**{key: then for key, then in saved.items() if key in container or not is_record((then,))}, **records}
    kept = {id(member) for member in saved} & {id(member) for member in container}
    changed = [member for member in (*container, *saved) if id(member) not in kept]
    return container.copy() if is_record(changed) else saved


def _same_members(container: Any, saved: Any) -> bool:
    """Whether both hold the same objects in the same order, without calling any object's ``==``."""
    if len(container) != len(saved):
        return False
    if isinstance(container, dict):
        return all(map(operator.is_, container, saved)) and all(map(operator.is_, container.values(), saved.values()))
    if isinstance(container, set):
        return {id(member) for member in container} == {id(member) for member in saved}
    return all(map(operator.is_, container, saved))


def _lies_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are of the same memory, shape and layout; of what has no memory of its own, taken for so."""
    if a.layout is not torch.strided:
        return True
    return (
        (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        and a.stride() == b.stride()
        and a.storage_offset() == b.storage_offset()
        and storage_pointer(a) == storage_pointer(b)
    )


def _restore_content(tensor: Tensor, content: Tensor) -> None:
    if tensor.layout is not torch.strided:
        with torch.no_grad():
            tensor.detach().copy_(content)
        return
    # An expanded tensor has several elements at one address: write each address once.
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
        tensor.detach()[once].copy_(content[once])


def _note_requires_grad(parameters: list[Tensor]) -> Step:
    flags = [parameter.requires_grad for parameter in parameters]

    def undo() -> None:
        for parameter, flag in zip(parameters, flags, strict=True):
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)

    return undo
