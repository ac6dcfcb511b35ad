"""How much of a displacement survives rounding: small steps vanish in 16-bit weights."""

import math
from collections.abc import Collection, Hashable, Sequence

import torch
from torch import Tensor

from sharpkern import ops
from sharpkern.distributed.ranks import Alone, Peers
from sharpkern.distributed.sharding import is_sharded, over_shards
from sharpkern.engines.evaluation.precision import is_low
from sharpkern.engines.tracked import TrackedParam
from sharpkern.ops.reductions import to_host
from sharpkern.ops.together import kind_of
from sharpkern.ops.update import ParamUpdate

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
    groups = _groups(pairs, rounded, alone=not ranks.splits)
    for members in groups:
        weight, move, scale = _sample_of(members[0]) if len(members) == 1 else _joined(members)
        displacement = move.update("auto" if len(members) == 1 else "torch").double() * alpha
        length = kept = _weighed(displacement.square(), scale)
        if members[0].owner in rounded:
            formed = (move.base.double() + displacement).to(weight.dtype)
            # Of a master, θ is the rounding: the weight itself may hold the last step size.
            moved = formed.double() - move.base.to(weight.dtype).double()
            kept = _weighed(moved * displacement, scale)
        sums.append(torch.stack([kept, length]))
    parameters = [members[0].parameter for members in groups]
    sums = over_shards(parameters, sums)
    columns = [to_host([one[k] for one in sums]) for k in range(2)]
    kept_length, all_length = ranks.totals(parameters, list(zip(*columns, strict=True)), 2)
    return kept_length / all_length if all_length > 0 else 1.0


def _weighed(terms: Tensor, scale: float | Tensor) -> Tensor:
    """The sum of terms, each of which stands for several."""
    return (scale * terms).sum() if isinstance(scale, Tensor) else scale * terms.sum()


def _groups(pairs: Sequence[TrackedParam], rounded: Collection[int], *, alone: bool) -> list[list[TrackedParam]]:
    """Pairs whose samples are looked at together: on a GPU a call for each takes longer than what it does."""
    alike: dict[Hashable, list[TrackedParam]] = {}
    for index, pair in enumerate(pairs):
        tensors = (pair.weight, *pair.move.operands)
        key: Hashable = index
        if (
            alone
            and ops.has_kernels(pair.weight.device)
            and not is_sharded(pair.parameter)
            and all(tensor.is_contiguous() for tensor in tensors)
        ):
            dtypes = tuple(tensor.dtype for tensor in tensors)
            key = (pair.weight.device, kind_of(pair.move), dtypes, pair.owner in rounded)
        alike.setdefault(key, []).append(pair)
    return list(alike.values())


def _sample_of(pair: TrackedParam) -> tuple[Tensor, ParamUpdate, float | Tensor]:
    """Some elements of a weight and of its update, and how many each of them stands for."""
    part = pair.view(_sample)
    return part.weight, part.move, pair.weight.numel() / max(1, part.weight.numel())


def _joined(pairs: Sequence[TrackedParam]) -> tuple[Tensor, ParamUpdate, float | Tensor]:
    """The same of several, one behind the other."""

    def sample(tensor: Tensor) -> Tensor:
        step = _step(tensor)
        return tensor.detach().as_strided((-(-tensor.numel() // step),), (step,))

    def joined(role: int) -> Tensor:
        return torch.cat([sample(operands[role]) for operands in every])

    every = [pair.move.operands for pair in pairs]
    roles = {id(operand): role for role, operand in enumerate(every[0])}
    weights = [sample(pair.weight) for pair in pairs]
    counts = torch.tensor([len(weight) for weight in weights])
    scales = torch.tensor([pair.weight.numel() for pair in pairs]).double() / counts.clamp(min=1)
    scale = scales.repeat_interleave(counts).to(pairs[0].weight.device, non_blocking=True)
    return torch.cat(weights), pairs[0].move.map(lambda operand: joined(roles[id(operand)])), scale


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
    return roundoff * math.hypot(*to_host(norms)) < _LITTLE * length


def _sample(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)[:: _step(tensor)].contiguous()


def _step(tensor: Tensor) -> int:
    """From one element that is looked at to the next."""
    # An odd step walks through all columns of a matrix whose width is a power of two.
    return tensor.numel() // _SAMPLE | 1
