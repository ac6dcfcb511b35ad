"""What torch.func.vmap batches, taken out of it for one call: a rule sees all step sizes at once, as plain tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Takes the number of step sizes, which of the tensors have one slice for each in front, and the tensors (None where
# there is none). Returns a tensor with the step sizes in front.
Rule = Callable[[int, Sequence[bool], Sequence[Any]], Tensor]


class _OnSteps(torch.autograd.Function):
    """The public way out of vmap: torch hands the rule what lies under the wrappers."""

    @staticmethod
    def forward(stock: Callable[..., Tensor], rule: Rule, *tensors: Tensor | None) -> Tensor:
        return stock(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: there is no backward."""

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[int | None], stock: Any, rule: Rule, *tensors: Tensor | None
    ) -> tuple[Tensor, int]:
        if info.randomness == "different":
            raise RuntimeError("loss_fn calls torch.func.vmap with randomness of its own")
        dims = in_dims[2:]
        front = [
            tensor if tensor is None or dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, dims, strict=True)
        ]
        return rule(info.batch_size, [dim is not None for dim in dims], front), 0


def outside_vmap(stock: Callable[..., Tensor], rule: Rule, *tensors: Tensor | None) -> Tensor:
    """Call a rule on all that torch.func.vmap batches at once, or the stock function where it batches nothing."""
    result: Tensor = _OnSteps.apply(stock, rule, *tensors)  # type: ignore[no-untyped-call]
    return result
