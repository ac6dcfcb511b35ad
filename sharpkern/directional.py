"""Directional sharpness λ_dir = ΔθᵀHΔθ / Δθᵀg: the curvature along the update, from a few losses or one exact product.

With f(η) = L(θ − ηΔθ), λ_dir = −f″(0)/f′(0). Central differences at ±h give both derivatives from the same two losses,
so a gradient that was clipped or scaled does not matter. A second difference has two errors, which h balances:

- truncation, in the order of h²|λ|³ where f bends away from its parabola on the scale of the crossing;
- rounding of the losses by δ = noise·f: √6·δ/(h²|f′|).

They are equal at h⁴ = √6·δ/|f′λ³|, for a float32 loss a few hundredths of the critical learning rate. A second value at
h/2 shows what truncation really is: nothing beyond rounding, or a part in h² to extrapolate away, or h was too large.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sharpkern._hvp import GradientGraph, check_symmetry
from sharpkern.direction import Direction
from sharpkern.engines.checks import Checks, checks_of
from sharpkern.engines.choose import choose, fall_back, is_compiled, open_engine
from sharpkern.engines.closure import Closure, default_reduce
from sharpkern.engines.guards import preserved
from sharpkern.engines.precision import LossPrecision
from sharpkern.engines.retained import retained_share
from sharpkern.engines.table import make_pairs
from sharpkern.engines.verify import check_repeatable, confirm
from sharpkern.errors import RetainedWarning, warn
from sharpkern.reference import inner_product
from sharpkern.sums import total

_METHODS = ("forward", "hvp")
_MAX_ROUNDS = 10
_RETAINED_FLOOR = 0.9
# Standard deviation of a second difference of three losses, in units of one loss's.
_SECOND_DIFFERENCE = math.sqrt(6)


def directional_sharpness(
    model: nn.Module, loss_fn: Callable[[], Tensor], direction: Direction, *, method: str = "forward"
) -> float:
    """Measure the curvature of the loss along an update direction, without touching the run.

    Args:
        model: Evaluated by ``loss_fn``.
        loss_fn: Returns the scalar loss of the model's current parameters, the same in every call.
        direction: Δθ, parameter change per unit learning rate.
        method: "forward": loss differences, usually 5 to 9 forward passes and at most 21, plus 2 checks in the first
            call; error about 1 % (float32) or 0.01 % (float64). "hvp": exact, one forward pass and three backward
            passes, two of them through the graph of the first; not for models with fused kernels.

    Returns:
        λ_dir in 1/learning-rate: negative where the curvature is, nan where the loss does not resolve it
        (``method="forward"``: |f″| within three standard errors) or has no slope or is not finite.

    Raises:
        TypeError: If ``loss_fn`` returns no tensor.
        ValueError: If ``method`` is unknown, the direction is not the model's, or the closure is not repeatable.
        RuntimeError: If ``method="hvp"`` and the loss cannot be differentiated twice.

    Memory: "forward": the largest weight matrix; "hvp": the graph of a forward and a backward pass and three copies of
        the parameters.
    Determinism: as deterministic as ``loss_fn``.
    Source: Kalra et al. 2026, arXiv 2601.16979, for the quantity.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> loss_fn = lambda: 3 * model.weight.square().sum()
        >>> loss_fn().backward()
        >>> round(directional_sharpness(model, loss_fn, Direction.from_gradients(model), method="hvp"), 4)
        6.0
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of 'forward', 'hvp', got {method!r}; leave it out for 'forward'")
    direction = direction.bind(model)
    if method == "hvp":
        return _by_product(model, loss_fn, direction)
    checks = checks_of(model, loss_fn)

    def measure(name: str) -> float:
        return _by_differences(model, loss_fn, direction, name, checks)

    return fall_back(measure, choose("auto", model, loss_fn, checks), "auto", checks)


def _by_product(model: nn.Module, loss_fn: Callable[[], Tensor], direction: Direction) -> float:
    """Return ΔθᵀHΔθ / Δθᵀg by an exact Hessian-vector product, slope and curvature from one graph."""
    generator = torch.Generator().manual_seed(0)
    with preserved(model, direction.parameters, grad=True):
        for parameter in direction.parameters:
            # A frozen parameter moves too if the direction says so.
            parameter.requires_grad_()
        graph = GradientGraph(loss_fn, direction.parameters)
        curved = graph.product(direction.tensors)
        others = [torch.randn(t.shape, generator=generator).to(t) for t in direction.tensors]
        check_symmetry(
            forth=_dot(others, curved),
            back=_dot(direction.tensors, graph.product(others)),
            scale=math.sqrt(_dot(curved, curved)),
        )
        slope = _dot(direction.tensors, graph.gradient)
        return _dot(direction.tensors, curved) / slope if slope else math.nan


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return the inner product, accumulated in float64."""
    return total(inner_product(a.detach(), b.detach()) for a, b in zip(left, right, strict=True))


def _by_differences(
    model: nn.Module, loss_fn: Callable[[], Tensor], direction: Direction, name: str, checks: Checks
) -> float:
    """Return λ_dir from losses at ±h, evaluated by the named engine."""
    pairs = make_pairs(direction.moves())
    precision = LossPrecision()
    with preserved(model, direction.parameters) as guard:
        closure = Closure(loss_fn, guard, precision, default_reduce(model))
        with open_engine(name, pairs, closure, compiled=is_compiled(model, loss_fn)) as engine:
            (base,) = engine.losses([0.0])
            noise = precision.noise()
            if not checks.repeatable and math.isfinite(base):
                check_repeatable(base, engine.losses([0.0])[0], noise, given=False)
                checks.repeatable = True
            probes: list[tuple[float, float]] = []

            def losses(step_sizes: Sequence[float]) -> list[float]:
                values = engine.losses(step_sizes)
                probes.extend(zip(step_sizes, values, strict=True))
                return values

            value = _three_point(losses, base, first_step=direction.lr or _small_step(direction), noise=noise)
            confirm(engine, checks, base, probes, noise)
            kept = retained_share(pairs, engine.rounded, probes[-1][0])
    if kept < _RETAINED_FLOOR:
        warn(
            f"only {kept:.2f} of the displacement by ±{abs(probes[-1][0]):.2g}·Δθ survives rounding to the weights' "
            "dtype; pass the optimizer's float32 masters to Direction.from_optimizer(masters=...)",
            RetainedWarning,
        )
    return value


def _small_step(direction: Direction) -> float:
    """Return the step that moves the parameters by a thousandth of their norm."""
    return 1e-3 * math.sqrt(_dot(direction.parameters, direction.parameters) / direction.norm_sq) or 1e-3


def _three_point(
    losses: Callable[[Sequence[float]], list[float]], base: float, *, first_step: float, noise: float
) -> float:
    """Return −f″(0)/f′(0) from f(0) and pairs f(±h): at the h that seems best, and at half of it as a check."""
    step = first_step
    # Value and uncertainty at twice the step, once the step seems good.
    twice: tuple[float, float] | None = None
    for _ in range(_MAX_ROUNDS):
        ahead, behind = losses((step, -step))
        if not (math.isfinite(ahead) and math.isfinite(behind)):
            step, twice = step / 10, None
            continue
        delta = noise * max(abs(base), abs(ahead), abs(behind))
        slope = (behind - ahead) / (2 * step)
        if abs(slope) * step <= 10 * delta:
            if twice:
                break
            # Either the step is lost in rounding, or it is so large that only the parabola's rise is seen.
            step *= 1 / 30 if abs(ahead - 2 * base + behind) > 10 * delta else 100
            continue
        value = (ahead - 2 * base + behind) / step**2 / slope
        uncertainty = _SECOND_DIFFERENCE * delta / step**2 / abs(slope)
        if twice:
            truncation = (twice[0] - value) / 3
            if abs(truncation) <= uncertainty:
                # The two agree to within rounding, of which the larger step has less.
                return twice[0] if abs(twice[0]) > 3 * twice[1] else math.nan
            if abs(truncation) <= 0.1 * abs(value):
                return value - truncation
        else:
            # Where rounding hides the curvature its size is unknown, but no larger than the uncertainty.
            best = step * (uncertainty / step**2 / max(abs(value), uncertainty) ** 3) ** 0.25
            if not 0.5 <= best / step <= 2:
                step *= min(max(best / step, 1 / 30), 30)
                continue
        step, twice = step / 2, (value, uncertainty)
    return math.nan
