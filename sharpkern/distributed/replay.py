"""What a rank communicates in a pass of the caller's own making, noted, and gone through where the pass fails.

Stages of a pipeline wait for each other's activations, layers that are split by hand for sums over the ranks. What a
rank that failed owes to the others is known from the last pass that went well: operations on tensors of these sizes, in
this order. It takes part in the rest of them with zeros, so that nobody waits, and is told of afterwards. Before a pass
has gone well, ranks announce what they do; see `sharpkern.distributed.announced`.
"""

from contextlib import AbstractContextManager, suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from sharpkern.distributed.announced import Announced, finish


class _Shape(NamedTuple):
    """What stands for a tensor that was communicated; of small ones of integers, such as sizes, what they held too."""

    size: torch.Size
    dtype: torch.dtype
    device: torch.device
    content: Tensor | None

    def filled(self) -> Tensor:
        if self.content is not None:
            return self.content.clone()
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)


# Bytes of integers that are kept: what ranks tell each other of shapes.
_LITTLE = 1 << 16
_Operation = tuple[Any, Any, Any]
_known: WeakKeyDictionary[nn.Module, list[_Operation]] = WeakKeyDictionary()


class Replay:
    """The operations of a model's passes that other ranks take part in."""

    def __init__(self, model: nn.Module, announced: Announced | None = None) -> None:
        self._model = model
        self._announced = announced
        # Of the pass that goes on; None where that is not noted.
        self._now: list[_Operation] | None = None

    def noting(self) -> AbstractContextManager[object]:
        """Begin a pass, and return a context that notes what it communicates."""
        self._now = []
        if self._announced is not None:
            self._announced.begin()
        return _Noting(self._now, self._announced)

    def finish(self) -> None:
        """End a pass that went well."""
        if self._now is None:
            return
        _known[self._model], self._now = self._now, None
        if self._announced is not None:
            self._announced.end()

    def settle(self) -> None:
        """A pass has gone well on all ranks, each of which knows from now on what it communicates."""
        self._announced = None

    @torch.no_grad()
    def keep_up(self) -> bool:
        """End a pass that failed: do the rest of what the others wait for; whether another rank's had failed before."""
        now, self._now = self._now, None
        if now is None:
            return False
        if self._announced is not None:
            is_first = self._announced.fail()
            self._announced.answer()
            return not is_first
        rest = _known.get(self._model, [])[len(now) :]
        # All are begun before one is waited for, as ranks that send to each other begin both.
        results = [func(*_filled(args), **_filled(kwargs)) for func, args, kwargs in rest]
        for result in results:
            with suppress(RuntimeError):
                finish(result)
        return False


def is_known(model: nn.Module) -> bool:
    """Whether a pass of a model has gone well."""
    return model in _known


class _Noting(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, noted: list[_Operation], announced: Announced | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._noted, self._announced = noted, announced

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "c10d" in getattr(func, "namespace", ""):
            if self._announced is not None:
                self._announced.tell(func, args, kwargs)
            self._noted.append((func, _shapes(args), _shapes(kwargs)))
        return func(*args, **kwargs)


def _shapes(values: Any) -> Any:
    return tree_map(_shape, values)


def _shape(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    tells = not value.is_floating_point() and not value.is_complex() and value.nbytes <= _LITTLE
    return _Shape(value.size(), value.dtype, value.device, value.clone() if tells else None)


def _filled(values: Any) -> Any:
    return tree_map(
        lambda x: x.filled() if isinstance(x, _Shape) else x, values, is_leaf=lambda x: isinstance(x, _Shape)
    )
