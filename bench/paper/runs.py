"""Training runs of figures 2 and 3: every sharpness at a step, runs side by side in a picture, and shares of rows."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaffold import Row, median, percent
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from sharpkern import Direction, Monitor, directional_sharpness, hessian_sharpness, stability_threshold
from sharpkern._support.figures import BOUND, GREY, MARKS, columns, draw_at_edge, legend_below, light_grid, new_figure

LossFn = Callable[[], Tensor]
# Residual to stop at of λ_max, which is approached from below: what λ_dir may seem to exceed it by.
TOLERANCE = 0.01
# λ_c and λ_dir count as close within this.
_CLOSE = 0.25
# What is kept of a monitor's record.
_MEASURED = ("step", "lr", "loss", "lambda_c", "status", "error", "heldout_lambda_c", "heldout_status")


class Gauge:
    """All sharpnesses of one loss at chosen steps; call it after ``backward()`` and before ``optimizer.step()``."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, due: Callable[[int], bool]) -> None:
        self._model, self._optimizer = model, optimizer
        self._monitor = Monitor(model, optimizer, every=due)
        self._preconditioner = optimizer if isinstance(optimizer, AdamW) else None
        # Each Lanczos iteration starts from the eigenvector of the last.
        self._eigenvector: Tensor | None = None

    def __call__(self, loss_fn: LossFn, heldout: LossFn | None = None) -> Row | None:
        """Measure if this step is due."""
        if self._monitor(loss_fn, heldout) is None:
            return None
        measured = self._monitor.history[-1].row()
        top = hessian_sharpness(
            self._model, loss_fn, preconditioner=self._preconditioner, tol=TOLERANCE, v0=self._eigenvector
        )
        self._eigenvector = top.vector
        row: Row = {
            **{name: measured[name] for name in _MEASURED},
            "lambda_dir": self._along(loss_fn, Direction.from_optimizer(self._optimizer)),
            "lambda_max": top.value,
            "residual": top.residual,
            "threshold": stability_threshold(self._optimizer),
        }
        if self._preconditioner is not None:
            plain = Direction.from_gradients(self._model, preconditioner=self._preconditioner)
            row["lambda_dir_plain"] = self._along(loss_fn, plain)
        return row

    def _along(self, loss_fn: LossFn, direction: Direction) -> float:
        return directional_sharpness(self._model, loss_fn, direction, method="hvp")


# -- rows -------------------------------------------------------------------------------------------------------------


def by_run(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows of each run, in order of appearance."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["run"], []).append(row)
    return list(runs.values())


def ratios(rows: Iterable[Row], above: str, below: str) -> list[float]:
    """Return the ratio of two columns wherever there is one; inf where λ_c is, of a direction that goes uphill."""
    pairs = [(row[above], row[below]) for row in rows if above in row and below in row]
    return [a / b for a, b in pairs if not math.isnan(a) and math.isfinite(b) and b]


def times(value: float) -> str:
    """Return a ratio to 2/η."""
    if not math.isfinite(value):
        return "no value" if math.isnan(value) else "∞"
    return f"{value:.2f} × 2/η" if value >= 0.1 else f"{value:.2g} × 2/η"


def close(rows: Iterable[Row]) -> str:
    """Return at how many points λ_c is close to λ_dir, and the median deviation."""
    deviations = [abs(ratio - 1) for ratio in ratios(rows, "lambda_c", "lambda_dir")]
    share = sum(deviation <= _CLOSE for deviation in deviations) / max(1, len(deviations))
    return f"{percent(share)} of {len(deviations)} points, median deviation {percent(median(deviations))}"


def largest_share(rows: Iterable[Row], column: str) -> str:
    """Return the largest ratio of a directional sharpness to λ_max, where that is positive."""
    shares = ratios((row for row in rows if row["lambda_max"] > 0), column, "lambda_max")
    return f"{max(shares, default=math.nan):.2f} of {len(shares)} points"


# -- picture ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One measured quantity: the column of its values, its label and colour, and the column of their status, if any."""

    column: str
    label: str
    color: str
    status: str | None = None


def draw_runs(
    rows: Sequence[Row],
    path: Path,
    *,
    curves: Sequence[Curve],
    thresholds: Sequence[Curve],
    title: Callable[[Row], str],
    window: int = 7,
    shaded: tuple[str, Callable[[Row], bool]] | None = None,
) -> None:
    """Draw one panel for each run: every measurement as a dot, running medians as lines, thresholds dashed.

    A median is of so many measurements, its own in the middle; steps may be shaded, and named in the legend.
    """
    runs = by_run(rows)
    figure = new_figure(4 * len(runs), 5.2)
    grid = figure.subplots(2, len(runs), sharex=True, sharey="row", squeeze=False, height_ratios=(3.5, 1))
    for panel, upper, lower in zip(runs, *grid, strict=True):
        steps = [row["step"] for row in panel]
        for line in thresholds:
            points = [(row["step"], row[line.column]) for row in panel if line.column in row]
            upper.plot(*columns(points), "--", color=line.color, linewidth=1.3, label=line.label, zorder=4)
        for curve in curves:
            _draw_curve(upper, curve, [row for row in panel if curve.column in row], window)
        lower.plot(steps, [row["loss"] for row in panel], color=GREY, linewidth=1)
        upper.set_yscale("log")
        upper.set_title(title(panel[0]), fontsize="medium")
        lower.set_xlabel("step")
        inside = [row["step"] for row in panel if shaded and shaded[1](row)]
        for axes in (upper, lower):
            light_grid(axes)
            if shaded and inside:
                axes.axvspan(inside[0], inside[-1], color="#eeeeee", zorder=0, label=shaded[0])
    grid[0][0].set_ylabel("sharpness (1/learning rate)")
    grid[1][0].set_ylabel("loss")
    legend_below(figure, grid[0], f"dots: measurements; lines: running medians of {window}" if window > 1 else None)
    figure.savefig(path)


def _draw_curve(axes: Any, curve: Curve, rows: Sequence[Row], window: int) -> None:
    """Draw one quantity of one run; what has no place on a log axis stands at an edge of it."""
    points = [(row["step"], row[curve.column], row[curve.status] if curve.status else "converged") for row in rows]
    dots = [(step, value) for step, value, status in points if status == "converged" and value > 0]
    bounds = [(step, value) for step, value, status in points if status == "unbounded"]
    axes.plot(*columns(dots), ".", color=curve.color, markersize=3.5, alpha=0.5, markeredgewidth=0, zorder=2)
    axes.plot(*columns(_running_medians(points, window)), color=curve.color, linewidth=1.5, label=curve.label, zorder=3)
    if bounds:
        axes.plot(*columns(bounds), "v", color=curve.color, fillstyle="none", label=BOUND)
    for status, (height, marker, meaning) in MARKS.items():
        steps = [step for step, _, found in points if found == status]
        draw_at_edge(axes, steps, height, marker, curve.color, meaning)
    steps = [step for step, value, _ in points if value <= 0]
    draw_at_edge(axes, steps, 0.03, "_", curve.color, "at or below zero")
    steps = [step for step, value, status in points if status == "converged" and not math.isfinite(value)]
    draw_at_edge(axes, steps, 0.06, "1", curve.color, "no value")


def _running_medians(points: Sequence[tuple[float, float, str]], window: int) -> list[tuple[float, float]]:
    """Return the median around each step, of what has a value; nan where a log axis has no place for it."""
    half = window // 2
    middles = [median(value for _, value, _ in points[max(i - half, 0) : i + half + 1]) for i in range(len(points))]
    return [(step, m if 0 < m < math.inf else math.nan) for (step, _, _), m in zip(points, middles, strict=True)]
