"""How much of a displacement survives rounding: small steps vanish in 16-bit weights."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from sharpkern.distributed.sharding import over_shards
from sharpkern.engines.tracked import TrackedParam
from sharpkern.ops.reductions import total

# Elements looked at in each tensor; there are many tensors.
_SAMPLE = 1 << 12


def retained_share(pairs: Sequence[TrackedParam], rounded: Collection[int], alpha: float) -> float:
    """⟨dW, αΔθ⟩/|αΔθ|² over all pairs, dW being the change of the rounded weights."""
    # Collected on the device, and read once at the end.
    sums: list[Tensor] = []
    for pair in pairs:
        part = pair.view(_sample)
        displacement = part.move.update().double() * alpha
        scale = pair.weight.numel() / max(1, part.weight.numel())
        length = kept = scale * displacement.square().sum()
        if pair.owner in rounded:
            formed = (part.move.base.double() + displacement).to(part.weight.dtype)
            moved = formed.double() - part.weight.double()
            kept = scale * (moved * displacement).sum()
        sums.append(torch.stack([kept, length]))
    sums = over_shards([pair.parameter for pair in pairs], sums)
    all_length = total(one[1] for one in sums)
    return total(one[0] for one in sums) / all_length if all_length > 0 else 1.0


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    # An odd step walks through all columns of a matrix whose width is a power of two.
    return flat[:: flat.numel() // _SAMPLE | 1].contiguous()
