"""When an estimate of the crossing may be returned, and what has to be looked at before.

An estimate is settled once it is exact enough and lies between a fall and a rise, or the searches before tell how far
such estimates are off; its error then covers the side where nothing was seen. Before it is returned the search looks
where an earlier crossing could hide, and how large the noise is; and, to certify it, for a fall and a rise that noise
cannot have made close to either side of it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

from sharpkern.search.curve import NOISE, SIGNIFICANT, Curve, Estimate, Probe

Status: TypeAlias = Literal["converged", "ascent", "unbounded", "nonfinite", "unresolved"]

# Between the crossing and the last fall, or the first rise, ψ may bend: so much of the way is in doubt, ...
_REACH = 0.03
# ... and so much of the way to the nearest probe, which is no further than this.
_NEAR = 0.4
_NEAREST = 0.4
# Two probes miss by less than this share of the error estimated, at nine of ten points measured; so do three with the
# crossing between them, where the error is no more than this.
_CALIBRATED, _SMALL = 0.5, 0.02
# A search that has taken more probes than this is unlike those before.
_FAMILIAR = 5
# One probe that misjudged more than this share of the way to the crossing of late is never enough.
_UNSURE = 0.6
# So many losses without a sign between the last fall and the first rise: noise hides the crossing among them.
_BLURRED = 3
# Where the slope alone would take this many times the loss off, and half as many where the answer is so many times what
# was expected, an earlier crossing may hide: the guard looks at the estimate divided by this, or where the slope would
# take this many times the loss off, if that is less.
_FAR_OUT, _UNEXPECTED = 3.0, 2.0
_GUARD, _GUARD_FALL = 4.0, 2.0
# A fall or rise that an outcome rests on has to be so many times the noise.
FIRM = 9.0
# Noise may be so many times what is given without notice where that is large.
_MORE = 4.0
# Above this relative error from noise alone a crossing counts as not resolved.
_TOO_NOISY = 0.1
# Where a fall of this many noise levels was due a probe without a sign may lie on the flank of a rise ...
_TELLING = 8.0
# ... which is looked for at this ratio to either side.
_BESIDE = 1.15
# A certificate may leave this ratio between the ends of the bracket where noise hides all signs inside.
_CLOSED = 1.5


@dataclass(frozen=True)
class Outcome:
    """How a search ended: status, critical learning rate, its relative error, and the exponent if measured."""

    status: Status
    eta: float = math.nan
    error: float = math.nan
    exponent: float | None = None


def settled(curve: Curve, estimate: Estimate | None, rtol: float) -> Estimate | None:
    """Return the estimate if it is exact enough and backed by enough probes, or the middle of a closed bracket."""
    lo, hi = curve.bracket()
    if estimate is not None and (_familiar(curve, estimate, rtol) or _backed(curve, estimate, rtol)):
        return estimate
    if not (lo > 0 and hi < math.inf):
        return None
    half = math.log(hi / lo) / 2
    better = estimate is not None and estimate.measured and 3.0 * estimate.noise < half
    blurred = sum(lo < probe.eta < hi for probe in curve.probes) >= _BLURRED and not better
    if blurred or hi <= lo * (1 + 2 * rtol):
        noise = half if blurred else 0.0
        return Estimate(math.log(lo) + half, half, noise, 1.0, measured=False, nearest=half)
    return None


def _familiar(curve: Curve, estimate: Estimate, rtol: float) -> bool:
    """Return whether it is exact enough by what the searches before say of such estimates, also with one side open."""
    lo, hi = curve.bracket()
    seen = (lo > 0 or hi < math.inf) and lo < math.exp(estimate.y) < hi
    if not (seen and curve.experience.is_learned and curve.trusts_slope()) or len(curve.probes) > _FAMILIAR:
        return False
    error = _CALIBRATED * estimate.error if estimate.measured else estimate.error
    sure = estimate.measured or (len(curve.probes) == 1 and curve.experience.miss < _UNSURE)
    return sure and estimate.nearest <= _NEAREST and max(error, estimate.noise) <= rtol


def _backed(curve: Curve, estimate: Estimate, rtol: float) -> bool:
    """Return whether it is exact enough by the probes alone, which lie close on both sides."""
    lo, hi = curve.bracket()
    if not (lo > 0 and hi < math.inf):
        return False
    tolerance = max(rtol, estimate.noise)
    if curve.experience.is_warm and curve.trusts_slope() and len(curve.coordinates()) > 2:
        tolerance = max(tolerance, min(rtol / _CALIBRATED, _SMALL))
    # Without a slope to trust, two probes determine it and ψ only together.
    enough = len(curve.probes) >= (2 if curve.trusts_slope() else 3)
    inside = lo < math.exp(estimate.y) < hi or estimate.noise > rtol
    close = _REACH * max(curve.distances(estimate.y)) <= tolerance
    return enough and inside and close and estimate.measured and estimate.error <= tolerance


def doubtful(curve: Curve, outcome: Outcome, rtol: float) -> tuple[Probe, float]:
    """Return the probe beside which to measure the noise before an outcome is returned, and how much of it is harmless.

    A crossing rests on its place and on the fall before it, the other outcomes on a fall or a rise alone.
    """
    if outcome.status != "converged":
        # The last fall, or the first rise where there is none.
        probe = curve.ends()[0]
        return probe, abs(probe.rise) / FIRM
    probe = min(curve.ends(), key=lambda end: abs(math.log(end.eta / outcome.eta)))
    falls = (-probe.rise for probe in curve.probes if probe.eta <= curve.bracket()[0])
    deepest = max(falls, default=abs(probe.rise))
    # Where the noise given is what limits the error, it has to be more by far.
    return probe, max(min(deepest / FIRM, rtol * curve.drop(probe.eta) / NOISE), _MORE * curve.noise_level)


def unchecked(curve: Curve, estimate: Estimate) -> Iterator[float]:
    """Yield the step sizes that must still be evaluated before the estimate may be returned.

    An earlier crossing is possible where the loss would fall far below zero on a straight line, around a probe that
    lies higher than its neighbours, and around one before the last fall that noise leaves without a sign.
    """
    eta = math.exp(estimate.y)
    slope = max(curve.given_slope or 0.0, curve.slope() or 0.0) or math.inf
    fall = slope * eta / (abs(curve.base_loss) or math.inf)
    if fall > (_FAR_OUT if eta < _UNEXPECTED * curve.guess else _FAR_OUT / 2):
        yield from _unless_near(curve, eta / max(_GUARD, fall / _GUARD_FALL if fall < math.inf else 0.0), 1.5)
    for bump in (*_bumps(curve), *_far_flanks(curve)):
        yield from _unless_near(curve, bump, 1.25)
    for touch in _touches(curve):
        yield from _unless_near(curve, touch * _BESIDE, math.sqrt(_BESIDE))
        yield from _unless_near(curve, touch / _BESIDE, math.sqrt(_BESIDE))


def _bumps(curve: Curve) -> Iterator[float]:
    """Yield the middles of the gaps to either side of each fall that is higher than its neighbours, and high."""
    before = [probe for probe in curve.probes if probe.eta < curve.bracket()[1]]
    deepest = min((probe.rise for probe in before), default=0.0)
    for left, top, right in zip(before, before[1:], before[2:], strict=False):
        if top.rise > max(max(left.rise, right.rise) + SIGNIFICANT * curve.noise_level, 0.5 * deepest):
            yield math.sqrt(top.eta * right.eta)
            yield math.sqrt(left.eta * top.eta)


def _far_flanks(curve: Curve) -> Iterator[float]:
    """Yield the middle between the last fall and the first rise where the loss falls again from that rise on.

    It has crossed somewhere before, and not just below.
    """
    lo, hi = curve.bracket()
    for first, after in pairwise(curve.probes):
        if first.eta == hi and lo > 0 and after.rise < first.rise - SIGNIFICANT * curve.noise_level:
            yield math.sqrt(lo * hi)


def _touches(curve: Curve) -> Iterator[float]:
    """Yield the probes without a sign before the last fall at step sizes where the loss should long have fallen.

    It should where a smaller step made it fall, or on a straight line from zero to the next fall.
    """
    falls = [probe for probe in curve.probes if probe.eta <= curve.bracket()[0] and curve.sign(probe) < 0]
    for probe in curve.probes:
        beyond = next((fall for fall in falls if fall.eta > probe.eta), None)
        if beyond is not None and curve.sign(probe) == 0:
            line = -beyond.rise * probe.eta / beyond.eta
            if falls[0].eta < probe.eta or line > _TELLING * curve.noise_level:
                yield probe.eta


def _unless_near(curve: Curve, eta: float, factor: float) -> Iterator[float]:
    """Yield ``eta`` unless a probe lies within ``factor`` of it."""
    if not any(eta / factor < probe.eta < eta * factor for probe in curve.probes):
        yield eta


def kept(curve: Curve, before: Estimate | None, now: Estimate | None) -> Estimate | None:
    """Return the settled estimate to certify: the earlier one while it is the more exact and nothing contradicts it.

    Noise may make the probes close to the crossing, which certify it, say less about its place than those before.
    """
    if before is None or (now is not None and now.reported_error <= before.reported_error):
        return now
    lo, hi = curve.bracket()
    slack = math.exp(before.noise)
    return before if lo / slack < math.exp(before.y) < hi * slack else now


def open_sides(curve: Curve, estimate: Estimate, rtol: float) -> Iterator[float]:
    """Yield a step size to each side of the estimate where no fall or rise is known close by.

    Where noise left the last one without a sign the next is twice as far out, as far as a certificate may reach.
    """
    if sum(curve.distances(estimate.y)) <= math.log1p(2.5 * rtol):
        return
    first = math.log1p(2.1 * max(rtol, 2.0 * estimate.noise)) / 2
    furthest = max(first, math.log(_widest(rtol)) / 2)
    for side, known in zip((-1, 1), curve.distances(estimate.y), strict=True):
        unsigned = [side * (math.log(probe.eta) - estimate.y) for probe in curve.probes if curve.sign(probe) == 0]
        step = max([first, *(2.0 * distance for distance in unsigned if distance < min(known, furthest))])
        if step <= furthest and 1.1 * step < known:
            yield math.exp(estimate.y + side * step)


def _widest(rtol: float) -> float:
    """Return the largest ratio between the ends of a bracket that counts as closed."""
    return max(_CLOSED, 1.0 + 2.5 * rtol)


def converged(curve: Curve, estimate: Estimate, rtol: float, certify: bool) -> Outcome:
    """Return the estimate as an outcome; one that drowns in noise, or that is not certified, is not resolved."""
    lo, hi = curve.bracket()
    if estimate.noise > _TOO_NOISY or (certify and hi > lo * _widest(rtol)):
        return Outcome("unresolved", exponent=estimate.exponent)
    eta = min(max(math.exp(estimate.y), lo), hi) if certify else math.exp(estimate.y)
    # Where one side is open nothing but the estimate tells how far the crossing may be.
    far = max(distance for distance in curve.distances(math.log(eta)) if distance < math.inf)
    # Between the ends of a bracket that noise kept open the certificate says nothing about the crossing.
    if certify and hi > lo * (1 + 2.5 * rtol):
        error = far + estimate.noise
    else:
        error = max(estimate.reported_error, _NEAR * estimate.nearest if estimate.measured else 0.0)
        if lo > 0 and hi < math.inf:
            error = min(max(error, _REACH * far), far + estimate.noise)
    return Outcome("converged", eta, math.expm1(error), estimate.exponent if estimate.measured else None)
