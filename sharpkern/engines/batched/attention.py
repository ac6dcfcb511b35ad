"""Attention for several step sizes by one call: they join the batch, whatever the mask."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sharpkern.engines.batched.random_draws import one_by_one
from sharpkern.engines.batched.vmap import Rule, outside_vmap

_MOST_SAMPLES = 65535
# More than any engine has at a time.
_MOST_STEPS = 16


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, any of whose tensors torch.func.vmap may batch.

    With dropout, each step size has a call of its own from the same random state.
    """

    def stock(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    # Kernels of CUDA take no more samples at once, and say so in an error that a loop does not survive.
    fits = math.prod(torch.broadcast_shapes(query.shape[:-3], key.shape[:-3])) * _MOST_STEPS <= _MOST_SAMPLES
    rule = _in_the_batch(stock) if fits and not dropout_p else one_by_one(stock)
    return outside_vmap(stock, rule, query, key, value, attn_mask)


def _in_the_batch(stock: Callable[..., Tensor]) -> Rule:
    """The rule that makes step sizes and batch one dimension, of four: fused kernels take no other number."""

    def rule(num_steps: int, several: Sequence[bool], tensors: Sequence[Any]) -> Tensor:
        query, key, value, mask = (
            tensor if own or tensor is None else tensor.unsqueeze(0)
            for tensor, own in zip(tensors, several, strict=True)
        )
        lead = torch.broadcast_shapes(*(tensor.shape[1:-3] for tensor in (query, key, value)))

        def aligned(tensor: Tensor) -> Tensor:
            """[K or 1, *lead or ones, H, T, E]."""
            missing = len(lead) + 4 - tensor.dim()
            return tensor.reshape(len(tensor), *(1,) * missing, *tensor.shape[1:])

        def folded(tensor: Tensor) -> Tensor:
            return aligned(tensor).expand(num_steps, *lead, -1, -1, -1).flatten(0, len(lead))

        if mask is not None:
            mask = aligned(mask)
            shared = mask.shape[: 1 + len(lead)].numel() == 1
            mask = mask.flatten(0, len(lead)) if shared else folded(mask)
        result: Tensor = stock(folded(query), folded(key), folded(value), mask).unflatten(0, (num_steps, *lead))
        has_heads = any(tensor.dim() > 3 for tensor in (query, key, value))
        return result if has_heads else result.squeeze(1)

    return rule
