"""Peak memory by counting the bytes of live tensors, with what they are for; tracemalloc sees none of them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sharpkern.distributed.sharding import local

ON_HOST = "on the host"


class PeakBytes(TorchDispatchMode):
    """Counts the storages that operators allocate while it is active, and those alive at once at most.

    Fake tensors count as the real ones they stand for: enter it inside of their mode, which then makes them. Under
    torch.func.vmap it sees whole batches. What an operator allocates and frees again by itself is not seen.

    Attributes:
        peak: bytes.
        parts: bytes by label, at the peak.
        host_bytes: of what is labelled `ON_HOST`, which is not of the device that is counted for.
    """

    def __init__(self, label: Callable[[Tensor, str], str] = lambda tensor, within: within) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._label_of = label
        self._default = ""
        self._live: dict[int, tuple[StorageWeakRef, int, str]] = {}
        # Some of it may be dead: no less is alive.
        self._total = 0
        self.peak = 0
        self.parts: dict[str, int] = {}
        self.host_bytes = 0

    @contextmanager
    def under(self, label: str) -> Iterator[None]:
        """Call what is made in a block by a name."""
        before, self._default = self._default, label
        try:
            yield
        finally:
            self._default = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(tensor)._cdata: tensor for tensor in _tensors_in((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for key, tensor in given.items():
            # FSDP2 frees and takes the memory of gathered parameters by their storages' size.
            if key in self._live and not self._live[key][0].expired():
                self._note(tensor, self._live[key][2])
        for tensor in _tensors_in(result):
            if tensor.device.type != "meta" and _storage(tensor)._cdata not in given:
                self._add(tensor)
        if self._total > self.peak:
            self._recount()
        return result

    def _add(self, tensor: Tensor) -> None:
        label = self._label_of(tensor, self._default)
        if label == ON_HOST:
            self.host_bytes += _storage(tensor).nbytes()
        else:
            self._note(tensor, label)

    def _note(self, tensor: Tensor, label: str) -> None:
        storage = _storage(tensor)
        before = self._live.get(storage._cdata)
        # Of a dead storage there is nothing left but its number.
        self._total += storage.nbytes() - (0 if before is None else before[1])
        self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), label

    def _recount(self) -> None:
        """Forget the dead, see who has given memory back without an operator, and whether this is the peak."""
        parts: Counter[str] = Counter()
        live = {}
        for key, (reference, _, label) in self._live.items():
            size = _size(reference)
            # What is empty now may be filled again.
            if size is not None:
                live[key] = reference, size, label
                parts[label] += size
        self._live = live
        self._total = parts.total()
        if self._total > self.peak:
            self.peak, self.parts = self._total, dict(parts)


def _size(reference: StorageWeakRef) -> int | None:
    """Bytes that a storage has now; None if it is dead."""
    storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
    return None if storage is None else int(storage.nbytes())


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor among the arguments or results of an operator."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        yield from _tensors_in(tuple(value.values()))


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    """What a tensor lies in: told apart by what it is and not by where, since fake ones lie nowhere; a shard's."""
    return local(tensor).untyped_storage()


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes of new tensors alive at once during a call."""
    counter = PeakBytes()
    with counter:
        function()
    return counter.peak


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors that do not share memory."""
    return sum(int(tensor.nbytes) for tensor in tensors)
