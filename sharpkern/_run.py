"""One measurement from its base loss to its result: what is evaluated, what is checked, what is warned of."""

import math
from collections.abc import Generator

import torch

from sharpkern.engines.batched import NUM_PARALLEL
from sharpkern.engines.precision import is_low
from sharpkern.engines.retained import retained_share
from sharpkern.engines.session import Engine, Session, Target
from sharpkern.engines.verify import check_repeatable, check_slope, confirm
from sharpkern.errors import EngineUnsupportedError, LossPrecisionWarning, RetainedWarning, warn
from sharpkern.measurement import Measurement, Options
from sharpkern.search import LineSearch, SearchMemory, SearchResult, warm_grid

_RETAINED_FLOOR = 0.9
# Relative difference of two losses that are the same but for float32 roundings.
_SAME_LOSS = 2e-6

# Evaluations that a search with several at a time may need.
ENOUGH_FORWARDS = 3 * NUM_PARALLEL

# Yields step sizes, is sent the losses there, and returns what it found.
Search = Generator[tuple[float, ...], list[float], SearchResult]


class Run:
    """One measurement by one engine.

    Args:
        session: of the model and the direction.
        target: the closure.
        engine: evaluates the losses.
        options: of the measurement.

    Attributes:
        engine: as given.
    """

    def __init__(self, session: Session, target: Target, engine: Engine, options: Options) -> None:
        self.engine = engine
        self._closure = target.closure
        self._direction = session.direction
        self._pairs = session.pairs
        self._options = options
        self._checks = target.checks
        self._known_base = session.base_loss
        self._retained = math.nan

    def search(self, memory: SearchMemory | None) -> Search:
        """Base loss, line search, and the checks that are due, the engine being asked by somebody else.

        Args:
            memory: what the last search left.

        Yields:
            Step sizes; send the losses there.

        Returns:
            SearchResult: of the line search.
        """
        engine, options, slope = self.engine, self._options, self._direction.slope
        # A few evaluations are better spent one at a time.
        several = engine.name == "batched" and options.method == "auto" and options.max_forwards >= ENOUGH_FORWARDS
        num_parallel = NUM_PARALLEL if several else 1
        first: list[tuple[float, float]] = []
        if self._known_base is not None:
            self._base = self._known_base
        else:
            step_sizes: tuple[float, ...] = ()
            if num_parallel > 1:
                step_sizes = warm_grid(memory, slope=slope, norm_sq=self._direction.norm_sq, num=num_parallel - 1)
            self._base, *losses = yield (0.0, *step_sizes)
            first = list(zip(step_sizes, losses, strict=True))
        given = self._known_base is not None
        # A loss with dropout that is handed in is of other masks, each time anew.
        known = self._checks.base_agrees if given else self._checks.repeatable
        if not known and self._spare_forwards() > 2 and math.isfinite(self._base):
            (again,) = yield (0.0,)
            if self._closure.redone and not given:
                # Another thread drew from the random streams: the first time too, perhaps.
                self._base = again
            check_repeatable(self._base, again, self._noise(), given=given)
            self._checks.repeatable = True
            if given:
                # In 16 bits the engine computes more exactly than a training step: then its own base loss is needed.
                same = abs(again - self._base) <= _SAME_LOSS * abs(again)
                self._checks.base_agrees = same and not any(self._closure.ranks.any_of([self._closure.random]))
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
            search.tell((yield step_sizes))
        result = search.result()
        self._refuse_constant(result)
        self._verify(result)
        if 0 < result.critical_lr < math.inf:
            self._retained = self._kept(result.critical_lr)
        return result

    def measurement(self, result: SearchResult, seconds: float) -> Measurement:
        """The result as users see it, with the warnings it calls for."""
        self._checks.num_measurements += 1
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
            engine=self.engine.name,
            retained=self._retained,
            seconds=seconds,
        )

    def _kept(self, eta: float) -> float:
        return retained_share(self._pairs, self.engine.rounded, -eta)

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
            reach = 1.5 * result.critical_lr if result.status == "converged" else math.inf
            confirm(self.engine, self._checks, self._base, result.probes, self._noise(), reach)
        # On measurements 1, 2, 4, 8, ...: a loop that mixes up its batches does so all the time.
        slope = self._direction.slope
        if self._checks.due and slope is not None and slope > 0 and self._spare_forwards() > 0:
            check_slope(
                self.engine,
                self._base,
                slope,
                result,
                self._noise(),
                kept=self._kept,
                random=self._closure.random,
                spare_forwards=self._spare_forwards(),
            )

    def _refuse_constant(self, result: SearchResult) -> None:
        losses = {loss for _, loss in result.probes}
        if len(result.probes) > 1 and losses == {self._base}:
            if self.engine.name != "inplace":
                # Perhaps the parameters are read where no mode can see it.
                raise EngineUnsupportedError("the loss is the same at every step size")
            raise ValueError(
                f"loss_fn must depend on the parameters that the direction moves, got {self._base} at every step size "
                f"up to {max(eta for eta, _ in result.probes):.3g}; compute the loss anew from the model in every call"
            )


def finish(run: Run, search: Search) -> SearchResult:
    """Go through a search with the run's own engine.

    Returns:
        SearchResult: what the search found.
    """
    step_sizes = next(search)
    while True:
        # Outside of the try: a closure that runs out of batches raises StopIteration as well.
        losses = run.engine.losses(step_sizes)
        try:
            step_sizes = search.send(losses)
        except StopIteration as stop:
            result: SearchResult = stop.value
            return result
