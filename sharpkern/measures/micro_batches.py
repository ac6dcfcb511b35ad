"""The micro-batches of one step: closures with weights, the random streams of training, batches that are split."""

import copy
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sharpkern.distributed.sharding import whole
from sharpkern.engines.evaluation.closure import LossFn
from sharpkern.engines.evaluation.guard import evaluating
from sharpkern.engines.session import Session
from sharpkern.tensors.random_state import Streams

Batch = TypeVar("Batch")
# A closure, or those of micro-batches with their weights.
Several = LossFn | Sequence[LossFn] | Sequence[tuple[LossFn, float]]
# What training knows: of the whole batch, or of each micro-batch.
Losses = float | Tensor | Sequence[float] | Sequence[Tensor] | Sequence[float | Tensor] | None
# What the gradient was multiplied by, or its norm before clipping and the largest one.
Clip = float | Tensor | tuple[float | Tensor, float] | None


class MicroBatch:
    """A closure of one micro-batch that training calls too: measurements repeat its dropout masks and know its loss.

    Called in training, it notes the random streams and the loss, and calls ``loss_fn``. Called in a measurement, it
    calls ``loss_fn`` with the random numbers of the last call in training, and leaves the streams as they were.

    Args:
        loss_fn: takes no argument and returns the loss of one micro-batch; its scale is that of a whole one.

    Raises:
        TypeError: ``loss_fn`` is not callable.

    Memory: 5 KB of random state.

    Examples:
        >>> import torch, sharpkern
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Dropout(0.5))
        >>> part = sharpkern.MicroBatch(lambda: model(torch.ones(2, 4)).square().mean())
        >>> loss = part()
        >>> bool(part.loss == loss)
        True
    """

    def __init__(self, loss_fn: Callable[[], Tensor]) -> None:
        if not callable(loss_fn):
            raise TypeError(
                f"loss_fn must be callable without arguments, got {type(loss_fn).__name__}; pass lambda: loss_of(batch)"
            )
        self.loss_fn = loss_fn
        self._trained: _Trained | None = None

    @property
    def loss(self) -> Tensor | None:
        """Of the last call in training, detached; None before."""
        return None if self._trained is None else self._trained.loss

    def __call__(self) -> Tensor:
        """Return the loss of the model's current parameters."""
        if not evaluating:
            streams = Streams()
            loss = self.loss_fn()
            self._trained = _Trained(streams, loss.detach()) if isinstance(loss, Tensor) else None
            return loss
        if self._trained is None:
            return self.loss_fn()
        here = Streams()
        try:
            self._trained.streams.put_back()
            return self.loss_fn()
        finally:
            here.put_back()


@dataclass(frozen=True)
class _Trained:
    """What is noted of a call in training."""

    streams: Streams
    loss: Tensor


def split(batch: Batch, parts: int) -> list[Batch]:
    """Split a batch into micro-batches, for a loop without gradient accumulation.

    The mean of their losses has to be the loss that was trained. So it is where that is a mean over rows; where it is
    one over tokens that differ in number, pass the numbers as ``weights=``. With BatchNorm in train mode it is not.

    Args:
        batch: a tensor or array [rows, ...], or a dictionary, ``BatchEncoding``, tuple or list of these and of lists
            with one member a row; what holds no rows, such as a number, goes into every part.
        parts: how many; it must divide the number of rows.

    Returns:
        list: the parts, of the batch's own type; tensors share its memory.

    Raises:
        TypeError: there is no tensor in ``batch``, or ``parts`` is no int.
        ValueError: tensors differ in their number of rows, or ``parts`` does not divide it.

    Examples:
        >>> import torch, sharpkern
        >>> [part["x"].tolist() for part in sharpkern.split({"x": torch.arange(4)}, 2)]
        [[0, 1], [2, 3]]
    """
    if isinstance(parts, bool) or not isinstance(parts, int):
        raise TypeError(f"parts must be an int, got {parts!r}; pass how many micro-batches to make")
    sizes = {tensor.shape[0] for tensor in _tensors(batch)}
    if not sizes:
        raise TypeError(f"batch must hold a tensor with rows, got {type(batch).__name__}; split the tensors it is of")
    if len(sizes) > 1:
        raise ValueError(f"tensors of batch must have the same number of rows, got {sorted(sizes)}; split them by hand")
    (rows,) = sizes
    if parts < 1 or rows % parts:
        near = [number for number in range(1, rows + 1) if rows % number == 0]
        raise ValueError(f"parts must divide the {rows} rows of batch, got {parts}; take one of {near}")
    size = rows // parts
    return [_rows(batch, slice(k * size, (k + 1) * size), rows) for k in range(parts)]


def _tensors(batch: Any) -> list[Tensor | np.ndarray]:
    if isinstance(batch, (Tensor, np.ndarray)):
        return [batch] if batch.ndim else []
    members = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return [tensor for member in members for tensor in _tensors(member)]


def _rows(batch: Any, rows: slice, num: int) -> Any:
    if isinstance(batch, (Tensor, np.ndarray)):
        return batch[rows] if batch.ndim else batch
    if isinstance(batch, MutableMapping):
        # BatchEncoding, defaultdict and the like are made from other things.
        part = copy.copy(batch)
        part.update({name: _rows(member, rows, num) for name, member in batch.items()})
        return part
    if isinstance(batch, (tuple, list)) and _tensors(batch):
        members = [_rows(member, rows, num) for member in batch]
        return type(batch)(*members) if hasattr(batch, "_fields") else type(batch)(members)
    return batch[rows] if isinstance(batch, (tuple, list)) and len(batch) == num else batch


class WholeBatch:
    """The weighted mean of micro-batches' losses, as one closure.

    Attributes:
        parts: the closures.
        weights: of each.
        total: what the sum is divided by: of the weights, the mean over ranks.
    """

    def __init__(self, parts: Sequence[LossFn], weights: Sequence[float]) -> None:
        self.parts, self.weights, self.total = list(parts), list(weights), math.fsum(weights)
        # Tells closures of this code from others.
        self.first = parts[0]

    def __call__(self) -> Tensor | None:
        """Evaluate them all; None where a rank has no loss of them."""
        total = None
        for part, weight in zip(self.parts, self.weights, strict=True):
            loss = part()
            if loss is not None:
                scaled = loss * (weight / self.total)
                total = scaled if total is None else total + scaled
        return total


@dataclass(frozen=True)
class Step:
    """The closures of one step, one or several, and what training knows of it.

    Attributes:
        closure: of the whole batch: the one that was given, or a `WholeBatch` of several.
        losses: of training, one for each micro-batch, or None.
        clip: what clipping multiplied the gradient by; None where nobody said.
    """

    closure: LossFn
    losses: list[float] | None = None
    clip: float | None = None

    @classmethod
    def of(
        cls,
        loss_fn: Any,
        weights: Any = None,
        losses: Any = None,
        clip: Any = None,
        name: str = "base_loss",
        *,
        sample: object = None,
    ) -> "Step":
        """What a caller gave, checked."""
        if not is_sequence(loss_fn):
            if sample is not None or weights is not None:
                raise TypeError(
                    "loss_fn must be a sequence of closures with sample= or weights=, one for each micro-batch, got "
                    "one; split the batch by sharpkern.split(batch, 16) and pass [lambda b=b: loss_of(b) for b in "
                    "parts]"
                )
            if not callable(loss_fn):
                raise TypeError(
                    f"loss_fn must be callable without arguments, got {type(loss_fn).__name__}; pass lambda: loss of "
                    "the batch"
                )
            return cls(loss_fn)
        pairs = [one if isinstance(one, tuple) else (one, 1.0) for one in loss_fn]
        if not pairs or not all(len(pair) == 2 and callable(pair[0]) for pair in pairs):
            raise TypeError(
                "loss_fn must be a closure, or a sequence of closures or (closure, weight), one for each micro-batch, "
                f"got {[type(one).__name__ for one in loss_fn][:3]}; pass [lambda b=b: loss_of(b) for b in batches]"
            )
        parts, own = zip(*pairs, strict=True)
        chosen: list[Any] = [*own] if weights is None else [weights]
        if isinstance(weights, (Sequence, Tensor, np.ndarray)) and not isinstance(weights, str):
            chosen = [*weights]
        if len(chosen) != len(parts) or not all(_is_number(one) and 0 < float(one) < math.inf for one in chosen):
            raise ValueError(
                f"weights must be {len(parts)} positive finite numbers, one for each closure, got {chosen}; "
                "leave them out where all micro-batches count the same"
            )
        known = _losses(parts, losses, name)
        return cls(WholeBatch(parts, [float(weight) for weight in chosen]), known, coefficient(clip))

    @property
    def parts(self) -> list[LossFn]:
        """The micro-batches' closures; none where one closure was given."""
        return self.closure.parts if isinstance(self.closure, WholeBatch) else []

    @property
    def weights(self) -> list[float]:
        """Of the parts."""
        return self.closure.weights if isinstance(self.closure, WholeBatch) else []

    @property
    def loss_fns(self) -> list[LossFn]:
        """All closures, the whole batch's first."""
        return [self.closure, *self.parts]

    def loss(self, given: Any) -> Any:
        """The loss that was trained, of this rank's batch, its weights being taken for as large as other ranks'."""
        if self.losses is None or not isinstance(self.closure, WholeBatch):
            return given
        pairs = zip(self.losses, self.weights, strict=True)
        return math.fsum(loss * weight for loss, weight in pairs) / self.closure.total

    def settle(self, session: Session) -> None:
        """Weigh this rank's batch by its share of all weights."""
        if isinstance(self.closure, WholeBatch):
            (self.closure.total,) = session.ranks.means([math.fsum(self.weights)])
        if self.losses is not None and session.base_loss is not None:
            (session.base_loss,) = session.ranks.means([self.loss(None)])


def _losses(parts: Sequence[Any], given: Any, name: str) -> list[float] | None:
    """The losses of micro-batches that training has computed."""
    noted = [part.loss if isinstance(part, MicroBatch) else None for part in parts]
    several = given
    if given is None or (isinstance(given, Tensor) and given.numel() == 1) or isinstance(given, (int, float)):
        several = None if any(loss is None for loss in noted) else noted
    if several is None:
        return None
    if (
        not isinstance(several, (Sequence, Tensor, np.ndarray))
        or len(several) != len(parts)
        or not all(map(_is_number, several))
    ):
        raise ValueError(
            f"{name} must be one number, or one for each of {len(parts)} closures, got {several!r}; leave it out"
        )
    if isinstance(several, Tensor):
        return [float(loss) for loss in several.detach().tolist()]
    tensors = [loss for loss in several if isinstance(loss, Tensor)]
    if len(tensors) == len(parts) and len({loss.device for loss in tensors}) == 1:
        # The host waits for the device once.
        return [float(x) for x in torch.stack([whole(loss.detach()).double().reshape(()) for loss in tensors]).tolist()]
    return [float(loss) for loss in several]


def coefficient(clip: object) -> float | None:
    """What a gradient was multiplied by: the number itself, or that of ``clip_grad_norm_`` from norm and maximum."""
    if clip is None:
        return None
    numbers = clip if isinstance(clip, tuple) else (clip,)
    if len(numbers) > 2 or not all(map(_is_number, numbers)):
        raise TypeError(
            f"clip must be a number or the pair (norm before clipping, max_norm), got {clip!r}; pass "
            "(clip_grad_norm_(parameters, max_norm), max_norm)"
        )
    found = [float(whole(x)) if isinstance(x, Tensor) else float(x) for x in numbers]
    factor = found[0] if len(found) == 1 else min(1.0, found[1] / (found[0] + 1e-6))
    if not 0 < factor <= 1:
        raise ValueError(
            f"clip must be what the gradient was multiplied by, in (0, 1], got {factor:.4g}; pass "
            "(norm before clipping, max_norm) for it to be computed, or 1.0 where nothing was clipped"
        )
    return factor


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) or (isinstance(value, Tensor) and value.numel() == 1)


def is_sequence(loss_fn: object) -> bool:
    """Whether closures of micro-batches were given in place of one."""
    return isinstance(loss_fn, Sequence) and not isinstance(loss_fn, (str, bytes))
