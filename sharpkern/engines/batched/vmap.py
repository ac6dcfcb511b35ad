"""What torch.func.vmap batches, taken out of it for one call: a rule sees all step sizes at once, as plain tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import VmapInterpreter

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
        return _applied(rule, info.batch_size, tensors, in_dims[2:]), 0


def _applied(rule: Rule, num_steps: int, tensors: Sequence[Tensor | None], dims: Sequence[int | None]) -> Tensor:
    front = [
        tensor if tensor is None or dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, dims, strict=True)
    ]
    return rule(num_steps, [dim is not None for dim in dims], front)


def outside_vmap(stock: Callable[..., Tensor], rule: Rule, *tensors: Tensor | None) -> Tensor:
    """Call a rule on all that torch.func.vmap batches at once, or the stock function where it batches nothing."""
    alone = _sole_vmap()
    if alone is None:
        result: Tensor = _OnSteps.apply(stock, rule, *tensors)  # type: ignore[no-untyped-call]
        return result
    # What torch does on the way to the rule, without its search for tensors, which takes longer than most rules.
    level = alone.level()
    given = [(None, None) if one is None else _functorch._unwrap_batched(one, level) for one in tensors]
    with alone.lower():
        if all(dim is None for _, dim in given):
            return stock(*tensors)
        inside = _applied(rule, alone.batch_size(), *zip(*given, strict=True))
    batched: Tensor = _functorch._add_batch_dim(inside, 0, level)
    return batched


def _sole_vmap() -> VmapInterpreter | None:
    """The vmap that goes over step sizes, where no other transform of torch.func is at work and nothing is recorded."""
    stack = _functorch.get_interpreter_stack()
    if stack is None or len(stack) != 1 or torch.is_grad_enabled() or stack[0].key() != _functorch.TransformType.Vmap:
        return None
    found = VmapInterpreter(stack[0])
    return found if found.randomness() == "same" else None
