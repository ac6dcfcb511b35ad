"""How the ranks of a distributed run decide alike: one mean of the loss, and one failure for all."""

import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sharpkern.distributed.announced import Announced
from sharpkern.errors import EngineUnsupportedError, NoUpdateError, RankError

# Where a failure is raised again, the frame lets go of it: it holds the frame, and a ring of the two would keep what
# the failed pass had in memory until the garbage collector comes by, which is late where memory had run out.

# How long a rank whose pass failed waits for ranks that may be stuck in a collective of the closure's own.
_PATIENCE = timedelta(seconds=60)

# From the mildest to the gravest: all ranks raise the gravest that one of them has.
_NO_UPDATE, _UNSUPPORTED, _OUT_OF_MEMORY, _FAILED = KINDS = range(4)


class Verdict(NamedTuple):
    """What the ranks make of one pass.

    Attributes:
        loss: the one that counts, nan where no rank has one.
        asked: whether any rank asks for something.
        random: whether the pass drew random numbers on any rank.
        num: ranks that have a loss.
    """

    loss: float
    asked: bool
    random: bool
    num: int


class Peers(Protocol):
    """The ranks that decide together.

    Attributes:
        alike: all run the same modules, so that what each finds out about its own holds for all.
        splits: some hold parts of the model.
    """

    alike: bool
    splits: bool

    def agree(
        self, loss: Tensor | None, failure: BaseException | None = None, *, asks: bool = False, random: bool = False
    ) -> Verdict:
        """The loss that counts, and what any rank says of its pass; raises where any rank failed."""

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag whether it is true on any rank."""

    def means(self, numbers: Sequence[float]) -> list[float]:
        """The mean of each number over the ranks."""

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, in their order."""

    @property
    def number(self) -> int:
        """Of this rank in that order."""

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over the ranks."""

    def union(self, names: Sequence[str]) -> list[str]:
        """The names that any rank has, in the same order on all of them."""

    def announced(self) -> Announced | None:
        """Where all of them tell what they communicate; None where there are no others."""

    def note(self, pieces: Iterable[Tensor]) -> None:
        """Look up which ranks hold the other parts of what these pieces belong to."""

    def totals(self, pieces: Sequence[Tensor], rows: Sequence[Sequence[float]], width: int) -> list[float]:
        """The sums of columns over all pieces of the whole model: there is a row of ``width`` for each piece."""


class Alone:
    """A single process, or ranks that the caller has a function of his own for."""

    alike = True
    splits = False

    def __init__(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        self._reduce = reduce

    def agree(
        self, loss: Tensor | None, failure: BaseException | None = None, *, asks: bool = False, random: bool = False
    ) -> Verdict:
        """The loss, reduced by the caller's function, and what was said."""
        if failure is not None:
            try:
                raise failure
            finally:
                del failure
        if loss is None:
            return Verdict(math.nan, asks, random, 0)
        return Verdict(float(loss if self._reduce is None else self._reduce(loss)), asks, random, 1)

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """The flags themselves."""
        return list(flags)

    def means(self, numbers: Sequence[float]) -> list[float]:
        """The numbers themselves."""
        return list(numbers)

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers themselves, of one rank."""
        return [list(numbers)]

    @property
    def number(self) -> int:
        """Of the only rank."""
        return 0

    def mean(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def union(self, names: Sequence[str]) -> list[str]:
        """The names themselves."""
        return list(names)

    def announced(self) -> Announced | None:
        """There is nobody to tell."""
        return None

    def note(self, pieces: Iterable[Tensor]) -> None:
        """Nothing to look up."""

    def totals(self, pieces: Sequence[Tensor], rows: Sequence[Sequence[float]], width: int) -> list[float]:
        """The sums of columns."""
        return column_sums(rows, width)


class Together:
    """The ranks of process groups, which take the mean of the losses that there are.

    ``split`` gives for a piece of the model the group whose ranks hold its other parts, one of ``split_groups``, or
    None where this rank holds all of it.
    """

    alike = True

    def __init__(
        self,
        groups: Sequence[Any],
        device: torch.device,
        split: Callable[[Tensor], Any] | None = None,
        split_groups: Sequence[Any] = (),
    ) -> None:
        self._groups = groups
        self._device = device
        self._split = split or (lambda _: None)
        self._split_groups = split_groups
        self.splits = bool(split_groups)
        self._size = 1
        for group in groups:
            self._size *= torch.distributed.get_world_size(group)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over the ranks."""
        total = tensor.clone()
        for group in self._groups:
            torch.distributed.all_reduce(total, group=group)
        return total / self._size

    def agree(
        self, loss: Tensor | None, failure: BaseException | None = None, *, asks: bool = False, random: bool = False
    ) -> Verdict:
        """The mean of the losses, and what any rank says; one collective for each group, also on a rank that failed."""
        told = torch.zeros(4 + len(KINDS), dtype=torch.float64, device=self._device)
        if loss is not None:
            told[0], told[1] = loss, 1
        told[2], told[3] = asks, random
        if failure is not None:
            told[4 + device_kind(failure)] = 1
        try:
            for group in self._groups:
                work = torch.distributed.all_reduce(told, group=group, async_op=True)
                if failure is None:
                    work.wait()
                else:
                    _wait_for_a_while(work, failure)
            total, num, asked, drew, *failures = told.tolist()
            if any(failures):
                raise_gravest(failure, failures, self._size)
            return Verdict(total / num if num else math.nan, asked > 0, drew > 0, int(num))
        finally:
            del failure

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag whether it is true on any rank; a collective for each group."""
        return [number > 0 for number in self.means([float(flag) for flag in flags])]

    def means(self, numbers: Sequence[float]) -> list[float]:
        """The mean of each number over the ranks; a collective for each group."""
        values: list[float] = self.mean(torch.tensor(numbers, dtype=torch.float64, device=self._device)).tolist()
        return values

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, as many on each; a collective, for ranks of one group."""
        told = torch.zeros(self._size, len(numbers), dtype=torch.float64, device=self._device)
        told[self.number] = torch.tensor(numbers, dtype=torch.float64)
        torch.distributed.all_reduce(told, group=self._groups[0])
        values: list[list[float]] = told.tolist()
        return values

    @property
    def number(self) -> int:
        """Of this rank in its group."""
        return torch.distributed.get_rank(self._groups[0])

    def union(self, names: Sequence[str]) -> list[str]:
        """The names, which all ranks have."""
        return list(names)

    def announced(self) -> Announced:
        """Where the ranks of the first group tell what they communicate."""
        group = self._groups[0]
        return Announced(torch.distributed.get_process_group_ranks(group), self._told(uuid.uuid4().hex)[0])

    def _told(self, said: object) -> list[Any]:
        """What each rank of the first group says, in their order."""
        heard: list[Any] = [None] * torch.distributed.get_world_size(self._groups[0])
        torch.distributed.all_gather_object(heard, said, group=self._groups[0])
        return heard

    def note(self, pieces: Iterable[Tensor]) -> None:
        """The groups are known."""

    def totals(self, pieces: Sequence[Tensor], rows: Sequence[Sequence[float]], width: int) -> list[float]:
        """The sums of columns over all pieces of the whole model; a collective for each group that splits it."""
        groups = [self._split(piece) for piece in pieces]
        own = [row for row, group in zip(rows, groups, strict=True) if group is None]
        found = torch.tensor(column_sums(own, width), dtype=torch.float64, device=self._device)
        for group in self._split_groups:
            mine = [row for row, other in zip(rows, groups, strict=True) if other is group]
            part = torch.tensor(column_sums(mine, width), dtype=torch.float64, device=self._device)
            torch.distributed.all_reduce(part, group=group)
            found += part
        totals: list[float] = found.tolist()
        return totals


def column_sums(rows: Sequence[Sequence[float]], width: int) -> list[float]:
    """Sums of the columns of rows of one width."""
    return [math.fsum(column) for column in zip(*rows, strict=True)] if rows else [0.0] * width


@contextmanager
def as_one(ranks: Peers) -> Iterator[None]:
    """Run a block without collectives of its own; if it fails on one rank, it fails on all."""
    failure = None
    try:
        yield
    except BaseException as raised:
        failure = raised
    try:
        ranks.agree(None, failure)
    finally:
        del failure


def device_kind(failure: BaseException) -> int:
    """How grave a failure is: one of `KINDS`."""
    if isinstance(failure, NoUpdateError):
        return _NO_UPDATE
    if isinstance(failure, EngineUnsupportedError):
        return _UNSUPPORTED
    return _OUT_OF_MEMORY if isinstance(failure, torch.OutOfMemoryError) else _FAILED


def _wait_for_a_while(work: Any, failure: BaseException) -> None:
    try:
        work.wait(_PATIENCE)
    except Exception:
        # The others are stuck elsewhere, or gone; what happened here is what has to be told.
        try:
            raise failure from None
        finally:
            del failure


def raise_gravest(failure: BaseException | None, failures: Sequence[float], size: int) -> None:
    """Raise the gravest failure of all ranks."""
    gravest = max(kind for kind, number in enumerate(failures) if number)
    if failure is not None and device_kind(failure) == gravest:
        try:
            raise failure
        finally:
            del failure
    where = f"{failures[gravest]:.0f} of {size} ranks, not on this one"
    if gravest == _NO_UPDATE:
        raise NoUpdateError("another rank has no update")
    if gravest == _UNSUPPORTED:
        raise EngineUnsupportedError(f"the engine is unable on {where}")
    if gravest == _OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(f"out of memory on {where}")
    raise RankError(f"the measurement failed on {where}; read there what happened") from failure
