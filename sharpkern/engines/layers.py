"""Layers whose weight is worth more than being formed: the linear layer and the language-model head."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sharpkern import linear
from sharpkern.engines.steps import on_steps
from sharpkern.engines.table import Pair, Scratch, Step
from sharpkern.errors import EngineUnsupportedError
from sharpkern.head import cross_entropy_of_rows

# Takes hidden states [T, C] and labels [T], and the options of `cross_entropy_of_rows`.
HeadLoss = Callable[..., Tensor]


def linear_on_steps(pair: Pair, step: Step, x: Tensor, dtype: torch.dtype, way: str) -> Tensor:
    """X (W + αD)ᵀ for all step sizes that α stands for.

    Args:
        pair: the weight, [N, C].
        step: α, of several step sizes.
        x: input, [..., C] as torch.func.vmap shows it.
        dtype: in which factors are multiplied.
        way: see `linear.moving_linear`.

    Returns:
        Tensor: [..., N] in ``dtype``, as vmap shows it.
    """

    def of_all(x: Tensor, alpha: Tensor) -> Tensor:
        return linear.moving_linear(x, pair.weight, pair.move, alpha, dtype=dtype, way=way)

    return _on_steps(of_all, pair, step, x)


def head_loss(pair: Pair, step: Step, dtype: torch.dtype, scratch: Scratch) -> HeadLoss:
    """The cross-entropy of a head, some rows of which are formed at a time.

    Args:
        pair: the weight, [V, C].
        step: α.
        dtype: of the product.
        scratch: where the rows of one step size take turns.

    Returns:
        HeadLoss: `cross_entropy_of_rows` of hidden states and labels.
    """
    vocabulary = len(pair.weight)

    def rows(chosen: slice) -> Tensor:
        part = pair.view(lambda tensor: tensor[chosen])
        return part.form(step, dtype=dtype, out=scratch.take(part.weight, dtype)) if step else part.weight.to(dtype)

    def of_one(hidden: Tensor, labels: Tensor, **options: object) -> Tensor:
        return cross_entropy_of_rows(hidden, vocabulary, rows, labels, **options)  # type: ignore[arg-type]

    def of_several(hidden: Tensor, labels: Tensor, **options: object) -> Tensor:
        def of_all(hidden: Tensor, alpha: Tensor) -> Tensor:
            def rows(chosen: slice) -> Tensor:
                return pair.move.map(lambda tensor: tensor[chosen]).form(alpha, dtype=dtype)

            hidden = hidden.expand(len(alpha), -1, -1)
            return cross_entropy_of_rows(hidden, vocabulary, rows, labels, **options)  # type: ignore[arg-type]

        return _on_steps(of_all, pair, step, hidden)

    return of_several if step.is_several else of_one


def _on_steps(of_all: Callable[[Tensor, Tensor], Tensor], pair: Pair, step: Step, x: Tensor) -> Tensor:
    """Call with x, [K, ...] or [1, ...] where all step sizes share it, and α, [K], outside of torch.func.vmap."""

    def rule(num_steps: int, several: Sequence[bool], tensors: Sequence[Tensor]) -> Tensor:
        x, alpha = tensors
        if not several[1]:
            raise EngineUnsupportedError("loss_fn batches a layer by torch.func.vmap itself")
        return of_all(x if several[0] else x.unsqueeze(0), alpha.flatten())

    return on_steps(of_all, rule, x, step.of(pair.move))
