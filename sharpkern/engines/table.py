"""The pairs (θ, Δθ) an engine works on, and the buffer that formed weights share."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkern import ops


def storage_pointer(tensor: Tensor) -> int | None:
    """Address of a tensor's memory, or None where it has none of its own: sparse tensors, wrappers of torch.func."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return None


@dataclass(frozen=True, eq=False)
class Pair:
    """A parameter, or a view of one, and the direction of the same shape.

    Attributes:
        weight: what the model holds; recognised by identity.
        base: what θ + αΔθ is formed from: the full-precision master of ``weight`` where there is one, else ``weight``.
        delta: Δθ, the shape of ``weight``.
        owner: index of the parameter.
    """

    weight: Tensor
    base: Tensor
    delta: Tensor
    owner: int

    @property
    def wide(self) -> torch.dtype:
        """Precision in which this pair is formed before rounding."""
        return ops.compute_dtype(self.base.dtype, self.delta.dtype)

    def form(self, alpha: float, *, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """θ + αΔθ in the weight's dtype, or in ``dtype``.

        Where autograd is on, the result belongs to the graph of the weight: a closure may differentiate by parameters.

        Memory: one tensor of the weight's size unless ``out`` is given.
        """
        if out is None and self.base.requires_grad and torch.is_grad_enabled():
            moved = self.base.to(self.wide) + alpha * self.delta.to(self.wide)
            return moved.to(dtype or self.weight.dtype)
        return ops.form(self.base, self.delta, alpha, dtype=dtype or self.weight.dtype, out=out)


def make_pairs(parameters: Iterable[Tensor], tensors: Iterable[Tensor], masters: Iterable[Tensor | None]) -> list[Pair]:
    """Pairs of the parameters that move; those whose Δθ is zero throughout stay out.

    A master counts only where the weight still is its rounding, bit for bit: after a checkpoint was loaded into the
    model alone, for example, the weights are the truth.

    Memory: nothing, unless Δθ is laid out in memory unlike its parameter (then a copy of that Δθ).
    """
    pairs: list[Pair] = []
    for weight, delta, master in zip(parameters, tensors, masters, strict=True):
        if not torch.any(delta):
            continue
        base = master if master is not None and torch.equal(master.to(weight.dtype), weight) else weight
        # Views are taken of weight and Δθ alike, so both must have the same strides.
        if delta.stride() != weight.stride():
            delta = torch.empty_like(weight, dtype=delta.dtype).copy_(delta)
        if base is not weight and base.stride() != weight.stride():
            base = torch.empty_like(weight, dtype=base.dtype).copy_(base)
        pairs.append(Pair(weight, base, delta, len(pairs)))
    return pairs


class Scratch:
    """One buffer per dtype and device that formed weights take turns in; it grows to the largest of them."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def take(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of the shape of ``like``, with its strides where they are dense; the contents are undefined.

        Memory: grows to the largest tensor asked for.
        """
        key = (dtype, like.device)
        if key in self._buffers and self._buffers[key].numel() < like.numel():
            # The smaller buffer goes before the larger one comes.
            del self._buffers[key]
        if key not in self._buffers:
            self._buffers[key] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        flat = self._buffers[key][: like.numel()]
        dense = torch.empty_like(like, device="meta")
        return flat.as_strided(dense.size(), dense.stride())

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in one of the buffers."""
        pointer = storage_pointer(tensor)
        return any(pointer == storage_pointer(buffer) for buffer in self._buffers.values())
