"""What a rank communicates in a pass of the caller's own making, noted, and gone through where the pass fails.

Stages of a pipeline wait for each other's activations, layers that are split by hand for sums over the ranks. What a
rank that failed owes to the others is known from the last pass that went well: operations on tensors of these sizes, in
this order. It takes part in the rest of them with zeros, so that nobody waits, and is told of afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

# How long a rank that failed waits in each operation for the others.
_PATIENCE = timedelta(seconds=30)


class _Shape(NamedTuple):
    """What stands for a tensor that was communicated."""

    size: torch.Size
    dtype: torch.dtype
    device: torch.device

    def zeros(self) -> Tensor:
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)


_Operation = tuple[Any, Any, Any]
_known: WeakKeyDictionary[nn.Module, list[_Operation]] = WeakKeyDictionary()


class Replay:
    """The operations of a model's passes that other ranks take part in."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._now: list[_Operation] = []

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what a pass communicates."""
        self._now = []
        with _Noting(self._now):
            yield

    def finish(self) -> None:
        """End a pass that went well."""
        _known[self._model], self._now = self._now, []

    @torch.no_grad()
    def keep_up(self) -> None:
        """End a pass that failed: do the rest of what the others wait for."""
        rest = _known.get(self._model, [])[len(self._now) :]
        self._now = []
        # All are begun before one is waited for, as ranks that send to each other begin both.
        results = [func(*_filled(args), **_filled(kwargs)) for func, args, kwargs in rest]
        for one in tree_iter(results):
            if isinstance(one, torch.ScriptObject):
                with suppress(RuntimeError):
                    torch._C._distributed_c10d.Work.unbox(one).wait(_PATIENCE)


class _Noting(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, noted: list[_Operation]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._noted = noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "c10d" in getattr(func, "namespace", ""):
            self._noted.append((func, _shapes(args), _shapes(kwargs)))
        return func(*args, **kwargs)


def _shapes(values: Any) -> Any:
    return tree_map(lambda x: _Shape(x.size(), x.dtype, x.device) if isinstance(x, Tensor) else x, values)


def _filled(values: Any) -> Any:
    return tree_map(
        lambda x: x.zeros() if isinstance(x, _Shape) else x, values, is_leaf=lambda x: isinstance(x, _Shape)
    )
