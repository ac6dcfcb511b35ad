"""How much of a displacement survives rounding: small steps vanish in 16-bit weights."""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from sharpkern.distributed.ranks import Alone, Peers
from sharpkern.distributed.sharding import is_sharded, over_shards
from sharpkern.engines.evaluation.precision import is_low
from sharpkern.engines.tracked import TrackedParam
from sharpkern.ops.reductions import to_host, total

# A difference of the share that nobody sees.
_LITTLE = 1e-4
# Elements looked at in each tensor; there are many tensors.
_SAMPLE = 1 << 12


def retained_share(
    pairs: Sequence[TrackedParam],
    rounded: Collection[int],
    alpha: float,
    norm_sq: float = 0.0,
    ranks: Peers | None = None,
) -> float:
    """⟨dW, αΔθ⟩/|αΔθ|² over all pairs, dW being the change of the rounded weights and ``norm_sq`` |Δθ|²."""
    ranks = ranks or Alone()
    much = not _rounds_little(pairs, abs(alpha) * math.sqrt(norm_sq))
    if not (ranks.any_of([much])[0] if ranks.splits else much):
        return 1.0
    # Collected on the device, and read once at the end.
    sums: list[Tensor] = []
    for pair in pairs:
        part = pair.view(_sample)
        displacement = part.move.update().double() * alpha
        scale = pair.weight.numel() / max(1, part.weight.numel())
        length = kept = scale * displacement.square().sum()
        if pair.owner in rounded:
            formed = (part.move.base.double() + displacement).to(part.weight.dtype)
            # Of a master, θ is the rounding: the weight itself may hold the last step size.
            moved = formed.double() - part.move.base.to(part.weight.dtype).double()
            kept = scale * (moved * displacement).sum()
        sums.append(torch.stack([kept, length]))
    parameters = [pair.parameter for pair in pairs]
    sums = over_shards(parameters, sums)
    columns = [to_host([one[k] for one in sums]) for k in range(2)]
    kept_length, all_length = ranks.totals(parameters, list(zip(*columns, strict=True)), 2)
    return kept_length / all_length if all_length > 0 else 1.0


@torch.no_grad()
def _rounds_little(pairs: Sequence[TrackedParam], length: float) -> bool:
    """Whether the rounding of all weights together is too short to count beside a displacement of a length."""
    weights = [pair.weight for pair in pairs]
    if not weights:
        return True
    if any(is_low(weight.dtype) or is_sharded(pair.parameter) for weight, pair in zip(weights, pairs, strict=True)):
        return False
    roundoff = max(torch.finfo(weight.dtype).eps for weight in weights)
    norms = torch._foreach_norm(weights)
    return roundoff * math.sqrt(total(norm.square() for norm in norms)) < _LITTLE * length


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    # An odd step walks through all columns of a matrix whose width is a power of two.
    return flat[:: flat.numel() // _SAMPLE | 1].contiguous()
