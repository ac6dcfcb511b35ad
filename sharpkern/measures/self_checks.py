"""KnownFacts that turn a silent wrong number into an error: repeatable losses, an independent evaluation, the slope."""

import math
from collections.abc import Callable, Sequence

import torch

from sharpkern.engines.evidence import LEAST_CERTAIN_RATIO
from sharpkern.engines.known import KnownFacts
from sharpkern.engines.session import Engine
from sharpkern.errors import EngineUnsupportedError, UncheckedWarning, warn
from sharpkern.search.line_search import SearchResult

# The loss falls by less than this share of what the gradient says: another batch, or another scale.
_LEAST_RATIO = 0.8
# The same where curvature may have bent the loss already, at the smallest step that stands out of the noise.
_LEAST_BENT_RATIO = 0.2
# At four times a small step a loss changes four times as much: off by this share of what it lacks, it is noise.
_SCATTER = 0.2
# With dropout the gradient is of other masks than the probes, and its slope is only near theirs; a loss scale is far.
_LEAST_RANDOM_RATIO = 0.02
# Share of the displacement below which rounding of the weights hides the slope, and above which it plays no part.
_LEAST_RETAINED, _ALL = 0.9, 0.999
# A fall of so many standard errors of one loss stands out of the noise; it is wrong by at most so many of its own.
_RESOLVED, _CERTAIN = 20, 4
# A slope that grows by at most this share of itself at a smaller step is nearly that at 0.
_STRAIGHT = 0.1
# Relative standard error of losses that tell slopes to a few hundredths, and by how much larger than the smallest step
# that stands out of the noise those steps are.
_EXACT, _FINE = 1e-5, 20.0
# Two engines differ by at most this share of the effect of a step, and so many times the noise; an effect is compared
# from so many times the noise on. In 16 bits they round other tensors, and differ by more than one of them scatters.
_IN_FULL, _IN_16_BITS = (0.02, 20, 50), (0.1, 60, 100)


def check_repeatable(first: float, second: float, noise: float) -> None:
    """Refuse a closure that gives another loss at the same parameters."""
    if abs(first - second) > max(1e-5, 20 * noise) * max(abs(first), abs(second)):
        raise ValueError(
            f"loss_fn must return the same loss whenever it is called, got {first} and then {second} at the same "
            "parameters; fetch the batch once, outside of the closure"
        )


def confirm(
    engine: Engine,
    checks: KnownFacts,
    base: float,
    probes: Sequence[tuple[float, float]],
    noise: float,
    reach: float = math.inf,
) -> None:
    """Compare an engine that does not write θ with the storage oracle, if due, where a probe shows the largest effect.

    Where no probe stands out of the noise, that is left to the next measurement.
    """
    floor = noise * abs(base)
    share, slack, least = _IN_16_BITS if noise > _EXACT else _IN_FULL
    effects = {(eta, loss): abs(loss - base) for eta, loss in probes if math.isfinite(loss)}
    near = {probe: effect for probe, effect in effects.items() if probe[0] <= reach}
    if near and max(near.values()) >= least * floor:
        effects = near
    if not effects or engine.writes or engine.name in checks.agrees | checks.unchecked:
        return
    (eta, loss), effect = max(effects.items(), key=lambda item: item[1])
    if effect < least * floor:
        return
    try:
        oracle = engine.oracle_loss(eta)
    except torch.OutOfMemoryError:
        # It takes a formed copy of the largest parameter, and all logits of a language model.
        warn(
            f"the independent check of the {engine.name} engine does not fit into memory and is left out for this "
            "model; measure it once with fewer tokens to have it made",
            UncheckedWarning,
        )
        checks.unchecked.add(engine.name)
        return
    if abs(oracle - loss) > share * effect + slack * floor:
        raise EngineUnsupportedError(
            f"at the step size {eta:.3g} the {engine.name} engine's loss is {loss}, "
            f"an independent evaluation gives {oracle}"
        )
    checks.agrees.add(engine.name)


def check_slope(
    engine: Engine,
    base: float,
    slope: float,
    result: SearchResult,
    noise: float,
    *,
    kept: Callable[[float], float],
    random: bool,
    spare_forwards: int,
) -> tuple[float | None, str | None]:
    """Look whether the loss falls along the direction as fast as the gradient says."""
    upper = result.critical_lr if result.status == "converged" else min((eta for eta, _ in result.probes), default=0.0)
    if result.status not in ("converged", "ascent") or upper <= 0:
        return None, None
    resolved = _RESOLVED * noise * abs(base) / slope
    small = [(eta, loss) for eta, loss in result.probes if resolved <= eta <= 0.1 * upper and math.isfinite(loss)]
    finite = [(eta, loss) for eta, loss in result.probes if math.isfinite(loss)]
    if small or (result.status == "ascent" and finite):
        eta, loss = min(small or finite)
    elif resolved <= 0.1 * upper:
        eta = max(resolved, 0.02 * upper)
        loss = engine.losses([eta])[0]
    else:
        return None, None
    ratio = (base - loss) / (eta * slope)
    least = _LEAST_RANDOM_RATIO if random else _LEAST_RATIO
    enough = least if random or noise > _EXACT else LEAST_CERTAIN_RATIO
    certain = ratio if ratio >= enough else math.inf
    closer = False
    while ratio < enough <= certain and eta / 10 > resolved and spare_forwards > 1:
        # Then a smaller step agrees with the slope: early in training the loss may bend at a ten thousandth of η_c.
        before, larger = ratio, eta
        # No closer than noise lets see small differences, as long as that is close enough.
        eta = max(_FINE * resolved if _FINE * resolved < eta / 10 else resolved, eta / 100)
        ratio = (base - engine.losses([eta])[0]) / (eta * slope)
        spare_forwards -= 1
        closer = True
        # What still bends may go on bending, a little as the root of the step, and every loss has its noise.
        bent = max(0.0, ratio - before)
        straight = bent <= _STRAIGHT * abs(ratio)
        most = ratio + bent / (math.sqrt(larger / eta) - 1) + _CERTAIN * math.sqrt(2) / _RESOLVED * resolved / eta
        certain = most if straight else math.inf
    if certain >= least and (not closer or eta / 10 > resolved):
        least = min(least, _LEAST_BENT_RATIO)
    share = kept(eta)
    if share < _LEAST_RETAINED:
        # Of the slope another part may be lost than of the displacement.
        least = min(least, _LEAST_BENT_RATIO)
    warning = None
    if ratio < least * share and spare_forwards > 0 and _is_noise(engine, base, eta, ratio, slope):
        return None, None
    if ratio < least * share:
        warning = (
            f"the loss falls by {ratio * slope:.3g} per unit step along the direction, its gradient says {slope:.3g}: "
            "loss_fn must evaluate the batch that the gradient is of, and the gradient must be unscaled; a loop that "
            "prefetches holds the next batch already"
        )
    unsure = random or noise > _EXACT or share < _ALL or certain == math.inf
    return None if unsure else certain, warning


def _is_noise(engine: Engine, base: float, eta: float, ratio: float, slope: float) -> bool:
    """Whether what the loss lacks at a small step is no more than noise there, or rounding that leaves the weights.

    Near interpolation a loss is made of the rounding of outputs, which no dtype tells.
    """
    (further,) = engine.losses([4 * eta])
    off = (base - further) / (4 * eta * slope) - ratio
    return not abs(off) <= _SCATTER * abs(1 - ratio)
