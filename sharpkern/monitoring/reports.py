"""What a Monitor's history is made into: a table, pictures, a summary."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sharpkern._support.figures import draw_alone
from sharpkern._support.files import write_rows
from sharpkern._support.html import table_html
from sharpkern._support.optional import missing

if TYPE_CHECKING:
    from sharpkern.monitoring.monitor import Record

# η_c over the learning rate up to which a step is at the edge of stability.
_EDGE = 1.25


@dataclass(frozen=True)
class RunSummary:
    """A run in a few numbers; ``print`` it, or let a notebook show it.

    Attributes:
        num_measured: steps measured.
        largest: (step, λ_c) of the largest λ_c that converged, in 1/learning-rate; None where none did.
        smallest_headroom: (step, η_c over the learning rate) of the step nearest to its edge; None likewise.
        at_edge_since: first step from which on η_c is at most 1.25 times the learning rate in half of the measurements
            or more; None if there is none, and so the run does not end at the edge.
        statuses: how many measurements ended in each status.
        num_skipped: steps that were due and had no update.
        forwards: losses evaluated, held-out ones and blocks included.
        seconds: that the measurements took.
    """

    num_measured: int
    largest: tuple[int, float] | None
    smallest_headroom: tuple[int, float] | None
    at_edge_since: int | None
    statuses: Mapping[str, int]
    num_skipped: int
    forwards: int
    seconds: float

    @classmethod
    def of(cls, history: "Sequence[Record]", num_skipped: int) -> "RunSummary":
        """Sum up a history."""
        found = [(r.step, r.measurement) for r in history]
        told = [
            (r.step, r.measurement.critical_lr / r.lr)
            for r in history
            if r.lr and r.measurement.status in {"converged", "ascent"}
        ]
        since, at_edge = None, 0
        for size, (step, headroom) in enumerate(reversed(told), 1):
            at_edge += headroom <= _EDGE
            since = step if headroom <= _EDGE and 2 * at_edge >= size else since
        every = [m for r in history for m in (r.measurement, r.heldout, *r.blocks.values()) if m is not None]
        return cls(
            len(history),
            max(((s, m.sharpness) for s, m in found if m.status == "converged"), key=lambda one: one[1], default=None),
            min(told, key=lambda one: one[1], default=None),
            since,
            Counter(m.status for _, m in found),
            num_skipped,
            sum(m.forwards for m in every),
            sum(m.seconds for m in every),
        )

    def _rows(self) -> dict[str, str]:
        largest, nearest = self.largest, self.smallest_headroom
        statuses = ", ".join(f"{count} {status}" for status, count in self.statuses.items())
        skipped = f", {self.num_skipped} skipped" if self.num_skipped else ""
        edge = "not at the end" if self.at_edge_since is None else f"since step {self.at_edge_since}"
        return {
            "measured": f"{self.num_measured} steps: {statuses}{skipped}",
            "largest λ_c": "" if largest is None else f"{largest[1]:.4g} at step {largest[0]}",
            "smallest η_c / lr": "" if nearest is None else f"{nearest[1]:.3g} at step {nearest[0]}",
            "at the edge": "" if nearest is None else edge,
            "cost": f"{self.forwards} forward passes, {self.seconds:.3g} s",
        }

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self._rows().items() if value)

    def _repr_html_(self) -> str:
        return table_html(self._rows())


class Reports:
    """The part of a Monitor that tells of its history."""

    history: "list[Record]"
    skipped: list[tuple[int, str]]

    def summary(self) -> RunSummary:
        """Return the largest λ_c, the smallest headroom, since when the run is at the edge, the statuses, the cost."""
        return RunSummary.of(self.history, len(self.skipped))

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one row per measured step.

        Args:
            path: of the file, written anew.

        Raises:
            ValueError: nothing was measured yet.
        """
        if not self.history:
            raise ValueError("history must hold a measurement to be written, got none; call the monitor first")
        write_rows(path, [record.row() for record in self.history])

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with one row per measured step, by the step; needs the extra ``pandas``.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise missing("pandas", "pandas", "a data frame") from error
        rows = [record.row() for record in self.history]
        return pandas.DataFrame(rows).set_index("step") if rows else pandas.DataFrame()

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        ax: Any = None,
        *,
        runs: "Iterable[Reports] | Mapping[str, Reports]" = (),
    ) -> Any:
        """Draw λ_c with 2/η, η_c with the schedule, and the loss against the step; needs the extra ``plot``.

        Args:
            path: of an image file, its format by the ending.
            ax: matplotlib axes to draw λ_c into, in place of a figure of its own.
            runs: other Monitors to compare with, in a list or by name.

        Returns:
            matplotlib.figure.Figure: for a notebook to show, where neither ``path`` nor ``ax`` is given.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: nothing was measured yet.
        """
        from sharpkern.monitoring.plot import draw_history, plot_history

        named = runs if isinstance(runs, Mapping) else {f"run {i}": run for i, run in enumerate(runs, 2)}
        others = {str(name): run.history for name, run in named.items()}
        if ax is None:
            return plot_history(self.history, path, runs=others, schedule=True)
        return draw_alone(lambda axes: draw_history(axes, self.history, runs=others), path, ax)

    def plot_blocks(self, path: str | os.PathLike[str] | None = None, ax: Any = None) -> Any:
        """Draw λ_c of every block, in the order of depth, against the step as a heat map; needs the extra ``plot``.

        Args:
            path: of an image file, its format by the ending.
            ax: matplotlib axes to draw into, in place of a figure of its own.

        Returns:
            matplotlib.figure.Figure: for a notebook to show, where neither ``path`` nor ``ax`` is given.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: no block was measured.
        """
        from sharpkern.monitoring.plot import draw_blocks

        measured = [(record.step, record.blocks) for record in self.history if record.blocks]
        return draw_alone(lambda axes: draw_blocks(axes, measured), path, ax)
