"""What one λ_c costs where the model is small and overheads count: in plain forward passes, on GPTs in training.

    python bench/bench_small.py [--quick] [--json PATH]

In one run and one thread. A GPT trains by AdamW on Python's help topics. At each of its last steps two monitors, one
for each tolerance, measure the same step in turns, with the loss that was trained given, and a plain forward pass
before and after each. What counts is all that a measurement takes: Δθ and its sums from the optimizer's state, the line
search, the checks that are due now and then. Times are medians over the steps, over the median plain forward pass.
"""

from collections import defaultdict
from functools import partial
from statistics import mean, median
from typing import Any

import ledger
from workloads import Counted, Training, in_turns, seconds, timed

import sharpkern

TOLERANCES = (0.01, 0.05)
# Steps of training on 256 tokens before, and measured ones before those that count.
_TRAINED, _WARM_UP = 100, 16
_SIZES = {("1M", 32): 48, ("1M", 256): 32, ("4M", 32): 32, ("4M", 1024): 16}
_QUICK = {("tiny", 32): 3}


def rows_of(size: str, tokens: int, steps: int, trained: int, warm_up: int) -> list[dict[str, Any]]:
    """Train a model, and measure steps of so many tokens to each tolerance."""
    training = Training.of_text(size, max(1, trained // 2))
    training.run(trained, min(tokens, 256))
    monitors = {}
    for rtol in TOLERANCES:
        # What is checked once is checked once for each closure's code: a class of its own makes it this monitor's own.
        own = type("Own", (Counted,), {})
        monitors[rtol] = sharpkern.Monitor(training.model, training.optimizer, rtol=rtol), own
    plain: list[float] = []
    taken: dict[float, list[tuple[float, float, str]]] = defaultdict(list)
    for step in range(warm_up + steps):
        loss_fn = training.begin(tokens)
        for rtol in in_turns(TOLERANCES, step):
            monitor, own = monitors[rtol]
            plain.append(seconds(loss_fn.plain))
            found, took = timed(partial(monitor, own(loss_fn.model, loss_fn.loss), loss=loss_fn.trained))
            plain.append(seconds(loss_fn.plain))
            taken[rtol].append((took, found.forwards, found.status))
        training.step()
    unit = median(plain[-4 * steps :])
    found_rows = []
    for rtol in TOLERANCES:
        counted = taken[rtol][-steps:]
        found_rows.append(
            {
                "model": size,
                "parameters": training.parameters,
                "tokens": tokens,
                "rtol": rtol,
                "measurements": steps,
                "converged": sum(status == "converged" for _, _, status in counted),
                "plain_forward_ms": 1e3 * unit,
                "in_plain_forwards": median(took for took, _, _ in counted) / unit,
                "in_plain_forwards_mean": mean(took for took, _, _ in counted) / unit,
                "forwards": median(forwards for _, forwards, _ in counted),
                "forwards_mean": mean(forwards for _, forwards, _ in counted),
            }
        )
    return found_rows


def measure(quick: bool) -> dict[str, Any]:
    """Run the benchmark and print it."""
    trained, warm_up = (4, 2) if quick else (_TRAINED, _WARM_UP)
    sizes = _QUICK if quick else _SIZES
    rows = [row for (size, tokens), steps in sizes.items() for row in rows_of(size, tokens, steps, trained, warm_up)]
    columns = "model tokens rtol plain_forward_ms in_plain_forwards in_plain_forwards_mean forwards forwards_mean"
    ledger.show("One warm λ_c in training, the loss given", rows, f"{columns} converged measurements")
    return {"small": rows}


if __name__ == "__main__":
    ledger.main(__doc__, measure)
