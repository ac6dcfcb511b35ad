"""Ranks that the caller names: who decides together, and which of them hold parts of one model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharpkern.distributed.layout import Layout
from sharpkern.distributed.ranks import Together, column_sums
from sharpkern.distributed.sharding import is_distributed


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run that no wrapper of the model tells of, where a model is split over them or trained by several.

    Every one of them calls the same function with the same options. Each passes its own part of the model, the
    optimizer of that part, and a ``loss_fn`` that returns the loss, or None where it has none, as the first stages of a
    pipeline. The loss that counts is the sum of the losses by the number of ranks that returned one. Slope and |Δθ|²
    are those of the whole model. A rank whose pass fails takes part in what the others have yet to communicate, as it
    did in the last pass that went well, and then all of them raise.

    Args:
        group: process group of the ranks that measure together; by default all ranks of the run.
        split: what holds different parts of one model: a process group, such as that of a pipeline's stages, for all
            parameters; or a function that takes a parameter and returns the group whose ranks hold the other parts of
            what it belongs to, or None for one that each rank holds whole, as the norms between layers that are split
            by hand. By default every rank holds all of the model.

    Raises:
        TypeError: ``group`` is no process group, or ``split`` neither that nor a function.

    Examples:
        >>> import sharpkern
        >>> ranks = sharpkern.Ranks(split=lambda parameter: None)
    """

    group: Any = None
    split: Any = None

    def __post_init__(self) -> None:
        if self.group is not None and not _is_group(self.group):
            raise TypeError(
                f"group must be a process group that this rank belongs to, got {_named(self.group)}; make it by "
                "torch.distributed.new_group, or take mesh.get_group(name)"
            )
        if self.split is not None and not callable(self.split) and not _is_group(self.split):
            raise TypeError(
                f"split must be a process group that this rank belongs to, or a function of a parameter, got "
                f"{_named(self.split)}; pass the group whose ranks hold the parts of the model"
            )


def check_ranks(ranks: object) -> None:
    """Refuse what says nothing of ranks."""
    if not (ranks is None or ranks == "alone" or isinstance(ranks, Ranks)):
        raise TypeError(
            f"ranks must be a sharpkern.Ranks or 'alone', got {_named(ranks)}; pass sharpkern.Ranks(group, split)"
        )


def splits(ranks: Ranks | str | None) -> bool:
    """Whether ranks hold parts of a model."""
    check_ranks(ranks)
    return isinstance(ranks, Ranks) and ranks.split is not None


class Declared(Together):
    """Ranks as the caller has named them, each of which may run other modules than the others."""

    alike = False

    def __init__(self, ranks: Ranks, layout: Layout, device: torch.device) -> None:
        group = torch.distributed.group.WORLD if ranks.group is None else ranks.group
        super().__init__([group], device, layout.split, layout.split_groups)
        self._ranks = ranks
        self.splits = self.splits or ranks.split is not None
        # The pieces are held, so that no other takes the place of one that is gone.
        self._known: dict[int, tuple[Tensor, tuple[int, ...]]] = {}

    def note(self, pieces: Iterable[Tensor]) -> None:
        """Ask which ranks hold the other parts of what these pieces belong to."""
        for piece in pieces:
            self._members(piece)

    def union(self, names: Sequence[str]) -> list[str]:
        """The names that any rank has, in the order of the ranks."""
        return list(dict.fromkeys(name for one in self._told(list(names)) for name in one))

    def totals(self, pieces: Sequence[Tensor], rows: Sequence[Sequence[float]], width: int) -> list[float]:
        """The sums of columns over all pieces of the whole model.

        Each rank tells all what it holds for which ranks: one that holds no part of something need not know of it.
        """
        own: dict[tuple[int, ...], list[int]] = {}
        for i, piece in enumerate(pieces):
            own.setdefault(self._members(piece), []).append(i)
        # What a wrapper has split besides adds up among the ranks of that.
        said = {
            members: super(Declared, self).totals([pieces[i] for i in mine], [rows[i] for i in mine], width)
            for members, mine in own.items()
        }
        heard = self._told(said)
        me = torch.distributed.get_rank()
        everything = sorted({members for one in heard for members in one if me in members})
        ranks = torch.distributed.get_process_group_ranks(self._groups[0])
        parts = [
            one[members]
            for members in everything
            for rank, one in zip(ranks, heard, strict=True)
            if rank in members and members in one
        ]
        return column_sums(parts, width)

    def _members(self, piece: Tensor) -> tuple[int, ...]:
        """The ranks that hold the parts of what a piece belongs to, by their numbers in the run."""
        if id(piece) not in self._known:
            split = self._ranks.split
            group = split(piece) if callable(split) and not _is_group(split) else split
            if group is not None and not _is_group(group):
                raise TypeError(
                    "split must return a process group that this rank belongs to, or None, got "
                    f"{_named(group)} for a parameter of shape {list(piece.shape)}"
                )
            distributed = torch.distributed
            members = (distributed.get_rank(),) if group is None else distributed.get_process_group_ranks(group)
            self._known[id(piece)] = piece, tuple(members)
        return self._known[id(piece)][1]


def device_of(model: nn.Module, ranks: Ranks) -> torch.device:
    """Where ranks communicate: a stage may have no parameters."""
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.device.type != "cpu":
        return parameter.device
    backend = torch.distributed.get_backend(ranks.group)
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


def _is_group(thing: object) -> bool:
    return is_distributed() and isinstance(thing, torch.distributed.ProcessGroup)


def _named(thing: object) -> str:
    return repr(thing) if isinstance(thing, (str, int)) else type(thing).__name__
