"""What the probes of a line search say about the loss along the direction, and where they put the crossing.

With f(η) = L(θ − ηΔθ), f₀ = f(0), slope s = Δθᵀg and y = log η, the crossing η_c is the zero of

    ψ(y) = log w,   w = 1 + (f(η) − f₀)/(sη),

which on a quadratic is a straight line of slope 1, and elsewhere close to one of slope p, the *exponent*. The zero does
not depend on s: a wrong slope bends ψ and costs probes, never accuracy. Where the probes contradict the slope, or where
none was given, it is read off the two probes nearest to zero. Far out, where the line of slope s has long passed below
zero, f₀ takes the place of sη: no fall can be compared with more.

How large the noise is, losses at neighbouring step sizes show, which the curve itself cannot tell apart.
"""

import math
from bisect import insort
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from sharpkern.search.finite_differences import spread_about_polynomial

# A loss difference below this many noise levels has no sign.
SIGNIFICANT = 3.0
# The loss is a float64; no difference is known better than its rounding.
_ROUNDING = 2.0**-51
# A rise above this many is hardly changed by noise.
_CLEAR = 12.0
# The crossing feels the noise of a probe and of the base loss; this many standard errors of one loss cover both.
NOISE = 3.0
# Below this share of the slope, w is a difference of nearly equal numbers.
_SMALLEST_W = 1e-4
# Probes are close enough to 0 for the directional sharpness if w grows with η to the power 1 ± this.
_PROPORTIONAL = 0.1
# Along a direction of ascent a rise over η keeps at least this share of its size towards 0.
_KEPT = 0.75
# On a quadratic above zero the slope takes at most this many times the loss off up to the crossing.
_QUADRATIC = 4.0
# To measure the noise, losses are compared at step sizes so far apart, relative to the tolerance or to a hundredth ...
_SPACING = 0.01
# ... first two of them, and if need be so many.
_NEIGHBOURS = 6
# By how much the noise may be more than the difference of two losses shows, or the spread of all.
_DOUBT = {2: 3.0, 4: 3.0, _NEIGHBOURS: 2.0}
# By how much the spread has to exceed the noise given, which it does by chance as well.
_CLEARLY = 1.5
# The crossing is known no better than this share of the distance to the nearest probe.
_NEAREST = 0.1
# Exponents outside are artefacts of two probes too close to one another.
_EXPONENTS = (0.02, 50.0)


class Probe(NamedTuple):
    """One evaluated step size with the loss difference f(η) − f₀, inf where the loss was not finite."""

    eta: float
    rise: float


class Coordinate(NamedTuple):
    """A probe as (log η, ψ) with the standard error of ψ."""

    y: float
    psi: float
    sigma: float


@dataclass(frozen=True)
class Experience:
    """What the searches before tell about the way from a first probe to the crossing.

    Attributes:
        exponent: Slope of ψ on that way.
        miss: Share of it by which it is misjudged, typically.
        is_learned: Whether enough searches have told so.
        is_warm: Whether one has told the exponent.
    """

    exponent: float = 1.0
    miss: float = 1.0
    is_learned: bool = False
    is_warm: bool = False


@dataclass(frozen=True)
class Estimate:
    """An estimate of the crossing from the probes nearest to it.

    Attributes:
        y: log of the estimated crossing.
        error: Error of the interpolation, in log units.
        noise: Error from the noise of the losses, in log units.
        exponent: Slope p of ψ at the crossing.
        measured: Whether the exponent comes from two probes, and not from the previous search.
        nearest: Distance to the nearest probe, in log units.
    """

    y: float
    error: float
    noise: float
    exponent: float
    measured: bool
    nearest: float

    @property
    def reported_error(self) -> float:
        """Error in log units that covers the truth at more than 95 % of measured points."""
        return 2.0 * self.error * (1.0 + 3.0 * min(abs(math.log(self.exponent)), 1.0)) + self.noise + 1e-4


class Curve:
    """The loss along the direction, as far as it has been evaluated.

    Attributes:
        noise_level: Standard error of a loss: as given, or as losses at neighbouring step sizes show it.
        noise_is_known: Whether there is no more noise than that, as far as it matters.
        experience: What the searches before tell.
    """

    def __init__(
        self,
        base_loss: float,
        slope: float | None,
        guess: float,
        noise: float,
        rtol: float,
        *,
        noise_is_known: bool = False,
        bound: float | None = None,
        experience: Experience | None = None,
    ) -> None:
        self.experience = experience or Experience()
        self.base_loss = base_loss
        self.given_slope = slope
        self.guess = guess
        self.noise_level = max(noise, _ROUNDING) * abs(base_loss)
        self.noise_is_known = noise_is_known
        self.probes: list[Probe] = []
        self.bound = bound
        self._spacing = _SPACING * min(rtol, 0.01)
        # Step sizes beside a probe and the losses there; they tell nothing else.
        self._beside: dict[float, Probe] = {}
        self._neighbours: dict[Probe, list[Probe]] = {}
        self._stuck: list[Probe] = []

    def add(self, eta: float, loss: float) -> None:
        """Record a loss, the first one at each step size; one that is not finite is a rise."""
        rise = loss - self.base_loss
        probe = Probe(eta, rise if math.isfinite(rise) else math.inf)
        if eta in self._beside:
            insort(self._neighbours[self._beside[eta]], probe)
        elif not any(math.isclose(eta, known.eta, rel_tol=1e-12) for known in self.probes):
            insort(self.probes, probe)

    def beside(self, probe: Probe, num: int) -> tuple[float, ...]:
        """Return step sizes beside a probe, to measure the noise there: one, and then up to ``num`` more at a time."""
        known = self._neighbours.setdefault(probe, [probe])
        new = range(len(known), _NEIGHBOURS)[: num if len(known) > 1 else 1]
        etas = tuple(probe.eta * math.exp(-self._spacing * i) for i in reversed(new))
        self._beside.update((eta, probe) for eta in etas)
        return etas

    def measure_noise(self, probe: Probe, harmless: float) -> None:
        """Set the noise level from the losses beside a probe.

        Two that differ by little prove that the noise is harmless; otherwise all of them tell how large it is.
        """
        rises = [neighbour.rise for neighbour in self._neighbours[probe]]
        if not math.isfinite(sum(rises)):
            # Not noise but the edge of a wall.
            self.noise_is_known = True
        elif max(rises) == min(rises) and self._must_differ():
            self._stuck.append(probe)
            if not self.ends():
                # Steps of weights that are rounded to the same: between two of them nothing is known.
                self.noise_level = abs(self._stuck[0].rise - self._stuck[-1].rise)
                self.noise_is_known = True
        elif len(rises) in _DOUBT:
            spread = spread_about_polynomial(rises, degree=min(len(rises) - 2, 1))
            level = _DOUBT[len(rises)] * spread
            self.noise_is_known = level <= harmless or len(rises) == _NEIGHBOURS
            if self.noise_is_known and level > harmless and spread > _CLEARLY * self.noise_level:
                self.noise_level = level

    def ends(self) -> list[Probe]:
        """Return the last fall before the first rise, and that, where they are finite and losses beside them differ."""
        return [probe for probe in self._finite_ends() if probe not in self._stuck]

    def _finite_ends(self) -> list[Probe]:
        return [probe for probe in self.probes if probe.eta in self.bracket() and math.isfinite(probe.rise)]

    def _must_differ(self) -> bool:
        """Return whether losses beside each other differ visibly on a straight line from last fall to first rise."""
        ends = self._finite_ends()
        if len(ends) < 2:
            return False
        (eta1, rise1), (eta2, rise2) = ends
        return self._spacing * (rise2 - rise1) / math.log(eta2 / eta1) > self.noise_level

    def sign(self, probe: Probe) -> int:
        """Return 1 for a rise, −1 for a fall, 0 for a difference that noise could have made."""
        if abs(probe.rise) <= SIGNIFICANT * self.noise_level:
            return 0
        return 1 if probe.rise > 0 else -1

    def bracket(self) -> tuple[float, float]:
        """Return the last fall before the first rise, and the first rise; 0 and inf where there is none."""
        lo = 0.0
        for probe in self.probes:
            sign = self.sign(probe)
            if sign > 0:
                return lo, probe.eta
            if sign < 0:
                lo = probe.eta
        return lo, math.inf

    def distances(self, y: float) -> tuple[float, float]:
        """Return how far below log η = y the last fall lies and how far above the first rise; inf where there is none.

        Negative where it lies on the other side.
        """
        lo, hi = self.bracket()
        return y - math.log(lo) if lo > 0 else math.inf, math.log(hi) - y

    def slope(self) -> float | None:
        """Return the slope that ψ is built with: the given one unless the probes contradict it, or an estimate."""
        given, extrapolated = self.given_slope, self._extrapolated_slope()
        falls = [probe for probe in self.probes if self.sign(probe) < 0]
        if given is not None:
            # The last fall counts: where the loss is concave at first, earlier ones pass below a right slope's line.
            lo = self.bracket()[0]
            margin = SIGNIFICANT * self.noise_level
            too_small = any(p.eta == lo and p.rise < -given * lo * (1.0 + 1e-9) - margin for p in falls)
            too_large = extrapolated is not None and extrapolated < given / 4
            ascent = not falls and self.rises_at_once()
            if not too_small and not too_large and not ascent:
                return given
        if extrapolated is None and len(falls) == 1 and len(self.probes) == 1:
            # On a quadratic that crosses at the guess, or at twice the only probe.
            eta, rise = falls[0]
            return -rise / (eta * (1.0 - eta / self.guess)) if 1.1 * eta < self.guess else -2.0 * rise / eta
        return extrapolated

    def trusts_slope(self) -> bool:
        """Return whether a slope was given and no probe contradicts it."""
        return self.given_slope is not None and self.slope() == self.given_slope

    def rises_at_once(self) -> bool:
        """Return whether the rises shrink in proportion to η, as along a direction of ascent, and not faster."""
        rises = [probe for probe in self.probes if self.sign(probe) > 0 and math.isfinite(probe.rise)]
        if not rises or rises[0].eta > self.bracket()[1]:
            return False
        steepness, margin = rises[0].rise / rises[0].eta, SIGNIFICANT * self.noise_level
        # Smaller steps must not show less than half of their share.
        if any(p.rise < 0.5 * steepness * p.eta - margin for p in self.probes if p.eta < rises[0].eta):
            return False
        # The smallest may owe much of its rise to noise: the next one, clear of it, is asked too.
        clear = [probe for probe in rises if probe.rise > _CLEAR * self.noise_level]
        return self._in_proportion(rises) or self._in_proportion(clear)

    def _in_proportion(self, rises: list[Probe]) -> bool:
        """Return whether rise over η, extrapolated linearly to 0, keeps most of its size there beyond the noise.

        Of −sη + cη² nothing would be left. Probes further apart than a factor of three count as that far apart.
        """
        if len(rises) < 2:
            return False
        eta1, rise1 = rises[0]
        eta2, rise2 = min(rises[1:], key=lambda probe: abs(math.log(probe.eta / (3.0 * eta1))))
        # On a quadratic the noise could hide the fall that the slope promises.
        hidden = self.given_slope is not None and self.given_slope * eta1 < _QUADRATIC * SIGNIFICANT * self.noise_level
        if hidden or rise2 <= _CLEAR * self.noise_level:
            return False
        share = max(eta1 / (eta2 - eta1), 0.5)
        at_zero = (1.0 + share) * rise1 / eta1 - share * rise2 / eta2
        error = self.noise_level * ((1.0 + share) / eta1 + share / eta2)
        return at_zero >= _KEPT * rise1 / eta1 + error

    def _extrapolated_slope(self) -> float | None:
        """Return −(f − f₀)/η extrapolated to 0 from the two smallest probes between which its change is visible."""
        finite = [probe for probe in self.probes if self.sign(probe) != 0 and math.isfinite(probe.rise)]
        for (eta1, rise1), (eta2, rise2) in combinations(finite, 2):
            error = 4.0 * self.noise_level * (1.0 / eta1 + 1.0 / eta2) * eta1 / (eta2 - eta1)
            change = (rise2 / eta2 - rise1 / eta1) * eta1 / (eta2 - eta1)
            if change > max(error, 1e-9 * abs(rise1 / eta1)):
                slope = change - rise1 / eta1
                # After cancellation among rises nothing is left that tells a small slope from none.
                return slope if slope > max(error, 0.02 * abs(rise1 / eta1)) else None
        return None

    def coordinates(self) -> list[Coordinate]:
        """Return the probes around the first crossing as (y, ψ, σ), sorted by y.

        Left out are those whose ψ is not finite or drowns in noise, and, to either side of the first rise, all from
        where ψ stops growing with y: they belong to another crossing, or to a dip before or a bump behind this one.
        """
        slope = self.slope()
        if slope is None:
            return []
        found = []
        for eta, rise in self.probes:
            drop = self._drop(slope, eta)
            resolution = self.noise_level / drop if drop > 0 else math.inf
            w = 1.0 + rise / drop if drop > 0 else 0.0
            if resolution < 1 / 3 and max(2.0 * resolution, _SMALLEST_W) < w < math.inf:
                found.append(Coordinate(math.log(eta), math.log(w), resolution / w))
        first_rise = math.log(self.bracket()[1])
        start = next((i for i, node in enumerate(found) if node.y >= first_rise), len(found))
        top = max(start, 1)
        while top < len(found) and found[top].psi > found[top - 1].psi:
            top += 1
        bottom = min(start, len(found) - 1)
        while bottom > 0 and found[bottom - 1].psi < found[bottom].psi:
            bottom -= 1
        return found[bottom:top]

    def drop(self, eta: float) -> float:
        """Return the fall at η that ψ compares with; inf where no slope is known."""
        slope = self.slope()
        return math.inf if slope is None else self._drop(slope, eta)

    def _drop(self, slope: float, eta: float) -> float:
        """Return the fall at η that ψ compares with.

        It is sη, and levels off at f₀ where the last fall lies further out than any quadratic that stays above zero
        would have it.
        """
        fall, whole = slope * eta, self.base_loss
        if 0 < _QUADRATIC * whole < slope * self.bracket()[0] and fall > 0:
            return 1.0 / math.hypot(1.0 / fall, 1.0 / whole)
        return fall

    def estimate(self) -> Estimate | None:
        """Estimate the first crossing from the up to three probes around it."""
        nodes = _nearest(self.coordinates())
        if not nodes:
            return None
        first = nodes[0]
        second = next((node for node in nodes[1:] if _separated(first, node)), None)
        if second is not None and _EXPONENTS[0] <= _secant(first, second) <= _EXPONENTS[1]:
            apart = [node for node in nodes if _separated(first, node) and _separated(second, node)]
            return self._interpolate(first, second, apart[0] if apart else None)
        if len(nodes) > 1 and abs(first.psi) > SIGNIFICANT * first.sigma:
            # ψ is flat, or falls: no power law to follow.
            return None
        exponent, miss = self.experience.exponent, self.experience.miss
        way, noise = -first.psi / exponent, NOISE * first.sigma / exponent
        return Estimate(first.y + way, miss * abs(way), noise, exponent, measured=False, nearest=abs(way))

    def _interpolate(self, first: Coordinate, second: Coordinate, third: Coordinate | None) -> Estimate:
        """Return the zero of ψ by a secant through the first two nodes, or by a parabola y(ψ) through three."""
        exponent = _secant(first, second)
        y = first.y - first.psi / exponent
        nearest = abs(first.y - y)
        product = nearest * abs(second.y - y)
        if third is None:
            # A quadratic has exponent 1 and no error; the further from it, the more ψ is bent.
            error = (0.15 + abs(math.log(exponent))) * product
            if not self.trusts_slope():
                # Probes that served to find the slope show the exponent of a quadratic whatever the curve.
                error += product
        else:
            bend = (exponent - _secant(second, third)) / (first.y - third.y)
            parabola = _parabola_zero(first, second, third)
            shift = abs(parabola - y)
            error = max(min(max(1.5 * abs(bend / exponent), 0.1) * product, nearest), 0.3 * shift)
            if shift <= nearest / 2:
                y = parabola
        error = max(error, _NEAREST * abs(first.y - y))
        return Estimate(y, error, NOISE * first.sigma / exponent, exponent, measured=True, nearest=abs(first.y - y))

    def directional_sharpness(self, crossing: float) -> float | None:
        """Return ΔθᵀHΔθ/(Δθᵀg) from the two smallest probes, or None if they do not resolve it.

        1 + (f − f₀)/(sη) starts as half of it times η. The two probes must show this proportion; what is left of a
        linear trend in their ratios is extrapolated away.
        """
        slope = self.given_slope
        finite = [probe for probe in self.probes if math.isfinite(probe.rise)]
        if slope is None or not self.trusts_slope() or len(finite) < 2 or finite[0].eta > 0.25 * crossing:
            return None
        (eta1, rise1), (eta2, rise2) = finite[:2]
        w1, w2 = 1.0 + rise1 / (slope * eta1), 1.0 + rise2 / (slope * eta2)
        if w1 <= 0 or w2 <= 0 or abs(math.log(w2 / w1) / math.log(eta2 / eta1) - 1.0) > _PROPORTIONAL:
            return None
        near, far = 2.0 * w1 / eta1, 2.0 * w2 / eta2
        noise = NOISE * self.noise_level / (slope * eta1 * w1)
        return near + (near - far) * eta1 / (eta2 - eta1) if noise <= _PROPORTIONAL else None


def _nearest(nodes: list[Coordinate]) -> list[Coordinate]:
    """Return the nodes to fit, the one nearest to the crossing first."""
    if all(node.psi > 0 for node in nodes):
        return nodes[:3]
    if all(node.psi < 0 for node in nodes):
        return nodes[:-4:-1]
    return sorted(nodes, key=lambda node: abs(node.psi))


def _separated(a: Coordinate, b: Coordinate) -> bool:
    """Return whether two nodes differ by more than their noise."""
    return abs(a.psi - b.psi) > 4.0 * (a.sigma + b.sigma)


def _secant(a: Coordinate, b: Coordinate) -> float:
    """Return the slope of ψ between two nodes."""
    return (b.psi - a.psi) / (b.y - a.y)


def _parabola_zero(a: Coordinate, b: Coordinate, c: Coordinate) -> float:
    """Return the y at ψ = 0 of the parabola y(ψ) through three nodes with different ψ."""
    return (
        a.y * b.psi * c.psi / ((a.psi - b.psi) * (a.psi - c.psi))
        + b.y * a.psi * c.psi / ((b.psi - a.psi) * (b.psi - c.psi))
        + c.y * a.psi * b.psi / ((c.psi - a.psi) * (c.psi - b.psi))
    )
