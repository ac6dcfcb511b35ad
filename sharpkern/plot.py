"""Plots: sharpness against the step with the line 2/η, and the loss below; or sharpness against the mix of data.

Drawn on a `matplotlib.figure.Figure` of their own, so that neither the user's backend nor an open figure is touched.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sharpkern._extras import missing

if TYPE_CHECKING:
    from sharpkern.measurement import Measurement
    from sharpkern.monitor import Record
    from sharpkern.sweep import MixtureSweep

# Okabe and Ito's palette, told apart with every kind of colour vision.
_BLUE, _ORANGE, _GREY = "#0072B2", "#E69F00", "#555555"
_EXTRA_STYLES = (("#D55E00", "s"), ("#009E73", "D"), ("#CC79A7", "v"))
_TASK_COLORS = (_BLUE, _ORANGE, "#009E73", "#CC79A7", "#D55E00", "#56B4E9", _GREY)

# Measurements without a value on a log axis: where they are marked, as a fraction of its height, and how.
_MARKS = {
    "ascent": (0.97, "^", "uphill at once"),
    "unresolved": (0.03, "x", "unresolved"),
    "nonfinite": (0.03, "*", "loss not finite"),
}


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
    lower, and an "unbounded" one is an open triangle at its bound, below which the true value lies.

    Args:
        history: The records of a `Monitor`.
        path: The file; its ending says the format.
        extra: Further curves on the sharpness axis, {label: [(step, value), …]}; values at or below zero stand at the
            lower edge.
        title: Stands above the plot.
        xlabel: What the records' steps are.

    Raises:
        ValueError: If the history is empty.
        ImportError: If matplotlib is not installed.
    """
    if not history:
        raise ValueError(
            "history must hold at least one record to draw, got none; call the monitor in the training loop"
        )
    figure = _figure(7.5, 5.0)
    sharpness_axes, loss_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))

    rated = [(record.step, 2 / record.lr) for record in history if record.lr]
    if rated:
        sharpness_axes.plot(*_columns(rated), color="black", linestyle="--", linewidth=1.2, label=r"$2/\eta$", zorder=1)
    _draw_measurements(
        sharpness_axes, history, lambda record: record.measurement, r"critical sharpness $\lambda_c$", _BLUE
    )
    _draw_measurements(sharpness_axes, history, lambda record: record.heldout, r"held-out $\lambda_c$", _ORANGE)
    for (label, points), (color, marker) in zip((extra or {}).items(), _EXTRA_STYLES, strict=False):
        _draw_extra(sharpness_axes, label, points, color, marker)
    sharpness_axes.set_yscale("log")
    sharpness_axes.set_ylabel("sharpness (1/learning rate)")
    _legend(sharpness_axes)

    loss_axes.plot(*_columns([(r.step, r.measurement.base_loss) for r in history]), color=_GREY, linewidth=1.2)
    heldout_losses = [(r.step, r.heldout.base_loss) for r in history if r.heldout]
    if heldout_losses:
        loss_axes.plot(*_columns(heldout_losses), color=_ORANGE, linewidth=1.2)
    loss_axes.set_ylabel("loss")
    loss_axes.set_xlabel(xlabel)

    for axes in (sharpness_axes, loss_axes):
        _plain(axes)
    if title is not None:
        figure.suptitle(title, fontsize="medium")
    figure.savefig(path)


def plot_mixture(sweep: "MixtureSweep", path: str | os.PathLike[str], *, title: str | None = None) -> None:
    """Draw λ_c of every task against the mix into an image file: medians, quartile bands, and every single repeat.

    A loss that rises from the first step on stands at the upper edge, a measurement without a result at the lower; a
    band that reaches the upper edge has an infinite quartile. The sweet spot is a vertical line.

    Args:
        sweep: What was measured; the x axis is the share of its first source, or, of more than two, the mix itself.
        path: The file; its ending says the format.
        title: Stands above the plot.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = _figure(7.5, 4.5)
    axes = figure.subplots()
    draw_mixture(axes, sweep)
    if title is not None:
        figure.suptitle(title, fontsize="medium")
    figure.savefig(path)


def draw_mixture(axes: Any, sweep: "MixtureSweep") -> None:
    """Draw what `plot_mixture` draws into axes of your own.

    Args:
        axes: Of matplotlib.
        sweep: What was measured.
    """
    two = len(sweep.sources) == 2
    place = {shares: shares[0] if two else i for i, shares in enumerate(sweep.mixes)}
    mixes = sorted(sweep.mixes, key=place.__getitem__)
    axes.set_yscale("log")
    finite = [point.sharpness for point in sweep.points if math.isfinite(point.sharpness)] or [1.0]
    top = 2.0 * max(finite)
    axes.set_ylim(min(finite) / 2, top)
    for i, task in enumerate(sweep.tasks):
        color = _TASK_COLORS[i % len(_TASK_COLORS)]
        found = [sweep.summary(shares, task) for shares in mixes]
        places = [place[shares] for shares in mixes]
        line = [one.sharpness if math.isfinite(one.sharpness) else math.nan for one in found]
        axes.plot(places, line, "-o", color=color, linewidth=1.6, markersize=3, label=task, zorder=3)
        edges = [[min(one.sharpness_low, top) for one in found], [min(one.sharpness_high, top) for one in found]]
        axes.fill_between(places, *edges, color=color, alpha=0.18, linewidth=0, zorder=1)
        single = [point for point in sweep.points if point.task == task]
        repeats = [place[point.shares] for point in single], [point.sharpness for point in single]
        axes.plot(*repeats, ".", color=color, markersize=3, alpha=0.45, zorder=2)
        # Side by side where tasks meet at an edge.
        shift = 0.015 * i
        for where, one in zip(places, found, strict=True):
            label = "uphill at once (size: share of repeats)"
            _draw_at_edge(
                axes, [where] * bool(one.ascent), 0.97 - shift, "^", color, label, 2 + 6 * one.ascent / one.repeats
            )
            _draw_at_edge(axes, [where] * bool(one.failed), 0.03 + shift, "x", color, "some repeats without a result")
    spot = sweep.sweet_spot
    if spot is not None:
        where = place[tuple(spot.shares.values())]
        axes.axvline(
            where, color="black", linestyle=":", linewidth=1.2, label=rf"sweet spot, $\eta$ = {spot.critical_lr:.2g}"
        )
    if two:
        axes.set_xlabel(f"share of {sweep.sources[0]} in the mix (the rest is {sweep.sources[1]})")
    else:
        axes.set_xticks(list(place.values()), ["\n".join(f"{share:g}" for share in shares) for shares in sweep.mixes])
        axes.set_xlabel("shares of " + ", ".join(sweep.sources) + " in the mix, from above")
    axes.set_ylabel(r"$\lambda_c$ of the task along the mix's update")
    _legend(axes)
    _plain(axes)


def _figure(width: float, height: float) -> Any:
    """Return a figure of its own, of inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("matplotlib", "plot", "plotting") from error
    return Figure(figsize=(width, height), dpi=140, layout="constrained")


def _legend(axes: Any) -> None:
    """Name each label once; those of points at an edge repeat."""
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    axes.legend(entries.values(), entries.keys(), loc="best", fontsize="small", framealpha=0.9)


def _plain(axes: Any) -> None:
    """Draw a light grid and no frame."""
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Return the steps and the values of a curve."""
    return [step for step, _ in points], [value for _, value in points]


def _draw_measurements(
    axes: Any, history: "Sequence[Record]", pick: "Callable[[Record], Measurement | None]", label: str, color: str
) -> None:
    """Draw one series of measurements: a line through those that converged, and a mark for each of the others."""
    picked = [(record.step, pick(record)) for record in history]
    taken = [(step, measurement) for step, measurement in picked if measurement is not None]
    if not taken:
        return
    # nan interrupts the line where there is no value to go through.
    line = [(step, m.sharpness if m.status == "converged" else math.nan) for step, m in taken]
    lonely = sum(m.status == "converged" for _, m in taken) < 2
    axes.plot(*_columns(line), color=color, linewidth=1.4, marker="o" if lonely else None, label=label, zorder=3)
    bounds = [(step, m.sharpness) for step, m in taken if m.status == "unbounded"]
    if bounds:
        axes.plot(*_columns(bounds), "v", color=color, fillstyle="none", label="no rise found: upper bound", zorder=3)
    for status, (height, marker, meaning) in _MARKS.items():
        steps = [step for step, m in taken if m.status == status]
        _draw_at_edge(axes, steps, height, marker, color, meaning)


def _draw_extra(axes: Any, label: str, points: Sequence[tuple[int, float]], color: str, marker: str) -> None:
    """Draw a further curve, its values at or below zero at the lower edge."""
    positive = [(step, value if value > 0 else math.nan) for step, value in points]
    style = {"color": color, "linewidth": 1.0, "marker": marker, "markersize": 3, "zorder": 2}
    axes.plot(*_columns(positive), label=label, **style)
    _draw_at_edge(axes, [step for step, value in points if value <= 0], 0.03, "_", color, "at or below zero")


def _draw_at_edge(
    axes: Any, places: Sequence[float], height: float, marker: str, color: str, label: str, size: float = 5.0
) -> None:
    """Mark places on the x axis at a height of the axes instead of at a value."""
    if places:
        transform = axes.get_xaxis_transform()
        axes.plot(
            places, [height] * len(places), marker, color=color, markersize=size, transform=transform, label=label
        )
