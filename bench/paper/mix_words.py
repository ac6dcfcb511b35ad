"""What figure 5 shows, in words worked out of its rows: where the tasks' curves cross, and what training made of it."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise

from facts import median, no_value, number, percent, sentences
from scaffold import Row

from sharpkern.mixtures.results import MixturePoint, MixtureSweep, SweetSpot

TASKS = ("English", "code")
# The sweet spot of the paper.
_PAPER = (0.6, 0.7)
# A loss that rises by no more than this is taken to be as it was.
_HARM = 0.01


def sweep_of(rows: Sequence[Row]) -> MixtureSweep:
    """Return the sweep that a figure's rows hold."""
    points = tuple(
        MixturePoint(
            _shares(row), int(row["repeat"]), row["task"], row["critical_lr"], row["lambda_c"], row["status"],
            row["error"], (row["bracket_low"], row["bracket_high"]), row["loss"], int(row["forwards"]), "virtual",
        )
        for row in rows if row["kind"] == "sweep"
    )  # fmt: skip
    return MixtureSweep(TASKS, TASKS, tuple(dict.fromkeys(point.shares for point in points)), points)


def _shares(row: Row) -> tuple[float, float]:
    return row["share"], round(1 - row["share"], 12)


def changes(rows: Sequence[Row]) -> dict[str, dict[float, list[float]]]:
    """Return how training on each mix changed the loss of each task, {task: {share: one number per run}}."""
    found: dict[str, dict[float, list[float]]] = {task: {} for task in TASKS}
    for row in rows:
        if row["kind"] == "training":
            found[row["task"]].setdefault(row["share"], []).append(row["change"])
    return found


def crossing(sweep: MixtureSweep, points: Sequence[MixturePoint]) -> float | None:
    """Return the share of English at which λ_c of the two tasks is the same, the largest if there are several.

    Critical learning rates are compared, medians of the points given, since those are finite where λ_c is not; between
    two shares (a − b)/(a + b) is taken to change linearly.
    """
    differences = []
    for shares in sweep.mixes:
        own, other = (
            median([p.safe_step for p in points if p.shares == shares and p.task == task and p.safe_step >= 0])
            for task in TASKS
        )
        if own + other > 0:
            differences.append((shares[0], (own - other) / (own + other)))
    # From the right, where English is all of the mix.
    for (left, before), (right, after) in reversed(list(pairwise(differences))):
        if before * after <= 0:
            return right if before == after else left + (right - left) * before / (before - after)
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
    return "\n\n".join([paper, f"**This run.** {_curves(sweep, rows)}", _training(rows), _difference(sweep, rows)])


def _curves(sweep: MixtureSweep, rows: list[Row]) -> str:
    """Give both curves, their crossing and the sweet spot."""
    repeats = sorted({point.repeat for point in sweep.points})
    at = crossing(sweep, sweep.points)
    alone = [crossing(sweep, [p for p in sweep.points if p.repeat == repeat]) for repeat in repeats]
    found = sorted(share for share in alone if share is not None)
    crosses = "They do not cross."
    if at is not None:
        between = f" ({percent(found[0])} to {percent(found[-1])})" if found else ""
        crosses = f"They cross at {percent(at)} English; by single repeats at {len(found)} of {len(repeats)}{between}."
    counted = "For the medians an unresolved one counts with the largest step known to lie before the rise."
    return sentences(
        f"Medians of {len(repeats)} repeats, each with other samples.",
        *(_curve(sweep, task) for task in TASKS),
        crosses,
        _sweet_spot(sweep),
        no_value(rows),
        counted if any(point.status == "unresolved" for point in sweep.points) else "",
    )


def _curve(sweep: MixtureSweep, task: str) -> str:
    """Give λ_c of one task at some shares, and where it has no finite median."""
    found = {shares[0]: sweep.summary(shares, task).sharpness for shares in sweep.mixes}
    middle = {shares[0]: _middle_points(sweep, shares, task) for shares in sweep.mixes}
    finite = [share for share, value in found.items() if math.isfinite(value)]
    values = []
    for share in finite[:: max(1, len(finite) // 4)]:
        bound = any(point.status != "converged" for point in middle[share])
        values.append(f"{'at most ' if bound else ''}{number(found[share])} at {percent(share)}")
    name = f"λ_c^{{{task}→mix}}"
    unknown = [share for share, value in found.items() if math.isnan(value)]
    return sentences(
        f"{name} is {', '.join(values)}." if values else f"{name} has no finite median.",
        *_uphill(sweep, task, {share: middle[share] for share, value in found.items() if math.isinf(value)}),
        f"At {_listed(unknown)} English no repeat has a value." if unknown else "",
    )


def _uphill(sweep: MixtureSweep, task: str, middle: Mapping[float, list[MixturePoint]]) -> list[str]:
    """Say of the shares at which the median step is 0 whether the loss rises at once, or noise hides how early."""
    at_once = [share for share, points in middle.items() if all(point.status == "ascent" for point in points)]
    hidden = [share for share in middle if share not in at_once]
    said = []
    if at_once:
        here = [p for p in sweep.points if p.task == task and p.shares[0] in at_once]
        ascent = sum(p.status == "ascent" for p in here)
        part = "" if ascent == len(here) else f" in {ascent} of {len(here)} measurements"
        said.append(f"At {_listed(at_once)} English the loss on {task} rises from the first step on{part} (λ_c = ∞).")
    if hidden:
        here = [p for p in sweep.points if p.task == task and p.shares[0] in hidden]
        unresolved = [p.bracket[1] for p in here if p.status == "unresolved" and p.bracket[1] < math.inf]
        ascent = sum(p.status == "ascent" for p in here)
        latest = max(unresolved)
        said.append(
            f"At {_listed(hidden)} English the loss on {task} rises by a step of η = {number(latest)} at the latest, "
            f"and noise hides how early, in {len(unresolved)} of {len(here)} measurements (λ_c is at least "
            f"{number(2 / latest)} there){f'; in {ascent} it rises from the first step on' if ascent else ''}."
        )
    return said


def _middle_points(sweep: MixtureSweep, shares: tuple[float, ...], task: str) -> list[MixturePoint]:
    """Return the repeats that a median is made of: one, or the two in the middle."""
    known = [p for p in sweep.points if p.shares == shares and p.task == task and not math.isnan(p.safe_step)]
    # Of two steps of 0 the one that goes uphill at once is the smaller.
    known.sort(key=lambda point: (point.safe_step, point.status != "ascent"))
    return known[(len(known) - 1) // 2 : len(known) // 2 + 1] if known else []


def _sweet_spot(sweep: MixtureSweep) -> str:
    spot = sweep.sweet_spot
    if spot is None:
        return "There is no sweet spot: at no share is a step known to raise neither loss."
    several = sorted(shares[0] for shares in spot.of_repeats)
    alone = f"{percent(several[0])} to {percent(several[-1])} by single repeats" if several else "no repeat has one"
    return (
        f"The sweet spot, where the larger of the two is smallest, is {percent(spot.shares['English'])} English "
        f"({alone}): {_allowed(sweep, spot)}."
    )


def _allowed(sweep: MixtureSweep, spot: SweetSpot) -> str:
    """Say which steps a sweet spot allows."""
    step, task = f"{spot.critical_lr:.2g}", spot.task
    statuses = {point.status for point in _middle_points(sweep, tuple(spot.shares.values()), task)}
    if "unbounded" in statuses:
        return f"no rise of the loss on {task} was found up to η = {step}"
    if "unresolved" in statuses:
        return f"up to η = {step} no rise is known of the loss on {task}, and noise hides where it begins"
    return f"it allows steps of η = {step} before the loss on {task} rises"


def _training(rows: list[Row]) -> str:
    """Say what training on the mixes did to both losses."""
    old, new = _means(rows)
    if not old or not new:
        return "There are no runs of training on the mixes."
    steps = next(row["steps"] for row in rows if row["kind"] == "training")
    return (
        f"Training {steps:.0f} steps on the mixes changes the held-out loss on English by {_ends(old)} English; "
        f"{_harm(old)}. It changes the loss on code by {_ends(new)}. The sum of both is lowest at "
        f"{percent(_best(old, new))} English."
    )


def _ends(changed: Mapping[float, float]) -> str:
    """Give the changes at the smallest, the middle and the largest share."""
    shares = sorted(changed)
    some = dict.fromkeys([shares[0], shares[len(shares) // 2], shares[-1]])
    return ", ".join(f"{changed[share]:+.3f} at {percent(share)}" for share in some)


def _harm(old: Mapping[float, float]) -> str:
    """Say on which mixes the loss on English rises."""
    harmless, safe = _harmless(old), [share for share in sorted(old) if old[share] <= _HARM]
    if harmless is not None and len(safe) == sum(share >= harmless for share in old):
        return f"it does not rise by more than {_HARM:g} from {percent(harmless)} English on"
    if not safe:
        return f"it rises by more than {_HARM:g} on every mix"
    return f"it does not rise by more than {_HARM:g} at {_listed(safe)} alone"


def _difference(sweep: MixtureSweep, rows: list[Row]) -> str:
    """Compare the sweet spot with the paper's, and with what training on the mixes shows."""
    old, new = _means(rows)
    spot = sweep.sweet_spot
    if spot is None:
        return "**Where they differ.** The paper has a sweet spot, and this run found none."
    share = spot.shares["English"]
    low, high = _PAPER
    inside = low <= share <= high
    crosses = crossing(sweep, sweep.points) is not None
    text = (
        f"{'The curves cross here too' if crosses else 'Unlike in the paper the curves do not cross'}, "
        f"{'and' if crosses == inside else 'but'} the sweet spot of {percent(share)} is "
        f"{'within' if inside else 'above' if share > high else 'below'} the paper's range."
    )
    end = "Model, data and tasks are other ones than the paper's, and far smaller."
    return sentences("**Where they differ.**", text, _against_training(share, old, new), end)


def _against_training(share: float, old: Mapping[float, float], new: Mapping[float, float]) -> str:
    """Compare the sweet spot with what training on the mixes shows."""
    if not old or not new:
        return ""
    text = (
        "It is a statement on the first step: the mix with the lowest sum of losses after training has "
        f"{percent(_best(old, new))} English"
    )
    if share in old and any(value <= _HARM for value in old.values()):
        text += (
            f", and the sweet spot is {'among' if old[share] <= _HARM else 'not among'} the mixes that do not raise "
            f"the loss on English by more than {_HARM:g}"
        )
    return f"{text}."


def _listed(shares: Sequence[float]) -> str:
    return ", ".join(map(percent, shares))


def _means(rows: Sequence[Row]) -> list[dict[float, float]]:
    """Return the mean change of each task's loss at each share; a loss that is no number counts as infinite."""
    return [
        {
            share: statistics.mean(math.inf if math.isnan(value) else value for value in values)
            for share, values in by_share.items()
        }
        for by_share in changes(rows).values()
    ]


def _best(old: Mapping[float, float], new: Mapping[float, float]) -> float:
    """Return the share with the lowest sum of losses."""
    return min(old, key=lambda share: old[share] + new.get(share, math.inf))


def _harmless(old: Mapping[float, float]) -> float | None:
    """Return the smallest share from which on the loss on English does not rise by more than a little."""
    safe = None
    for share in sorted(old, reverse=True):
        if old[share] > _HARM:
            break
        safe = share
    return safe
