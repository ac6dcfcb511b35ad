"""The crossing of a mean of many functions from a sample of them, where the slope of the mean is known.

That slope is a control variate. With f_i(η) = L_i(η) − L_i(0), s_i = −f_i′(0), and a sample S,

    f̂(η) = mean_S f_i(η) + β·η·(mean_S s_i − s),   β by least squares of f_i(η) on −η·s_i over S.
"""

import math
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from sharpkern.search.line_search import LineSearch, SearchMemory, SearchResult

# Fewer functions are all evaluated; "auto" begins with this share, within two bounds; what cannot grow, with more.
FEWEST = 12
_SHARE, _LEAST, _MOST, _LEAST_FIXED = 1 / 8, 4, 6, 8
# One standard error of log η_c is typically this much times √(1/m − 1/M), which counts as so many members of a sample.
_TYPICAL, _PRIOR_SIZE = 0.12, 8
# A sample grows at most by this factor at a time, to more than is wanted by this one, and not at all where that saves
# less than this share of what all the others cost.
_AT_A_TIME, _AMPLE, _SAVING = 2, 1.1, 0.1
# All are evaluated where the members were last, if the crossing is so near in log units.
_NEAR = 0.1
# Prior of β: 1, with this standard deviation; and the range that it is taken to.
_PRIOR, _MOST_BETA = 0.5, 2.5
# The slopes are taken from probes at these shares of the first step size.
_LOW, _HIGH = 0.03, 0.3
# Exponents of the crossing lie between these; w = 1 + f/(s·η) goes up to this, and counts in log units from the other.
_EXPONENTS = (0.02, 20.0)
_MOST_W, _LEAST_W = 1e3, 0.5
# Largest tolerance of the search on a sample; log units are cut here.
_FINEST, _WIDEST = 0.03, 5.0
# A smaller exponent says that the functions bend before their slopes are seen, so that these tell little.
_BENT = 0.3
# Most evaluations of all functions after the sample has told where; the share of a step that is left unsure, all of it
# where the exponent is a remembered one; and what is unsure where there was no step.
_MOST_NEWTON, _UNSURE, _EXACT = 6, 0.2, 1e-3
# Slopes of a sample that are so many standard errors off are not those of the mean.
_IMPOSSIBLE = 4.0
# Where the sample's slope is off by this share, or is but this share of the given one, it says too little.
_FAR = 0.3

# Functions to evaluate, and where.
Question = tuple[tuple[int, ...], float]


@dataclass(frozen=True)
class SampledResult:
    """What a sample says of the mean.

    Attributes:
        found: of the mean; its error holds for the mean, and its probes are of the estimate f̂.
        base_loss: the mean at 0.
        size: functions that decided; all of them where a sample was not enough.
        beta: of the control variate, 1 where all decided.
        excess: by how many standard errors the sample's slope exceeds the given one; None where it was not seen.
    """

    found: SearchResult
    base_loss: float
    size: int
    beta: float
    excess: float | None = None


class OtherSlopeError(ValueError):
    """The functions are steeper than the slope that was given for their mean."""


class _Estimate(NamedTuple):
    """f̂ at one step size, its standard error, and β."""

    value: float
    error: float = 0.0
    beta: float = 1.0


def first_size(num: int, sample: float | str, rtol: float, num_groups: int = 1) -> int:
    """How many functions are evaluated at first, the same number of each group: all of them where a part saves nothing.

    Args:
        num: how many there are.
        sample: "auto", a share of them, or their number.
        rtol: relative error to reach.
        num_groups: of equal size.
    """
    if sample == "auto":
        size = min(max(_LEAST, _SHARE * num), _MOST)
    elif isinstance(sample, int):
        size = sample
    else:
        size = max(_LEAST_FIXED, float(sample) * num)
    size = num_groups * max(1, round(size / num_groups))
    return num if num < FEWEST or 3 * size >= 2 * num else size


class SampledSearch:
    """Searches for the first crossing of Σ wᵢLᵢ; whoever evaluates drives the generator `ask`.

    Args:
        slope: of the mean, −d/dη at 0.
        groups: numbers of the functions, in groups of equal size that are sampled alike.
        size: of the first sample, from `first_size`.
        base: L_i(0), for strata; or None.
        weights: wᵢ, equal by default.
        may_grow: take a larger sample, or all, where that is needed for ``rtol``.
        rtol: relative error to reach.
        noise: relative standard error of one value.
        norm_sq: as of `LineSearch`.
        initial_lr: as of `LineSearch`.
        memory: as of `LineSearch`.
        max_forwards: most evaluations, all functions counting as one.
        draw: seeds which functions are drawn.

    Attributes:
        members: the functions drawn so far.
    """

    def __init__(
        self,
        slope: float,
        groups: Sequence[Sequence[int]],
        size: int,
        *,
        base: Sequence[float] | None = None,
        weights: Sequence[float] | None = None,
        may_grow: bool = True,
        rtol: float = 0.05,
        noise: float = 2e-7,
        norm_sq: float | None = None,
        initial_lr: float | None = None,
        memory: SearchMemory | None = None,
        max_forwards: int = 40,
        draw: object = 0,
    ) -> None:
        self._slope, self._groups, self._base = slope, groups, base
        self._num = sum(map(len, groups))
        self._weights = _shares(weights or [1.0] * self._num)
        self._may_grow, self._rtol, self._noise = may_grow, rtol, noise
        self._known: dict[str, Any] = {
            "slope": slope,
            "norm_sq": norm_sq,
            "initial_lr": initial_lr,
            "noise": noise,
        }
        self._memory, self._max_forwards = memory, max_forwards
        self._random = random.Random(f"sharpkern {draw}")
        self._values: dict[float, dict[int, float]] = {0.0: {}}
        self._low = self._high = 0.0
        self.members: list[int] = []
        self._grow(size)

    def trust_base(self, *, is_exact: bool) -> None:
        """Take the base losses that were given for L_i(0), which then need not be evaluated; or for something else."""
        if not is_exact:
            self._base = None
        elif self._base is not None:
            self._values[0.0] = dict(enumerate(self._base)) | self._values[0.0]

    def ask(self) -> Generator[Question, list[float], SampledResult]:
        """Yield (functions, step size), be sent their values there, and return the result."""
        yield from self._evaluate(0.0)
        values = self._values[0.0] if self._base is None else dict(enumerate(self._base))
        self._base_loss = self._mean(values, range(self._num) if len(values) == self._num else self.members)
        search = self._search(min(self._rtol / 3, _FINEST))
        if not search.ask() or self._has_all or not (yield from self._evaluate_slopes(search.ask()[0])):
            return (yield from self._by_all())
        excess = self._excess()
        if excess > _IMPOSSIBLE:
            # Where it is less, the functions may have bent before the first probe.
            raise OtherSlopeError(f"the slope is {excess:.1f} standard errors below that of the sample")
        if excess < -_IMPOSSIBLE and self._slope_share() < _FAR:
            # The functions bend before they are seen, or the slope is that of a sum of them.
            return (yield from self._by_all(excess))
        found = yield from self._drive(search)
        if found.status != "converged":
            return (yield from self._by_all(excess))
        eta, doubt, probes = found.critical_lr, found.error, list(found.probes)
        near = sorted({e for e, _ in probes}, key=lambda e: abs(math.log(e / eta)))[:2]
        nearest, exponent, is_seen = near[0], _clipped(found.exponent or 1.0), len(near) > 1
        if is_seen:
            exponent = _clipped((self._psi(near[0]) - self._psi(near[1])) / math.log(near[0] / near[1]))
        while True:
            size, estimate = len(self.members), self._estimate(nearest)
            is_bent = exponent < _BENT and not self._has_all
            is_far = self._may_grow and not self._has_all and abs(self._slope_share() - 1) > _FAR
            half = (1 + is_bent) * _student(size - 2) * estimate.error / (self._slope * nearest * exponent)
            error = math.expm1(min(math.hypot(half, math.log1p(doubt)), _WIDEST))
            if (error <= self._rtol and not is_bent and not is_far) or not self._may_grow or self._has_all:
                found = _moved(found, eta, error, exponent, probes)
                return SampledResult(found, self._base_loss, size, estimate.beta, excess)
            wanted = self._wanted(half / _student(size - 2), doubt)
            # Two probes of each new member, or one of all that are left.
            saves = 2 * (wanted - size) < (1 - _SAVING) * (self._num - size)
            grows = saves and not is_bent and not is_far
            self._grow(min(wanted, _AT_A_TIME * size) if grows else self._num)
            if self._has_all:
                nearest = nearest if abs(math.log(eta / nearest)) < _NEAR else eta
            else:
                self._high = nearest if nearest > 3 * self._low else self._high
                yield from self._evaluate(self._low)
                yield from self._evaluate(self._high)
            eta, exponent, doubt, visited = yield from self._newton(nearest, exponent, is_seen=is_seen)
            nearest, is_seen = visited[-1], is_seen or len(visited) > 1
            probes += [(e, self._base_loss + self._estimate(e).value) for e in visited]

    @property
    def _has_all(self) -> bool:
        return len(self.members) == self._num

    def _search(self, rtol: float) -> LineSearch:
        spent = sum(map(len, self._values.values()))
        left = (self._max_forwards * self._num - spent) // len(self.members)
        most = max(1, min(left, self._max_forwards))
        return LineSearch(self._base_loss, **self._known, memory=self._memory, rtol=rtol, max_evaluations=most)

    def _drive(self, search: LineSearch) -> Generator[Question, list[float], SearchResult]:
        while step_sizes := search.ask():
            (eta,) = step_sizes
            yield from self._evaluate(eta)
            search.tell([self._base_loss + self._estimate(eta).value])
        return search.result()

    def _evaluate(self, eta: float) -> Generator[Question, list[float], None]:
        """Have the members evaluated at a step size, and at 0, where they have not been."""
        for place in dict.fromkeys((0.0, eta)):
            known = self._values.setdefault(place, {})
            missing = tuple(i for i in self.members if i not in known)
            if missing:
                known.update(zip(missing, (yield missing, place), strict=True))

    def _changes(self, eta: float) -> list[float]:
        """f_i(η) of the members; what is not finite counts as a rise without end."""
        base, values = self._values[0.0], self._values[eta]
        changes = [values[i] - base[i] for i in self.members]
        return [change if math.isfinite(change) else math.inf for change in changes]

    def _mean(self, values: dict[int, float], members: Sequence[int]) -> float:
        total = math.fsum(self._weights[i] for i in members)
        return sum(self._weights[i] * values[i] for i in members) / total

    def _evaluate_slopes(self, first: float) -> Generator[Question, list[float], bool]:
        """Have evaluated what the members' slopes are taken from; return whether they can be."""
        if self._slope <= 0:
            return False
        unit, least = abs(self._base_loss) / self._slope, 10 * self._noise
        self._low = min(max(_LOW * first, least * unit), _HIGH * first, max(0.003, least) * unit)
        self._high = first if first * self._slope < _HIGH * abs(self._base_loss) else 3 * self._low
        yield from self._evaluate(self._low)
        yield from self._evaluate(self._high)
        low = self._changes(self._low)
        return all(map(math.isfinite, low)) and any((*low, *self._changes(self._high)))

    def _slope_share(self) -> float:
        """The members' slope in that of all."""
        return -_dot(self._member_shares(), self._falls(1.0)) / self._slope

    def _excess(self) -> float:
        """By how many standard errors the members' slopes exceed the given one."""
        shares, falls, size = self._member_shares(), self._falls(1.0), len(self.members)
        mean = _dot(shares, falls)
        variance = _dot(shares, [(fall - mean) ** 2 for fall in falls]) / (size - 1) * (1 - size / self._num)
        # Of a few, the standard error itself is unsure.
        error = math.sqrt(variance) * (1 + 8 / (size - 1) ** 2)
        return (-mean - self._slope) / max(error, 1e-3 * self._slope)

    def _falls(self, eta: float) -> list[float]:
        """−η·s_i of the members, the parabola being taken away by the second probe."""
        low, high = self._low, self._high
        falls = []
        for a, b in zip(self._changes(low), self._changes(high), strict=True):
            bend = (b / high - a / low) * low / (high - low) if math.isfinite(b) else 0.0
            falls.append(eta * (a / low - bend))
        return falls

    def _estimate(self, eta: float) -> _Estimate:
        """f̂ at a step size."""
        shares, changes = self._member_shares(), self._changes(eta)
        mean, size = _dot(shares, changes), len(self.members)
        if self._has_all or not math.isfinite(mean):
            return _Estimate(mean)
        falls = self._falls(eta)
        middle = _dot(shares, falls)
        off = middle + eta * self._slope
        x, y = [fall - middle for fall in falls], [change - mean for change in changes]
        spread = max(_dot(shares, [a * a for a in x]), 1e-300)
        beta = _dot(shares, [a * b for a, b in zip(x, y, strict=True)]) / spread
        rest = [(b - beta * a) ** 2 for a, b in zip(x, y, strict=True)]
        variance = max(_dot(shares, rest) / spread / max(size - 3, 0.5), 1e-12)
        beta = 1 + (beta - 1) * _PRIOR**2 / (_PRIOR**2 + variance)
        beta = min(max(beta, 0.0), _MOST_BETA)
        rest = [(b - beta * a) * share * size for a, b, share in zip(x, y, shares, strict=True)]
        scatter = sum(r * r for r in rest) / max(size - 2, 1) / size + off**2 / (1 / _PRIOR**2 + 1 / variance)
        return _Estimate(mean - beta * off, math.sqrt(scatter * (1 - size / self._num)), beta)

    def _psi(self, eta: float) -> float:
        """Log of w = 1 + f̂/(s·η), which is 0 at the crossing and nearly straight over log η; far below, w is that."""
        w = 1 + self._estimate(eta).value / (self._slope * eta)
        return math.log(min(max(w, _LEAST_W), _MOST_W)) + max(min(w / _LEAST_W - 1, 0.0), -2 * _WIDEST)

    def _member_shares(self) -> list[float]:
        return _shares([self._weights[i] for i in self.members])

    def _grow(self, size: int) -> None:
        """Draw more members, to this many: one from each stratum of the base losses, or of the order where none is."""
        each = max((size - len(self.members)) // len(self._groups), 1)
        for group in self._groups:
            left = [i for i in group if i not in self.members]
            if self._base is not None:
                left.sort(key=self._base.__getitem__)
            num = min(each, len(left))
            bounds = [len(left) * k // num for k in range(num + 1)]
            self.members += [left[self._random.randrange(start, end)] for start, end in pairwise(bounds)]

    def _by_all(self, excess: float | None = None) -> Generator[Question, list[float], SampledResult]:
        """Search on all functions."""
        self._grow(self._num)
        yield from self._evaluate(0.0)
        self._base_loss = self._mean(self._values[0.0], self.members)
        found = yield from self._drive(self._search(self._rtol))
        return SampledResult(found, self._base_loss, self._num, 1.0, excess)

    def _wanted(self, error: float, doubt: float) -> int:
        """How many members make an error small enough, by the standard error that these have and that is typical."""
        size = len(self.members)
        seen_sq = error**2 / (1 / size - 1 / self._num)
        factor_sq = (_PRIOR_SIZE * _TYPICAL**2 + (size - 2) * seen_sq) / (_PRIOR_SIZE + size - 2)
        room_sq = max(self._rtol**2 - doubt**2, self._rtol**2 / 4)
        return max(size + 2, math.ceil(_AMPLE / (room_sq / (4 * factor_sq) + 1 / self._num)))

    def _newton(
        self, eta: float, exponent: float, *, is_seen: bool
    ) -> Generator[Question, list[float], tuple[float, float, float, list[float]]]:
        """Newton's method in log w on the members: the crossing, its exponent, what is left of doubt, and the way."""
        visited: list[float] = []
        psis: list[float] = []
        doubt, enough = math.inf, self._rtol if self._has_all else self._rtol / 2
        while doubt > enough and len(visited) < _MOST_NEWTON:
            yield from self._evaluate(eta)
            visited.append(eta)
            psis.append(self._psi(eta))
            if len(visited) > 1 and abs(way := math.log(visited[-1] / visited[-2])) > _EXACT:
                exponent, is_seen = _clipped((psis[-1] - psis[-2]) / way), True
            step = min(max(-psis[-1] / exponent, -1.0), 1.0)
            eta *= math.exp(step)
            unsure = (_UNSURE if is_seen else 1.0) * abs(step) * (1 + 1.2 * max(math.log(exponent), 0.0))
            doubt = math.expm1(min(unsure + _EXACT, _WIDEST))
        return eta, exponent, doubt, visited


def _moved(
    found: SearchResult, eta: float, error: float, exponent: float, probes: Sequence[tuple[float, float]]
) -> SearchResult:
    """The result for all functions, whose crossing lies within the error, and not in the bracket of an estimate."""
    return replace(
        found,
        critical_lr=eta,
        sharpness=2 / eta,
        error=error,
        bracket=(eta / (1 + error), eta * (1 + error)),
        exponent=exponent,
        probes=tuple(probes),
        evaluations=len(probes),
        memory=replace(found.memory, eta=eta),
    )


def _shares(weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _clipped(exponent: float) -> float:
    return min(max(exponent, _EXPONENTS[0]), _EXPONENTS[1])


def _student(dof: int) -> float:
    """The 97.5 % quantile of Student's t."""
    if dof <= 2:
        return 12.706 if dof < 2 else 4.303
    z: float = 1.959964
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + math.fsum(term / dof**k for k, term in enumerate(terms, 1))
