"""Peak memory by counting the bytes of live tensors; tracemalloc sees none of them."""

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sharpkern.shards import local


class PeakBytes(TorchDispatchMode):
    """Counts the storages that operators allocate while it is active, and those alive at once at most.

    Fake tensors count as the real ones they stand for: enter it inside of their mode, which then makes them. Under
    torch.func.vmap it sees whole batches. What an operator allocates and frees again by itself is not seen.

    Attributes:
        peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta" and _storage(leaf) not in given:
                storage = local(leaf).untyped_storage()
                self._live[_storage(leaf)] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def _storage(tensor: Tensor) -> int:
    """Which storage a tensor lies in: not where, since fake ones lie nowhere. Of a DTensor, its shard's."""
    return local(tensor).untyped_storage()._cdata


def peak_bytes(function: Any) -> int:
    """Most bytes of new tensors alive at once during a call."""
    with PeakBytes() as counter:
        function()
    return counter.peak


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
