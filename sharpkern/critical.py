"""Critical sharpness: how far along the optimizer's own update the loss starts to rise, by forward passes only."""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sharpkern import ops
from sharpkern.direction import Direction
from sharpkern.engines.batched import NUM_PARALLEL
from sharpkern.engines.checks import Checks, checks_of
from sharpkern.engines.choose import Engine, choose, fall_back, is_compiled, open_engine
from sharpkern.engines.closure import Closure, default_reduce
from sharpkern.engines.guards import preserved
from sharpkern.engines.pace import Pace
from sharpkern.engines.precision import LossPrecision, is_low
from sharpkern.engines.retained import retained_share
from sharpkern.engines.table import Pair, make_pairs
from sharpkern.engines.verify import check_repeatable, check_slope, confirm
from sharpkern.engines.virtual import VirtualEngine
from sharpkern.errors import EngineUnsupportedError, LossPrecisionWarning, RetainedWarning, warn
from sharpkern.measurement import Measurement, Options
from sharpkern.search import LineSearch, SearchMemory, SearchResult, warm_grid

_RETAINED_FLOOR = 0.9
# Relative difference of two losses that are the same but for float32 roundings.
_SAME_LOSS = 2e-6


def critical_sharpness(
    model: nn.Module,
    loss_fn: Callable[[], Tensor],
    direction: Direction,
    *,
    initial_lr: float | None = None,
    rtol: float = 0.01,
    method: str = "auto",
    engine: str = "auto",
    base_loss: float | Tensor | None = None,
    certify: bool = False,
    noise: float | None = None,
    max_forwards: int = 40,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Measurement:
    """Measure λ_c = 2/η_c, η_c being the smallest η with L(θ − ηΔθ) > L(θ).

    Nothing of the run changes: parameters, gradients, optimizer state, buffers, flags and random streams are bit for
    bit what they were, also when ``loss_fn`` raises. Every evaluation starts from the random state at entry, so that
    dropout masks are equal.

    Args:
        model: evaluated by ``loss_fn``; its parameters are recognised by identity.
        loss_fn: takes no argument and returns the scalar loss of the model's current parameters, of the batch that the
            gradient is of. Called unchanged, several times; it has to give the same loss each time.
        direction: Δθ, parameter change per unit learning rate.
        initial_lr: first guess of η_c; the optimizer's learning rate by default.
        rtol: relative error of η_c to reach, in (0, 1).
        method: "auto", or "bisection" (doubling and bisection to 1/16, the published search).
        engine: "auto"; "virtual" computes with θ − ηΔθ without ever writing θ; "batched" the same for up to 8 step
            sizes in one call of ``loss_fn``, which pays for small models and few tokens on a GPU; "inplace" writes and
            restores θ. An engine that is named is used or raises; "auto" begins with the virtual one, and warns when it
            has to leave it.
        base_loss: L(θ), if it is known already; saves one evaluation, except where 16-bit arithmetic makes it differ
            from what the engine, which computes losses in float32, compares the other losses with.
        certify: evaluate further until a fall and a rise beyond the noise enclose η_c, within 2.5·rtol of each other,
            or, where noise hides all signs in so narrow a bracket, within a ratio of 1.5; ``error`` then covers all of
            it. A bracket that stays open is "unresolved". A rise further down that no evaluation came near, or that
            the noise exceeds, is not seen.
        noise: relative standard error of one loss; by default from the precision seen in the pass.
        max_forwards: most evaluations of ``loss_fn``, the base loss included.
        reduce: applied to the loss tensor before it is read, such as an all-reduce; every rank then decides alike. By
            default the mean over the process group of a `DistributedDataParallel` model, otherwise nothing.

    Returns:
        Measurement: with ``sharpness`` in 1/learning-rate, and a ``status`` that says whether there is one.

    Raises:
        EngineUnsupportedError: the virtual or batched engine was named and cannot evaluate this model or closure.
        TypeError: an argument is of the wrong kind, or ``loss_fn`` does not return a floating-point tensor.
        ValueError: an argument is out of range, the direction moves none of the model's parameters, or ``loss_fn`` is
            not repeatable or does not depend on the parameters.

    Memory: virtual: the largest weight matrix and the buffers; batched: 8 times the activations besides; inplace: a
    copy of the parameters that move.

    Determinism: as deterministic as ``loss_fn``.

    Source: Kalra et al. 2026, arXiv 2601.16979.

    Example:
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
    options = Options(initial_lr, rtol, method, engine, certify, noise, max_forwards, reduce)
    measurement, _ = measure(model, loss_fn, direction, options, base_loss=base_loss)
    return measurement


def measure(
    model: nn.Module,
    loss_fn: Callable[[], Tensor],
    direction: Direction,
    options: Options,
    *,
    base_loss: float | Tensor | None = None,
    memory: SearchMemory | None = None,
    pace: Pace | None = None,
) -> tuple[Measurement, SearchMemory]:
    """`critical_sharpness` with a warm start.

    Args:
        model: as there.
        loss_fn: as there.
        direction: as there.
        options: as there.
        base_loss: as there.
        memory: what the last search left.
        pace: what passes took in the loop that this is a measurement of; engine="auto" then takes the quicker one.

    Returns:
        tuple: the measurement, and what to hand to the next one.

    Raises:
        EngineUnsupportedError: as there.
        TypeError: as there.
        ValueError: as there.
    """
    started = time.perf_counter()
    _check_arguments(model, loss_fn, direction)
    known_base = None if base_loss is None else _as_number(base_loss)
    direction = direction.bind(model)
    pairs = make_pairs(direction.moves())
    checks = checks_of(model, loss_fn)
    compiled = is_compiled(model, loss_fn)
    reduce = options.reduce or default_reduce(model)
    quickest = "virtual" if pace is None or not _may_batch(pairs, options, reduce) else pace.engine()
    name = choose(options.engine, model, loss_fn, checks, quickest)
    with preserved(model, direction.parameters) as guard:
        closure = Closure(loss_fn, guard, LossPrecision(), reduce)

        def search(engine_name: str) -> tuple[_Run, SearchResult]:
            with open_engine(engine_name, pairs, closure, compiled=compiled) as engine:
                run = _Run(engine, closure, direction, pairs, options, checks, known_base)
                result = run.search(memory)
                if pace is not None and isinstance(engine, VirtualEngine):
                    pace.note(engine.name, engine.work, engine.seconds)
                return run, result

        run, result = fall_back(search, name, options.engine, checks)
    checks.num_measurements += 1
    return run.measurement(result, time.perf_counter() - started), result.memory


class _Run:
    """One measurement by one engine."""

    def __init__(
        self,
        engine: Engine,
        closure: Closure,
        direction: Direction,
        pairs: Sequence[Pair],
        options: Options,
        checks: Checks,
        known_base: float | None,
    ) -> None:
        self._engine = engine
        self._closure = closure
        self._direction = direction
        self._pairs = pairs
        self._options = options
        self._checks = checks
        self._known_base = known_base
        self._retained = math.nan

    def search(self, memory: SearchMemory | None) -> SearchResult:
        """Base loss, line search, and the checks that are due."""
        engine, options, slope = self._engine, self._options, self._direction.slope
        num_parallel = NUM_PARALLEL if engine.name == "batched" and options.method == "auto" else 1
        first: list[tuple[float, float]] = []
        if self._known_base is not None:
            self._base = self._known_base
        else:
            step_sizes: tuple[float, ...] = ()
            if num_parallel > 1 and self._spare_forwards() >= num_parallel:
                step_sizes = warm_grid(memory, slope=slope, norm_sq=self._direction.norm_sq, num=num_parallel - 1)
            self._base, *losses = engine.losses([0.0, *step_sizes])
            first = list(zip(step_sizes, losses, strict=True))
        given = self._known_base is not None
        # A loss with dropout that is handed in is of other masks, each time anew.
        known = self._checks.base_agrees if given else self._checks.repeatable
        if not known and self._spare_forwards() > 2 and math.isfinite(self._base):
            again = engine.losses([0.0])[0]
            check_repeatable(self._base, again, self._noise(), given=given)
            self._checks.repeatable = True
            if given:
                # In 16 bits the engine computes more exactly than a training step: then its own base loss is needed.
                same = abs(again - self._base) <= _SAME_LOSS * abs(again)
                self._checks.base_agrees = same and not self._closure.random
                self._base = again
        search = LineSearch(
            self._base,
            slope=slope,
            norm_sq=self._direction.norm_sq,
            initial_lr=options.initial_lr or self._direction.lr,
            memory=memory,
            rtol=options.rtol,
            method="bisection" if options.method == "bisection" else "auto",
            certify=options.certify,
            noise=self._noise(),
            max_evaluations=max(1, self._spare_forwards() + len(first)),
            num_parallel=num_parallel,
            probes=first,
        )
        while step_sizes := search.ask():
            search.tell(engine.losses(step_sizes))
        result = search.result()
        self._refuse_constant(result)
        self._verify(result)
        if 0 < result.critical_lr < math.inf:
            self._retained = self._kept(result.critical_lr)
        return result

    def measurement(self, result: SearchResult, seconds: float) -> Measurement:
        """The result as users see it, with the warnings it calls for."""
        if is_low(self._closure.precision.loss_dtype):
            warn(
                f"loss_fn returned its loss in {self._closure.precision.loss_dtype}, too coarse to compare nearby step "
                "sizes; compute the loss from logits.float()",
                LossPrecisionWarning,
            )
        if self._retained < _RETAINED_FLOOR:
            warn(
                f"only {self._retained:.2f} of the displacement at η_c survives rounding to the weights' dtype; "
                "pass the optimizer's float32 masters to Direction.from_optimizer(masters=...)",
                RetainedWarning,
            )
        return Measurement(
            critical_lr=result.critical_lr,
            sharpness=result.sharpness,
            bracket=result.bracket,
            base_loss=self._base,
            slope=self._direction.slope,
            directional_sharpness=result.directional_sharpness,
            error=result.error,
            exponent=result.exponent,
            probes=result.probes,
            forwards=self._closure.calls,
            status=result.status,
            engine=self._engine.name,
            retained=self._retained,
            seconds=seconds,
        )

    def _kept(self, eta: float) -> float:
        return retained_share(self._pairs, self._engine.rounded, -eta)

    def _spare_forwards(self) -> int:
        return self._options.max_forwards - self._closure.calls

    def _noise(self) -> float:
        if self._options.noise is not None:
            return self._options.noise
        low = any(
            is_low(pair.weight.dtype) or torch.is_autocast_enabled(pair.weight.device.type) for pair in self._pairs
        )
        return self._closure.precision.noise(low_and_unseen=low)

    def _verify(self, result: SearchResult) -> None:
        """Compare the engine with the oracle once, and the slope with the gradient's now and then."""
        if not math.isfinite(self._base):
            return
        if self._spare_forwards() > 0:
            confirm(self._engine, self._checks, self._base, result.probes, self._noise())
        # On measurements 1, 2, 4, 8, ...: a loop that mixes up its batches does so all the time.
        due = self._checks.num_measurements & (self._checks.num_measurements + 1) == 0
        if due and self._direction.slope is not None and self._direction.slope > 0 and self._spare_forwards() > 0:
            check_slope(
                self._engine,
                self._base,
                self._direction.slope,
                result,
                self._noise(),
                kept=self._kept,
                random=self._closure.random,
                spare_forwards=self._spare_forwards(),
            )

    def _refuse_constant(self, result: SearchResult) -> None:
        losses = {loss for _, loss in result.probes}
        if len(result.probes) > 1 and losses == {self._base}:
            if self._engine.name != "inplace":
                # Perhaps the parameters are read where no mode can see it.
                raise EngineUnsupportedError("the loss is the same at every step size")
            raise ValueError(
                f"loss_fn must depend on the parameters that the direction moves, got {self._base} at every step size "
                f"up to {max(eta for eta, _ in result.probes):.3g}; compute the loss anew from the model in every call"
            )


def _may_batch(pairs: Sequence[Pair], options: Options, reduce: Callable[[Tensor], Tensor] | None) -> bool:
    """Whether several step sizes at a time may be quicker, and the choice is nobody else's."""
    # Ranks would not agree on what is quickest.
    distributed = torch.distributed
    alone = not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)
    # On a CPU eight cost more than a whole search one at a time (bench/results/line_search.json).
    on_gpu = all(ops.has_kernels(pair.weight.device) for pair in pairs)
    return options.method == "auto" and reduce is None and alone and on_gpu


def _check_arguments(model: object, loss_fn: object, direction: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; pass the model that loss_fn evaluates"
        )
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn must be callable without arguments, got {type(loss_fn).__name__}; pass lambda: loss of the batch"
        )
    if not isinstance(direction, Direction):
        raise TypeError(
            f"direction must be a sharpkern.Direction, got {type(direction).__name__}; make one by "
            "Direction.from_optimizer(optimizer)"
        )


def _as_number(base_loss: object) -> float:
    if isinstance(base_loss, Tensor) and base_loss.numel() == 1:
        return float(base_loss.detach())
    if isinstance(base_loss, bool) or not isinstance(base_loss, (int, float)):
        raise TypeError(f"base_loss must be a number, got {base_loss!r}; leave it out to have it evaluated")
    return float(base_loss)
