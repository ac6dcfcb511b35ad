"""Random numbers under torch.func.vmap: every step size sees those that a pass of its own would have drawn.

Which numbers a call draws depends on the shape and the layout of its tensors and, on a GPU, on the kernel that is
chosen for them. So they are drawn by the stock function, for the slice of one step size.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sharpkern.engines.batched.vmap import Rule, outside_vmap
from sharpkern.tensors.random_state import note_generators, note_streams


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout` with one mask for all step sizes."""
    if not training or p == 0:
        return F.dropout(input, p, training, inplace)

    def stock(input: Tensor) -> Tensor:
        return F.dropout(input, p, inplace=inplace)

    def rule(num_steps: int, several: Sequence[bool], tensors: Sequence[Any]) -> Tensor:
        (input,) = tensors
        if input.is_cuda and not inplace and p < 1:
            # The kernel that the stock function takes here: it multiplies in float32 at least, and rounds once.
            _, kept = torch.native_dropout(input[0], p, True)
            factor = kept.to(torch.promote_types(input.dtype, torch.float32)) / (1 - p)
        else:
            factor = stock(torch.ones_like(input[0]))
        return torch.mul(input, factor, out=torch.empty_like(input))

    result = outside_vmap(stock, rule, input)
    return input.copy_(result) if inplace else result


def drawn_alike(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that draws random numbers, called for one step size at a time from the same state of the streams."""

    @functools.wraps(function)
    def alike(*args: Any, **kwargs: Any) -> Tensor:
        # A result that is written into a given tensor is vmap's to refuse.
        if kwargs.get("out") is not None:
            return function(*args, **kwargs)
        values = [*args, *kwargs.values()]
        places = [place for place, value in enumerate(values) if isinstance(value, Tensor)]

        def stock(*tensors: Tensor) -> Tensor:
            filled = {**dict(enumerate(values)), **dict(zip(places, tensors, strict=True))}
            rest = [filled[place] for place in range(len(values))]
            return function(*rest[: len(args)], **dict(zip(kwargs, rest[len(args) :], strict=True)))

        return outside_vmap(stock, one_by_one(stock, kwargs.get("generator")), *(values[place] for place in places))

    return alike


def one_by_one(stock: Callable[..., Tensor], generator: torch.Generator | None = None) -> Rule:
    """The rule that calls a function for one step size after the other, each from the same state of the streams."""

    def rule(num_steps: int, several: Sequence[bool], tensors: Sequence[Any]) -> Tensor:
        rewind = [
            *note_streams(tensor.device for tensor in tensors if tensor is not None),
            *note_generators([generator]),
        ]
        results = []
        for step in range(num_steps):
            for put_back in rewind:
                put_back()
            results.append(stock(*(t[step] if own else t for t, own in zip(tensors, several, strict=True))))
        return torch.stack(results)

    return rule
