"""A second, independent look below torch's Python surface: which parameters' memory the operators really read.

The virtual engine recognises parameters by identity in Python calls. These modes recognise them by storage, one level
lower, where every operator of an eager pass goes by. They are slow and need a whole formed parameter per operator, so
they check single passes.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from sharpkern.engines.calls import map_tensors
from sharpkern.engines.table import Pair, Step, storage_pointer
from sharpkern.errors import EngineUnsupportedError


class _BelowPython(TorchDispatchMode):
    """Sees every operator, and those of the functions that higher-order operators such as flex attention call."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(func, HigherOrderOperator):
            return self.see(func, args, kwargs or {})
        plainly = func.py_kernels.get(torch._C.DispatchKey.CompositeExplicitAutograd)
        if plainly is None:
            raise EngineUnsupportedError(f"{func.name()} calls functions whose operators cannot be seen")
        with self:
            return plainly(*args, **(kwargs or {}))

    def see(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator."""
        raise NotImplementedError


class StorageWatch(_BelowPython):
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

    def see(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator, having noted what it reads."""

        def note(tensor: Tensor) -> Tensor:
            self.touched |= self._owners.get(storage_pointer(tensor), set())
            return tensor

        if not func.is_view:
            map_tensors((args, kwargs), note)
        return func(*args, **kwargs)


class StorageOracle(_BelowPython):
    """Evaluates at θ + αΔθ by putting formed weights wherever an operator reads a parameter's memory.

    Memory: formed copies of the parameters that one operator reads.
    """

    def __init__(self, pairs: Iterable[Pair], alpha: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pairs = {storage_pointer(pair.weight): pair for pair in pairs}
        self._step = Step(alpha)

    def see(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator with formed weights."""

        def replace(tensor: Tensor) -> Tensor:
            pair = self._pairs.get(storage_pointer(tensor))
            if pair is None:
                return tensor
            offset = tensor.storage_offset() - pair.weight.storage_offset()
            return pair.form(self._step).as_strided(tensor.size(), tensor.stride(), offset)

        # Views keep the parameter's storage and are seen again by the operator that reads them.
        if not func.is_view:
            args, kwargs = map_tensors(args, replace), map_tensors(kwargs, replace)
        return func(*args, **kwargs)
