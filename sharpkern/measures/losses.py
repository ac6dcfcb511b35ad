"""The loss along a direction, at step sizes of the caller's choice."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sharpkern.directions.direction import Direction
from sharpkern.distributed.declared import Ranks
from sharpkern.engines.retained import retained_share
from sharpkern.engines.session import Engine, Session, Target, in_session
from sharpkern.engines.timing import may_batch
from sharpkern.errors import EngineUnsupportedError, NoUpdateError, RetainedWarning, warn
from sharpkern.measures.critical import check_arguments
from sharpkern.measures.directional import small_step
from sharpkern.measures.micro_batches import Several, Step
from sharpkern.measures.result import Options
from sharpkern.measures.run import RETAINED_FLOOR, constant_loss
from sharpkern.measures.self_checks import confirm, looked_at_twice


def losses_along(
    model: nn.Module,
    loss_fn: Several,
    direction: Direction,
    step_sizes: Sequence[float] | Tensor,
    *,
    engine: str = "auto",
    reduce: Callable[[Tensor], Tensor] | None = None,
    ranks: Ranks | str | None = None,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Return L(θ − ηΔθ) for every step size η: the loss curve along an update, without touching the run.

    Args:
        model: evaluated by ``loss_fn``.
        loss_fn: takes no argument and returns the scalar loss of the model's current parameters, the same in each call.
            Or a sequence of closures, or of (closure, weight): the micro-batches of one step, of which all are
            evaluated.
        direction: Δθ, parameter change per unit learning rate.
        step_sizes: η, learning rates, [K], in any order; 0 gives L(θ), a negative one a step uphill.
        engine: as for `critical_sharpness`. "batched" takes 8 step sizes in one call of ``loss_fn``, fewer where memory
            is short. "auto" begins with it on a GPU of a single process, and with one step size at a time elsewhere.
        reduce: as for `critical_sharpness`; without it the mean over the ranks that train one model.
        ranks: as for `critical_sharpness`.
        weights: of the micro-batches, as for `critical_sharpness`.

    Returns:
        Tensor: losses, [K] float64 on the CPU, in the order of ``step_sizes``; inf or nan where the loss is.

    Raises:
        EngineUnsupportedError: the virtual or batched engine was named and cannot evaluate this model or closure.
        NoUpdateError: the loss is the same at every step size, although the parameters move.
        RankError: the evaluation failed on another rank.
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range, or ``loss_fn`` is not repeatable.

    Memory: as `critical_sharpness`.

    Determinism: as deterministic as ``loss_fn``. Up to three further evaluations check the engine and the closure in
    the 1st, 2nd, 4th, 8th and so on measurement of a model.

    Source: Kalra et al. 2026, arXiv 2601.16979.

    Examples:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> loss_fn = lambda: model.weight.square().sum()
        >>> loss_fn().backward()
        >>> losses_along(model, loss_fn, Direction.from_gradients(model), [0.0, 0.5, 1.0])
        tensor([1., 0., 1.], dtype=torch.float64)
    """
    step = Step.of(loss_fn, weights)
    check_arguments(model, direction)
    options, etas = Options(engine=engine, reduce=reduce, ranks=ranks), _numbers(step_sizes)

    def measured(session: Session) -> tuple[list[float], float]:
        own = [float(len(etas)), sum(etas), sum(eta * eta for eta in etas)]
        unlike = [not math.isclose(*pair, rel_tol=1e-6) for pair in zip(own, session.ranks.means(own), strict=True)]
        if any(session.ranks.any_of(unlike)):
            raise ValueError(f"step_sizes must be the same on every rank, got {len(etas)} others here; pass the same")
        step.settle(session)
        target = session.target(step.closure)
        session.begin(target.checks)
        # Of another engine too, that takes the place of this one.
        is_known = target.checks.repeatable
        quickest = "batched" if len(etas) > 1 and may_batch(session.pairs) else "virtual"

        def evaluate(opened: Engine) -> tuple[list[float], float]:
            losses, constant = _by_engine(opened, target, etas, is_known=is_known)
            furthest = max(etas, key=abs)
            kept = retained_share(session.pairs, opened.rounded, -furthest, session.direction.norm_sq, session.ranks)
            # A step may well be too short to be seen.
            seen = kept >= RETAINED_FLOOR and abs(furthest) >= (session.direction.lr or small_step(session))
            if constant is not None and seen:
                # Perhaps the parameters are read where no mode can see it.
                raise (
                    NoUpdateError(constant) if opened.writes else EngineUnsupportedError("the losses are all the same")
                )
            return losses, kept

        return session.run(target, evaluate, engine=options.engine, quickest=quickest)

    plan = (etas, engine)
    losses, kept = in_session(measured, model, direction, step.loss_fns, reduce=reduce, ranks=ranks, plan=plan)
    if kept < RETAINED_FLOOR:
        warn(
            f"only {kept:.2f} of the longest displacement survives rounding to the weights' dtype; pass the "
            "optimizer's float32 masters to Direction.from_optimizer(masters=...)",
            RetainedWarning,
        )
    return torch.tensor(losses, dtype=torch.float64, device="cpu")


def _by_engine(
    engine: Engine, target: Target, etas: Sequence[float], *, is_known: bool
) -> tuple[list[float], str | None]:
    """Return the losses, checked for what this engine may get wrong where that is due, and what is wrong with all."""
    checks = target.checks
    if is_known and (engine.writes or engine.name in checks.agrees | checks.unchecked):
        losses = engine.losses(etas)
        return losses, constant_loss(losses[0], [(eta, loss) for eta, loss in zip(etas, losses, strict=True) if eta])
    base, *losses = engine.losses([0.0, *etas])
    if not math.isfinite(base):
        return losses, None
    noise = target.closure.noise()
    if not checks.repeatable:
        base = looked_at_twice(base, lambda: engine.losses([0.0])[0], target, noise)
    probes = [(eta, loss) for eta, loss in zip(etas, losses, strict=True) if eta]
    confirm(engine, checks, base, probes, noise)
    return losses, constant_loss(base, probes)


def _numbers(step_sizes: Any) -> list[float]:
    """Return step sizes as numbers, refused where they are none."""
    if isinstance(step_sizes, Tensor):
        step_sizes = step_sizes.detach().tolist()
    remedy = "pass a list such as [0.0, 0.1, 0.2], or a tensor [K]"
    if isinstance(step_sizes, (str, bytes)) or not isinstance(step_sizes, Iterable):
        raise TypeError(f"step_sizes must be numbers, got {type(step_sizes).__name__}; {remedy}")
    found = list(step_sizes)
    for eta in found:
        if isinstance(eta, (bool, str)) or not hasattr(eta, "__float__"):
            raise TypeError(f"step_sizes must be numbers, got {eta!r} among them; {remedy}")
    if not found:
        raise ValueError(f"step_sizes must hold at least one number, got none; {remedy}")
    numbers = [float(eta) for eta in found]
    for eta in numbers:
        if not abs(eta) < torch.finfo(torch.float32).max:
            raise ValueError(f"step_sizes must be finite learning rates, got {eta} among them; leave it out")
    return numbers
