"""The torch functions that torch.func.vmap batches wrongly, slowly or not at all, and ours in their place.

Ours take the same arguments. Where nothing is batched they do what the stock functions do; where something is, their
results are without gradient.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sharpkern.engines.batched.attention import attention
from sharpkern.engines.batched.batch_norms import batch_norm, instance_norm
from sharpkern.engines.batched.random_draws import drawn_alike, dropout


def _torch_dropout(input: Tensor, p: float, train: bool) -> Tensor:
    """`torch.dropout`."""
    return dropout(input, p, train)


def _calling_ours(function: Callable[..., Any]) -> Callable[..., Any]:
    """A Python function of torch whose own calls, which no function mode sees, are of our functions."""
    if not isinstance(function, FunctionType):
        return function
    ours = {
        "scaled_dot_product_attention": attention,
        "dropout": dropout,
        # Under a mode of the user it would call itself by its public name, and then torch's functions.
        "has_torch_function": lambda tensors: False,
    }
    scope = {**function.__globals__, **ours}
    alike = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    alike.__kwdefaults__ = function.__kwdefaults__
    return alike


# By the functions as a torch-function mode sees them.
REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: attention,
    F.multi_head_attention_forward: _calling_ours(F.multi_head_attention_forward),
    F.dropout: dropout,
    torch.dropout: _torch_dropout,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    **{
        function: drawn_alike(function)
        for function in (
            torch.bernoulli,
            torch.Tensor.bernoulli,
            torch.multinomial,
            torch.Tensor.multinomial,
            torch.normal,
        )
    },
}
