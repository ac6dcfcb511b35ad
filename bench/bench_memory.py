"""Memory plans of large language models: ``python bench/bench_memory.py --json bench/results/memory.json``.

Counts, and measures no time: the figures are the same on every machine that has the same torch and transformers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ledger

from sharpkern import memory_plan
from sharpkern.memory.plan import MemoryPlan
from sharpkern.memory.report import cells, columns, draw, label

# AdamW with float32 moments on bfloat16 weights, one sequence of 4096 tokens on each GPU: model, GPUs.
PLANS = [("olmo2-1b", 1), ("olmo2-7b", 1), ("olmo2-13b", 1), ("olmo2-32b", 8), ("llama3-70b", 16)]
QUICK = [("olmo2-1b", 1)]


# The plan that is told whole, and drawn.
_WHOLE = "olmo2-7b"
# Of the others these methods.
_METHODS = (
    "plain forward",
    "forward and backward",
    "clone and dictionary",
    "in place, Δθ from state",
    "virtual, Δθ from state",
)


def markdown(record: Mapping[str, Any]) -> str:
    """Return one plan whole, and a few methods of all."""
    plans = [MemoryPlan.from_json(plan) for plan in record["plans"]]
    (whole,) = (plan for plan in plans if plan.model == _WHOLE)
    return "\n".join([*_whole(whole), "", *_of_all(plans), "", _beside_training(plans)])


def brief(record: Mapping[str, Any]) -> str:
    """Return what training and the smallest measurement of the whole plan take, in two sentences."""
    (plan,) = (plan for plan in map(MemoryPlan.from_json, record["plans"]) if plan.model == _WHOLE)
    training, least = (
        plan["forward and backward"],
        min((row for row in plan.rows if row.direction), key=lambda row: row.peak_bytes),
    )
    told = [f"{peak} GiB ({card} card)" for peak, card in (cells(row) for row in (training, least))]
    return (
        f"OLMo 2 7B, bf16 weights, AdamW with float32 moments, one sequence of {plan.conditions['tokens']} tokens: "
        f'forward and backward peak at {told[0]}. The leanest measurement, "{label(least)}", peaks at {told[1]}.'
    )


def picture(record: Mapping[str, Any], path: Path) -> None:
    """Draw the plan that is told whole."""
    (whole,) = (plan for plan in record["plans"] if plan["model"] == _WHOLE)
    draw(MemoryPlan.from_json(whole), path)


def _whole(plan: MemoryPlan) -> list[str]:
    names = columns(plan)
    lines = [f"| {plan.model}, GiB | peak | {' | '.join(names)} | smallest card |", "|---" * (len(names) + 3) + "|"]
    return lines + [f"| {label(row)} | {' | '.join(cells(row, names))} |" for row in plan.rows]


def _of_all(plans: list[MemoryPlan]) -> list[str]:
    rows = [{label(row): "{} ({})".format(*cells(row)) for row in plan.rows} for plan in plans]
    lines = [
        "| peak on each GPU, GiB (smallest card) | GPUs | " + " | ".join(_METHODS) + " |",
        "|---" * (len(_METHODS) + 2) + "|",
    ]
    for plan, row in zip(plans, rows, strict=True):
        told = " | ".join(row.get(method, "") for method in _METHODS)
        lines.append(f"| {plan.model} | {plan.conditions['gpus']} | {told} |")
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
        f"In {len(less)} of these {len(plans)} plans, every measurement with Δθ from the optimizer's state peaks below "
        "forward and backward. (Forward and backward keep all activations here; nothing is recomputed.)"
    )


def measure(quick: bool) -> dict[str, Any]:
    """Make the plans and print them."""
    plans = [memory_plan(model, num_gpus=num_gpus) for model, num_gpus in (QUICK if quick else PLANS)]
    print(*plans, sep="\n")
    return {"plans": [plan.to_json() for plan in plans]}


if __name__ == "__main__":
    ledger.main(__doc__, measure)
