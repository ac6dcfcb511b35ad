"""A memory plan as a table and as a picture."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from sharpkern._support.figures import COLORS, light_grid, new_figure, save_figure
from sharpkern.directions.residence import fits
from sharpkern.memory.cards import CARDS, USABLE, MethodMemory

if TYPE_CHECKING:
    from sharpkern.memory.plan import MemoryPlan

_GIB, _MIB = 2**30, 2**20
# The order in which parts are told and stacked.
PARTS = (
    "weights",
    "optimizer",
    "gradients",
    "direction",
    "copies",
    "formed",
    "gathered",
    "logits",
    "activations",
)


# Columns of the table: what is there anyway in one, and what every method adds.
_HELD = ("weights", "optimizer", "gradients")
_COLUMNS = {
    "held": _HELD,
    "Δθ": ("direction",),
    "copies": ("copies",),
    "gathered": ("gathered",),
    "logits": ("logits",),
    "rest": ("formed", "activations"),
}


def headline(plan: "MemoryPlan") -> str:
    """Say in a sentence which card a measurement fits, and how."""
    ways = (row for row in plan.rows if row.direction)
    # Of those that the smallest card holds the one that "auto" takes, where it is among them.
    row = min(ways, key=lambda row: (row.card or CARDS[-1] + 1, not row.method.startswith("virtual"), row.peak_bytes))
    unit, size = _unit(plan)
    least = f"{label(row)} ({row.peak_bytes / size:.2f} {unit} on each GPU)"
    if row.card is None:
        return f"Fits no card of up to {CARDS[-1]} GB; the least is {least}. Shard it over more GPUs."
    return f"Fits {'an' if row.card == 80 else 'a'} {row.card} GB card: {least}.{_kept(plan)}"


def _kept(plan: "MemoryPlan") -> str:
    """Say from which card on Δθ is kept in bf16 where nobody says whether it is."""
    row = next((row for row in plan.rows if row.direction == "bf16"), None)
    if row is None:
        return ""
    direction = row.parts["direction"] // torch.bfloat16.itemsize
    card = next((card for card in CARDS if fits(direction, int(USABLE * card) - row.sum(_HELD))), None)
    return "" if card is None else f" On {card} GB or more Δθ is kept in bf16, which moves fewer bytes."


def told(plan: "MemoryPlan") -> Group:
    """Return the headline and the table."""
    return Group(headline(plan), "", table(plan))


def _unit(plan: "MemoryPlan") -> tuple[str, int]:
    """Return GiB, or MiB for a small model."""
    return ("GiB", _GIB) if max(row.peak_bytes for row in plan.rows) >= _GIB else ("MiB", _MIB)


def table(plan: "MemoryPlan") -> Table:
    """Return a plan as a table."""
    about = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in plan.conditions.items())
    shown = Table(title=f"{plan.model}: {about}", caption=_caption(plan), box=SIMPLE_HEAD, pad_edge=False)
    names = columns(plan)
    unit, size = _unit(plan)
    shown.add_column(f"{unit} on each GPU")
    for name in ("peak", *names, "card"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in plan.rows:
        shown.add_row(label(row), *cells(row, names, size))
    return shown


def columns(plan: "MemoryPlan") -> list[str]:
    """Return the columns of a plan's table that hold anything, between peak and card."""
    return [name for name, parts in _COLUMNS.items() if any(row.sum(parts) for row in plan.rows)]


def cells(row: MethodMemory, names: Iterable[str] = (), unit: int = _GIB) -> list[str]:
    """Return a row's peak, what is in some columns, and its card, in words."""
    sizes = [row.peak_bytes, *(row.sum(_COLUMNS[name]) for name in names)]
    card = "none" if row.card is None else f"{row.card} GB"
    return [*(f"{size / unit:.2f}" if size >= 0.005 * unit else "" for size in sizes), card]


def _caption(plan: "MemoryPlan") -> str:
    _, unit = _unit(plan)
    held = ", ".join(f"{part} {plan.rows[-1].parts.get(part, 0) / unit:.2f}" for part in _HELD)
    host = max(row.host_bytes for row in plan.rows)
    return (
        f"held: {held}; rest: activations and formed weights; on the host: {host / unit:.2f}; card: the smallest that "
        f"holds it in {USABLE / _GIB:.0%} of as many GiB"
    )


def draw(plan: "MemoryPlan", path: str | os.PathLike[str]) -> None:
    """Draw the parts of every method as stacked bars, with lines for what cards hold."""
    rows = plan.rows
    figure = new_figure(9.0, 1.6 + 0.36 * len(rows))
    axes = figure.subplots()
    names = [label(row) for row in rows]
    left = [0.0] * len(rows)
    for part, color in zip(PARTS, (*COLORS, "#F0E442", "#999999"), strict=True):
        widths = [row.parts.get(part, 0) / _GIB for row in rows]
        if any(widths):
            axes.barh(names, widths, left=left, color=color, label=part, height=0.7)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("peak memory on each GPU, GiB")
    axes.set_xlim(0, 1.08 * max(left))
    _draw_cards(axes, max(left))
    light_grid(axes)
    axes.grid(visible=False, axis="y")
    axes.set_title(plan.model, fontsize="medium", pad=18)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    save_figure(figure, path)


def _draw_cards(axes: Any, longest: float) -> None:
    for card in CARDS:
        usable = USABLE * card / _GIB
        if usable < 1.08 * longest:
            axes.axvline(usable, color="#555555", linestyle="--", linewidth=0.9)
            axes.annotate(
                f"{card} GB",
                (usable, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize="x-small",
            )


def label(row: MethodMemory) -> str:
    """Name a row."""
    # Others than the engines know no direction but one in memory.
    return row.method + {"state": ", Δθ from state", "bf16": ", Δθ in bf16"}.get(row.direction, "")
