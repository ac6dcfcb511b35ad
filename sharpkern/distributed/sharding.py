"""Parameters that a rank holds only a shard of: DTensors, as FSDP2 and tensor parallelism make them.

θ − ηΔθ and the formulas of SGD and Adam(W) are elementwise: every rank works on its own shard, and only sums over whole
tensors have to travel. torch.distributed is looked up where it is loaded already: importing it takes longer than all of
this package, and whoever has a DTensor has loaded it.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sharpkern.distributed.flat import FlatShards, flat_modules

_PLAIN = (Tensor, nn.Parameter)


def is_distributed() -> bool:
    """Whether there may be other processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, which shares its memory; any other tensor as it is."""
    shard: Tensor = tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return shard


def local_as(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of a tensor that belongs to this rank's shard of a parameter."""
    if not is_sharded(parameter) or not is_sharded(tensor):
        return local(tensor)
    mine: Any = parameter
    other: Any = tensor
    if other.placements != mine.placements:
        other = other.redistribute(placements=mine.placements)
    return local(other)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with what all ranks hold of it; a collective for DTensors, nothing for others."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def partial_placement(parameter: Tensor) -> str | None:
    """Name the placement of a parameter that no rank can work on its own part of."""
    if not is_sharded(parameter):
        return None
    placements: Sequence[Any] = parameter.placements  # type: ignore[attr-defined]
    return next((str(placement) for placement in placements if placement.is_partial()), None)


@torch.no_grad()
def over_shards(parameters: Sequence[Tensor], sums: Sequence[Tensor]) -> list[Tensor]:
    """Add up sums over elements across the ranks that hold the shards; every rank has to call this alike."""
    result = list(sums)
    groups: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for i, parameter in enumerate(parameters):
        if is_sharded(parameter):
            mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
            dims = tuple(dim for dim, placement in enumerate(placements) if not placement.is_replicate())
            groups.setdefault((mesh, dims), []).append(i)
    for (mesh, dims), members in groups.items():
        # A shard that was offloaded to the CPU is summed where the ranks can talk.
        together = torch.stack([result[i].to(mesh.device_type) for i in members])
        for dim in dims:
            torch.distributed.all_reduce(together, group=mesh.get_group(dim))
        for i, one in zip(members, together, strict=True):
            result[i] = one.to(sums[i].device)
    return result


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules that ``fully_shard`` was applied to, the outermost first."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return (
        []
        if kind is None or not is_distributed()
        else [module for module in model.modules() if isinstance(module, kind)]
    )


def reshard(model: nn.Module) -> None:
    """Free what FSDP has gathered, so that the model's parameters are the shards that the optimizer holds.

    After a forward pass without gradients the outermost module stays gathered, and what is written to a shard then is
    not what the next pass reads. Nothing is communicated, and no value changes.
    """
    for module in fsdp_modules(model):
        module.reshard()
    for module in flat_modules(model):
        FlatShards(module).reshard()
