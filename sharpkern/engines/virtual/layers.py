"""Layers whose weight is worth more than being formed: the linear layer and the language-model head."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpkern.engines.batched.vmap import outside_vmap
from sharpkern.engines.tracked import Scratch, Step, TrackedParam, formed, stream_of
from sharpkern.engines.virtual import linear
from sharpkern.errors import EngineUnsupportedError
from sharpkern.ops.linear_cross_entropy import cross_entropy_of_rows
from sharpkern.tensors.fake import device_kind

# Where several step sizes are formed in the cache block by block, quicker than they would be read from memory again.
_IN_CACHE = ("cpu",)

# Takes hidden states [T, C] and labels [T], and the options of `cross_entropy_of_rows`.
HeadLoss = Callable[..., Tensor]


class Kept:
    """Formed weights of linear layers, for the next closure that is evaluated at the same step sizes.

    Attributes:
        enabled: whether another closure will be evaluated at these step sizes, or was.
    """

    def __init__(self, num_bytes: int) -> None:
        self.enabled = True
        self._num_bytes = self._room = num_bytes
        self._step_sizes: tuple[float, ...] = ()
        self._weights: dict[tuple[Any, ...], Tensor] = {}

    def begin(self, step_sizes: tuple[float, ...]) -> None:
        """Start a pass, and forget what is of other step sizes."""
        if step_sizes != self._step_sizes:
            self._weights, self._room = {}, self._num_bytes
        self._step_sizes = step_sizes

    def weights(self, pair: TrackedParam, step: Step | Tensor, dtype: torch.dtype) -> Tensor | None:
        """W + α_k D, [K, N, C], formed where it is not there yet; None where there is no room for it."""
        if not self._num_bytes:
            return None
        weight, alpha = pair.weight, step.of(pair.move) if isinstance(step, Step) else step
        key = (pair.owner, weight.storage_offset(), weight.shape, weight.stride(), dtype, stream_of(weight.device))
        if key not in self._weights:
            num_bytes = len(alpha) * weight.numel() * dtype.itemsize
            if num_bytes > self._room or not self.enabled:
                return None
            self._room -= num_bytes
            self._weights[key] = formed(pair.move, alpha, dtype)
        return self._weights[key]


def linear_on_steps(
    pair: TrackedParam, bias: TrackedParam | None, step: Step, x: Tensor, dtype: torch.dtype, way: str, kept: Kept
) -> Tensor:
    """The layer x (W + αD)ᵀ + b + αd for all step sizes that α stands for."""

    def of_all(x: Tensor, alpha: Tensor) -> Tensor:
        keeps = way == "formed" and device_kind(x.device) not in _IN_CACHE
        weights = kept.weights(pair, alpha, dtype) if keeps else None
        vectors = None if bias is None else formed(bias.move, alpha, dtype)
        if weights is None:
            return linear.moving_linear(x, pair.weight, pair.move, alpha, dtype=dtype, way=way, bias=vectors)
        flat = x.to(dtype).reshape(len(x), -1, x.shape[-1]).expand(len(alpha), -1, -1)
        return linear.with_weights(flat, weights, vectors).reshape(len(alpha), *x.shape[1:-1], -1)

    return _on_steps(of_all, pair, step, x)


def head_loss(pair: TrackedParam, step: Step, dtype: torch.dtype, scratch: Scratch) -> HeadLoss:
    """The cross-entropy of a head, some rows of which are formed at a time."""
    vocabulary = len(pair.weight)

    def rows(chosen: slice) -> Tensor:
        if not step:
            return pair.weight[chosen].to(dtype)
        part = pair.rows(chosen)
        return part.form(step, dtype=dtype, out=scratch.take(part.weight, dtype))

    def of_one(hidden: Tensor, labels: Tensor, **options: object) -> Tensor:
        return cross_entropy_of_rows(hidden, vocabulary, rows, labels, **options)  # type: ignore[arg-type]

    def of_several(hidden: Tensor, labels: Tensor, **options: object) -> Tensor:
        def of_all(hidden: Tensor, alpha: Tensor) -> Tensor:
            def rows(chosen: slice) -> Tensor:
                return formed(pair.move.rows(chosen), alpha, dtype)

            hidden = hidden.expand(len(alpha), -1, -1)
            height = linear.rows_of_head(hidden)
            return cross_entropy_of_rows(hidden, vocabulary, rows, labels, height=height, **options)  # type: ignore[arg-type]

        return _on_steps(of_all, pair, step, hidden)

    return of_several if step.is_several else of_one


def _on_steps(of_all: Callable[[Tensor, Tensor], Tensor], pair: TrackedParam, step: Step, x: Tensor) -> Tensor:
    """Call with x, [K, ...] or [1, ...] where all step sizes share it, and α, [K], outside of torch.func.vmap."""

    def rule(num_steps: int, several: Sequence[bool], tensors: Sequence[Tensor]) -> Tensor:
        x, alpha = tensors
        if not several[1]:
            raise EngineUnsupportedError("loss_fn batches a layer by torch.func.vmap itself")
        return of_all(x if several[0] else x.unsqueeze(0), alpha.flatten())

    return outside_vmap(of_all, rule, x, step.of(pair.move))
