"""Memory plans of the ledger as README's tables and picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sharpkern.memory.plan import MemoryPlan
from sharpkern.memory.show import COLUMNS, draw, label

_GIB = 2**30
# The plan that is told whole, and drawn.
_WHOLE = "olmo2-7b"
# Of the others these methods.
_METHODS = (
    ("plain forward", None),
    ("forward and backward", None),
    ("clone and dictionary", "resident"),
    ("in place", "state"),
    ("virtual", "state"),
)


def markdown(record: Mapping[str, Any]) -> str:
    """Return one plan whole, and a few methods of all.

    Args:
        record: of the ledger.
    """
    plans = [MemoryPlan.from_json(plan) for plan in record["plans"]]
    (whole,) = (plan for plan in plans if plan.model == _WHOLE)
    return "\n".join([*_whole(whole), "", *_of_all(plans), "", _beside_training(plans)])


def picture(record: Mapping[str, Any], path: Path) -> None:
    """Draw the plan that is told whole.

    Args:
        record: of the ledger.
        path: of the image.
    """
    (whole,) = (plan for plan in record["plans"] if plan["model"] == _WHOLE)
    draw(MemoryPlan.from_json(whole), path)


def _whole(plan: MemoryPlan) -> list[str]:
    columns = {name: parts for name, parts in COLUMNS.items() if any(row.sum(parts) for row in plan.rows)}
    lines = [
        f"| {plan.model}, GiB | peak | {' | '.join(columns)} | smallest card |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for row in plan.rows:
        sizes = [row.peak_bytes, *(row.sum(parts) for parts in columns.values())]
        lines.append(f"| {label(row)} | {' | '.join(map(_gib, sizes))} | {_card(row.card)} |")
    return lines


def _of_all(plans: list[MemoryPlan]) -> list[str]:
    lines = [
        "| peak on each GPU, GiB (smallest card) | GPUs | " + " | ".join(_name(*method) for method in _METHODS) + " |",
        "|---" * (len(_METHODS) + 2) + "|",
    ]
    for plan in plans:
        found = {(row.method, row.direction): row for row in plan.rows}
        cells = []
        for name, direction in _METHODS:
            row = found.get((name, direction or ""))
            cells.append("" if row is None else f"{_gib(row.peak_bytes)} ({_card(row.card)})")
        lines.append(f"| {plan.model} | {plan.conditions['gpus']} | {' | '.join(cells)} |")
    return lines


def _beside_training(plans: list[MemoryPlan]) -> str:
    """Say whether a measurement fits where training does."""
    less = [
        plan
        for plan in plans
        if all(
            row.peak_bytes < plan["forward and backward"].peak_bytes for row in plan.rows if row.direction == "state"
        )
    ]
    return (
        f"In {len(less)} of these {len(plans)} plans every measurement with Δθ from the optimizer's state takes less "
        "than going forward and backward, for which activations are kept (nothing is recomputed here)."
    )


def _name(method: str, direction: str | None) -> str:
    return f"{method}, Δθ from state" if direction == "state" else method


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f}" if size >= 0.005 * _GIB else ""


def _card(card: int | None) -> str:
    return "none" if card is None else f"{card} GB"
