"""Plots of a training run: sharpness against the step with the line 2/η, and the loss below."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from sharpkern._support.figures import (
    BLUE,
    BOUND,
    COLORS,
    GREY,
    MARKS,
    ORANGE,
    columns,
    draw_at_edge,
    least_beside,
    legend_once,
    light_grid,
    new_figure,
    save_figure,
)

if TYPE_CHECKING:
    from sharpkern.measures.result import Measurement
    from sharpkern.monitoring.monitor import Record

_EXTRA_STYLES = (("#D55E00", "s"), ("#009E73", "D"), ("#CC79A7", "v"))
_RUN_COLORS = COLORS[2:]
# Of an axis at least, in log units; and measurements on each side that η_c's band is of.
_LEAST_ROOM, _NEIGHBOURS = math.log(3.0), 2


def plot_history(
    history: "Sequence[Record]",
    path: str | os.PathLike[str] | None = None,
    *,
    extra: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    runs: "Mapping[str, Sequence[Record]] | None" = None,
    schedule: bool = False,
    title: str | None = None,
    xlabel: str = "step",
) -> Any:
    """Draw λ_c and 2/η against the step, η_c with the schedule, and the loss, into an image file or a figure.

    No measurement is dropped: one that goes uphill at once stands at the upper edge, one that is unresolved at the
    lower, and an "unbounded" one is an open triangle at its bound, below which the true value lies; at the lower edge
    where the bound lies far below all else. Values far from all others are marked at the edges too.
    """
    _refuse_empty(history)
    shows_schedule = schedule and any(record.lr for record in history)
    heights = (3, 2, 1) if shows_schedule else (3, 1)
    figure = new_figure(7.5, 7.0 if shows_schedule else 5.0)
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    draw_history(panels[0], history, extra=extra, runs=runs)
    if shows_schedule:
        _draw_schedule(panels[1], history)
    loss_axes = panels[-1]
    loss_axes.plot(*columns([(r.step, r.measurement.base_loss) for r in history]), color=GREY, linewidth=1.2)
    heldout_losses = [(r.step, r.heldout.base_loss) for r in history if r.heldout]
    if heldout_losses:
        loss_axes.plot(*columns(heldout_losses), color=ORANGE, linewidth=1.2)
    for other, color in zip((runs or {}).values(), cycle(_RUN_COLORS), strict=False):
        loss_axes.plot(*columns([(r.step, r.measurement.base_loss) for r in other]), color=color, linewidth=1.0)
    loss_axes.set_ylabel("loss")
    loss_axes.set_xlabel(xlabel)
    for axes in panels[1:]:
        light_grid(axes)
    if title is not None:
        figure.suptitle(title, fontsize="medium")
    if path is None:
        return figure
    return save_figure(figure, path)


def draw_history(
    axes: Any,
    history: "Sequence[Record]",
    *,
    extra: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    runs: "Mapping[str, Sequence[Record]] | None" = None,
) -> None:
    """Draw λ_c and 2/η against the step, of other runs too; neither a single value nor a far 2/η stretches the axis."""
    _refuse_empty(history)
    axes.set_yscale("log")
    rated = [(record.step, 2 / record.lr) for record in history if record.lr]
    if rated:
        axes.plot(*columns(rated), color="black", linestyle="--", linewidth=1.2, label=r"$2/\eta$", zorder=1)
    draw_measurements(axes, history, lambda record: record.measurement, r"critical sharpness $\lambda_c$", BLUE)
    draw_measurements(axes, history, lambda record: record.heldout, r"held-out $\lambda_c$", ORANGE)
    for (label, points), (color, marker) in zip((extra or {}).items(), _EXTRA_STYLES, strict=False):
        _draw_extra(axes, label, points, color, marker)
    for (label, other), color in zip((runs or {}).items(), cycle(_RUN_COLORS), strict=False):
        draw_measurements(axes, other, lambda record: record.measurement, rf"$\lambda_c$ of {label}", color)
        lines = [(record.step, 2 / record.lr) for record in other if record.lr]
        axes.plot(*columns(lines), color=color, linestyle="--", linewidth=0.8, zorder=1)
    _limit(axes, rated)
    axes.set_ylabel("sharpness (1/learning rate)")
    light_grid(axes)
    legend_once(axes)


def _refuse_empty(history: "Sequence[Record]") -> None:
    if not history:
        raise ValueError(
            "history must hold at least one record to draw, got none; call the monitor in the training loop"
        )


def _limit(axes: Any, rated: Sequence[tuple[int, float]]) -> None:
    """Let the bulk of all lines fill the axis, with 2/η where it is near, and mark at the edges what lies outside."""
    # Without 2/η, and marks that stand at an edge already.
    lines = [line for line in axes.lines if line.get_transform() is axes.transData and line.get_linestyle() != "--"]
    curves = [line.get_ydata() for line in lines if line.get_linestyle() == "-"]
    logs = sorted(math.log(y) for curve in curves for y in curve if 0 < y < math.inf)
    if not logs:
        return
    low, high = logs[len(logs) // 10], logs[-1 - len(logs) // 10]
    room = max(high - low, _LEAST_ROOM)
    bottom, top = max(logs[0], low - room), min(logs[-1], high + room)
    thresholds = [math.log(line) for _, line in rated]
    bounds = [math.log(y) for line in lines if line.get_linestyle() != "-" for y in line.get_ydata() if y > 0]
    near = [y for y in (*thresholds, *bounds) if bottom - room <= y <= top + room]
    bottom, top = min([bottom, *near]), max([top, *near])
    margin = 0.06 * max(top - bottom, _LEAST_ROOM)
    axes.set_ylim(math.exp(bottom - margin), math.exp(top + margin))
    for line in lines:
        points = [(x, math.log(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if y > 0]
        above, below = [x for x, y in points if y > top + margin], [x for x, y in points if y < bottom - margin]
        draw_at_edge(axes, above, 0.97, "2", line.get_color(), "beyond the axis")
        draw_at_edge(axes, below, 0.03, "1", line.get_color(), "beyond the axis")
    if rated and not any(bottom <= y <= top for y in thresholds):
        words = f"2/η from {min(line for _, line in rated):.3g} to {max(line for _, line in rated):.3g}, off the axis"
        place = 0.99 if math.log(rated[-1][1]) > top else 0.01
        style = {"ha": "right", "va": "top" if place > 0.5 else "bottom", "fontsize": "x-small", "color": GREY}
        axes.text(0.99, place, words, transform=axes.transAxes, **style)


def _draw_schedule(axes: Any, history: "Sequence[Record]") -> None:
    """Draw the learning rate, and η_c with a band from the smallest to the largest of a few measurements beside it."""
    found = [(r.step, r.measurement.critical_lr) for r in history if r.measurement.status == "converged"]
    steps, values = columns(found)
    windows = [values[max(0, i - _NEIGHBOURS) : i + _NEIGHBOURS + 1] for i in range(len(values))]
    axes.fill_between(steps, [min(w) for w in windows], [max(w) for w in windows], color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(steps, values, color=BLUE, linewidth=1.0, label=r"$\eta_c$")
    axes.plot(*columns([(r.step, r.lr) for r in history if r.lr]), color="black", linestyle="--", label=r"$\eta$")
    axes.set_yscale("log")
    axes.set_ylabel("learning rate")
    legend_once(axes)


def draw_blocks(
    axes: Any, measured: "Sequence[tuple[int | str, Mapping[str, Measurement]]]", xlabel: str = "step"
) -> None:
    """Draw λ_c of every block against the step as a heat map; grey where it has no value."""
    if not measured:
        raise ValueError("history must hold λ_c of blocks to draw, got none; pass Monitor(..., blocks=True)")
    from matplotlib.colors import LogNorm

    names = list(dict.fromkeys(name for _, blocks in measured for name in blocks))
    rows = [[_value(blocks.get(name)) for _, blocks in measured] for name in names]
    known = [value for row in rows for value in row if not math.isnan(value)] or [1.0]
    norm = LogNorm(min(known), max(max(known), 1.01 * min(known)))
    # One column for each measurement, whatever the steps between them.
    image = axes.imshow(rows, aspect="auto", norm=norm, cmap="viridis", interpolation="nearest")
    axes.set_facecolor("#cccccc")
    shown = range(0, len(measured), -(-len(measured) // 10))
    axes.set_xticks(list(shown), [str(measured[i][0]) for i in shown])
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_xlabel(xlabel)
    axes.figure.colorbar(image, ax=axes, label=r"$\lambda_c$ of the block alone (1/learning rate)")


def _value(m: "Measurement | None") -> float:
    return m.sharpness if m is not None and m.status == "converged" else math.nan


def draw_measurements(
    axes: Any, history: "Sequence[Record]", pick: "Callable[[Record], Measurement | None]", label: str, color: str
) -> None:
    """Draw one series of measurements: a line through those that converged, and a mark for each of the others."""
    picked = [(record.step, pick(record)) for record in history]
    taken = [(step, measurement) for step, measurement in picked if measurement is not None]
    if not taken:
        return
    # nan interrupts the line where there is no value to go through.
    line = [(step, m.sharpness if m.status == "converged" else math.nan) for step, m in taken]
    # A line does not show a point between two gaps.
    values = [math.nan, *(value for _, value in line), math.nan]
    lonely = [i for i in range(len(line)) if math.isnan(values[i]) and math.isnan(values[i + 2])]
    marks = {"marker": "o", "markersize": 4, "markevery": lonely}
    axes.plot(*columns(line), color=color, linewidth=1.4, label=label, zorder=3, **marks)
    bounds = [(step, m.sharpness) for step, m in taken if m.status == "unbounded"]
    least = least_beside(axes.dataLim.minposy)
    near = [(step, bound) for step, bound in bounds if bound >= least]
    if near:
        axes.plot(*columns(near), "v", color=color, fillstyle="none", label=BOUND, zorder=3)
    draw_at_edge(axes, [step for step, bound in bounds if bound < least], 0.03, "v", color, BOUND, fillstyle="none")
    for status, (height, marker, meaning) in MARKS.items():
        steps = [step for step, m in taken if m.status == status]
        draw_at_edge(axes, steps, height, marker, color, meaning)


def _draw_extra(axes: Any, label: str, points: Sequence[tuple[int, float]], color: str, marker: str) -> None:
    """Draw a further curve, its values at or below zero at the lower edge."""
    positive = [(step, value if value > 0 else math.nan) for step, value in points]
    style = {"color": color, "linewidth": 1.0, "marker": marker, "markersize": 3, "zorder": 2}
    axes.plot(*columns(positive), label=label, **style)
    draw_at_edge(axes, [step for step, value in points if value <= 0], 0.03, "_", color, "at or below zero")
