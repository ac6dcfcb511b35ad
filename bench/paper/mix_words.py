"""What figure 5 shows, in words worked out of its rows: where the tasks' curves cross, and what training made of it."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise

from facts import median, percent
from scaffold import Row

from sharpkern.sweep import MixturePoint, MixtureSweep

TASKS = ("English", "code")
# The sweet spot of the paper.
_PAPER = (0.6, 0.7)
# A loss that rises by no more than this is taken to be as it was.
_HARM = 0.01


def sweep_of(rows: Sequence[Row]) -> MixtureSweep:
    """Return the sweep that a figure's rows hold.

    Args:
        rows: of the figure.
    """
    points = tuple(
        MixturePoint(
            _shares(row), int(row["repeat"]), row["task"], row["critical_lr"], row["lambda_c"], row["status"],
            row["error"], (0.0, row["bracket_high"]), row["loss"], int(row["forwards"]), "virtual",
        )
        for row in rows if row["kind"] == "sweep"
    )  # fmt: skip
    return MixtureSweep(TASKS, TASKS, tuple(dict.fromkeys(point.shares for point in points)), points)


def _shares(row: Row) -> tuple[float, float]:
    return row["share"], round(1 - row["share"], 12)


def changes(rows: Sequence[Row]) -> dict[str, dict[float, list[float]]]:
    """Return how training on each mix changed the loss of each task, {task: {share: one number per run}}.

    Args:
        rows: of the figure.
    """
    found: dict[str, dict[float, list[float]]] = {task: {} for task in TASKS}
    for row in rows:
        if row["kind"] == "training":
            found[row["task"]].setdefault(row["share"], []).append(row["change"])
    return found


def crossing(sweep: MixtureSweep, points: Sequence[MixturePoint]) -> float | None:
    """Return the share of English at which λ_c of the two tasks is the same; None if one is larger everywhere.

    Critical learning rates are compared, medians of the points given, since those are finite where λ_c is not; between
    two shares (a − b)/(a + b) is taken to change linearly.

    Args:
        sweep: whose mixes count.
        points: some of its points.
    """
    differences = []
    for shares in sweep.mixes:
        own, other = (
            median([p.safe_step for p in points if p.shares == shares and p.task == task and p.safe_step >= 0])
            for task in TASKS
        )
        if own + other > 0:
            differences.append((shares[0], (own - other) / (own + other)))
    # From the right, where English is all of the mix and its own loss falls the furthest.
    for (left, before), (right, after) in reversed(list(pairwise(differences))):
        if before < 0 <= after:
            return left + (right - left) * before / (before - after)
    return None


def findings(rows: list[Row]) -> str:
    """Say what the rows show."""
    sweep = sweep_of(rows)
    paper = (
        "**The paper** measures λ_c^{task→mix}, the critical sharpness of a task's loss along the update of a mix, "
        "against the share of pre-training data in it. The curves of the tasks cross, and the mix that allows the "
        f"largest step without harm to any of them has {percent(_PAPER[0])} to {percent(_PAPER[1])} of pre-training "
        "data."
    )
    return "\n\n".join([paper, f"**This run.** {_curves(sweep)}", f"{_training(rows)}", _difference(sweep, rows)])


def _curves(sweep: MixtureSweep) -> str:
    """Give both curves, their crossing and the sweet spot."""
    repeats = sorted({point.repeat for point in sweep.points})
    lines = [_curve(sweep, task) for task in TASKS]
    at = crossing(sweep, sweep.points)
    alone = [crossing(sweep, [p for p in sweep.points if p.repeat == repeat]) for repeat in repeats]
    found = sorted(share for share in alone if share is not None)
    text = f"Medians of {len(repeats)} repeats, each with other samples. {' '.join(lines)} "
    if at is None:
        text += "They do not cross."
    else:
        text += f"They cross at {percent(at)} English"
        between = f" ({percent(found[0])} to {percent(found[-1])})" if found else ""
        text += f"; by single repeats at {len(found)} of {len(repeats)}{between}."
    spot = sweep.sweet_spot
    if spot is None:
        return f"{text} There is no sweet spot: at every share the loss of some task rises from the first step on."
    several = sorted(shares[0] for shares in spot.of_repeats)
    return (
        f"{text} The sweet spot, where the larger of the two is smallest, is {percent(spot.shares['English'])} English "
        f"({percent(several[0])} to {percent(several[-1])} by single repeats): it allows steps of η = "
        f"{spot.critical_lr:.2g} before the loss on {spot.task} rises."
    )


def _curve(sweep: MixtureSweep, task: str) -> str:
    """Give λ_c of one task at some shares, and where it is infinite."""
    found = {shares[0]: sweep.summary(shares, task).sharpness for shares in sweep.mixes}
    uphill = [percent(share) for share, value in found.items() if math.isinf(value)]
    finite = {share: value for share, value in found.items() if math.isfinite(value)}
    some = list(finite)[:: max(1, len(finite) // 4)]
    values = ", ".join(f"{finite[share]:.3g} at {percent(share)}" for share in some)
    rises = f" At {', '.join(uphill)} English the loss rises from the first step on (λ_c = ∞)." if uphill else ""
    return f"λ_c^{{{task}→mix}} is {values}.{rises}"


def _training(rows: list[Row]) -> str:
    """Say what training on the mixes did to both losses."""
    old, new = _means(rows)
    steps = next(row["steps"] for row in rows if row["kind"] == "training")
    harmless = _harmless(old)
    ends = ", ".join(f"{old[share]:+.3f} at {percent(share)}" for share in (min(old), _middle(old), max(old)))
    gains = ", ".join(f"{new[share]:+.3f} at {percent(share)}" for share in (min(new), _middle(new), max(new)))
    said = (
        f"it stays within {_HARM:g} of what it was from {percent(harmless)} English on"
        if harmless is not None
        else f"it rises by more than {_HARM:g} on every mix"
    )
    return (
        f"Training {steps:.0f} steps on the mixes changes the held-out loss on English by {ends} English; {said}. It "
        f"changes the loss on code by {gains}. The sum of both is lowest at {percent(_best(old, new))} English."
    )


def _difference(sweep: MixtureSweep, rows: list[Row]) -> str:
    """Compare the sweet spot with the paper's, and with what training on the mixes shows."""
    old, new = _means(rows)
    best, harmless = _best(old, new), _harmless(old)
    spot = sweep.sweet_spot
    if spot is None:
        return "**Where they differ.** The paper has a sweet spot and this run has none."
    share = spot.shares["English"]
    low, high = _PAPER
    inside = low <= share <= high
    crosses = crossing(sweep, sweep.points) is not None
    text = "**Where they differ.** " + (
        "The curves cross here too, " if crosses else "Unlike in the paper the curves do not cross, "
    )
    text += (
        f"{'and' if crosses else 'but'} the sweet spot of {percent(share)} is within the paper's range. "
        if inside
        else f"{'but' if crosses else 'and'} the sweet spot of {percent(share)} is "
        f"{'above' if share > high else 'below'} the paper's range. "
    )
    text += (
        "It is a statement on the first step: the mix with the lowest sum of losses after training has "
        f"{percent(best)} English"
    )
    if harmless is not None:
        safe = share >= harmless
        text += (
            f", and the sweet spot is {'among' if safe else 'not among'} the mixes that leave the loss on English alone"
        )
    return f"{text}. Model, data and tasks are other ones than the paper's, and far smaller."


def _means(rows: Sequence[Row]) -> list[dict[float, float]]:
    """Return the mean change of each task's loss at each share."""
    return [
        {share: statistics.mean(values) for share, values in by_share.items()} for by_share in changes(rows).values()
    ]


def _middle(by_share: Mapping[float, float]) -> float:
    return sorted(by_share)[len(by_share) // 2]


def _best(old: Mapping[float, float], new: Mapping[float, float]) -> float:
    """Return the share with the lowest sum of losses."""
    return min(old, key=lambda share: old[share] + new[share])


def _harmless(old: Mapping[float, float]) -> float | None:
    """Return the smallest share from which on the loss on English does not rise by more than a little."""
    safe = None
    for share in sorted(old, reverse=True):
        if old[share] > _HARM:
            break
        safe = share
    return safe
