"""What a sweep over data mixes found: tables, the sweet spot, a plot.

Repeats are summed up as critical learning rates, since those are finite where λ_c is not: 0 where the loss rises from
the first step on. Where noise hides how early the loss rises, but not that it does, the largest step known to lie
before counts, which is seldom more than 0. λ_c of the summary is 2 over that of η_c.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sharpkern._support.files import write_rows
from sharpkern._support.optional import missing
from sharpkern.measures.result import Measurement
from sharpkern.search.line_search import Status


@dataclass(frozen=True)
class MixturePoint:
    """One task's loss along the update of one mix.

    Attributes:
        shares: of the sources, in their order.
        repeat: number of the repeat.
        task: name of the task.
        critical_lr: η_c; 0 for "ascent", the largest step tried for "unbounded", nan where there is none.
        sharpness: λ_c = 2/η_c, in 1/learning-rate; inf for "ascent".
        status: of the `Measurement`.
        error: relative uncertainty of η_c.
        bracket: largest step known to lie before the rise, and smallest known rise; 0 and inf if unknown.
        loss: the task's loss at θ.
        forwards: losses evaluated.
        engine: that evaluated them.
    """

    shares: tuple[float, ...]
    repeat: int
    task: str
    critical_lr: float
    sharpness: float
    status: Status
    error: float
    bracket: tuple[float, float]
    loss: float
    forwards: int
    engine: str

    @classmethod
    def of(cls, shares: tuple[float, ...], repeat: int, task: str, m: Measurement) -> "MixturePoint":
        """Return the point of a measurement."""
        found = (m.critical_lr, m.sharpness, m.status, m.error, m.bracket, m.base_loss, int(m.forwards), m.engine)
        return cls(shares, repeat, task, *found)

    @property
    def safe_step(self) -> float:
        """η_c; of an unresolved one the largest step known to lie before a rise that is known; nan if none is."""
        if self.status == "unresolved" and self.bracket[1] < math.inf:
            return self.bracket[0]
        return self.critical_lr


@dataclass(frozen=True)
class Summary:
    """The repeats of one task and mix.

    Attributes:
        critical_lr: median η_c.
        critical_lr_low: its lower quartile.
        critical_lr_high: its upper quartile.
        repeats: measurements in all.
        ascent: how many of them go uphill from the first step on; they count with η_c = 0.
        unbounded: how many found no rise; they count with the largest step tried.
        unresolved: how many are known to rise, and not where; they count with the largest step known to lie before.
        failed: how many are known nothing of; they do not count.
    """

    critical_lr: float
    critical_lr_low: float
    critical_lr_high: float
    repeats: int
    ascent: int
    unbounded: int
    unresolved: int
    failed: int

    @property
    def sharpness(self) -> float:
        """λ_c of the median; inf where it goes uphill, nan where every repeat failed."""
        return _inverse(self.critical_lr)

    @property
    def sharpness_low(self) -> float:
        """λ_c of the upper quartile of η_c."""
        return _inverse(self.critical_lr_high)

    @property
    def sharpness_high(self) -> float:
        """λ_c of the lower quartile of η_c."""
        return _inverse(self.critical_lr_low)


@dataclass(frozen=True)
class SweetSpot:
    """The mix that allows the longest step before any task's loss rises.

    Attributes:
        shares: of the sources by name.
        critical_lr: the step it allows: the smallest of the tasks' median η_c, a learning rate.
        sharpness: 2/critical_lr, the largest of the tasks' λ_c.
        task: whose loss rises first.
        of_repeats: the sweet spot of every repeat by itself, shares in the order of the sources, repeats without one
            left out: how far to trust it.
    """

    shares: dict[str, float]
    critical_lr: float
    sharpness: float
    task: str
    of_repeats: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class MixtureSweep:
    """λ_c of every task along the update of every mix.

    Attributes:
        sources: names of the data sources.
        tasks: names of the tasks.
        mixes: shares of the sources, one tuple per mix, in the order asked for.
        points: all measurements.
    """

    sources: tuple[str, ...]
    tasks: tuple[str, ...]
    mixes: tuple[tuple[float, ...], ...]
    points: tuple[MixturePoint, ...]

    def summary(self, shares: Sequence[float], task: str) -> Summary:
        """Sum up the repeats of one task and mix.

        Args:
            shares: one of ``mixes``.
            task: one of ``tasks``.

        Returns:
            Summary: median and quartiles.

        Raises:
            ValueError: nothing was measured there.
        """
        points = [p for p in self.points if p.task == task and p.shares == tuple(shares)]
        if not points:
            raise ValueError(
                f"shares and task must be of this sweep, got {tuple(shares)} and {task!r}; it has the mixes "
                f"{self.mixes} and the tasks {self.tasks}"
            )
        return _summary(points)

    @property
    def table(self) -> list[dict[str, Any]]:
        """One row per mix and task: shares, median and quartiles of λ_c and η_c, and what the repeats came to."""
        rows = []
        for shares in self.mixes:
            for task in self.tasks:
                found = self.summary(shares, task)
                rows.append(
                    {
                        **{f"share_{name}": share for name, share in zip(self.sources, shares, strict=True)},
                        "task": task,
                        "lambda_c": found.sharpness,
                        "lambda_c_low": found.sharpness_low,
                        "lambda_c_high": found.sharpness_high,
                        **asdict(found),
                    }
                )
        return rows

    @property
    def sweet_spot(self) -> SweetSpot | None:
        """The mix that allows the longest step before any task's loss rises; None if some task's rises at every mix."""
        found = self._longest_step(self.points)
        if found is None:
            return None
        shares, step, task = found
        repeats = sorted({point.repeat for point in self.points})
        alone = [self._longest_step([p for p in self.points if p.repeat == repeat]) for repeat in repeats]
        return SweetSpot(
            dict(zip(self.sources, shares, strict=True)),
            step,
            _inverse(step),
            task,
            tuple(one[0] for one in alone if one is not None),
        )

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write `table`.

        Args:
            path: of the file, written anew.
        """
        write_rows(path, self.table)

    def to_pandas(self) -> Any:
        """Return `table` as a ``pandas.DataFrame``; needs pandas.

        Raises:
            ImportError: it is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise missing("pandas", "pandas", "to_pandas") from None
        return pd.DataFrame(self.table)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw λ_c of every task against the share of the first source, with bands; needs the extra ``plot``.

        Args:
            path: of the image, its format by the ending.
        """
        from sharpkern.mixtures.plot import plot_mixture

        plot_mixture(self, path)

    def _longest_step(self, points: Sequence[MixturePoint]) -> tuple[tuple[float, ...], float, str] | None:
        """Return the mix, the step it allows and the task whose loss rises first, if any step is allowed."""
        best = None
        for shares in self.mixes:
            here = [point for point in points if point.shares == shares]
            medians = {task: _summary([p for p in here if p.task == task]).critical_lr for task in self.tasks}
            task = min(medians, key=lambda name: medians[name])
            # A task that nothing is known of may rise at once.
            if not any(map(math.isnan, medians.values())) and medians[task] > (best[1] if best else 0.0):
                best = (shares, medians[task], task)
        return best


def _summary(points: Sequence[MixturePoint]) -> Summary:
    known = [point for point in points if not math.isnan(point.safe_step)]
    steps = [point.safe_step for point in known]
    low, median, high = np.quantile(steps, (0.25, 0.5, 0.75)).tolist() if steps else [math.nan] * 3
    counts = {status: sum(p.status == status for p in known) for status in ("ascent", "unbounded", "unresolved")}
    return Summary(median, low, high, len(points), **counts, failed=len(points) - len(known))


def _inverse(critical_lr: float) -> float:
    """Return λ_c of η_c."""
    return 2 / critical_lr if critical_lr else math.inf
