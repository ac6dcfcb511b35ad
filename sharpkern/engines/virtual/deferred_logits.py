"""Logits that are not there: what they would be computed from, and how calls on them keep tokens apart.

Deferred logits know the hidden states of every row of the storage that they would lie in. A call on them is first made
on a meta tensor of their shape and strides: where its result still consists of whole rows, the hidden states of those
rows follow from strides and offset alone, whatever the call was.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharpkern.engines.virtual import torch_calls as calls
from sharpkern.engines.virtual.layers import HeadLoss
from sharpkern.errors import EngineUnsupportedError

_COPIES = frozenset("contiguous clone".split())
# Of the calls that usually give views, those that may copy without changing the order of the elements.
_IN_ORDER = frozenset("reshape flatten".split())

_DIVISIONS = frozenset("div divide true_divide __truediv__".split())
_PRODUCTS = frozenset("mul multiply __mul__ __rmul__".split())


@dataclass(frozen=True)
class Head:
    """A matrix product that was put off.

    Attributes:
        hidden: last hidden states, [..., C].
        vocabulary: V.
        dtype: the product's.
        loss: the cross-entropy of hidden states and labels.
        call: the call that was put off, without arguments.
        autocast: makes the autocast context of that call.
        version: of ``hidden`` at that call, see `version_of`.
    """

    hidden: Tensor
    vocabulary: int
    dtype: torch.dtype
    loss: HeadLoss
    call: Callable[[], Tensor]
    autocast: Callable[[], AbstractContextManager[object]]
    version: int

    def logits(self) -> Tensor:
        """Make the product as it would have been made at once, [..., V]."""
        self.check()
        with self.autocast():
            return self.call()

    def check(self) -> None:
        """Refuse to go on from hidden states that are no longer what the head was called with."""
        if version_of(self.hidden) != self.version:
            raise EngineUnsupportedError(
                "loss_fn writes the hidden states after the language-model head was called, whose logits are not "
                "computed before it is known what for"
            )


@dataclass(frozen=True)
class Cap:
    """How far a soft-cap c·tanh(z/c) has come: "divided" by c, "bent" by tanh, or "done"."""

    bound: float
    stage: str


@dataclass(eq=False)
class Deferred:
    """Logits, or a view or copy of some, that are not there.

    Attributes:
        head: the product they come of.
        layout: meta tensor with their shape, strides, offset and dtype.
        states: hidden states of every row of their storage, [R, C] contiguous.
        make: the call that was put off; None once it has been made.
        cap: the soft-cap they are in, or None.
        real: the tensor, once it was needed.
    """

    head: Head
    layout: Tensor
    states: Tensor
    make: Callable[[], Tensor] | None
    cap: Cap | None = None
    real: Tensor | None = None

    @property
    def hidden(self) -> Tensor:
        """Their hidden states, [..., C] with their leading dimensions."""
        width = self.states.shape[1]

        def by_rows(elements: int | torch.SymInt) -> int:
            return int(elements) // self.head.vocabulary * width

        strides = [by_rows(stride) for stride in self.layout.stride()[:-1]]
        offset = self.states.storage_offset() + by_rows(self.layout.storage_offset())
        return self.states.as_strided((*self.layout.shape[:-1], width), (*strides, 1), offset)

    def made(self) -> Tensor:
        """The tensor itself: views of one tensor are views here too."""
        if self.make is not None:
            self.real, self.make = self.make(), None
        assert self.real is not None
        return self.real

    def after(self, func: Any, name: str, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> "Deferred | None":
        """What a call gives that keeps every token's logits together."""
        try:
            layout, cap = self._layout_after(func, name, rest, kwargs)
        except Exception:
            # What a meta tensor cannot do, or no tensor can: the logits themselves will tell.
            return None
        if layout is self.layout:
            return self
        if not isinstance(layout, Tensor) or not _has_whole_rows(layout, self.head.vocabulary):
            return None
        is_view = name in calls.LINEAR_IN_FIRST
        if is_view and layout.dtype != self.layout.dtype:
            # The bits of the logits, read as another dtype.
            return None
        states = self.states
        if layout.untyped_storage()._cdata != self.layout.untyped_storage()._cdata:
            if not layout.is_contiguous() or (is_view and name not in _IN_ORDER):
                return None
            states = self.hidden.reshape(-1, states.shape[1]).contiguous()
        return Deferred(self.head, layout, states, lambda: func(self.made(), *rest, **kwargs), cap)

    def _layout_after(self, func: Any, name: str, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """What the call makes of the layout, and of the soft-cap."""
        if name in calls.LINEAR_IN_FIRST or name in _COPIES:
            return func(self.layout, *rest, **kwargs), self.cap
        if name in calls.CASTS:
            return self._cast(func, rest, kwargs), self.cap
        cap = None if kwargs else _capped(name, self.cap, rest)
        return None if cap is None else torch.empty_like(self.layout), cap

    def _cast(self, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The layout after a cast; None for one to another device, to integers, or to more bits than a loss has."""
        empty = torch.empty(0, dtype=self.layout.dtype, device=self.states.device)
        result = func(empty, *rest, **kwargs)
        if result is empty:
            return self.layout
        if not isinstance(result, Tensor) or result.device != empty.device or not result.is_floating_point():
            return None
        if result.dtype.itemsize > max(4, empty.dtype.itemsize):
            return None
        return torch.empty_like(self.layout, dtype=result.dtype)


def _capped(name: str, cap: Cap | None, rest: tuple[Any, ...]) -> Cap | None:
    """The soft-cap after one more call, c·tanh(z/c) being spelled z / c, tanh, · c; None for any other call."""
    if name == "tanh" and cap is not None and cap.stage == "divided":
        return Cap(cap.bound, "bent")
    if len(rest) != 1 or type(rest[0]) not in (int, float):
        return None
    if name in _DIVISIONS and cap is None and rest[0] > 0:
        return Cap(rest[0], "divided")
    if name in _PRODUCTS and cap == Cap(rest[0], "bent"):
        return Cap(rest[0], "done")
    return None


def _has_whole_rows(layout: Tensor, vocabulary: int) -> bool:
    """Whether the last dimension is the vocabulary, and each row all logits of one token."""
    steps = (layout.storage_offset(), *layout.stride()[:-1])
    return (
        layout.dim() > 0
        and layout.shape[-1] == vocabulary
        and layout.stride(-1) == 1
        and not any(step % vocabulary for step in steps)
    )


def version_of(tensor: Tensor) -> int:
    """How often a tensor's memory was written: wrappers of torch.func do not count that themselves."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor._version


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among nested values."""
    tensors: list[Tensor] = []
    calls.map_values(lambda value: tensors.append(value) if isinstance(value, Tensor) else None, values)
    return tensors
