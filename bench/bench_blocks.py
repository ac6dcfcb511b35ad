"""Which layer limits the step: λ_c of every block of GPTs beside λ_c of the whole, in warm-up and after.

    python bench/bench_blocks.py [--quick] [--json PATH]

GPTs of about 1 and 30 million parameters learn bytes of Python's help topics by AdamW, with a linear warm-up and a
constant learning rate after it. At some steps every block is moved alone. The limiting block is the one with the
largest λ_c, and so the smallest η_c. Medians over the steps of each phase make the table.
"""

from statistics import median
from typing import Any

import ledger
from workloads import Training

import sharpkern

# Of each size: steps of the warm-up, of all, and from one measured step to the next; tokens in a step.
_FULL = {"1M": (100, 500, 10, 1024), "30M": (100, 500, 10, 256)}
_QUICK = {"tiny": (4, 8, 2, 64)}


def blocks(quick: bool) -> dict[str, Any]:
    """Measure every model."""
    return {"models": [of_model(size, *numbers) for size, numbers in (_QUICK if quick else _FULL).items()]}


def of_model(size: str, warm_up: int, num_steps: int, every: int, tokens: int) -> dict[str, Any]:
    """Train, measure, and sum up both phases."""
    training = Training.of_text(size, warm_up)
    monitor = sharpkern.Monitor(training.model, training.optimizer, every=every, blocks=True)
    for _ in range(num_steps):
        loss_fn = training.begin(tokens)
        monitor(loss_fn)
        training.step()
    rows = [
        {
            "step": record.step,
            "lr": record.lr,
            "loss": record.measurement.base_loss,
            "lambda_c": record.measurement.sharpness,
            "status": record.measurement.status,
            "forwards": record.measurement.forwards,
            "blocks": {
                name: {"lambda_c": m.sharpness, "slope": m.slope, "status": m.status, "forwards": m.forwards}
                for name, m in record.blocks.items()
            },
        }
        for record in monitor.history
    ]
    phases = [
        _summary("warm-up", [row for row in rows if row["step"] < warm_up]),
        _summary("constant", [row for row in rows if row["step"] >= warm_up]),
    ]
    for phase in phases:
        print(f"{phase['phase']}: λ_c of the whole {phase['lambda_c']:.3g}, limiting {phase['limiting']}")
        ledger.show(phase["phase"], phase["blocks"], "block lambda_c share_of_whole share_of_slope")
    return {"parameters": training.parameters, "tokens": tokens, "warm_up": warm_up, "rows": rows, "phases": phases}


def _summary(phase: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of a phase, and at how many steps each block was the one that limits."""
    found = [{n: b for n, b in row["blocks"].items() if b["status"] == "converged"} for row in rows]
    largest = [max(one, key=lambda name: one[name]["lambda_c"]) for one in found if one]
    table = []
    for name in rows[0]["blocks"]:
        there = [(row, one[name]) for row, one in zip(rows, found, strict=True) if name in one]
        if there:
            slopes = (sum(b["slope"] for b in row["blocks"].values()) for row, _ in there)
            table.append(
                {
                    "block": name,
                    "lambda_c": median(b["lambda_c"] for _, b in there),
                    "share_of_whole": median(b["lambda_c"] / row["lambda_c"] for row, b in there),
                    "share_of_slope": median(b["slope"] / total for (_, b), total in zip(there, slopes, strict=True)),
                }
            )
    return {
        "phase": phase,
        "steps": len(rows),
        "lambda_c": median(row["lambda_c"] for row in rows if row["status"] == "converged"),
        "limiting": {name: largest.count(name) for name in sorted(set(largest))},
        "forwards_of_blocks": median(sum(b["forwards"] for b in row["blocks"].values()) for row in rows),
        "blocks": table,
    }


if __name__ == "__main__":
    ledger.main(__doc__, blocks)
