"""What the words about training runs are worked out of: medians and shares of rows, and the sentences all have."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from scaffold import Row

# λ_c and λ_dir count as close within this, and a sharpness as near a threshold.
CLOSE = 0.25
# What a measurement that did not converge came to.
_MEANINGS = {
    "ascent": "uphill at once, λ_c = ∞",
    "unbounded": "no rise found, λ_c is an upper bound",
    "unresolved": "noise hides where the loss rises",
    "nonfinite": "the loss is not finite",
}


def by_run(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows of each run, in order of appearance."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["run"], []).append(row)
    return list(runs.values())


def ratios(rows: Iterable[Row], above: str, below: str) -> list[float]:
    """Return the ratio of two columns wherever there is one; inf where λ_c is, of a direction that goes uphill."""
    pairs = [(row[above], row[below]) for row in rows if above in row and below in row]
    return [a / b for a, b in pairs if not math.isnan(a) and math.isfinite(b) and b]


def median(values: Sequence[float]) -> float:
    """Return the median of what is a number, nan if nothing is."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def number(value: float) -> str:
    """Return a value to three digits."""
    return "∞" if math.isinf(value) else f"{float(f'{value:.3g}'):g}"


def sentences(*found: str) -> str:
    """Return a paragraph of those sentences that there are."""
    return " ".join(sentence for sentence in found if sentence)


def percent(share: float) -> str:
    """Return a share in whole percent, 0 or 100 of them only where it is none or all."""
    if math.isinf(share):
        return "∞"
    near_all = 0.99 < share < 1
    near_none = 0 < share < 0.01
    return "99 %" if near_all else "1 %" if near_none else f"{100 * share:.0f} %"


def close(rows: list[Row]) -> str:
    """Say how close λ_c is to λ_dir of the same update."""
    deviations = [abs(ratio - 1) for ratio in ratios(rows, "lambda_c", "lambda_dir")]
    if not deviations:
        return "at no point have both λ_c and λ_dir a value"
    share = sum(deviation <= CLOSE for deviation in deviations) / len(deviations)
    points = "points" if len(deviations) == len(rows) else "points that have both"
    return (
        f"λ_c is within {percent(CLOSE)} of λ_dir at {percent(share)} of {len(deviations)} {points} (median deviation "
        f"{percent(median(deviations))}, largest {percent(max(deviations))})"
    )


def times(value: float, unit: str) -> str:
    """Return a ratio to a threshold, such as "0.97 × 2/η"; words where there is none."""
    if math.isnan(value):
        return "no value"
    return f"{'∞' if math.isinf(value) else f'{value:.2f}' if value >= 0.1 else f'{value:.2g}'} × {unit}"


def bound(rows: list[Row], column: str, name: str, tolerance: float) -> str:
    """Say whether a directional sharpness is at most λ_max at every point."""
    pairs = [(row[column], row["lambda_max"]) for row in rows]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    if not pairs:
        return f"At no point have both {name} and λ_max a value."
    above = sum(value > top for value, top in pairs)
    over = sum(value > top + tolerance * abs(top) for value, top in pairs)
    if over:
        text = f"{name} exceeds λ_max by more than the solver's {percent(tolerance)} at {over} of {len(pairs)} points"
    elif above:
        text = (
            f"{name} is at most λ_max within the solver's {percent(tolerance)} at all {len(pairs)} points, and above "
            f"it by less than that at {above}"
        )
    else:
        text = f"{name} is at most λ_max at all {len(pairs)} points"
    if len(pairs) < len(rows):
        text += f" that have both, which {len(rows) - len(pairs)} have not"
    # Of a negative λ_max a ratio says nothing on which of both is larger.
    shares = [value / top for value, top in pairs if top > 0]
    if shares:
        where = "" if len(shares) == len(pairs) else " where λ_max is positive"
        text += f"; the largest ratio{where} is {max(shares):.2f}"
    return f"{text}."


def no_value(rows: list[Row]) -> str:
    """Count the measurements that did not converge."""
    keys = ("status", "in_training_status", "heldout_status")
    statuses = [row[key] for row in rows for key in keys if key in row]
    failed = Counter(status for status in statuses if status != "converged")
    if not failed:
        return ""
    counts = ", ".join(f"{count} {status} ({_MEANINGS[status]})" for status, count in sorted(failed.items()))
    return f"Of {len(statuses)} measurements of λ_c some did not converge: {counts}."
