"""A second, independent look below torch's Python surface: which parameters' memory the operators really read.

The virtual engine recognises parameters by identity in Python calls. These modes recognise them by storage, one level
lower, where every operator of an eager pass goes by. They are slow and need a whole formed parameter per operator, so
they check single passes.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from sharpkern.engines.evaluation.closure import Closure
from sharpkern.engines.evaluation.compiled import Eagerly
from sharpkern.engines.tracked import Step, TrackedParam
from sharpkern.engines.virtual.torch_calls import map_tensors
from sharpkern.errors import EngineUnsupportedError
from sharpkern.tensors.storage import Owners, byte_span

# A multiple of every dtype's size.
_ALIGNED = 16


class _BelowPython(TorchDispatchMode):
    """Sees every operator, and those of the functions that higher-order operators such as flex attention call."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(func, HigherOrderOperator):
            if func.is_view and torch.is_inference_mode_enabled():
                # What is a view or a copy, such as `to` and `reshape`, arrives whole there: its parts tell.
                with self:
                    parts = func.decompose(*args, **(kwargs or {}))
                if parts is not NotImplemented:
                    return parts
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
    """Notes which parameters' memory any operator reads.

    Attributes:
        touched: what `TrackedParam.memory` is of them.
    """

    def __init__(self, pairs: Iterable[TrackedParam]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owners = Owners((pair.weight, pair.memory) for pair in pairs)
        self.touched: set[int] = set()

    def see(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator, having noted what it reads."""

        def note(tensor: Tensor) -> Tensor:
            self.touched.update(self._owners.of(tensor))
            return tensor

        if not func.is_view:
            map_tensors((args, kwargs), note)
        return func(*args, **kwargs)


class StorageOracle(_BelowPython):
    """Evaluates at θ + αΔθ by putting formed weights wherever an operator reads a parameter's memory."""

    def __init__(self, pairs: Iterable[TrackedParam], alpha: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pairs = Owners((pair.weight, pair) for pair in pairs)
        self._step = Step(alpha)

    def see(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator with formed weights."""

        def replace(tensor: Tensor) -> Tensor:
            pairs = self._pairs.of(tensor)
            return moved(tensor, pairs, self._step) if pairs else tensor

        # Views keep the parameter's storage and are seen again by the operator that reads them.
        if not func.is_view:
            args, kwargs = map_tensors(args, replace), map_tensors(kwargs, replace)
        return func(*args, **kwargs)


def oracle_loss(pairs: Iterable[TrackedParam], closure: Closure, eta: float) -> float:
    """The loss at θ − ηΔθ by `StorageOracle`, which shares nothing with the engines."""
    # Casts that an enclosing autocast keeps are of θ before, and of θ − ηΔθ after.
    torch.clear_autocast_cache()
    precision = closure.precision
    seen = precision.loss_dtype
    try:
        return closure(Eagerly(StorageOracle(pairs, -eta)))
    finally:
        torch.clear_autocast_cache()
        # Without the mode a 16-bit loss is not taken to float32: that says nothing of the engine's losses.
        precision.loss_dtype = seen


@torch.no_grad()
def moved(tensor: Tensor, pairs: Sequence[TrackedParam], step: Step) -> Tensor:
    """A copy of a tensor as it would be, had the parameters in its memory moved.

    It may hold several parameters, a part of one, or the bytes of one as another dtype.
    """
    spans = [span for one in (tensor, *(pair.weight for pair in pairs)) if (span := byte_span(one))]
    first = min(start for _, start, _ in spans) // _ALIGNED * _ALIGNED
    copy = _copied(tensor.untyped_storage(), first, max(stop for *_, stop in spans))

    def there(like: Tensor) -> Tensor:
        offset = like.storage_offset() - first // like.element_size()
        return copy.view(like.dtype).as_strided(like.size(), like.stride(), offset)

    for pair in pairs:
        pair.form(step, out=there(pair.weight))
    result = there(tensor)
    result = result.conj() if tensor.is_conj() else result
    return torch._neg_view(result) if tensor.is_neg() else result


def _copied(storage: torch.UntypedStorage, first: int, stop: int) -> Tensor:
    """A copy of some bytes of a storage, filled up to a length that every dtype divides."""
    there = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, first, (stop - first,), (1,))
    copy = there.new_zeros(-(-len(there) // _ALIGNED) * _ALIGNED)
    copy[: len(there)] = there
    return copy
