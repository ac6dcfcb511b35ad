"""Which step sizes to try next: one at a time, several at a time, or by bisection.

Each strategy is a generator. It yields step sizes, finds their losses in the curve when it is resumed, and returns an
`Outcome`. All of them end: moves to one side grow, brackets shrink, and the number of evaluations is limited outside.
"""

import math
from collections.abc import Generator
from dataclasses import replace
from itertools import pairwise

from sharpkern.search.acceptance import FIRM, Outcome, converged, doubtful, kept, open_sides, settled, unchecked
from sharpkern.search.curve import Curve, Estimate, Probe

_DECADE = math.log(10.0)
# Without any rise the search goes up to this multiple of the first guess, or of the step that would bring a linear
# loss to zero, whichever is larger; and no further down.
_REACH = 1e9
# Rises this close to the noise are as far down as a search can see.
_FLOOR = 20.0
# A rise at the noise floor is compared with one this much further out.
_LOOK_ABOVE = 3.0
# A step out of the noise is at least this factor.
_LEAST_STEP = 1.05
# A probe that shows nothing proves so for step sizes up to this ratio above it.
_CLOSE = 4.5
# Estimates miss the crossing by up to this share of their distance to the nearest probe ...
_MISS = 0.1
# ... and noise hides signs within its own error: probes are aimed beyond both, but no further than this, in log units.
_VISIBLE, _FURTHEST = 1.3, 0.5
# A loss that changes nowhere over this ratio of step sizes is flat as far as its noise lets see.
_FLAT = 1e6
# A rise by more than this share of the loss is too far out to say how the loss starts.
_LOCAL = 0.1

Steps = Generator[tuple[float, ...], None, Outcome]


def adaptive(curve: Curve, rtol: float, certify: bool, num: int, width: float) -> Steps:
    """Try step sizes where the probes so far put the crossing, until they agree; look where they may be deceived."""
    chooser = _Single(curve, rtol) if num == 1 else _Grids(curve, rtol, num, width)
    answer = None
    if not curve.probes:
        yield chooser.first()
    while True:
        outcome = _dead_end(curve)
        if outcome is None:
            estimate = curve.estimate()
            found = settled(curve, estimate, rtol)
            answer = kept(curve, answer, found) if certify else found
            if answer is None:
                yield chooser.after(estimate)
                continue
            checks = tuple(unchecked(curve, answer))
            if certify and not checks:
                checks = tuple(open_sides(curve, answer, rtol))
            if checks:
                yield tuple(sorted(checks[:num]))
                continue
            outcome = converged(curve, answer, rtol, certify)
        if outcome.status == "unresolved" or curve.noise_is_known:
            return outcome
        # What was found may be made of noise.
        probe, harmless = doubtful(curve, outcome, rtol)
        yield curve.beside(probe, num)
        curve.measure_noise(probe, harmless)


class _Single:
    """One step size at a time."""

    def __init__(self, curve: Curve, rtol: float) -> None:
        self._curve, self._rtol = curve, rtol
        self._widths = [math.inf]

    def first(self) -> tuple[float, ...]:
        # Without a slope the first probe is there to show it.
        return (self._curve.guess if self._curve.given_slope is not None else self._curve.guess / 3.0,)

    def after(self, estimate: Estimate | None) -> tuple[float, ...]:
        lo, hi = self._curve.bracket()
        self._widths.append(math.log(hi / lo) if lo > 0 else math.inf)
        if len(self._widths) > 3 and math.inf > self._widths[-1] > self._widths[-4] / 2:
            # Three moves have not halved the bracket: do it by force.
            self._widths = [math.inf]
            return (_middle(self._curve),)
        return (_propose(self._curve, estimate, self._rtol, len(self._curve.probes)),)


class _Grids:
    """Several step sizes at a time, on grids that close in on the crossing."""

    def __init__(self, curve: Curve, rtol: float, num: int, width: float) -> None:
        self._curve, self._rtol, self._num, self._width = curve, rtol, num, width
        self._passes = 0

    def first(self) -> tuple[float, ...]:
        return first_grid(self._curve.guess, self._width, self._num)

    def after(self, estimate: Estimate | None) -> tuple[float, ...]:
        self._passes += 1
        lo, hi = self._curve.bracket()
        if lo > 0 and hi < math.inf:
            span = math.log(hi / lo)
            grids = [(math.log(lo * hi) / 2, span / 2 * (self._num - 1) / (self._num + 1))]
            if estimate is not None and lo < math.exp(estimate.y) < hi and 3.0 * estimate.error < span:
                grids.insert(0, (estimate.y, max(1.5 * estimate.error, 0.02)))
            # Where all losses of a grid are lost in noise, the next one would be the same: nothing is left to ask.
            asked = (_grid(self._curve, *grid, self._num) for grid in grids)
            return next((grid for grid in asked if not _is_known(self._curve, grid)), ())
        # A narrow grid, as steady runs leave behind, must not use up all evaluations on its way.
        self._width = max(1.5 * self._width, min(3.0 * self._width, _DECADE))
        eta = _propose(self._curve, estimate, self._rtol, self._passes)
        if eta > hi:
            return (eta,)
        center = math.log(eta)
        if hi == math.inf:
            center = max(center, math.log(self._curve.probes[-1].eta) + self._width / 2)
        elif lo == 0:
            center = min(center, math.log(hi) - self._width / 2)
        grid = _grid(self._curve, center, self._width, self._num)
        # Where two grids have found no rise, there may be none at all.
        endless = hi == math.inf and (self._passes > 1 or _was_unbounded(self._curve))
        return (*grid[:-1], _limit(self._curve)) if endless else grid


def _is_known(curve: Curve, grid: tuple[float, ...]) -> bool:
    """Return whether all of these step sizes have been evaluated."""
    return all(any(math.isclose(eta, probe.eta, rel_tol=1e-6) for probe in curve.probes) for eta in grid)


def first_grid(guess: float, width: float, num: int) -> tuple[float, ...]:
    """Return the step sizes to begin with, several at a time."""
    center = math.log(guess)
    watch = [center - width - math.log(divisor) for divisor in (12.0, 3.5)] if num >= 6 else []
    return tuple(math.exp(y) for y in [*watch, *_spaced(center - width, center + width, num - len(watch))])


def bisection(curve: Curve, width: float = 1 / 16) -> Steps:
    """Double or halve the guess until the crossing is enclosed, then bisect and report the midpoint."""
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
            eta = min(2 * lo, _limit(curve))
        elif lo == 0:
            eta = hi / 2
        elif hi / lo > 1 + width:
            eta = (lo + hi) / 2
        else:
            # Its answer is one where a fall and a rise beyond the noise enclose it.
            fall, rise = curve.bracket()
            if not 0 < fall <= lo or rise == math.inf:
                return Outcome("unresolved")
            eta = (lo + hi) / 2
            return Outcome("converged", eta, max(1 - fall / eta, rise / eta - 1))


def _grid(curve: Curve, center: float, width: float, num: int) -> tuple[float, ...]:
    """Return ``num`` step sizes evenly spaced in log, within ``width`` of the center, where they can teach something.

    They end below the first rise, which continues their spacing, and at the limit; and where no fall is known, not far
    below the noise floor.
    """
    lo, hi = curve.bracket()
    bottom, top = center - width, center + width
    if lo == 0 and hi < math.inf:
        bottom = max(bottom, min(math.log(_lowest(curve) / _CLOSE), center))
    if top >= math.log(hi):
        top = math.log(hi) - (math.log(hi) - bottom) / num
    top = min(top, math.log(_limit(curve)))
    return tuple(math.exp(y) for y in _spaced(bottom, top, num))


def _spaced(bottom: float, top: float, num: int) -> list[float]:
    return [bottom + (top - bottom) * i / (num - 1) for i in range(num)] if num > 1 else [(bottom + top) / 2]


def _dead_end(curve: Curve) -> Outcome | None:
    """Return the outcome where another probe can add nothing: the top or the noise floor is reached."""
    lo, hi = curve.bracket()
    if hi == math.inf:
        # The limit passes through a logarithm on its way here.
        if curve.probes[-1].eta >= _limit(curve) * (1 - 1e-9):
            falls = min(probe.rise for probe in curve.probes) < -FIRM * curve.noise_level
            return Outcome("unbounded", curve.probes[-1].eta) if falls else Outcome("unresolved")
        if lo == 0 and curve.probes[-1].eta > _FLAT * curve.probes[0].eta:
            return Outcome("unresolved")
    elif lo == 0:
        if hi <= 1.5 * _floor(curve) and curve.rises_at_once():
            # Noise that hides all but such a rise, as that of losses far out is, hides how the loss starts.
            starts = _first_rise(curve).rise < _LOCAL * abs(curve.base_loss) or curve.given_slope is None
            return Outcome("ascent" if starts else "unresolved")
        if _at_bottom(curve) and not _needs_company(curve):
            return Outcome("unresolved")
    return None


def _limit(curve: Curve) -> float:
    """Return the largest step size to try."""
    if curve.bound is not None and _was_unbounded(curve):
        return curve.bound
    to_zero = abs(curve.base_loss) / curve.given_slope if curve.given_slope else 0.0
    return _REACH * max(curve.guess, to_zero)


def _was_unbounded(curve: Curve) -> bool:
    """Return whether the last search found no rise up to a step size far above the guess."""
    return curve.bound is not None and curve.bound > 10.0 * curve.guess


def _floor(curve: Curve) -> float:
    """Return the smallest step size at which a rise like the lowest one would still stand out of the noise."""
    eta, rise = _first_rise(curve)
    steepness = rise / eta if rise < math.inf else curve.slope() or math.inf
    return max(_FLOOR * curve.noise_level / steepness, curve.guess / _REACH)


def _lowest(curve: Curve) -> float:
    """Return how far down to go from the first rise at once."""
    return min(_floor(curve), curve.bracket()[1] / 4.0)


def _at_bottom(curve: Curve) -> bool:
    """Return whether nothing can be seen below the first rise, before which no fall is known.

    A small rise may be the near side of a crossing: two steps that show nothing, one close by, prove the bottom.
    """
    hi = curve.bracket()[1]
    below = _below(curve, hi)
    return hi <= 1.5 * curve.guess / _REACH or (_apart(below) and hi <= _CLOSE * below[-1])


def _apart(etas: list[float]) -> bool:
    """Return whether two step sizes or more lie over a factor of two apart."""
    return len(etas) > 1 and etas[-1] > 2.0 * etas[0]


def _at_floor(curve: Curve) -> bool:
    """Return whether the first rise, before which no fall is known, is among the smallest that can be seen."""
    return _at_bottom(curve) or curve.bracket()[1] <= 1.5 * _floor(curve)


def _needs_company(curve: Curve) -> bool:
    """Return whether the first rise has no other near enough to tell whether both are in proportion to η."""
    eta, rise = _first_rise(curve)
    return rise < math.inf and not any(2.0 * eta <= probe.eta <= 10.0 * eta for probe in curve.probes)


def _first_rise(curve: Curve) -> Probe:
    """Return the smallest step size with a rise."""
    return next(probe for probe in curve.probes if curve.sign(probe) > 0)


def _below(curve: Curve, eta: float) -> list[float]:
    """Return the step sizes evaluated below ``eta``."""
    return [probe.eta for probe in curve.probes if probe.eta < eta]


def _propose(curve: Curve, estimate: Estimate | None, rtol: float, passes: int) -> float:
    """Return the next step size: the estimate where it is safe, otherwise a move that is sure to teach something.

    Only a rise at the noise floor, with no other to compare it with, makes it look a little above a known rise.
    """
    lo, hi = curve.bracket()
    aim = None if estimate is None else replace(estimate, y=estimate.y + _beyond(curve, estimate, rtol))
    if hi == math.inf:
        eta = _upward(curve, aim, passes)
    elif lo == 0:
        eta = _downward(curve, aim, passes)
        if eta > hi:
            return eta
    else:
        eta = math.exp(aim.y) if aim is not None else 0.0
        if not lo < eta < hi:
            eta = _middle(curve)
    return eta if estimate is None else _away_from(curve, eta, estimate, rtol)


def _beyond(curve: Curve, estimate: Estimate, rtol: float) -> float:
    """Return how far beyond the estimate to aim, in log units, to see a fall or a rise on the side where none is near.

    Far enough for the sign to be told from an error of the estimate and from noise.
    """
    below, above = curve.distances(estimate.y)
    miss = max(_MISS * estimate.nearest, estimate.error if estimate.measured else 0.0, rtol)
    step = min(max(miss, _VISIBLE * estimate.noise), max(below, above) / 2, _FURTHEST)
    return step if above > below else -step


def _upward(curve: Curve, estimate: Estimate | None, passes: int) -> float:
    """Return a step size while no rise is known."""
    if _was_unbounded(curve):
        # If it still is, all else is wasted.
        return _limit(curve)
    lo, last = curve.bracket()[0], curve.probes[-1].eta
    leap, push = _stride(passes)
    eta = last * leap
    # Where two losses equal f₀ the slope is wrong, or nothing but noise is seen: larger steps show more.
    flat = estimate is None or (estimate.measured and estimate.exponent < 0.25)
    if estimate is not None and not flat and (lo > 0 or len(curve.probes) == 1):
        # The power law is local: it may be trusted over a decade or two.
        eta = min(max(math.exp(estimate.y), last * push if lo > 0 else 0.0), last * max(100.0, leap))
    return min(eta, _step_out(curve), _limit(curve))


def _downward(curve: Curve, estimate: Estimate | None, passes: int) -> float:
    """Return a step size while a rise is known, and no fall before it."""
    hi = curve.bracket()[1]
    below = _below(curve, hi)
    if _at_floor(curve) and _needs_company(curve):
        return _LOOK_ABOVE * hi
    if below and hi > _CLOSE * below[-1]:
        return math.sqrt(below[-1] * hi)
    if below:
        return below[0] / (10.0 if len(below) == 1 or _apart(below) else 3.0)
    first = _first_rise(curve)
    if hi * 2.0 < curve.probes[-1].eta and first.rise < _LOCAL * abs(curve.base_loss) and curve.rises_at_once():
        # The slope is contradicted: the same at the noise floor settles it.
        return _lowest(curve)
    leap, push = _stride(passes)
    eta = hi / leap if estimate is None else max(min(math.exp(estimate.y), hi / push), hi / leap)
    return max(eta, _lowest(curve))


def _stride(passes: int) -> tuple[float, float]:
    """Return the largest and the smallest factor by which to move on while one side of the crossing is unknown."""
    push = math.exp(min(math.log(1.5) * 2 ** (passes - 3), math.log(4.0))) if passes >= 3 else 1.0
    return 10.0 ** max(1, passes - 2), push


def _middle(curve: Curve) -> float:
    """Return the middle, in log, of the widest gap between the probes around the crossing, or less far out."""
    lo, hi = curve.bracket()
    etas = [probe.eta for probe in curve.probes if lo <= probe.eta <= hi]
    left, right = max(pairwise(etas), key=lambda gap: gap[1] / gap[0])
    middle = math.sqrt(left * right)
    return min(middle, _step_out(curve)) if right == hi else middle


def _step_out(curve: Curve) -> float:
    """Return how far to go at most above probes that noise leaves without a sign: as far as they reach above a fall.

    A crossing may begin there, and the loss may have fallen again by the middle of a wide gap.
    """
    lo, hi = curve.bracket()
    last = max((probe.eta for probe in curve.probes if probe.eta < hi), default=0.0)
    return last * max(last / lo, _LEAST_STEP) if last > lo > 0 else math.inf


def _away_from(curve: Curve, eta: float, estimate: Estimate, rtol: float) -> float:
    """Return ``eta``, moved off where it would repeat an old probe, far enough for ψ to differ visibly."""
    distance = max(0.5 * rtol if estimate.measured else 0.03, 6.0 * estimate.noise)
    nearest = min((probe.eta for probe in curve.probes), key=lambda old: abs(math.log(eta / old)))
    lo, hi = curve.bracket()
    # Rounding must not decide between up and down.
    up = eta > nearest * (1 - 1e-9) and nearest < hi
    factor = math.exp(min(distance, math.log(10.0)) * (1 if up else -1))
    while any(abs(math.log(eta / probe.eta)) < 0.1 * rtol for probe in curve.probes):
        eta *= factor
    if hi == math.inf:
        return min(eta, _limit(curve))
    return eta if lo < eta < hi else _middle(curve)
