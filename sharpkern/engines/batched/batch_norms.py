"""Norms over the batch for several step sizes: each channel is normalised by itself, so they join the channels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sharpkern.engines.batched.vmap import Rule, outside_vmap
from sharpkern.tensors.storage import storage_pointer

NORMS_OF_BATCHES = ("batch_norm", "instance_norm")


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` that leaves running statistics alone where they would differ by step size."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, eps=eps)

    def normalise(mean: Any, var: Any, input: Tensor, weight: Any, bias: Any) -> Tensor:
        return F.batch_norm(input, mean, var, weight, bias, True, momentum, eps)

    return _on_steps(normalise, running_mean, running_var, input, weight, bias)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.instance_norm` that leaves running statistics alone where they would differ by step size."""
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, eps=eps)

    def normalise(mean: Any, var: Any, input: Tensor, weight: Any, bias: Any) -> Tensor:
        return F.instance_norm(input, mean, var, weight, bias, True, momentum, eps)

    return _on_steps(normalise, running_mean, running_var, input, weight, bias)


def _on_steps(
    normalise: Callable[..., Tensor], mean: Tensor | None, var: Tensor | None, *tensors: Tensor | None
) -> Tensor:
    """Normalise, and update the running statistics only where torch.func.vmap batches nothing."""
    return outside_vmap(lambda *tensors: normalise(mean, var, *tensors), _in_the_channels(normalise), *tensors)


def _in_the_channels(normalise: Callable[..., Tensor]) -> Rule:
    """The rule that makes step sizes and channels one dimension."""

    def rule(num_steps: int, several: Sequence[bool], tensors: Sequence[Any]) -> Tensor:
        input, *affine = (
            tensor if own or tensor is None else tensor.expand(num_steps, *tensor.shape)
            for tensor, own in zip(tensors, several, strict=True)
        )
        channels = input.movedim(0, 1).flatten(1, 2)
        vectors = (None if vector is None else vector.flatten() for vector in affine)
        result: Tensor = normalise(None, None, channels, *vectors).unflatten(1, (num_steps, -1))
        return result.movedim(1, 0)

    return rule


def statistics_left_alone(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The running statistics that a call updates for one step size, and not for several."""
    if name not in NORMS_OF_BATCHES:
        return []
    given = dict(zip(("input", "running_mean", "running_var", "weight", "bias", "training"), args, strict=False))
    given |= kwargs
    training = given.get("training", given.get("use_input_stats", name == "instance_norm"))
    shared = storage_pointer(given["input"]) is not None and given.get("weight") is None and given.get("bias") is None
    if not training or shared:
        return []
    return [given[which] for which in ("running_mean", "running_var") if given.get(which) is not None]
