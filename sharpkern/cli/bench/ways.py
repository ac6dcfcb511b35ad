"""What the section "linear" found, in short: of every way to take K step sizes the median share over the shapes."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sharpkern.cli.bench.linear import NAIVE, ONE_AT_A_TIME
from sharpkern.cli.bench.record import Json

# What an engine may choose from.
WAYS = ("products", "formed", "fused")
# Against these every one of them is held.
REFERENCES = ("product again", NAIVE, ONE_AT_A_TIME)


@dataclass(frozen=True)
class Summary:
    """One dtype, number of tokens and number of step sizes at once.

    Attributes:
        dtype: of inputs and weights, without "torch.".
        tokens: per step size, M.
        at_once: step sizes per pass, K.
        shares: speed per step size over that of the bare product, by way; the median over shapes.
        floor: of each way the share of what reading W and D once would take, where tokens are few.
        references: shares of what takes one step size at a time.
        rows: of all shapes, of the ways alone.
    """

    dtype: str
    tokens: int
    at_once: int
    shares: Mapping[str, float]
    floor: Mapping[str, float]
    references: Mapping[str, float]
    rows: tuple[Json, ...]

    @property
    def best(self) -> str:
        """The quickest way."""
        return max(self.shares, key=lambda way: self.shares[way])

    @property
    def times_naive(self) -> float:
        """How many times as fast as the obvious way the quickest one is; nan where that was not timed."""
        return self.shares[self.best] / self.references.get(NAIVE, math.nan)

    def asked(self, field: str) -> Any:
        """Return what the rows say is asked for, or None.

        Args:
            field: "target" or "least_times_naive".
        """
        return next((row[field] for row in self.rows if field in row), None)


def summaries(cases: Mapping[str, Iterable[Json]]) -> list[Summary]:
    """Return the summaries of a section, ordered by dtype, tokens and step sizes at once.

    Args:
        cases: rows by case.
    """
    groups: dict[tuple[str, int], list[Json]] = defaultdict(list)
    for rows in cases.values():
        for row in rows:
            if {"way", "share"} <= row.keys():
                groups[row["dtype"], row["tokens"]].append(row)
    found = []
    for (dtype, tokens), group in sorted(groups.items()):
        references = _medians((row for row in group if row["way"] in REFERENCES), "share")
        ways = [row for row in group if row["way"] in WAYS]
        for at_once in sorted({row["at_once"] for row in ways}):
            rows = tuple(row for row in ways if row["at_once"] == at_once)
            shares, floor = _medians(rows, "share"), _medians(rows, "share_of_floor")
            found.append(Summary(dtype, tokens, at_once, shares, floor, references, rows))
    return found


def _medians(rows: Iterable[Json], field: str) -> dict[str, float]:
    """Return the median over shapes by way, of the rows that have the field."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if field in row:
            values[row["way"]].append(row[field])
    return {way: statistics.median(of_way) for way, of_way in values.items()}
