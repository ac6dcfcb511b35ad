"""What the words about training runs are worked out of: medians and shares of rows, and the sentences all have."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from scaffold import Row

# λ_c and λ_dir count as close within this, and a sharpness as near a threshold.
CLOSE = 0.25


def by_run(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows of each run, in order of appearance.

    Args:
        rows: with the run's name in ``run``.
    """
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["run"], []).append(row)
    return list(runs.values())


def ratios(rows: Iterable[Row], above: str, below: str) -> list[float]:
    """Return the ratio of two columns wherever there is one; inf where λ_c is, of a direction that goes uphill.

    Args:
        rows: of a figure.
        above: column of the numerator.
        below: column of the denominator.
    """
    pairs = [(row[above], row[below]) for row in rows if above in row and below in row]
    return [a / b for a, b in pairs if not math.isnan(a) and math.isfinite(b) and b]


def median(values: Sequence[float]) -> float:
    """Return the median, nan of nothing.

    Args:
        values: to take it of.
    """
    return statistics.median(values) if values else math.nan


def percent(share: float) -> str:
    """Return a share in whole percent, 0 or 100 of them only where it is none or all.

    Args:
        share: 1 is all.
    """
    if math.isinf(share):
        return "∞"
    near_all = 0.99 < share < 1
    near_none = 0 < share < 0.01
    return "99 %" if near_all else "1 %" if near_none else f"{100 * share:.0f} %"


def close(rows: list[Row]) -> str:
    """Say how close λ_c is to λ_dir of the same update.

    Args:
        rows: of a figure.

    Returns:
        A clause.
    """
    deviations = [abs(ratio - 1) for ratio in ratios(rows, "lambda_c", "lambda_dir")]
    share = sum(deviation <= CLOSE for deviation in deviations) / len(deviations)
    return (
        f"λ_c is within {percent(CLOSE)} of λ_dir at {percent(share)} of {len(deviations)} points (median deviation "
        f"{percent(median(deviations))}, largest {percent(max(deviations))})"
    )


def times(value: float, unit: str) -> str:
    """Return a ratio to a threshold, such as "0.97 × 2/η".

    Args:
        value: the ratio.
        unit: what it is to.
    """
    return f"{'∞' if math.isinf(value) else f'{value:.2f}' if value >= 0.1 else f'{value:.2g}'} × {unit}"


def bound(rows: list[Row], column: str, name: str, tolerance: float) -> str:
    """Say whether a directional sharpness is at most λ_max at every point.

    Args:
        rows: of a figure.
        column: of the directional sharpness.
        name: of it in words.
        tolerance: of the solver of λ_max, relative.

    Returns:
        One sentence.
    """
    over = sum(row[column] > row["lambda_max"] + tolerance * abs(row["lambda_max"]) for row in rows)
    how = (
        f"is at most λ_max at all {len(rows)} points"
        if not over
        else f"exceeds λ_max by more than the solver's {percent(tolerance)} at {over} of {len(rows)} points"
    )
    return f"{name} {how}; the largest ratio is {max(ratios(rows, column, 'lambda_max')):.2f}."


def no_value(rows: list[Row]) -> str:
    """Count the measurements that did not converge.

    Args:
        rows: of a figure.

    Returns:
        One sentence, or nothing if all did.
    """
    statuses = [row[key] for row in rows for key in ("status", "heldout_status") if key in row]
    failed = Counter(status for status in statuses if status != "converged")
    if not failed:
        return ""
    counts = ", ".join(f"{count} {status}" for status, count in sorted(failed.items()))
    return f"Of {len(statuses)} measurements of λ_c some did not converge: {counts}."
