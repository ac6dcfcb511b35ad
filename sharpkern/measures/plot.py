"""The picture of one measurement: the loss at the step sizes that were tried, and what was found."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sharpkern._support.figures import BLUE, GREY, ORANGE, draw_at_edge, legend_once, light_grid

if TYPE_CHECKING:
    from sharpkern.measures.result import Measurement

# How far above the base loss the picture goes, in units of the deepest fall below it.
_ABOVE = 1.5


def draw_measurement(axes: Any, m: "Measurement", curve: tuple[Iterable[Any], Iterable[Any]] | None) -> None:
    """Draw the loss against the step size, with base loss, bracket, η_c and learning rate.

    What rises far above the base loss stands at the upper edge, so that the fall is seen.
    """
    line = [] if curve is None else sorted(zip(*(map(float, part) for part in curve), strict=True))
    if any(eta > 0 for eta, _ in m.probes) and all(eta > 0 for eta, _ in line):
        axes.set_xscale("log")
    if math.isfinite(m.base_loss):
        axes.axhline(m.base_loss, color=GREY, linestyle="--", linewidth=1.0, label=r"$L(\theta)$")
    if line:
        axes.plot(*zip(*line, strict=True), color=BLUE, linewidth=1.4, label="loss curve")
    losses = [loss for _, loss in (*m.probes, *line) if math.isfinite(loss)]
    fall = m.base_loss - min(losses, default=m.base_loss)
    top = m.base_loss + _ABOVE * fall if fall > 0 else max(losses, default=math.inf)
    seen = [(eta, loss) for eta, loss in m.probes if loss <= top]
    axes.plot([eta for eta, _ in seen], [loss for _, loss in seen], "o", color=BLUE, markersize=5, label="probes")
    draw_at_edge(axes, [eta for eta, loss in m.probes if not loss <= top], 0.97, "^", BLUE, "probes above")
    if fall > 0:
        axes.set_ylim(m.base_loss - 1.15 * fall, top)
    low, high = m.bracket
    if 0 < low < high < math.inf:
        axes.axvspan(low, high, color=ORANGE, alpha=0.25, linewidth=0, label="bracket")
    if 0 < m.critical_lr < math.inf:
        label = (
            rf"$\eta_c$ = {m.critical_lr:.3g}" if m.status == "converged" else f"{m.status} up to {m.critical_lr:.3g}"
        )
        axes.axvline(m.critical_lr, color=ORANGE, linewidth=1.4, label=label)
    if m.lr is not None:
        axes.axvline(m.lr, color="black", linestyle=":", linewidth=1.4, label=rf"learning rate {m.lr:.3g}")
    axes.set_xlabel(r"step size $\eta$")
    axes.set_ylabel(r"$L(\theta - \eta\Delta\theta)$")
    light_grid(axes)
    legend_once(axes)
