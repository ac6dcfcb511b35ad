"""Norms whose weights move, by one kernel: W + αΔθ meets x in float32 and is never rounded, nor written to memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sharpkern import ops
from sharpkern.engines.tracked import Step, TrackedParam

PairOf = Callable[[Any], TrackedParam | None]
UpdateOf = Callable[[TrackedParam], Tensor]


def moving_norm(
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    pair_of: PairOf,
    step: Step,
    update_of: UpdateOf = lambda pair: pair.move.update(),
) -> tuple[Tensor, set[int]] | None:
    """The result of a call, or None where it is not one for a kernel."""
    # The stock operators have rules of their own for autograd and autocast.
    if torch.is_grad_enabled():
        return None
    if func is F.layer_norm:
        return _layer_norm(pair_of, update_of, step, *args, **kwargs)
    if func is F.rms_norm:
        return _rms_norm(pair_of, update_of, step, *args, **kwargs)
    return None


def _layer_norm(
    pair_of: PairOf,
    update_of: UpdateOf,
    step: Step,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, set[int]] | None:
    if not _fits(step, input, normalized_shape, weight, bias):
        return None
    (W, D), (b, d) = _moving(weight, pair_of, update_of), _moving(bias, pair_of, update_of)
    y = ops.layer_norm(input.unsqueeze(0), W, D, b, d, step.on(input.device), eps=eps)[0]
    return y, _owners(pair_of, weight, bias)


def _rms_norm(
    pair_of: PairOf,
    update_of: UpdateOf,
    step: Step,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, set[int]] | None:
    if eps is None or not _fits(step, input, normalized_shape, weight, None):
        return None
    W, D = _moving(weight, pair_of, update_of)
    y = ops.rms_norm(input.unsqueeze(0), W, D, step.on(input.device), eps=eps)[0]
    return y, _owners(pair_of, weight)


def _fits(
    step: Step, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> bool:
    """Whether the kernels compute what the stock operator would, but for roundings."""
    return (
        weight is not None
        and len(normalized_shape) == 1
        # Elsewhere the stock operators on the formed weight of one step size are as fast.
        and (step.is_several or ops.has_kernels(input.device))
        and not torch.is_autocast_enabled(input.device.type)
        and all(vector is None or vector.dtype == input.dtype != torch.float64 for vector in (weight, bias))
    )


def _moving(vector: Tensor | None, pair_of: PairOf, update_of: UpdateOf) -> tuple[Any, Tensor | None]:
    """A vector of the norm, in its best precision, and its direction, None where it does not move."""
    pair = pair_of(vector)
    return (vector, None) if pair is None else (pair.move.base, update_of(pair))


def _owners(pair_of: PairOf, *vectors: Tensor | None) -> set[int]:
    return {pair.owner for vector in vectors if (pair := pair_of(vector)) is not None}
