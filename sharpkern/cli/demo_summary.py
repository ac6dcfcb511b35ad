"""What the demo's run shows, in words computed from its numbers."""

import math
import statistics
from collections.abc import Iterator, Sequence

from sharpkern.cli.digits import DemoRun

# Share of the run, at its end, that the medians are of.
LAST_SHARE = 0.4


def summary(run: DemoRun) -> str:
    """Say what the run shows, from its numbers."""
    return " ".join([_setting(run), _rise(run), _end(run), _cost(run)])


def _setting(run: DemoRun) -> str:
    """Name the run."""
    losses = [record.measurement.base_loss for record in run.history]
    steps = f"{run.num_steps} steps" if run.diverged_at is None else f"{run.diverged_at} of {run.num_steps} steps"
    text = (
        f"{steps} of full-batch gradient descent at η = {run.lr:g} on {run.num_samples} digits took the loss from "
        f"{losses[0]:.2f} to {losses[-1]:.2f}; the stability threshold 2/η is {run.threshold:.4g}."
    )
    return text if run.diverged_at is None else f"{text} Then the loss was no longer finite: the run diverged."


def _rise(run: DemoRun) -> str:
    """Say when λ_max met the threshold and when λ_c jumped, or that they did not."""
    reached = next((point.step for point in run.hessian if point.hessian_sharpness >= run.threshold), None)
    largest = max(point.hessian_sharpness for point in run.hessian)
    text = (
        f"λ_max never reached it: its largest value was {largest:.3g}."
        if reached is None
        else f"λ_max reached it by step {reached}."
    )
    jumped = next((step for step, value in _critical(run) if value >= run.threshold / 2), None)
    if jumped is None:
        return f"{text} λ_c did not jump: it stayed below half of 2/η."
    before = [value for step, value in _critical(run) if step < jumped]
    if not before:
        return f"{text} λ_c was above half of 2/η from the first step on."
    return f"{text} λ_c jumped at step {jumped}: its median before was {statistics.median(before):.2g}."


def _end(run: DemoRun) -> str:
    """Give the medians at the end of the run and compare them with 2/η."""
    first = (1 - LAST_SHARE) * run.num_steps
    medians = {
        "λ_c": _median([value for step, value in _critical(run) if step >= first]),
        "λ_max": _median([point.hessian_sharpness for point in run.hessian if point.step >= first]),
        "λ_dir": _median([point.directional_sharpness for point in run.hessian if point.step >= first]),
    }
    listed = ", ".join(f"{name} {value:.3g} ({value / run.threshold:.2f} × 2/η)" for name, value in medians.items())
    ratio = medians["λ_c"] / run.threshold
    if math.isnan(ratio):
        verdict = "the end of the run has no λ_c to judge by"
    elif abs(ratio - 1) <= 0.05:
        verdict = "λ_c stands at 2/η to within 5 %, the edge of stability"
    elif abs(ratio - 1) <= 0.25:
        verdict = "λ_c stands near 2/η, but not within 5 % of it"
    else:
        verdict = (
            "λ_c does not stand at 2/η: the edge of stability was NOT seen; try more steps or another learning rate"
        )
    return f"Medians over the last {100 * LAST_SHARE:.0f} %: {listed}; {verdict}."


def _cost(run: DemoRun) -> str:
    """Say what a measurement took, and how many have no value."""
    forwards = statistics.mean(record.measurement.forwards for record in run.history)
    products = statistics.mean(point.products for point in run.hessian)
    text = f"One λ_c took {forwards:.1f} forward passes on average, one λ_max {products:.1f} Hessian-vector products."
    failed = [record.measurement.status for record in run.history if record.measurement.status != "converged"]
    if not failed:
        return text
    counts = ", ".join(f"{failed.count(status)} {status}" for status in sorted(set(failed)))
    return f"{text} Of {len(run.history)} measurements of λ_c some have no value: {counts}."


def _critical(run: DemoRun) -> Iterator[tuple[int, float]]:
    """Return step and λ_c of the measurements that converged."""
    return (
        (record.step, record.measurement.sharpness)
        for record in run.history
        if record.measurement.status == "converged"
    )


def _median(values: Sequence[float]) -> float:
    """Return the median, nan of nothing."""
    return statistics.median(values) if values else math.nan
