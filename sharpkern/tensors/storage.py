"""Which tensors share memory: by their storage, and the bytes of it that they take."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def storage_pointer(tensor: Tensor) -> int | None:
    """Address of a tensor's storage, or None where it has none of its own: sparse tensors, wrappers of torch.func.

    Fake tensors lie nowhere, and are told apart by what would hold their memory.
    """
    try:
        storage = tensor.untyped_storage()
        return storage._cdata if storage.device.type == "meta" else storage.data_ptr()
    except (NotImplementedError, RuntimeError):
        return None


def byte_span(tensor: Tensor) -> tuple[int, int, int] | None:
    """Storage of a tensor, its first byte there and the one after its last; None where it takes no memory."""
    storage = storage_pointer(tensor)
    if not storage or not tensor.numel():
        return None
    start, size = int(tensor.storage_offset()), tensor.element_size()
    return storage, start * size, (start + elements_spanned(tensor)) * size


def elements_spanned(tensor: Tensor) -> int:
    """How many elements lie between a tensor's first and its last, both included."""
    if tensor.is_contiguous():
        return tensor.numel()
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have a byte in common; columns of one matrix have none."""
    span, other_span = byte_span(one), byte_span(other)
    if span is None or other_span is None or span[0] != other_span[0]:
        return False
    return max(span[1], other_span[1]) < min(span[2], other_span[2]) and _collide([one, other])


def overlapping(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the groups of tensors that share memory, by index; a tensor that has its memory to itself is in none."""
    if len({storage_pointer(tensor) for tensor in tensors}) == len(tensors):
        return []
    spans = sorted((span, index) for index, tensor in enumerate(tensors) if (span := byte_span(tensor)))
    groups: list[list[int]] = []
    last, end = 0, 0
    for (storage, start, stop), index in spans:
        if storage == last and start < end:
            groups[-1].append(index)
            end = max(end, stop)
        else:
            groups.append([index])
            last, end = storage, stop
    return [sorted(group) for group in groups if len(group) > 1 and _collide([tensors[i] for i in group])]


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether several elements of a tensor may be one in memory, as an expanded one's are."""
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


class Owners(Generic[Item]):
    """Whose memory a tensor lies in."""

    def __init__(self, owned: Iterable[tuple[Tensor, Item]]) -> None:
        self._owned: dict[int, list[tuple[int, int, Tensor, Item]]] = {}
        for tensor, item in owned:
            if span := byte_span(tensor):
                self._owned.setdefault(span[0], []).append((*span[1:], tensor, item))
        # For each, in the order of their starts, where the last byte of all before it is.
        self._reach: dict[int, list[int]] = {}
        for storage, mine in self._owned.items():
            mine.sort(key=lambda one: one[0])
            reach = 0
            self._reach[storage] = [reach := max(reach, end) for _, end, _, _ in mine]

    def of(self, tensor: Tensor) -> list[Item]:
        """Return what is found by the memory that a tensor lies in."""
        span = byte_span(tensor) if self._owned else None
        if span is None or span[0] not in self._owned:
            return []
        storage, start, stop = span
        mine, reach = self._owned[storage], self._reach[storage]
        index = bisect_left(mine, stop, key=lambda one: one[0])
        found = []
        while index and reach[index - 1] > start:
            index -= 1
            _, end, owner, item = mine[index]
            if end > start and _collide([owner, tensor]):
                found.append(item)
        return found


def _collide(tensors: Sequence[Tensor]) -> bool:
    """Whether any two of several tensors, whose spans meet, have a byte in common."""
    spans = [span for tensor in tensors if (span := byte_span(tensor))]
    if all(stop - start <= tensor.nbytes for (_, start, stop), tensor in zip(spans, tensors, strict=True)):
        return True
    first = min(start for _, start, _ in spans)
    marks = torch.zeros(max(stop for *_, stop in spans) - first, dtype=torch.bool, device="cpu")
    for (_, start, _), tensor in zip(spans, tensors, strict=True):
        size = tensor.element_size()
        # Several elements at one address are marked once.
        shape = [1 if stride == 0 else length for length, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        bytes_ = marks.as_strided((*shape, size), (*(size * stride for stride in tensor.stride()), 1), start - first)
        if bytes_.any():
            return True
        bytes_.fill_(True)
    return False
