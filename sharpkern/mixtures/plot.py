"""Plot of a sweep over data mixes: λ_c of every task against the mix, with everything that the repeats came to."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sharpkern._support.figures import (
    BOUND,
    COLORS,
    draw_at_edge,
    least_beside,
    legend_below,
    light_grid,
    new_figure,
    save_figure,
)

if TYPE_CHECKING:
    from sharpkern.mixtures.results import MixturePoint, MixtureSweep


def plot_mixture(sweep: "MixtureSweep", path: str | os.PathLike[str]) -> None:
    """Draw λ_c of every task against the mix into an image file."""
    figure = new_figure(7.5, 5.0)
    axes = figure.subplots()
    draw_mixture(axes, sweep)
    legend_below(figure, [axes])
    save_figure(figure, path)


def draw_mixture(axes: Any, sweep: "MixtureSweep") -> None:
    """Draw λ_c of every task against the mix: medians as lines, quartiles as bands, every repeat as a dot.

    A loss that rises from the first step on stands at the upper edge, and a band that reaches it has an infinite
    quartile. The sweet spot is a vertical line. A legend is left to the caller.
    """
    two = len(sweep.sources) == 2
    place = {shares: shares[0] if two else i for i, shares in enumerate(sweep.mixes)}
    axes.set_yscale("log")
    known = [2 / step for p in sweep.points if p.status != "unbounded" and 0 < (step := _drawn(p)) < math.inf]
    least = least_beside(min(known, default=math.inf))
    bounds = [p.sharpness for p in sweep.points if p.status == "unbounded" and p.sharpness >= least]
    shown = [*known, *bounds] or [1.0]
    axes.set_ylim(min(shown) / 2, 2 * max(shown))
    for i, task in enumerate(sweep.tasks):
        _draw_task(axes, sweep, task, place, COLORS[i % len(COLORS)], shift=0.02 * i)
    spot = sweep.sweet_spot
    if spot is not None:
        label = rf"sweet spot, $\eta$ = {spot.critical_lr:.2g}"
        axes.axvline(place[tuple(spot.shares.values())], color="black", linestyle=":", linewidth=1.2, label=label)
    if two:
        axes.set_xlabel(f"share of {_plain(sweep.sources[0])} in the mix (the rest is {_plain(sweep.sources[1])})")
    else:
        axes.set_xticks(list(place.values()), ["\n".join(f"{share:g}" for share in shares) for shares in place])
        axes.set_xlabel("shares of " + ", ".join(map(_plain, sweep.sources)) + " in the mix, from above")
    axes.set_ylabel(r"$\lambda_c$ of the task along the mix's update")
    light_grid(axes)


def _draw_task(
    axes: Any,
    sweep: "MixtureSweep",
    task: str,
    place: Mapping[tuple[float, ...], float],
    color: str,
    shift: float,
) -> None:
    """Draw one task; ``shift`` keeps tasks apart that meet at an edge."""
    mixes = sorted(sweep.mixes, key=place.__getitem__)
    places = [place[shares] for shares in mixes]
    found = [sweep.summary(shares, task) for shares in mixes]
    medians = [one.sharpness if math.isfinite(one.sharpness) else math.nan for one in found]
    axes.plot(places, medians, "-o", color=color, linewidth=1.6, markersize=3, label=_plain(task), zorder=3)
    edges = ([_within(axes, bound) for bound in bounds] for bounds in _quartiles(found))
    axes.fill_between(places, *edges, color=color, alpha=0.18, linewidth=0, zorder=1)
    for status, marker, label in (
        ("converged", ".", None),
        ("unbounded", "v", BOUND),
        ("unresolved", "2", "rises at some smaller step: lower bound"),
    ):
        points = [p for p in sweep.points if p.task == task and p.status == status and 0 < _drawn(p) < math.inf]
        inside = [p for p in points if 2 / _drawn(p) > axes.get_ylim()[0]]
        if inside:
            values = [place[p.shares] for p in inside], [2 / _drawn(p) for p in inside]
            axes.plot(*values, marker, color=color, markersize=4, alpha=0.5, label=label, zorder=2)
        far = [place[p.shares] for p in points if p not in inside]
        draw_at_edge(axes, far, 0.03 + shift, marker, color, label, 4.0)
    for where, one in zip(places, found, strict=True):
        if one.ascent:
            size = 2 + 6 * one.ascent / one.repeats
            draw_at_edge(axes, [where], 0.97 - shift, "^", color, "uphill at once (size: share of repeats)", size)
        if one.failed:
            draw_at_edge(axes, [where], 0.03 + shift, "x", color, "repeats without a result")


def _drawn(point: "MixturePoint") -> float:
    """Return the step that a repeat is drawn by: an unresolved one by the smallest with a known rise."""
    return point.bracket[1] if point.status == "unresolved" else point.critical_lr


def _quartiles(found: Sequence[Any]) -> tuple[list[float], list[float]]:
    return [one.sharpness_low for one in found], [one.sharpness_high for one in found]


def _within(axes: Any, value: float) -> float:
    """Return a value, or the upper edge of the axes in place of infinity."""
    return value if math.isfinite(value) or math.isnan(value) else float(axes.get_ylim()[1])


def _plain(name: str) -> str:
    """Return a name without what matplotlib takes for the beginning of a formula."""
    return name.replace("$", r"\$")
