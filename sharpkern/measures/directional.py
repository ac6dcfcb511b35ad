"""Directional sharpness λ_dir = ΔθᵀHΔθ / Δθᵀg: the curvature along the update, from a few losses or one exact product.

With f(η) = L(θ − ηΔθ), λ_dir = −f″(0)/f′(0). Central differences at ±h give both derivatives from the same two losses,
so a gradient that was clipped or scaled does not matter.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sharpkern.directions.direction import Direction
from sharpkern.distributed.declared import Ranks, check_ranks
from sharpkern.engines.retained import retained_share
from sharpkern.engines.session import Engine, Session, Target, in_session
from sharpkern.engines.settling import size_of
from sharpkern.errors import RetainedWarning, warn
from sharpkern.measures.critical import check_arguments
from sharpkern.measures.hvp import GradientGraph, check_differentiable, check_symmetry, no_reducers, refuse_shards
from sharpkern.measures.micro_batches import Several, Step
from sharpkern.measures.run import RETAINED_FLOOR
from sharpkern.measures.self_checks import confirm, looked_at_twice
from sharpkern.ops.reductions import inner_product, total
from sharpkern.search.finite_differences import Estimate, at_step, three_point

_METHODS = ("forward", "gradient", "hvp")
# At ±h the slope differs from that at 0 by a share within these, or another h is tried, that aims at the share between;
# so many pairs of gradients at most. An error above a third leaves nothing of the value.
_CHANGES, _CHANGE, _GRADIENT_PAIRS, _UNRESOLVED = (0.001, 0.1), 0.02, 3, 1 / 3
# Errors of an inner product of exact products, in units of the rounding seen in them.
_ROUNDINGS = 5


class DirectionalSharpness(float):
    """λ_dir, a number in 1/learning-rate, and how it was measured; ``float(value)`` is the number alone.

    Attributes:
        error: relative uncertainty, nan where the value is. Of "forward" the truncation and rounding of the difference,
            and what rounding of the weights left out; of "hvp" rounding alone.
        step_size: the h of the difference, or the last one tried where the value is nan; None for "hvp".
        forwards: losses evaluated, all of them: base loss, differences and checks; for "gradient" each with a backward
            pass.

    Examples:
        >>> import copy
        >>> value = DirectionalSharpness(6.0, error=0.01, step_size=0.1, forwards=5)
        >>> f"{value:.2f}", value + 1, copy.copy(value).error
        ('6.00', 7.0, 0.01)
    """

    error: float
    step_size: float | None
    forwards: int

    def __new__(
        cls, value: float, error: float = math.nan, step_size: float | None = None, forwards: int = 0
    ) -> "DirectionalSharpness":
        """Return ``value`` with what is known of it."""
        self = super().__new__(cls, value)
        self.error, self.step_size, self.forwards = error, step_size, forwards
        return self


def directional_sharpness(
    model: nn.Module,
    loss_fn: Several,
    direction: Direction,
    *,
    method: str = "forward",
    step_size: float | None = None,
    ranks: Ranks | str | None = None,
    weights: Sequence[float] | None = None,
) -> DirectionalSharpness:
    """Measure the curvature of the loss along an update direction, without touching the run.

    Args:
        model: Evaluated by ``loss_fn``. Under `DistributedDataParallel` the loss is the mean over the ranks.
        loss_fn: Returns the scalar loss of the model's current parameters, the same in every call. Or a sequence of
            closures, or of (closure, weight): the micro-batches of one step, each evaluated in every pass.
        direction: Δθ, parameter change per unit learning rate.
        method: "forward": loss differences, usually 5 to 9 forward passes and at most 23, plus 2 checks in the first
            call. "gradient": the difference of two gradients along Δθ, each one forward and one backward pass, plus 2
            checks in the first call, and up to 4 more where the first step is much too long or too short. "hvp": exact,
            one forward pass and three backward passes, two of them through the graph of the first; not for models with
            fused kernels.
        step_size: h of the points ±h, a learning rate, for "forward" and "gradient"; by default one at which truncation
            and rounding balance. For "forward" two more losses, at ±h/2, tell the error, or four where they are coarse.
        ranks: as for `critical_sharpness`; of ranks that split the model, for "forward" alone.
        weights: of the micro-batches, as for `critical_sharpness`.

    Returns:
        λ_dir in 1/learning-rate: negative where the curvature is, nan where the loss does not resolve it
        (``method="forward"``: |f″| within three standard errors) or has no slope or is not finite. It is a float with
        its relative uncertainty in ``error``, which in float32 training runs covers the truth at nine points of ten or
        more.

    Raises:
        TypeError: If ``loss_fn`` returns no tensor, or ``step_size`` is no number.
        ValueError: If ``method`` is unknown, ``step_size`` is not positive and finite or given for "hvp", the direction
            is not the model's, or the closure is not repeatable.
        RuntimeError: If ``method="hvp"`` and the loss cannot be differentiated twice. Where that cannot be told of an
            operator, because its gradient is not torch's own, a warning says so.

    Memory: "forward": as `critical_sharpness`; "gradient": that, a backward pass and the gradients; "hvp": the graph of
        a forward and a backward pass and three copies of the parameters.
    Determinism: as deterministic as ``loss_fn``.
    Source: Kalra et al. 2026, arXiv 2601.16979, for the quantity.

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> loss_fn = lambda: 3 * model.weight.square().sum()
        >>> loss_fn().backward()
        >>> round(directional_sharpness(model, loss_fn, Direction.from_gradients(model), method="hvp"), 4)
        6.0
    """
    if method not in _METHODS:
        raise ValueError(
            f"method must be one of 'forward', 'gradient', 'hvp', got {method!r}; leave it out for 'forward'"
        )
    _check_step_size(step_size, method)
    check_ranks(ranks)
    step = Step.of(loss_fn, weights)
    check_arguments(model, direction)
    if method == "hvp":
        return _by_product(model, step, direction, ranks)
    if method == "gradient":
        return _by_gradients(model, step, direction, step_size, ranks)
    return _by_differences(model, step, direction, step_size, ranks)


def _check_step_size(step_size: object, method: str) -> None:
    """Refuse a step that is none, or has no place."""
    if step_size is None:
        return
    if isinstance(step_size, bool) or not hasattr(step_size, "__float__"):
        raise TypeError(
            f"step_size must be a number, positive and finite, got {step_size!r}; leave it out for the best"
        )
    if not 0 < float(step_size) < torch.finfo(torch.float32).max:
        raise ValueError(f"step_size must be positive and finite, got {step_size}; leave it out for the best")
    if method == "hvp":
        raise ValueError(f"step_size must be left out with method='hvp', which takes no step, got {step_size}")


def _by_product(model: nn.Module, step: Step, direction: Direction, ranks: Ranks | str | None) -> DirectionalSharpness:
    """Return ΔθᵀHΔθ / Δθᵀg by an exact Hessian-vector product, slope and curvature from one graph."""
    generator = torch.Generator().manual_seed(0)

    def measured(session: Session) -> DirectionalSharpness:
        step.settle(session)
        direction = session.direction
        for parameter in direction.parameters:
            # A frozen parameter moves too if the direction says so.
            parameter.requires_grad_()
        graph = GradientGraph(session, step.closure, direction.parameters)
        forwards = 1 if session.settled_by is None else 2
        delta = direction.tensors
        curved = graph.product(delta)
        if not math.isfinite(graph.loss):
            return DirectionalSharpness(math.nan, forwards=forwards)
        others = [torch.randn(t.shape, generator=generator).to(t) for t in delta]
        length, size = math.sqrt(_dot(curved, curved)), math.sqrt(direction.norm_sq)
        other = graph.product(others)
        # Where there is no curvature along Δθ both are rounding, of products as large as the other's; where there is
        # none along that one either, of what cancels in them, which is as large as the loss.
        reach = 100 * math.sqrt(_dot(other, other)) + abs(graph.loss) * math.sqrt(_dot(others, others))
        rounding = graph.rounding * size * reach
        check_symmetry(forth=_dot(others, curved), back=_dot(delta, other), scale=length + rounding)
        graph.tell_unchecked()
        slope, curvature = _dot(delta, graph.gradient), _dot(delta, curved)
        if not slope:
            return DirectionalSharpness(math.nan, forwards=forwards)
        # What cancels in the inner products enlarges the share of rounding.
        shares = size * length / abs(curvature) + size * graph.length / abs(slope) if curvature else math.inf
        return DirectionalSharpness(curvature / slope, _ROUNDINGS * graph.rounding * shares, forwards=forwards)

    return in_session(measured, model, direction, step.loss_fns, ranks=ranks, grad=True, plan=())


def _by_gradients(
    model: nn.Module,
    step: Step,
    direction: Direction,
    step_size: float | None,
    ranks: Ranks | str | None,
) -> DirectionalSharpness:
    """Return λ_dir from the slopes of the loss at ±h, each from one gradient."""

    def measured(session: Session) -> DirectionalSharpness:
        step.settle(session)
        direction = session.direction
        parameters = [pair.parameter for pair in session.pairs]
        refuse_shards(session, parameters)
        deltas = [pair.move.update() for pair in session.pairs]
        lengths = [0.0]

        def slope_fn() -> Tensor:
            with torch._C.DisableTorchFunction():
                for parameter in parameters:
                    # A frozen parameter moves too if the direction says so.
                    parameter.requires_grad_()
            with no_reducers(session.outer):
                loss = check_differentiable(step.closure())
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            lengths[0] = math.sqrt(_dot(gradients, gradients))
            sums = [inner_product(g, d) for g, d in zip(gradients, deltas, strict=True)]
            # A loss without a value has no slope.
            return torch.stack(sums).sum() + 0 * loss.detach()

        target = session.target(slope_fn)

        def measure(engine: Engine) -> DirectionalSharpness:
            h, change = step_size or 0.05 * (direction.lr or 0.0) or small_step(session), math.nan
            for _ in range(1 if step_size else _GRADIENT_PAIRS):
                if not math.isnan(change):
                    h *= min(max(_CHANGE / change if change else math.inf, 1e-3), 1e3)
                ahead, behind = engine.losses([h, -h])
                slope, curvature = (ahead + behind) / 2, (behind - ahead) / (2 * h)
                change = h * abs(curvature / slope) if slope else math.nan
                if math.isnan(change) or _CHANGES[0] <= change <= _CHANGES[1]:
                    break
            if math.isnan(change):
                return DirectionalSharpness(math.nan, step_size=h, forwards=target.closure.calls)
            roundoff = target.closure.precision.unit_roundoff or max(torch.finfo(p.dtype).eps for p in parameters)
            rounding = roundoff * lengths[0] * math.sqrt(direction.norm_sq) / abs(slope)
            if not target.checks.repeatable:
                ahead = looked_at_twice(ahead, lambda: engine.losses([h])[0], target, rounding)
            confirm(engine, target.checks, slope, [(h, ahead)], rounding)
            # Of the second derivative a central difference leaves out about the square of what the slope changes by.
            error = change**2 + (rounding / change if change else math.inf)
            error += abs(1 - retained_share(session.pairs, engine.rounded, h, direction.norm_sq, session.ranks))
            value = (behind - ahead) / (h * (behind + ahead)) if error < _UNRESOLVED else math.nan
            return DirectionalSharpness(value, error, step_size=h, forwards=target.closure.calls)

        return session.run(target, measure)

    return in_session(measured, model, direction, step.loss_fns, ranks=ranks, grad=True, plan=(step_size, "gradient"))


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return the inner product, accumulated in float64."""
    return total(inner_product(a.detach(), b.detach()) for a, b in zip(left, right, strict=True))


def _by_differences(
    model: nn.Module,
    step: Step,
    direction: Direction,
    step_size: float | None,
    ranks: Ranks | str | None,
) -> DirectionalSharpness:
    """Return λ_dir from losses at ±h."""

    def measured(session: Session) -> tuple[Estimate, float, int]:
        step.settle(session)
        target = session.target(step.closure)

        def measure(engine: Engine) -> tuple[Estimate, float]:
            estimate, last = _by_engine(engine, target, step_size, session)
            kept = retained_share(session.pairs, engine.rounded, last, session.direction.norm_sq, session.ranks)
            return estimate, kept

        return *session.run(target, measure), target.closure.calls

    estimate, kept, forwards = in_session(measured, model, direction, step.loss_fns, ranks=ranks, plan=(step_size,))
    if kept < RETAINED_FLOOR:
        warn(
            f"only {kept:.2f} of the displacement by ±{estimate.step:.2g}·Δθ survives rounding to the weights' "
            "dtype; pass the optimizer's float32 masters to Direction.from_optimizer(masters=...)",
            RetainedWarning,
        )
    # What the displacement lacks, the slope lacks once and the curvature twice.
    error = estimate.error + abs(1 - kept)
    return DirectionalSharpness(estimate.value, error, step_size=estimate.step, forwards=forwards)


def _by_engine(engine: Engine, target: Target, step_size: float | None, session: Session) -> tuple[Estimate, float]:
    """Return the estimate, checked for what this engine may get wrong, and the last step it evaluated."""
    checks, noise_of = target.checks, target.closure.noise
    (base,) = engine.losses([0.0])
    noise = noise_of()
    if not checks.repeatable and math.isfinite(base):
        base = looked_at_twice(base, lambda: engine.losses([0.0])[0], target, noise)
    probes: list[tuple[float, float]] = []

    def losses(step_sizes: Sequence[float]) -> list[float]:
        values = engine.losses(step_sizes)
        probes.extend(zip(step_sizes, values, strict=True))
        return values

    if step_size is None:
        estimate = three_point(losses, base, first_step=session.direction.lr or small_step(session), noise=noise)
    else:
        estimate = at_step(losses, base, step=float(step_size), noise=noise)
    confirm(engine, checks, base, probes, noise)
    return estimate, probes[-1][0]


def small_step(session: Session) -> float:
    """Return the step that moves the parameters by a thousandth of their norm."""
    theta_sq, *_ = size_of([(parameter, None) for parameter in session.direction.parameters], session.ranks)
    return 1e-3 * math.sqrt(theta_sq / session.direction.norm_sq) or 1e-3
