"""Plots of a training run: sharpness against the step with the line 2/η, and the loss below."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sharpkern._support.figures import (
    BLUE,
    BOUND,
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


def plot_history(
    history: "Sequence[Record]",
    path: str | os.PathLike[str],
    *,
    extra: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    title: str | None = None,
    xlabel: str = "step",
) -> None:
    """Draw λ_c and 2/η against the step, and the loss below, into an image file.

    No measurement is dropped: one that goes uphill at once stands at the upper edge, one that is unresolved at the
    lower, and an "unbounded" one is an open triangle at its bound, below which the true value lies; at the lower edge
    where the bound lies far below all else.
    """
    if not history:
        raise ValueError(
            "history must hold at least one record to draw, got none; call the monitor in the training loop"
        )
    figure = new_figure(7.5, 5.0)
    sharpness_axes, loss_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))

    rated = [(record.step, 2 / record.lr) for record in history if record.lr]
    if rated:
        sharpness_axes.plot(*columns(rated), color="black", linestyle="--", linewidth=1.2, label=r"$2/\eta$", zorder=1)
    draw_measurements(
        sharpness_axes, history, lambda record: record.measurement, r"critical sharpness $\lambda_c$", BLUE
    )
    draw_measurements(sharpness_axes, history, lambda record: record.heldout, r"held-out $\lambda_c$", ORANGE)
    for (label, points), (color, marker) in zip((extra or {}).items(), _EXTRA_STYLES, strict=False):
        _draw_extra(sharpness_axes, label, points, color, marker)
    sharpness_axes.set_yscale("log")
    sharpness_axes.set_ylabel("sharpness (1/learning rate)")
    legend_once(sharpness_axes)

    loss_axes.plot(*columns([(r.step, r.measurement.base_loss) for r in history]), color=GREY, linewidth=1.2)
    heldout_losses = [(r.step, r.heldout.base_loss) for r in history if r.heldout]
    if heldout_losses:
        loss_axes.plot(*columns(heldout_losses), color=ORANGE, linewidth=1.2)
    loss_axes.set_ylabel("loss")
    loss_axes.set_xlabel(xlabel)

    for axes in (sharpness_axes, loss_axes):
        light_grid(axes)
    if title is not None:
        figure.suptitle(title, fontsize="medium")
    save_figure(figure, path)


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
