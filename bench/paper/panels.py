"""A figure of several training runs side by side: sharpness against the step on a log axis, and the loss below."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharpkern._support.figures import MARKS, columns, draw_at_edge, legend_below

# Measurements that the lines are a median of, this one in the middle.
_WINDOW = 7


@dataclass(frozen=True)
class Curve:
    """One measured quantity.

    Attributes:
        column: of its values.
        label: in the legend.
        color: of Okabe and Ito's palette.
        status: column that says which of the values are none.
    """

    column: str
    label: str
    color: str
    status: str | None = None


def draw_runs(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    curves: Sequence[Curve],
    thresholds: Sequence[Curve],
    title: Callable[[Mapping[str, Any]], str],
) -> None:
    """Draw one panel for each run: every measurement as a dot, running medians as lines, thresholds dashed."""
    from matplotlib.figure import Figure

    runs = list(dict.fromkeys(row["run"] for row in rows))
    figure = Figure(figsize=(4 * len(runs), 5.2), dpi=120, layout="constrained")
    grid = figure.subplots(2, len(runs), sharex=True, sharey="row", squeeze=False, height_ratios=(3.5, 1))
    for run, upper, lower in zip(runs, *grid, strict=True):
        panel = [row for row in rows if row["run"] == run]
        steps = [row["step"] for row in panel]
        for line in thresholds:
            values = [row[line.column] for row in panel]
            upper.plot(steps, values, "--", color=line.color, linewidth=1.3, label=line.label, zorder=4)
        for curve in curves:
            _draw_curve(upper, curve, [row for row in panel if curve.column in row])
        lower.plot(steps, [row["loss"] for row in panel], color="#555555", linewidth=1)
        upper.set_yscale("log")
        upper.set_title(title(panel[0]), fontsize="medium")
        lower.set_xlabel("step")
        for axes in (upper, lower):
            axes.grid(visible=True, color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("sharpness (1/learning rate)")
    grid[1][0].set_ylabel("loss")
    legend_below(figure, grid[0], f"dots: measurements; lines: running medians of {_WINDOW}")
    figure.savefig(path)


def _draw_curve(axes: Any, curve: Curve, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw one quantity of one run; what has no place on a log axis stands at an edge of it."""
    points = [(row["step"], row[curve.column], row[curve.status] if curve.status else "converged") for row in rows]
    dots = [(step, value) for step, value, status in points if status == "converged" and value > 0]
    bounds = [(step, value) for step, value, status in points if status == "unbounded"]
    axes.plot(*columns(dots), ".", color=curve.color, markersize=3.5, alpha=0.5, markeredgewidth=0, zorder=2)
    axes.plot(*columns(_running_medians(points)), color=curve.color, linewidth=1.5, label=curve.label, zorder=3)
    if bounds:
        axes.plot(*columns(bounds), "v", color=curve.color, fillstyle="none", label="no rise found: upper bound")
    for status, (height, marker, meaning) in MARKS.items():
        steps = [step for step, _, found in points if found == status]
        draw_at_edge(axes, steps, height, marker, curve.color, meaning)
    steps = [step for step, value, _ in points if value <= 0]
    draw_at_edge(axes, steps, 0.03, "_", curve.color, "at or below zero")
    steps = [step for step, value, status in points if status == "converged" and not math.isfinite(value)]
    draw_at_edge(axes, steps, 0.06, "1", curve.color, "no value")


def _running_medians(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float]]:
    """Return the median around each step, of what has a value; nan where a log axis has no place for it."""
    line = []
    for i, (step, _, _) in enumerate(points):
        around = points[max(i - _WINDOW // 2, 0) : i + _WINDOW // 2 + 1]
        values = [value for _, value, _ in around if not math.isnan(value)]
        median = statistics.median(values) if values else math.nan
        line.append((step, median if 0 < median < math.inf else math.nan))
    return line
