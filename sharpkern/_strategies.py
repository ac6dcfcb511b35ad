"""Which step sizes to try next: one at a time, several at a time, or by bisection.

Each strategy is a generator. It yields step sizes, finds their losses in the curve when it is resumed, and returns an
`Outcome`. All of them end: moves to one side grow, brackets shrink, and the number of evaluations is limited outside.
"""

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from sharpkern._curve import Curve, Estimate

Status: TypeAlias = Literal["converged", "ascent", "unbounded", "nonfinite", "unresolved"]

# Without any rise the search goes up to this multiple of the first guess, or of the step that would bring a linear
# loss to zero, whichever is larger.
_REACH = 1e6
# Rises this close to the noise are as far down as a search can see.
_FLOOR = 20.0
# A loss that changes nowhere over this ratio of step sizes is flat as far as its noise lets see.
_FLAT = 1e6
# Where an earlier crossing would hide: the guard looks at the estimate divided by these ...
_GUARDS = (4.0, 12.0)
# ... where the slope alone would take this many times the loss off, or the exponent is below this.
_GUARD_FALL = 2.0
_GUARD_EXPONENT = 0.4
# Above this relative error from noise alone a crossing counts as not resolved.
_TOO_NOISY = 0.1


@dataclass(frozen=True)
class Outcome:
    """How a search ended: status, critical learning rate, its relative error, and the exponent if measured."""

    status: Status
    eta: float = math.nan
    error: float = math.nan
    exponent: float | None = None


Steps = Generator[tuple[float, ...], None, Outcome]


def sequential(curve: Curve, exponent: float, rtol: float, certify: bool) -> Steps:
    """Try one step size at a time, each where the probes so far put the crossing.

    Args:
        curve: Receives the losses; empty at the start. Its guess is where the search begins.
        exponent: Expected slope of ψ.
        rtol: Relative error to reach.
        certify: Whether to close the bracket to 2.5·rtol around the answer.

    Yields:
        One step size.

    Returns:
        The outcome.
    """
    # Without a slope the first probe is there to show it.
    yield (curve.guess if curve.given_slope is not None else curve.guess / 3.0,)
    widths = [math.inf]
    while True:
        lo, hi = curve.bracket()
        estimate = curve.estimate(exponent)
        outcome = _dead_end(curve)
        if outcome is not None:
            return outcome
        settled = _settled(curve, estimate, rtol)
        if settled is not None:
            check = next(_unchecked(curve, settled, rtol, certify), None)
            if check is None:
                return _converged(curve, settled)
            yield (check,)
            continue
        widths.append(math.log(hi / lo) if lo > 0 else math.inf)
        slow = len(widths) > 3 and widths[-1] < math.inf and widths[-1] > widths[-4] / 2
        if slow:
            widths = [math.inf]
            yield (math.sqrt(lo * hi),)
        else:
            yield (_propose(curve, estimate, rtol, len(curve.probes)),)


def batched(curve: Curve, exponent: float, rtol: float, certify: bool, num: int, width: float) -> Steps:
    """Try ``num`` step sizes at a time, on grids that close in on the crossing.

    Args:
        curve: Receives the losses; empty at the start. Its guess is where the search begins.
        exponent: Expected slope of ψ.
        rtol: Relative error to reach.
        certify: Whether to close the bracket to 2.5·rtol around the answer.
        num: Step sizes per pass, at least 2.
        width: Half-width of the first grid, in log units.

    Yields:
        Up to ``num`` step sizes, ascending.

    Returns:
        The outcome.
    """
    center, passes = math.log(curve.guess), 0
    # With six or more, two of the first grid look for an earlier crossing.
    watch = [center - width - math.log(divisor) for divisor in (_GUARDS[1], 3.5)] if num >= 6 else []
    yield _grid(center, width, num - len(watch), watch)
    while True:
        passes += 1
        lo, hi = curve.bracket()
        estimate = curve.estimate(exponent)
        outcome = _dead_end(curve)
        if outcome is not None:
            return outcome
        settled = _settled(curve, estimate, rtol)
        if settled is not None:
            checks = tuple(_unchecked(curve, settled, rtol, certify))[:num]
            if not checks:
                return _converged(curve, settled)
            yield tuple(sorted(checks))
            continue
        if lo > 0 and hi < math.inf:
            inside = estimate is not None and lo < math.exp(estimate.y) < hi
            if inside and estimate is not None and 3.0 * estimate.error < math.log(hi / lo):
                yield _grid(estimate.y, max(1.5 * estimate.error, 0.02), num)
            else:
                step = math.log(hi / lo) / (num + 1)
                yield tuple(lo * math.exp(step * i) for i in range(1, num + 1))
            continue
        width *= 1.5
        center = math.log(_propose(curve, estimate, rtol, passes))
        if hi == math.inf:
            center = max(center, math.log(curve.probes[-1].eta) + width / 2)
        elif lo == 0:
            center = min(center, math.log(hi) - width / 2)
        yield _grid(center, width, num)


def bisection(curve: Curve, width: float = 1 / 16) -> Steps:
    """Double or halve the guess until the crossing is enclosed, then bisect and report the midpoint.

    Args:
        curve: Receives the losses; empty at the start. Its guess is the first step size.
        width: Width of the last bracket, relative to its lower end.

    Yields:
        One step size.

    Returns:
        The outcome.

    Source: Kalra et al. 2026, arXiv 2601.16979, Algorithm 1.
    """
    eta = curve.guess
    while True:
        yield (eta,)
        outcome = _dead_end(curve)
        if outcome is not None:
            return outcome
        # The plain sign decides, also where noise may have made it: a midpoint without a sign would never end.
        hi = min((probe.eta for probe in curve.probes if probe.rise > 0), default=math.inf)
        lo = max((probe.eta for probe in curve.probes if probe.eta < hi), default=0.0)
        if hi == math.inf:
            eta = 2 * lo
        elif lo == 0:
            eta = hi / 2
        elif hi / lo > 1 + width:
            eta = (lo + hi) / 2
        else:
            return Outcome("converged", (lo + hi) / 2, (hi - lo) / (hi + lo))


def _grid(center: float, width: float, num: int, more: list[float] | None = None) -> tuple[float, ...]:
    """Return ``num`` step sizes evenly spaced in log within ``width`` of the center, and ``more``, ascending."""
    ys = [center + width * (2 * i / (num - 1) - 1) for i in range(num)] + (more or [])
    return tuple(math.exp(y) for y in sorted(ys))


def _settled(curve: Curve, estimate: Estimate | None, rtol: float) -> Estimate | None:
    """Return the estimate if it is exact enough and backed by enough probes, or the middle of a closed bracket."""
    lo, hi = curve.bracket()
    enclosed = lo > 0 and hi < math.inf
    if estimate is not None:
        tolerance = max(rtol, estimate.noise)
        # Without a slope to trust, two probes determine it and ψ only together.
        enough = len(curve.probes) >= (2 if curve.trusts_slope() else 3)
        inside = lo < math.exp(estimate.y) < hi or estimate.noise > rtol
        conditioned = enclosed or estimate.exponent >= 0.25
        exact = estimate.measured and estimate.nearest < 0.7 and estimate.error <= tolerance
        if enough and inside and conditioned and exact:
            return estimate
    if enclosed and hi <= lo * (1 + 2 * rtol):
        half = math.log(hi / lo) / 2
        return Estimate(math.log(lo) + half, half, 0.0, 1.0, measured=False, nearest=half)
    return None


def _unchecked(curve: Curve, estimate: Estimate, rtol: float, certify: bool) -> Iterator[float]:
    """Yield the step sizes that must still be evaluated before the estimate may be returned.

    An earlier crossing is possible where the loss would fall far below zero on a straight line, where ψ is flat, and
    around a probe that lies higher than its neighbours.
    """
    eta = math.exp(estimate.y)
    slope = max(curve.given_slope or 0.0, curve.slope() or 0.0) or math.inf
    if slope * eta > _GUARD_FALL * abs(curve.base_loss) or estimate.exponent < _GUARD_EXPONENT:
        for divisor in _GUARDS:
            yield from _unless_near(curve, eta / divisor, 1.6)
    for bump in _bumps(curve):
        yield from _unless_near(curve, bump, 1.25)
    if certify:
        lo, hi = curve.bracket()
        tolerance = max(rtol, estimate.noise)
        if hi > lo * (1 + 2.5 * tolerance):
            if lo < eta / (1 + 1.25 * tolerance):
                yield from _unless_near(curve, eta / (1 + 1.1 * tolerance), 1 + 0.3 * tolerance)
            if hi > eta * (1 + 1.25 * tolerance):
                yield from _unless_near(curve, eta * (1 + 1.1 * tolerance), 1 + 0.3 * tolerance)


def _bumps(curve: Curve) -> Iterator[float]:
    """Yield the middles of the gaps to either side of each fall that is higher than its neighbours, and high."""
    before = [probe for probe in curve.probes if probe.eta < curve.bracket()[1]]
    deepest = min((probe.rise for probe in before), default=0.0)
    for left, top, right in zip(before, before[1:], before[2:], strict=False):
        if top.rise > max(left.rise, right.rise, 0.5 * deepest):
            yield math.sqrt(top.eta * right.eta)
            yield math.sqrt(left.eta * top.eta)


def _unless_near(curve: Curve, eta: float, factor: float) -> Iterator[float]:
    """Yield ``eta`` unless a probe lies within ``factor`` of it."""
    if not any(eta / factor < probe.eta < eta * factor for probe in curve.probes):
        yield eta


def _converged(curve: Curve, estimate: Estimate) -> Outcome:
    """Return the estimate as an outcome; one that drowns in noise is not resolved."""
    if estimate.noise > _TOO_NOISY:
        return Outcome("unresolved", exponent=estimate.exponent)
    lo, hi = (math.log(eta) if eta > 0 else -math.inf for eta in curve.bracket())
    error = min(estimate.reported_error, max(estimate.y - lo, hi - estimate.y) + estimate.noise)
    exponent = estimate.exponent if estimate.measured else None
    return Outcome("converged", math.exp(estimate.y), math.expm1(error), exponent)


def _dead_end(curve: Curve) -> Outcome | None:
    """Return the outcome where another probe can add nothing: the top or the noise floor is reached."""
    lo, hi = curve.bracket()
    if hi == math.inf and curve.probes[-1].eta >= _limit(curve):
        return Outcome("unbounded", curve.probes[-1].eta) if lo > 0 else Outcome("unresolved")
    if lo == 0 and hi < math.inf and curve.probes[-1].eta > hi:
        # One small rise may be the near side of a crossing: it takes two steps that show nothing to prove the floor.
        bottom = _num_below(curve, hi) > 1
        if (bottom or hi <= 1.5 * _floor(curve)) and _rises_at_once(curve):
            return Outcome("ascent")
        if bottom:
            return Outcome("unresolved")
    if lo == 0 and hi == math.inf and curve.probes[-1].eta > _FLAT * curve.probes[0].eta:
        return Outcome("unresolved")
    return None


def _limit(curve: Curve) -> float:
    """Return the largest step size to try."""
    to_zero = abs(curve.base_loss) / curve.given_slope if curve.given_slope else 0.0
    return _REACH * max(curve.guess, to_zero)


def _floor(curve: Curve) -> float:
    """Return the smallest step size at which a rise like the lowest one would still stand out of the noise."""
    eta, rise = next(probe for probe in curve.probes if curve.sign(probe) > 0)
    steepest = max(rise / eta if rise < math.inf else 0.0, curve.given_slope or curve.slope() or 0.0)
    return _FLOOR * curve.noise_level / steepest if steepest > 0 else curve.guess / _REACH**2


def _num_below(curve: Curve, eta: float) -> int:
    """Return the number of probes below ``eta``."""
    return sum(probe.eta < eta for probe in curve.probes)


def _rises_at_once(curve: Curve) -> bool:
    """Return whether the rises shrink in proportion to η, as along a direction of ascent, and not faster."""
    rises = [probe for probe in curve.probes if curve.sign(probe) > 0]
    # A given slope that could not have been seen at this step size may still lead to a crossing below it.
    hidden = curve.given_slope is not None and curve.given_slope * rises[0].eta <= 3.0 * curve.noise_level
    if hidden or len(rises) < 2 or not math.isfinite(rises[1].rise):
        return False
    return rises[0].rise / rises[0].eta >= 0.5 * rises[1].rise / rises[1].eta


def _propose(curve: Curve, estimate: Estimate | None, rtol: float, passes: int) -> float:
    """Return the next step size: the estimate where it is safe, otherwise a move that is sure to teach something."""
    lo, hi = curve.bracket()
    etas = [probe.eta for probe in curve.probes]
    one_sided = passes if lo == 0 or hi == math.inf else 0
    leap = 10.0 ** max(1, one_sided - 2)
    if estimate is None or (hi == math.inf and estimate.exponent < 0.25):
        if hi == math.inf:
            return min(etas[-1] * leap, _limit(curve))
        if lo > 0:
            return math.sqrt(lo * hi)
        if _num_below(curve, hi) > 1:
            return 10.0 * etas[-1]
        return max(etas[0] / leap, min(_floor(curve), etas[0] / 4.0))
    eta = math.exp(estimate.y)
    if not lo < eta < hi:
        eta = math.sqrt(lo * hi) if 0 < lo < hi < math.inf else hi / 2 if eta >= hi else lo * 2
    # The power law is local: it may be trusted over a decade or two.
    push = math.exp(min(math.log(1.5) * 2 ** (one_sided - 3), math.log(4.0))) if one_sided >= 3 else 1.0
    if hi == math.inf:
        eta = min(max(eta, etas[-1] * push if lo > 0 else 0.0), etas[-1] * max(100.0, leap), _limit(curve))
    elif lo == 0:
        eta = max(min(eta, hi / push), hi / leap, min(_floor(curve), hi / 4.0))
    return _away_from(curve, eta, estimate, rtol)


def _away_from(curve: Curve, eta: float, estimate: Estimate, rtol: float) -> float:
    """Return ``eta``, moved off where it would repeat an old probe, far enough for ψ to differ visibly."""
    distance = max(0.5 * rtol, 6.0 * estimate.noise)
    if not estimate.measured:
        # Losses equal to f₀ so far: a crossing by luck, or nothing but noise. Look further away each time.
        zeros = sum(curve.sign(probe) == 0 for probe in curve.probes)
        distance = min(max(0.03, distance) * 4.0 ** max(zeros - 1, 0), math.log(100.0))
    nearest = min((probe.eta for probe in curve.probes), key=lambda old: abs(math.log(eta / old)))
    factor = math.exp(distance if eta >= nearest else -distance)
    while any(abs(math.log(eta / probe.eta)) < 0.1 * rtol for probe in curve.probes):
        eta *= factor
    return eta
