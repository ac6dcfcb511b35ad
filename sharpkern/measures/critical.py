"""Critical sharpness: how far along the optimizer's own update the loss starts to rise, by forward passes only."""

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor, nn

from sharpkern.directions.direction import Direction
from sharpkern.distributed.declared import Ranks
from sharpkern.distributed.ranks import Peers
from sharpkern.distributed.sharding import whole
from sharpkern.engines.session import Engine, Session, in_session
from sharpkern.engines.timing import EngineTimes, may_batch
from sharpkern.engines.tracked import TrackedParam
from sharpkern.engines.virtual.engine import VirtualEngine
from sharpkern.measures.micro_batches import Clip, Losses, Several, Step
from sharpkern.measures.result import Measurement, Options
from sharpkern.measures.run import ENOUGH_FORWARDS, ConstantLossError, Run, finish
from sharpkern.measures.sampled import by_sample
from sharpkern.search.line_search import SearchMemory, SearchResult


def critical_sharpness(
    model: nn.Module,
    loss_fn: Several,
    direction: Direction,
    *,
    initial_lr: float | None = None,
    rtol: float | None = None,
    method: str = "auto",
    engine: str = "auto",
    base_loss: Losses = None,
    certify: bool = False,
    noise: float | None = None,
    max_forwards: int = 40,
    reduce: Callable[[Tensor], Tensor] | None = None,
    ranks: Ranks | str | None = None,
    sample: float | str | None = None,
    weights: Sequence[float] | None = None,
    clip: Clip = None,
) -> Measurement:
    """Measure λ_c = 2/η_c, η_c being the smallest η with L(θ − ηΔθ) > L(θ).

    Nothing of the run changes: parameters, gradients, optimizer state, buffers, flags and random streams are bit for
    bit what they were, also when ``loss_fn`` raises. Every evaluation starts from the random state at entry, so that
    dropout masks are equal.

    Args:
        model: evaluated by ``loss_fn``; its parameters are recognised by identity.
        loss_fn: takes no argument and returns the scalar loss of the model's current parameters, of the batch that the
            gradient is of. Called unchanged, several times; it has to give the same loss each time. Or a sequence of
            such closures, or of (closure, weight): the micro-batches of one step, of this rank.
        direction: Δθ, parameter change per unit learning rate.
        initial_lr: first guess of η_c; the optimizer's learning rate by default.
        rtol: relative error of η_c to reach, in (0, 1); 0.01 by default, 0.05 with ``sample``.
        method: "auto", or "bisection" (doubling and bisection to 1/16, the published search).
        engine: "auto"; "virtual" computes with θ − ηΔθ without ever writing θ; "batched" the same for up to 8 step
            sizes in one call of ``loss_fn``, which pays for small models and few tokens on a GPU; "inplace" lets the
            parameters hold θ − ηΔθ: plain ones on a CPU in other memory during a pass, for all others θ is written and
            restored. An engine that is named is used or raises. "auto" begins with the virtual one, which for up to 512
            MiB of plain parameters on a CPU takes other memory during a pass too, and warns when it has to leave it.
        base_loss: L(θ), if it is known already, each rank's own: the loss that was trained. It is compared with what
            ``loss_fn`` returns in the first three calls for a model and closure and every twentieth, and used in its
            place in the others, which saves one evaluation. Where ``loss_fn`` draws random numbers (dropout), or 16-bit
            arithmetic makes it differ from what the engine computes in float32, it is compared and never used. Of
            micro-batches a sequence: what each closure returns.
        certify: evaluate further until a fall and a rise beyond the noise enclose η_c, within 2.5·rtol of each other,
            or, where noise hides all signs in so narrow a bracket, within a ratio of 1.5; ``error`` then covers all of
            it. A bracket that stays open is "unresolved". A rise further down that no evaluation came near, or that
            the noise exceeds, is not seen.
        noise: relative standard error of one loss; by default from the precision seen in the pass. Losses at step sizes
            beside the result show whether it is more: one evaluation, up to five where it is.
        max_forwards: most evaluations of ``loss_fn``, the base loss included.
        reduce: applied to the loss tensor before it is read, such as an all-reduce; every rank then decides alike. By
            default the mean over the ranks of a `DistributedDataParallel` model or of the mesh of DTensor parameters
            (FSDP2, tensor parallelism), or over all ranks where they are found to hold the same weights and update at
            the first measurement, by one more evaluation; ranks then also fail alike, where one of them fails.
        ranks: a `sharpkern.Ranks`, which says who decides together and what splits the model, for pipelines, layers
            that are split by hand and ranks that nothing tells of; or "alone": this rank by itself, whatever others do.
        sample: of the micro-batches of all ranks, which ones are evaluated. None: all. "auto": as many as ``rtol``
            needs. A share, or a number of them: these alone, and ``error`` says how exact that is. Drawn anew in each
            measurement, not from the run's random streams. Where it would save nothing (less than 12 micro-batches), or
            might mislead, all are evaluated; a `SampleWarning` tells why.
        weights: of the micro-batches in the gradient, such as numbers of tokens, relative to all ranks'; equal by
            default.
        clip: what clipping multiplied the gradient by, or (its norm before, max_norm): a sample needs it.

    Returns:
        Measurement: with ``sharpness`` in 1/learning-rate, and a ``status`` that says whether there is one.

    Raises:
        EngineUnsupportedError: the virtual or batched engine was named and cannot evaluate this model or closure.
        RankError: the measurement failed on another rank.
        TypeError: an argument is of the wrong kind, or ``loss_fn`` does not return a floating-point tensor.
        ValueError: an argument is out of range, the direction moves none of the model's parameters, or ``loss_fn`` is
            not repeatable or does not depend on the parameters; on several ranks, they hold different directions or
            parts of a model.

    Memory: virtual: the largest weight matrix and the buffers, or by "auto" up to 512 MiB for a copy of plain
    parameters on a CPU; batched: 8 times the activations besides; inplace: a copy of the parameters that move.

    Determinism: as deterministic as ``loss_fn``.

    Source: Kalra et al. 2026, arXiv 2601.16979.

    Examples:
        >>> import torch, sharpkern
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(16, 3), torch.randn(16, 1)
        >>> loss_fn = lambda: torch.nn.functional.mse_loss(model(x), y)
        >>> loss_fn().backward()
        >>> m = sharpkern.critical_sharpness(model, loss_fn, sharpkern.Direction.from_optimizer(optimizer))
        >>> m.status, abs(m.sharpness - 2 / m.critical_lr) < 1e-12
        ('converged', True)
    """
    options = Options(initial_lr, rtol, method, engine, certify, noise, max_forwards, reduce, ranks, sample)
    measurement, _ = measure(model, loss_fn, direction, options, base_loss=base_loss, weights=weights, clip=clip)
    return measurement


def measure(
    model: nn.Module,
    loss_fn: Several,
    direction: Direction,
    options: Options,
    *,
    base_loss: Losses = None,
    trained_loss: Losses = None,
    memory: SearchMemory | None = None,
    pace: EngineTimes | None = None,
    weights: Sequence[float] | None = None,
    clip: Clip = None,
    draw: int | None = None,
) -> tuple[Measurement, SearchMemory]:
    """`critical_sharpness` with a warm start, and what a sample is drawn by."""
    started = time.perf_counter()
    name, given = ("base_loss", base_loss) if trained_loss is None else ("loss", trained_loss)
    check_arguments(model, direction)
    step = step_of(model, loss_fn, direction, options, weights=weights, losses=given, clip=clip, name=name)
    known_base = _as_number(name, step.loss(given))

    def measured(session: Session) -> tuple[Run, SearchResult]:
        step.settle(session)
        target = session.target(step.closure)
        left = common(memory, session.ranks)
        # The same on all ranks.
        (number,) = session.ranks.means([target.checks.num_measurements if draw is None else draw])

        def search(engine: Engine) -> tuple[Run, SearchResult]:
            run = Run(session, target, engine, options, must_agree=base_loss is not None)
            result = finish(run, run.search(left))
            if pace is not None and isinstance(engine, VirtualEngine):
                pace.note(engine.name, engine.work, engine.seconds)
            return run, result

        if found := by_sample(session, target, options, step, left, number):
            return found
        quickest = "virtual" if pace is None or not _may_batch(session.pairs, options) else pace.engine()
        return session.run(target, search, engine=options.engine, quickest=quickest)

    try:
        run, result = in_session(
            measured,
            model,
            direction,
            step.loss_fns,
            reduce=options.reduce,
            ranks=options.ranks,
            base_loss=known_base,
            plan=options.plan,
        )
    except ConstantLossError as constant:
        if pace is None:
            raise
        run, result = constant.run, constant.result
    return run.measurement(result, time.perf_counter() - started), result.memory


def common(memory: SearchMemory | None, ranks: Peers) -> SearchMemory | None:
    """What the last search left, unless a rank has searched by itself since: all have to begin alike."""
    own = [number or 0.0 for number in (memory or SearchMemory()).to_dict().values()]
    unlike = [not math.isclose(*pair, rel_tol=1e-12) for pair in zip(own, ranks.means(own), strict=True)]
    return None if any(ranks.any_of(unlike)) else memory


def _may_batch(pairs: Sequence[TrackedParam], options: Options) -> bool:
    """Whether several step sizes at a time may be quicker, and the choice is nobody else's."""
    searches = options.method == "auto" and options.max_forwards >= ENOUGH_FORWARDS
    return searches and options.reduce is None and may_batch(pairs)


def check_arguments(model: object, direction: object) -> None:
    """Refuse arguments of the wrong kind; `Step.of` does closures."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; pass the model that loss_fn evaluates"
        )
    if not isinstance(direction, Direction):
        raise TypeError(
            f"direction must be a sharpkern.Direction, got {type(direction).__name__}; make one by "
            "Direction.from_optimizer(optimizer)"
        )


def step_of(
    model: nn.Module,
    loss_fn: Several,
    direction: Direction,
    options: Options,
    *,
    weights: Sequence[float] | None,
    clip: Clip,
    losses: Losses = None,
    name: str = "base_loss",
) -> Step:
    """The closures, checked, and whether a sample of them can tell of all."""
    clip = direction._clip if clip is None else clip
    step = Step.of(loss_fn, weights, losses, clip, name, sample=options.sample)
    if options.sample is not None and direction.bind(model).slope is None:
        raise ValueError(
            "direction must know its slope for a sample, got one that no gradient belongs to; make it by "
            "Direction.from_optimizer(optimizer), or leave sample out"
        )
    return step


def _as_number(name: str, loss: object) -> float | None:
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return float(whole(loss.detach()))
    if loss is not None and (isinstance(loss, bool) or not isinstance(loss, (int, float, np.number))):
        raise TypeError(f"{name} must be a number, got {loss!r}; leave it out to have it evaluated")
    return None if loss is None else float(loss)
