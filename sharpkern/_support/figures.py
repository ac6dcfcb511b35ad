"""How plots are drawn, on a `matplotlib.figure.Figure` of their own: no backend and no open figure is touched."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from typing import Any

from sharpkern._support.files import replacing
from sharpkern._support.optional import missing

# Okabe and Ito's palette, told apart with every kind of colour vision.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#555555"
COLORS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#D55E00", "#56B4E9", GREY)

# Measurements without a value on a log axis: where they are marked, as a fraction of its height, and how.
MARKS = {
    "ascent": (0.97, "^", "uphill at once"),
    "unresolved": (0.03, "x", "unresolved"),
    "nonfinite": (0.03, "*", "loss not finite"),
}
BOUND = "no rise found: upper bound"


def new_figure(width: float, height: float) -> Any:
    """Return a figure of its own, of inches; a notebook shows it where it is the value of a cell."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("matplotlib", "plot", "plotting") from error

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            image = BytesIO()
            self.savefig(image, format="png")
            return image.getvalue()

    return Shown(figsize=(width, height), dpi=140, layout="constrained")


def draw_alone(
    draw: Callable[[Any], None], path: str | os.PathLike[str] | None, ax: Any, width: float = 6.5, height: float = 4.0
) -> Any:
    """Draw into axes, or a figure of its own; return that where it is neither somebody else's nor a file."""
    figure = new_figure(width, height) if ax is None else ax.figure
    draw(figure.subplots() if ax is None else ax)
    if path is not None:
        save_figure(figure, path)
    return figure if ax is None and path is None else None


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure into an image file, its format by the ending; PNG, and its ending, where there is none."""
    ending = os.path.splitext(path)[1][1:]
    if not ending and not os.path.exists(path):
        path = f"{os.fspath(path)}.png"
    # A pipe takes no path, whose writer goes back and forth in the file.
    with replacing(path) as beside, beside.open("wb") as file:
        figure.savefig(file, format=ending or "png")


def legend_once(axes: Any) -> None:
    """Name each label once; those of points at an edge repeat."""
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    axes.legend(entries.values(), entries.keys(), loc="best", fontsize="small", framealpha=0.9)


def legend_below(figure: Any, panels: Iterable[Any], words: str | None = None) -> None:
    """Name every label once, whichever panel has it, where the legend covers nothing."""
    entries = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    style = {"loc": "outside lower center", "ncols": 4, "fontsize": "small", "frameon": False}
    figure.legend(entries.values(), entries.keys(), title=words, title_fontsize="small", **style)


def light_grid(axes: Any) -> None:
    """Draw a light grid and no frame."""
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Return the steps and the values of a curve."""
    return [step for step, _ in points], [value for _, value in points]


def least_beside(lowest: float) -> float:
    """The least bound that is drawn at its value: from one far below the curves nothing could be seen of them."""
    return lowest / 10 if lowest < math.inf else 0.0


def draw_at_edge(
    axes: Any,
    places: Sequence[float],
    height: float,
    marker: str,
    color: str,
    label: str | None,
    size: float = 5.0,
    fillstyle: str = "full",
) -> None:
    """Mark places on the x axis at a height of the axes instead of at a value."""
    if places:
        style = {"color": color, "markersize": size, "fillstyle": fillstyle}
        axes.plot(places, [height] * len(places), marker, transform=axes.get_xaxis_transform(), label=label, **style)
