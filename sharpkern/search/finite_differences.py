"""−f″(0)/f′(0) of a function of one number, from values at 0 and ±h, and how far off it may be.

A second difference has two errors, which h balances:

- truncation, in the order of h²|λ|³ where f bends away from its parabola on the scale of the crossing;
- rounding of the losses by δ = noise·f: √6·δ/(h²|f′|). A loss that is a small difference of large numbers, such as a
  cross-entropy that is nearly zero, is rounded more coarsely: the fourth difference of the five losses at 0, ±h/2 and
  ±h shows it, which is their spread about a cubic. The fourth derivative shows there too, and goes with h⁴: where the
  difference is larger than thought, the one at half of these steps is taken.

They are equal at h⁴ = √6·δ/|f′λ³|, for a float32 loss a few hundredths of the critical learning rate. A second value at
h/2 shows what truncation really is: nothing beyond rounding, or a part in h² to extrapolate away, or h was too large.

The uncertainty of a value at h is twice its distance from the value at h/2, four thirds of which the part in h² alone
would make, or once if that part was extrapolated away; and one standard deviation of rounding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

Losses = Callable[[Sequence[float]], list[float]]

_MAX_ROUNDS = 10
# Standard deviations, in units of one loss's: of a second difference of three losses, of half the difference of two.
_SECOND_DIFFERENCE, _HALF_DIFFERENCE = math.sqrt(6), math.sqrt(0.5)
# A value of fewer standard deviations is none.
_RESOLVED = 3


@dataclass(frozen=True)
class Estimate:
    """−f″/f′ as measured.

    Attributes:
        value: nan where the losses do not resolve it.
        error: relative uncertainty of ``value``, nan where that is.
        step: the largest h that went into it, or the last one tried.
    """

    value: float
    error: float
    step: float


def spread_about_polynomial(values: Sequence[float], degree: int) -> float:
    """Return the standard deviation of evenly spaced values about their best polynomial: what no smooth curve makes."""
    residual, basis = list(values), list[list[float]]()
    for power in range(degree + 1):
        vector = [(i - (len(values) - 1) / 2) ** power for i in range(len(values))]
        for known in basis:
            vector = _without(vector, known)
        length = math.hypot(*vector)
        basis.append([x / length for x in vector])
        residual = _without(residual, basis[-1])
    return math.hypot(*residual) / math.sqrt(len(values) - degree - 1)


def _without(vector: Sequence[float], direction: Sequence[float]) -> list[float]:
    """Return a vector without its part along a unit vector."""
    along = sum(x * y for x, y in zip(vector, direction, strict=True))
    return [x - along * y for x, y in zip(vector, direction, strict=True)]


def three_point(losses: Losses, base: float, *, first_step: float, noise: float) -> Estimate:
    """Measure at the h that seems best, and at half of it as a check."""
    step = first_step
    # At twice the step, once the step seems good.
    twice: _Difference | None = None
    for _ in range(_MAX_ROUNDS):
        here = _difference(losses, base, step, noise)
        if not here.finite:
            step, twice = step / 10, None
            continue
        if math.isnan(here.value):
            if twice:
                break
            # Either the step is lost in rounding, or it is so large that only the parabola's rise is seen.
            step *= 1 / 30 if here.bent else 100
            continue
        if twice:
            twice, here = _with_noise_seen(losses, base, twice, here, noise)
            truncation = (twice.value - here.value) / 3
            if abs(truncation) <= here.rounding:
                # The two agree to within rounding, of which the larger step has less.
                return _checked(twice, here)
            if abs(truncation) <= 0.1 * abs(here.value):
                value = here.value - truncation
                return Estimate(value, (3 * abs(truncation) + here.rounding) / abs(value), twice.step)
        else:
            # Where rounding hides the curvature its size is unknown, but no larger than the uncertainty.
            best = step * (here.rounding / step**2 / max(abs(here.value), here.rounding) ** 3) ** 0.25
            if not 0.5 <= best / step <= 2:
                step *= min(max(best / step, 1 / 30), 30)
                continue
        step, twice = step / 2, here
    return Estimate(math.nan, math.nan, step)


def at_step(losses: Losses, base: float, *, step: float, noise: float) -> Estimate:
    """Measure at a given h, and at half of it for the uncertainty."""
    far, near = (_difference(losses, base, h, noise) for h in (step, step / 2))
    return _checked(*_with_noise_seen(losses, base, far, near, noise))


@dataclass(frozen=True)
class _Difference:
    """−f″/f′ by the losses at ±h.

    Attributes:
        step: h.
        value: nan if a loss is not finite or the slope is lost in rounding.
        rounding: standard deviation of ``value`` that rounding of the losses makes.
        finite: whether the losses are.
        bent: whether there is a second difference beyond rounding.
        both: sum of the losses at ±h.
        delta: standard deviation of one loss.
    """

    step: float
    value: float = math.nan
    rounding: float = math.nan
    finite: bool = True
    bent: bool = False
    both: float = math.nan
    delta: float = math.nan


def _difference(losses: Losses, base: float, step: float, noise: float) -> _Difference:
    """Return what the losses at ±h show."""
    ahead, behind = losses((step, -step))
    if not (math.isfinite(ahead) and math.isfinite(behind)):
        return _Difference(step, finite=False)
    delta = noise * max(abs(base), abs(ahead), abs(behind))
    first, second = (behind - ahead) / 2, ahead - 2 * base + behind
    bent = abs(second) > 10 * delta
    if abs(first) <= 10 * delta:
        return _Difference(step, bent=bent, both=ahead + behind, delta=delta)
    value = second / first / step
    rounding = math.hypot(_SECOND_DIFFERENCE, _HALF_DIFFERENCE * value * step) * delta / abs(first) / step
    return _Difference(step, value, rounding, bent=bent, both=ahead + behind, delta=delta)


def _with_noise_seen(
    losses: Losses, base: float, far: _Difference, near: _Difference, noise: float
) -> tuple[_Difference, _Difference]:
    """Return both with the rounding that the losses show, where that is more than was thought."""
    if not _fourth(base, far, near) > _RESOLVED * far.delta:
        return far, near
    seen = _fourth(base, near, _difference(losses, base, near.step / 2, noise))
    if not seen > far.delta > 0:
        return far, near
    return (
        replace(far, rounding=far.rounding * seen / far.delta),
        replace(near, rounding=near.rounding * seen / near.delta),
    )


def _fourth(base: float, far: _Difference, near: _Difference) -> float:
    """Return the standard deviation of one loss by the fourth difference of five, nan if one is not finite."""
    return spread_about_polynomial((far.both / 2, near.both / 2, base, near.both / 2, far.both / 2), degree=3)


def _checked(far: _Difference, near: _Difference) -> Estimate:
    """Return the value at h with what the one at h/2 says of it."""
    if not abs(far.value) > _RESOLVED * far.rounding or math.isnan(near.value):
        return Estimate(math.nan, math.nan, far.step)
    return Estimate(far.value, (2 * abs(far.value - near.value) + far.rounding) / abs(far.value), far.step)
