"""How a model's weights lie on a rank: what of them an optimizer moves, and how what is written becomes the model's.

Each kind of sharding is one `Layout`, found by `layout_of`. What measures knows no other way to ask.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sharpkern._undo import Trace
from sharpkern.distributed import deepspeed, flat
from sharpkern.distributed.lockstep import reducers_of
from sharpkern.distributed.ranks import Together
from sharpkern.distributed.sharding import is_distributed, is_sharded, reshard

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Layout:
    """How a model's weights lie on this rank; by default whole, in its own parameters.

    Attributes:
        groups: whose ranks train the model together; empty where nothing tells of any.
        device: that these groups communicate on.
        publish: makes what the pieces hold the model's weights; called after every write, by all ranks alike.
        pieces: the tensors that an optimizer moves in place of the model's parameters; None where it moves those.
        split: gives for a piece the group whose ranks hold its other parts, one of ``split_groups``, or None where it
            is whole, or a DTensor, which says so itself.
        split_groups: all groups that ``split`` gives, in the same order on all ranks.
        copied: why only pieces that are written move the model: its passes read copies of them. Empty where they read
            the pieces.
        repoints: passes give parameters other memory by ``.data``, which is no write to them.
        replays: passes or ``publish`` communicate in ways that no hook tells of, so that a rank which fails has to go
            through what it noted in the last pass; see `sharpkern.distributed.replay`.
        prepare: makes the model ready to be measured, having entered what puts it back.
    """

    groups: tuple[Any, ...] = ()
    device: torch.device = _CPU
    publish: Callable[[], object] = lambda: None
    pieces: Sequence[Tensor] | None = None
    split: Callable[[Tensor], Any] = lambda _: None
    split_groups: tuple[Any, ...] = ()
    copied: str = ""
    repoints: bool = False
    replays: bool = False
    prepare: Callable[[Trace], object] = lambda _: None

    def ranks(self) -> Together | None:
        """The ranks that decide together; None where nothing tells of any."""
        return Together(self.groups, self.device, self.split, self.split_groups) if self.groups else None


def layout_of(model: nn.Module) -> Layout:
    """The layout of a model, or of the wrapper around it."""
    if not is_distributed():
        return Layout()
    found = (find(model) for find in _KINDS)
    return next((layout for layout in found if layout is not None), Layout())


def _engine(model: nn.Module) -> Layout | None:
    """DeepSpeed's, whose optimizers move tensors of its own, but for stage 0 in float32."""
    engine = deepspeed.engine_in(model)
    if engine is None:
        return None
    deepspeed.refuse_unknown(engine)
    groups, device = (engine.data_parallel_group,), next(model.parameters()).device
    known = deepspeed.wrapped(engine.optimizer)
    if known is None:
        return Layout(groups, device)
    pieces, group = [piece.weight for piece in known.pieces()], known.group()
    own = set(map(id, pieces))
    return Layout(
        groups,
        device,
        publish=known.publish,
        pieces=pieces,
        split=lambda piece: group if id(piece) in own else None,
        split_groups=() if group is None else (group,),
        copied="DeepSpeed's optimizer moves tensors of its own, of which the model's parameters are made",
        repoints=known.gathers,
        prepare=lambda trace: trace.add(deepspeed.keep_state(known)),
    )


def _flat(model: nn.Module) -> Layout | None:
    """FSDP1."""
    splits = flat.splits_of(model)
    if any(flat.is_flat(parameter) and id(parameter) not in splits for parameter in model.parameters()):
        raise TypeError(
            "model must be the FullyShardedDataParallel wrapper around all of it, got what is inside of it and a "
            "loss_fn that does not call the wrapper; pass the wrapper"
        )
    modules = flat.flat_modules(model)
    if not modules:
        return None
    return Layout(
        groups=tuple(flat.flat_groups(model)),
        device=modules[0].compute_device,
        publish=partial(reshard, model),
        split=lambda piece: splits.get(id(piece)),
        split_groups=tuple(group for group in dict.fromkeys(splits.values()) if group is not None),
        copied="the model's parameters lie in flat tensors, of which the forward pass reads gathered copies",
        repoints=True,
        prepare=partial(flat.keep_pieces, model),
    )


def _averaged(model: nn.Module) -> Layout | None:
    """Whole models whose gradients a wrapper averages, whatever its parameters are."""
    group = next((reducer.process_group for _, reducer in reducers_of(model)), None)
    if group is None:
        return None
    return replace(_sharded(model) or Layout(device=next(model.parameters()).device), groups=(group,))


def _sharded(model: nn.Module) -> Layout | None:
    """DTensors: FSDP2, also hybrid, and tensor parallelism."""
    meshes = dict.fromkeys(parameter.device_mesh for parameter in model.parameters() if is_sharded(parameter))  # type: ignore[attr-defined]
    if not meshes:
        return None
    # Where groups overlap, the mean of one is the same number again in the other.
    groups = dict.fromkeys(group for mesh in meshes for group in mesh.get_all_groups())
    return Layout(
        groups=tuple(groups),
        device=torch.device(next(iter(meshes)).device_type),
        publish=partial(reshard, model),
        copied="the model's parameters are DTensors, of which the forward pass reads gathered copies",
    )


# The first that knows a model says how it lies.
_KINDS: list[Callable[[nn.Module], Layout | None]] = [_engine, _flat, _averaged, _sharded]
