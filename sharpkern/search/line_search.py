"""The line search: the smallest step size at which a function of one number exceeds its value at zero.

`LineSearch` asks for step sizes and is told losses, so that whoever evaluates them, one at a time or several per pass,
stays in control; `find_critical_lr` drives it on a plain function. Nothing here knows about tensors.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

from sharpkern.search.acceptance import Outcome
from sharpkern.search.acceptance import Status as Status
from sharpkern.search.curve import Curve, Experience
from sharpkern.search.strategies import Steps, adaptive, bisection, first_grid

# The last critical learning rate predicts the next to within this factor; a ratio beyond is a change of scale.
_LARGEST_CORRECTION = 30.0
# At the crossing the slope alone would typically have taken this share off the loss.
_USUAL_FALL = 0.1
# A guess so many times too large is not improved but made anew.
_LOST = 1e6
# Step sizes beyond this, or below its inverse, are no measurement any more.
_LARGEST = 1e100
# First half-width of a grid of K step sizes around a cold guess, and around a warm one.
_WARM_WIDTH = math.log(2.0)
_WIDTHS = (math.log(1.25), math.log(5.0))
# One search may be deceived about the noise; so many are not.
_LOOKS = 2
# After so many searches it is known how far the first probe alone misjudges the way to the crossing ...
_ENOUGH = 2
# ... which is taken for this share before, follows about so many searches, one of which counts no more than so many
# times the others, is never less than this, and grows by this factor where one probe was enough.
_FIRST_MISS, _FOLLOWED, _OUTLIER, _LEAST_MISS, _FORGET = 0.5, 6.0, 2.0, 0.01, 1.05
# Weight of the last search in the exponent, which lies between these; a way so short tells none.
_FRESH = 0.6
_EXPONENTS = (0.1, 30.0)
_NO_WAY = 1e-3


@dataclass
class SearchMemory:
    """What one search leaves to the next; plain positive floats, or None where unknown, for a checkpoint.

    Attributes:
        eta: Last critical learning rate, or where it may be.
        exponent: Slope of ψ from the first probe to there.
        slope: Δθᵀg of that search.
        norm_sq: |Δθ|² of that search.
        half_width: Half-width of the next grid of step sizes, in log units.
        bound: Largest step tried where the last search found no rise.
        noise: Relative standard error of one loss, as last measured.
        base_loss: |f(0)| at that time.
        num_looks: Searches that have measured the noise.
        miss: Share of the way from the first probe to the crossing by which it misjudged that way, typically.
        num_misses: Searches that told so.
    """

    eta: float | None = None
    exponent: float | None = None
    slope: float | None = None
    norm_sq: float | None = None
    half_width: float | None = None
    bound: float | None = None
    noise: float | None = None
    base_loss: float | None = None
    num_looks: float | None = None
    miss: float | None = None
    num_misses: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """Return the fields as a dict of floats."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, float | None]) -> "SearchMemory":
        """Return the memory that `to_dict` wrote, or an empty one where no search can have left its numbers.

        Raises:
            ValueError: it holds something else.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping) or not set(values) <= set(names):
            raise ValueError(
                f"the memory of a search must be a dictionary with {', '.join(map(repr, names))}, got {values!r}; pass "
                "what to_dict() returned"
            )
        for name, value in values.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(
                    f"{name!r} of a search's memory must be a number or None, got {value!r}; pass what to_dict() "
                    "returned"
                )
        memory = cls(**values)
        return memory if memory.is_possible() else cls()

    def is_possible(self) -> bool:
        """Whether a search may have left this: a guess of nan would leave every search after it unresolved."""
        ranges = (
            (self.exponent, -_LARGEST, _LARGEST),
            (self.slope, -_LARGEST, _LARGEST),
            (self.half_width, 1e-3, 10.0),
            *((number, 1 / _LARGEST, _LARGEST) for number in (self.eta, self.norm_sq, self.bound)),
            *((number, 1 / _LARGEST, _LARGEST) for number in (self.noise, self.base_loss, self.num_looks)),
            *((number, 1 / _LARGEST, _LARGEST) for number in (self.miss, self.num_misses)),
        )
        return all(value is None or low <= value <= high for value, low, high in ranges)


@dataclass(frozen=True)
class SearchResult:
    """Outcome of a line search. A failure never looks like a result: its numbers are nan.

    Attributes:
        status: "converged"; "ascent" (the loss rises at once: critical_lr 0, sharpness inf); "unbounded" (no rise up to
            the largest step tried, which critical_lr then holds); "nonfinite" (the base loss is); "unresolved"
            (differences below the noise, or evaluations used up before the crossing was known).
        critical_lr: η_c, the smallest step size with f(η) > f(0).
        sharpness: λ_c = 2/η_c, in 1/learning-rate.
        bracket: Largest step known to lie before the first rise, and smallest known rise; 0 and inf where unknown.
        error: Relative uncertainty of critical_lr.
        exponent: Steepness of the crossing: slope of log(1 + (f(η) − f(0))/(slope·η)) against log η, 1 on a quadratic;
            small means ill-conditioned.
        probes: Pairs (η, loss) in the order evaluated, without the base loss.
        evaluations: Number of probes.
        passes: Number of times that losses were told.
        slope: −f′(0): the given one, an estimate from the probes where none was given, or None.
        directional_sharpness: ΔθᵀHΔθ/(Δθᵀg) where the probes resolve it, otherwise None.
        noise: Relative standard error of one loss, as given, or as measured where that is more; 0 if f(0) is.
        memory: For the next search.
    """

    status: Status
    critical_lr: float
    sharpness: float
    bracket: tuple[float, float]
    error: float
    exponent: float | None
    probes: tuple[tuple[float, float], ...]
    evaluations: int
    passes: int
    slope: float | None
    directional_sharpness: float | None
    noise: float
    memory: SearchMemory


class LineSearch:
    """Search for the first crossing f(η) > f(0), by asking for step sizes and being told losses.

    Args:
        base_loss: f(0).
        slope: −f′(0) = Δθᵀg if known. It speeds the search up; a wrong one costs evaluations, not accuracy. One that
            is not positive is taken for unknown: the losses decide whether the direction goes uphill.
        norm_sq: |Δθ|² if known; together with the slope it scales the last result to this direction.
        initial_lr: First guess where there is no memory, usually the learning rate in use. "auto" starts at
            0.1·f(0)/slope instead if that is larger: in a warm-up the learning rate says little about the crossing.
        memory: `SearchResult.memory` of the previous search. Once it tells how far one loss foretells the crossing, one
            may do, and no rise need be seen beyond a fall; the error then covers what was not seen.
        rtol: Relative error to reach, in (0, 1).
        method: "auto", or "bisection" (doubling or halving, then bisection to 1/16, for comparison).
        certify: Whether to evaluate further until a fall and a rise beyond the noise enclose the answer. "converged"
            then means a bracket closed to 2.5·rtol, or, where noise hides all signs in so narrow a one, to a ratio of
            1.5 at most; the error then covers all of it. A bracket that stays open is "unresolved". A rise further
            down that no probe came near, or that the noise exceeds, is not seen.
        noise: Relative standard error of one loss, as far as it is known. Before a result is returned one to three
            losses at neighbouring step sizes show whether it is more; the memory says so of the next searches, until
            the base loss has halved.
        max_evaluations: Most probes, the base loss not included.
        num_parallel: Step sizes asked for at a time.
        probes: Pairs (η, loss) that are known already, as those of a `warm_grid`.

    Raises:
        TypeError: If an argument is not of the named type.
        ValueError: If an argument is out of its range.

    Determinism: The same losses lead to the same step sizes.

    Source: Kalra et al. 2026, arXiv 2601.16979, for η_c and for "bisection".

    Examples:
        >>> search = LineSearch(1.0, slope=1.0, initial_lr=0.1)
        >>> while step_sizes := search.ask():
        ...     search.tell([1.0 - eta + eta**2 for eta in step_sizes])
        >>> round(search.result().critical_lr, 2)
        1.0
    """

    def __init__(
        self,
        base_loss: float,
        *,
        slope: float | None = None,
        norm_sq: float | None = None,
        initial_lr: float | None = None,
        memory: SearchMemory | None = None,
        rtol: float = 0.01,
        method: Literal["auto", "bisection"] = "auto",
        certify: bool = False,
        noise: float = 2e-7,
        max_evaluations: int = 39,
        num_parallel: int = 1,
        probes: Sequence[tuple[float, float]] = (),
    ) -> None:
        if method not in ("auto", "bisection"):
            raise ValueError(f"method must be 'auto' or 'bisection', got {method!r}; leave it out for 'auto'")
        if method == "bisection" and num_parallel != 1:
            raise ValueError(
                f"num_parallel must be 1 with method='bisection', got {num_parallel!r}; use method='auto' for more"
            )
        self._base_loss = _number("base_loss", base_loss, "pass the loss at step size 0")
        self._given_slope = None if slope is None else _finite("slope", slope, "leave it out if it is not known")
        self._norm_sq = None if norm_sq is None else _positive("norm_sq", norm_sq, "leave it out if it is not known")
        if initial_lr is not None:
            _positive("initial_lr", initial_lr, "leave it out for a guess from the loss and the slope")
        rtol = self._rtol = _fraction("rtol", rtol, "leave it out for 0.01")
        self._certify = certify
        noise = _fraction("noise", noise, "leave it out for 2e-7", zero=True)
        self._max_evaluations = _count("max_evaluations", max_evaluations, "leave it out for 39")
        self._num_parallel = _count("num_parallel", num_parallel, "leave it out for 1")
        self._before = _usable(memory)
        self._probes: list[tuple[float, float]] = []
        self._passes = 0
        self._pending: tuple[float, ...] = ()
        self._outcome: Outcome | None = None
        self._guess = self._first_guess(initial_lr, method)
        self._width = self._first_width()
        positive = self._given_slope if self._given_slope is not None and self._given_slope > 0 else None
        # One look far out, where all losses are rounded coarsely, tells nothing of losses elsewhere.
        known = self._known_noise() if (self._before.num_looks or 0) >= _LOOKS else None
        self._curve = Curve(
            self._base_loss,
            positive,
            self._guess,
            max(noise, known or 0.0),
            rtol,
            noise_is_known=known is not None,
            bound=self._before.bound,
            experience=self._experience(),
        )
        if not math.isfinite(self._base_loss):
            self._outcome = Outcome("nonfinite")
        else:
            self._steps = self._strategy(method, rtol, certify)
            if probes:
                self._take(probes)
            self._advance()

    @property
    def finished(self) -> bool:
        """Whether the result is known."""
        return self._outcome is not None

    def ask(self) -> tuple[float, ...]:
        """Return the step sizes to evaluate next, at most ``num_parallel``; none when finished."""
        return self._pending

    def tell(self, losses: Sequence[float]) -> None:
        """Take the losses at the step sizes asked for.

        Args:
            losses: One number per step size, in the same order. One that is not finite counts as a rise.

        Raises:
            ValueError: If their number differs from that of the step sizes, or nothing was asked for.
        """
        if len(losses) != len(self._pending) or not self._pending:
            raise ValueError(
                f"losses must hold one loss per step size asked for ({len(self._pending)}), got {len(losses)}; "
                "call ask() again to see them"
            )
        values = [_number("losses", loss, "pass floats, for example tensor.item()") for loss in losses]
        self._take(list(zip(self._pending, values, strict=True)))
        self._advance()

    def result(self) -> SearchResult:
        """Return the result.

        Raises:
            ValueError: If the search is not finished.
        """
        if self._outcome is None:
            raise ValueError("result() must wait for a finished search, got one that still asks; tell() it its losses")
        status, eta = self._outcome.status, self._outcome.eta
        if status == "ascent":
            eta, sharpness = 0.0, math.inf
        else:
            sharpness = 2.0 / eta
        found = status == "converged"
        return SearchResult(
            status=status,
            critical_lr=eta,
            sharpness=sharpness,
            bracket=self._curve.bracket(),
            error=self._outcome.error,
            exponent=self._outcome.exponent,
            probes=tuple(self._probes),
            evaluations=len(self._probes),
            passes=self._passes,
            slope=self._slope(),
            directional_sharpness=self._curve.directional_sharpness(eta) if found else None,
            noise=self._curve.noise_level / abs(self._base_loss) if self._base_loss else 0.0,
            memory=self._memory(),
        )

    def _take(self, probes: Sequence[tuple[float, float]]) -> None:
        """Enter the losses of one pass."""
        for eta, loss in probes:
            self._probes.append((eta, loss))
            self._curve.add(eta, loss)
        self._passes += 1

    def _advance(self) -> None:
        """Resume the strategy for its next step sizes, or take its outcome; never ask for more than is left."""
        left = self._max_evaluations - len(self._probes)
        try:
            self._pending = next(self._steps)[:left]
        except StopIteration as stop:
            self._pending, self._outcome = (), stop.value
            return
        if not self._pending or not all(1 / _LARGEST < eta < _LARGEST for eta in self._pending):
            self._pending, self._outcome = (), self._given_up()

    def _given_up(self) -> Outcome:
        """Return what is known where evaluations are used up: a fall and a rise may be close, if no noise made them."""
        lo, hi = self._curve.bracket()
        # Noise is never infinite.
        quiet = self._curve.noise_is_known or any(probe == (hi, math.inf) for probe in self._curve.probes)
        if self._certify or not quiet or not 0 < lo < hi <= lo * (1 + 2 * self._rtol):
            return Outcome("unresolved")
        return Outcome("converged", math.sqrt(lo * hi), hi / lo - 1)

    def _strategy(self, method: str, rtol: float, certify: bool) -> Steps:
        """Return the generator that chooses step sizes."""
        if method == "bisection":
            return bisection(self._curve)
        return adaptive(self._curve, rtol, certify, self._num_parallel, self._width)

    def _experience(self) -> Experience:
        """Return what the searches before this one tell about this one."""
        before = self._before
        exponent, is_warm = _clipped(before.exponent or 1.0), before.exponent is not None
        # Several at a time lie far apart, and on both sides anyway.
        if (before.num_misses or 0.0) < _ENOUGH or self._num_parallel > 1:
            return Experience(exponent, is_warm=is_warm)
        return Experience(exponent, before.miss or 1.0, is_learned=True, is_warm=is_warm)

    def _first_guess(self, initial_lr: float | None, method: str) -> float:
        """Return the last crossing, scaled to this direction, or a first guess."""
        slope = self._given_slope
        if self._before.eta is not None:
            guess = _scaled(self._before, slope, self._norm_sq)
        else:
            usual = 0.0
            if slope is not None and slope > 0 and method == "auto" and math.isfinite(self._base_loss):
                usual = _USUAL_FALL * abs(self._base_loss) / slope
            guess = max(float(initial_lr or 0.0), usual) or 1.0
        return min(max(guess, 10 / _LARGEST), _LARGEST / 10)

    def _first_width(self) -> float:
        """Return the half-width of the first grid: that of the memory, or wide enough for a cold guess."""
        if self._before.half_width is not None:
            return self._before.half_width
        if self._before.eta is not None:
            return _WARM_WIDTH
        # About 0.7 log units between neighbours, up to two decades to either side.
        return min(0.35 * max(self._num_parallel, 4), math.log(100.0))

    def _slope(self) -> float | None:
        return self._given_slope if self._given_slope is not None else self._curve.slope()

    def _known_noise(self) -> float | None:
        """Return the noise that the memory holds, unless the base loss has halved since."""
        before, base = self._before, abs(self._base_loss)
        if before.noise is None or before.base_loss is None or base < before.base_loss / 2:
            return None
        return before.noise

    def _memory(self) -> SearchMemory:
        """Return what the next search may use of this one."""
        assert self._outcome is not None
        curve, status = self._curve, self._outcome.status
        if status == "nonfinite":
            return self._before
        before = self._with_noise()
        lo, hi = curve.bracket()
        place = math.sqrt(lo * hi) or hi
        if status == "converged":
            place = self._outcome.eta
        elif status != "unresolved":
            return replace(before, bound=curve.probes[-1].eta if hi == math.inf else None)
        elif not self._guess / _LOST < place < math.inf:
            # A guess that led nowhere is not made again.
            return replace(before, eta=None, bound=curve.probes[-1].eta if hi == math.inf else None)
        slope = self._slope()
        return replace(
            self._with_experience(before, place),
            eta=place,
            slope=slope if slope is not None and slope > 0 else None,
            norm_sq=self._norm_sq,
            half_width=min(max(0.7 * self._width + 0.9 * abs(math.log(place / self._guess)), _WIDTHS[0]), _WIDTHS[1]),
            bound=None,
        )

    def _with_experience(self, before: SearchMemory, place: float) -> SearchMemory:
        """Return the memory with what this search tells of the way from its first probe to the crossing."""
        assert self._outcome is not None
        exponent, experience = self._outcome.exponent, self._curve.experience
        slope, (eta, loss) = self._given_slope or 0.0, self._probes[0]
        if self._outcome.status != "converged" or slope <= 0:
            return before
        if exponent is None:
            # Nobody looked: it is known a little less well.
            return replace(before, miss=min(_FORGET * before.miss, 1.0)) if before.miss is not None else before
        if before.exponent is None or self._num_parallel > 1:
            return replace(before, exponent=exponent) if self._curve.trusts_slope() else before
        way, w = math.log(place / eta), 1.0 + (loss - self._base_loss) / (slope * eta)
        if not 0 < w < math.inf or w == 1.0 or abs(way) < _NO_WAY:
            return before
        psi, last = math.log(w), before.miss or _FIRST_MISS
        # One search that went astray must not make all others doubtful.
        miss = min(abs(way + psi / experience.exponent) / abs(psi / experience.exponent), 1.0, _OUTLIER * last)
        num = min((before.num_misses or 0.0) + 1.0, _FOLLOWED)
        return replace(
            before,
            exponent=experience.exponent ** (1 - _FRESH) * _clipped(-psi / way) ** _FRESH,
            miss=max(math.sqrt(last**2 + (miss**2 - last**2) / (num + 1.0)), _LEAST_MISS),
            num_misses=num,
        )

    def _with_noise(self) -> SearchMemory:
        """Return the last memory with what is known of the noise now."""
        curve, before, base = self._curve, self._before, abs(self._base_loss)
        if not (curve.noise_is_known and base):
            return before
        looks = before.num_looks or 0
        if looks >= _LOOKS and self._known_noise() is not None:
            return before
        return replace(before, noise=curve.noise_level / base, base_loss=base, num_looks=min(looks + 1, _LOOKS))


def _clipped(exponent: float) -> float:
    """Return the exponent, or the nearest one that a search can go by."""
    return min(max(exponent, _EXPONENTS[0]), _EXPONENTS[1])


def _scaled(before: SearchMemory, slope: float | None, norm_sq: float | None) -> float:
    """Return the last crossing, scaled to another direction."""
    assert before.eta is not None
    # Half-way, in log units, between curvature that stays per unit step and curvature that stays per unit length.
    ratio = 1.0
    if slope is not None and slope > 0 and before.slope is not None and before.slope > 0:
        ratio *= slope / before.slope
    if norm_sq is not None and before.norm_sq is not None:
        ratio *= before.norm_sq / norm_sq
    return before.eta * min(max(math.sqrt(ratio), 1 / _LARGEST_CORRECTION), _LARGEST_CORRECTION)


def warm_grid(
    memory: SearchMemory | None, *, slope: float | None = None, norm_sq: float | None = None, num: int
) -> tuple[float, ...]:
    """Return step sizes to evaluate together with f(0): the first ones of a search that takes several at a time.

    Args:
        memory: From the previous search.
        slope: As in `LineSearch`.
        norm_sq: As in `LineSearch`.
        num: How many.

    Returns:
        ``num`` step sizes, ascending; none where the previous search tells nothing.
    """
    before = _usable(memory)
    if before.eta is None:
        return ()
    return first_grid(_scaled(before, slope, norm_sq), before.half_width or _WARM_WIDTH, num)


def _usable(memory: SearchMemory | None) -> SearchMemory:
    """Return the memory, or an empty one where no search can have left it."""
    return memory if memory is not None and memory.is_possible() else SearchMemory()


def find_critical_lr(
    f: Callable[[float], float],
    *,
    base_loss: float | None = None,
    slope: float | None = None,
    norm_sq: float | None = None,
    initial_lr: float | None = None,
    memory: SearchMemory | None = None,
    rtol: float = 0.01,
    method: Literal["auto", "bisection"] = "auto",
    certify: bool = False,
    noise: float = 2e-7,
    max_evaluations: int = 39,
    num_parallel: int = 1,
) -> SearchResult:
    """Return the smallest η > 0 with f(η) > f(0), for a plain function.

    Args:
        f: Loss as a function of the step size.
        base_loss: f(0); evaluated if left out.
        slope: As in `LineSearch`, like all that follow.
        norm_sq: |Δθ|².
        initial_lr: First guess.
        memory: From the previous search.
        rtol: Relative error to reach.
        method: "auto" or "bisection".
        certify: Whether to close the bracket, as far as noise allows.
        noise: Relative standard error of one loss.
        max_evaluations: Most evaluations of f, f(0) not included.
        num_parallel: Step sizes chosen at a time.

    Returns:
        The result.

    Raises:
        TypeError: If an argument is not of the named type.
        ValueError: If an argument is out of its range.

    Examples:
        >>> result = find_critical_lr(lambda eta: 3.0 - 2.0 * eta + 0.5 * eta**2)
        >>> result.status, round(result.critical_lr, 1), round(result.sharpness, 2)
        ('converged', 4.0, 0.5)
    """
    search = LineSearch(
        f(0.0) if base_loss is None else base_loss,
        slope=slope,
        norm_sq=norm_sq,
        initial_lr=initial_lr,
        memory=memory,
        rtol=rtol,
        method=method,
        certify=certify,
        noise=noise,
        max_evaluations=max_evaluations,
        num_parallel=num_parallel,
    )
    while step_sizes := search.ask():
        search.tell([f(eta) for eta in step_sizes])
    return search.result()


def _number(name: str, value: float, remedy: str) -> float:
    """Return the value as a float; nan and inf are allowed."""
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}; {remedy}")
    return float(value)


def _finite(name: str, value: float, remedy: str) -> float:
    number = _number(name, value, remedy)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number:g}; {remedy}")
    return number


def _positive(name: str, value: float, remedy: str) -> float:
    number = _finite(name, value, remedy)
    if number <= 0:
        raise ValueError(f"{name} must be positive, got {number:g}; {remedy}")
    return number


def _fraction(name: str, value: float, remedy: str, zero: bool = False) -> float:
    number = _number(name, value, remedy)
    if not (0 < number < 1 or (zero and number == 0)):
        raise ValueError(f"{name} must be a number in {'[' if zero else '('}0, 1), got {number:g}; {remedy}")
    return number


def _count(name: str, value: int, remedy: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}; {remedy}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}; {remedy}")
    return value
