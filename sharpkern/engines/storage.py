"""A second, independent look below torch's Python surface: which parameters' memory the operators really read.

The virtual engine recognises parameters by identity in Python calls. These modes recognise them by storage, one level
lower, where every operator of an eager pass goes by. They are slow and need a whole formed parameter per operator, so
they check single passes.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sharpkern.engines.calls import map_tensors
from sharpkern.engines.table import Pair, Step, storage_pointer


class StorageWatch(TorchDispatchMode):
    """Notes which parameters of the table any operator reads.

    Attributes:
        touched: indices of the parameters.
    """

    def __init__(self, pairs: Iterable[Pair]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owners: dict[int | None, set[int]] = {}
        for pair in pairs:
            self._owners.setdefault(storage_pointer(pair.weight), set()).add(pair.owner)
        self.touched: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def note(tensor: Tensor) -> Tensor:
            self.touched |= self._owners.get(storage_pointer(tensor), set())
            return tensor

        if not func.is_view:
            map_tensors((args, kwargs), note)
        return func(*args, **(kwargs or {}))


class StorageOracle(TorchDispatchMode):
    """Evaluates at θ + αΔθ by putting formed weights wherever an operator reads a parameter's memory.

    Memory: formed copies of the parameters that one operator reads.
    """

    def __init__(self, pairs: Iterable[Pair], alpha: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pairs = {storage_pointer(pair.weight): pair for pair in pairs}
        self._step = Step(alpha)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def replace(tensor: Tensor) -> Tensor:
            pair = self._pairs.get(storage_pointer(tensor))
            if pair is None:
                return tensor
            offset = tensor.storage_offset() - pair.weight.storage_offset()
            return pair.form(self._step).as_strided(tensor.size(), tensor.stride(), offset)

        # Views keep the parameter's storage and are seen again by the operator that reads them.
        if not func.is_view:
            args, kwargs = map_tensors(args, replace), map_tensors(kwargs or {}, replace)
        return func(*args, **(kwargs or {}))
