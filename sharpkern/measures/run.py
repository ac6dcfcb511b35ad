"""One measurement from its base loss to its result: what is evaluated, what is checked, what is warned of."""

import math
from collections.abc import Callable, Generator, Sequence
from functools import partial
from statistics import median

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from sharpkern.distributed.ranks import Alone
from sharpkern.engines.batched.engine import NUM_PARALLEL
from sharpkern.engines.evaluation.precision import is_low
from sharpkern.engines.retained import retained_share
from sharpkern.engines.session import Engine, Session, Target
from sharpkern.errors import (
    EngineUnsupportedError,
    LossPrecisionWarning,
    NoUpdateError,
    RetainedWarning,
    SlopeMismatchWarning,
    warn,
)
from sharpkern.measures.result import Measurement, Options
from sharpkern.measures.self_checks import check_repeatable, check_slope, confirm
from sharpkern.search.line_search import LineSearch, SearchMemory, SearchResult, warm_grid

RETAINED_FLOOR = 0.9
# Relative difference of two losses that are the same but for float32 roundings, and of two that may be the same but for
# how they were computed: by other kernels, or compiled.
SAME_LOSS, SAME_ARITHMETIC = 5e-7, 1e-4
# Evaluations that a search with several at a time may need.
ENOUGH_FORWARDS = 4 * NUM_PARALLEL

# Yields step sizes, is sent the losses there, and returns what it found.
Search = Generator[tuple[float, ...], list[float], SearchResult]


class ConstantLossError(NoUpdateError):
    """The loss is the same at every step size; a loop goes on, with a measurement that is unresolved."""

    def __init__(self, reason: str, run: "Run", result: SearchResult) -> None:
        super().__init__(reason)
        self.run, self.result = run, result


class Run:
    """One measurement by one engine.

    Attributes:
        engine: as given.
    """

    def __init__(
        self,
        session: Session,
        target: Target,
        engine: Engine,
        options: Options,
        *,
        must_agree: bool = False,
        base: float | None = None,
    ) -> None:
        self.engine = engine
        self._closure = target.closure
        self._direction = session.direction
        self._pairs = session.pairs
        self._options = options
        self._checks = target.checks
        session.begin(target.checks)
        self._trained = session.base_loss
        self._must_agree = must_agree
        # As this engine has evaluated it before, in the same session.
        self._known_base = base
        self._retained = math.nan
        self._model = session.model
        self._in_eval_mode = False
        self._compared: Callable[..., None] | None = None
        self._slope_ratio: float | None = None
        self._slope_warning: str | None = None

    def search(self, memory: SearchMemory | None) -> Search:
        """Base loss, line search, and the checks that are due, the engine being asked by somebody else."""
        engine, options, slope = self.engine, self._options, self._direction.slope
        # A few evaluations are better spent one at a time.
        several = engine.name == "batched" and options.method == "auto" and options.max_forwards >= ENOUGH_FORWARDS
        num_parallel = NUM_PARALLEL if several else 1
        first: list[tuple[float, float]] = []
        if self._known_base is not None:
            self._base, noise = self._known_base, self._noise()
        elif self._trained is not None and math.isfinite(self._trained) and self._checks.trained_loss.is_known:
            # Of a pass that was not made nothing was seen.
            self._base, noise = self._trained, self._checks.noise
        else:
            step_sizes: tuple[float, ...] = ()
            if num_parallel > 1:
                step_sizes = warm_grid(memory, slope=slope, norm_sq=self._direction.norm_sq, num=num_parallel - 1)
            self._base, *losses = yield (0.0, *step_sizes)
            first = list(zip(step_sizes, losses, strict=True))
            yield from self._check_base()
            noise = self._noise()
        search = LineSearch(
            self._base,
            slope=slope,
            norm_sq=self._direction.norm_sq,
            initial_lr=options.initial_lr or self._direction.lr,
            memory=memory,
            rtol=options.tolerance,
            method="bisection" if options.method == "bisection" else "auto",
            certify=options.certify,
            noise=noise,
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

    def _check_base(self) -> Generator[tuple[float, ...], list[float], None]:
        """Evaluate the base loss again where that is due, and compare it with the one that was trained."""
        if not math.isfinite(self._base):
            return
        random = self._trained is not None and self._draws_random_numbers()
        self._in_eval_mode = not self._model.training or (not random and _has_dropout(self._model))
        # More would be more than the noise of the losses that it is compared with.
        same = not random and self._is_near(min(SAME_LOSS, 2 * self._noise()))
        if not (self._checks.repeatable or same) and self._spare_forwards() > 2:
            (again,) = yield (0.0,)
            check_repeatable(self._base, again, self._noise())
            self._checks.repeatable = True
            if self._closure.redone:
                # Another thread drew from the random streams: the first time too, perhaps.
                self._base = again
        if self._trained is None:
            return
        # The engine computes in float32 what training rounded.
        widened = self._closure.largest(self._closure.precision.widened_roundoff)
        tolerance = max(SAME_ARITHMETIC, 20 * self._noise(), 4 * widened)
        if self._must_agree and not random and not self._is_near(tolerance):
            raise ValueError(
                f"base_loss must be what loss_fn returns at the current parameters, got {self._trained} and loss_fn "
                f"returned {self._base}; leave base_loss out"
            )
        evidence = self._checks.trained_loss
        other = None if random else self._base
        if random and evidence.needs_other_masks and self._spare_forwards() > 2:
            self._closure.other_masks = 1 + evidence.num
            (other,) = yield (0.0,)
            self._closure.other_masks = 0
            # Of a closure that seeds itself it cannot be told how far masks take its loss.
            other = None if other == self._base else other
        self._compared = partial(evidence.note, self._trained, self._base, other, tolerance, same=same)

    def _is_near(self, tolerance: float) -> bool:
        """Whether the loss that was trained was handed in, and is the evaluated one but for a relative difference."""
        return self._trained is not None and abs(self._trained - self._base) <= tolerance * abs(self._base)

    def measurement(self, result: SearchResult, seconds: float) -> Measurement:
        """The result as users see it, with the warnings it calls for."""
        self._note(result)
        self._checks.noise = self._noise()
        if is_low(self._closure.precision.loss_dtype):
            warn(
                f"loss_fn returned its loss in {self._closure.precision.loss_dtype}, too coarse to compare nearby step "
                "sizes; compute the loss from logits.float()",
                LossPrecisionWarning,
            )
        if self._retained < RETAINED_FLOOR:
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
            engine=self._engine_name(),
            retained=self._retained,
            seconds=seconds,
            lr=self._direction.lr,
        )

    def _engine_name(self) -> str:
        """The engine as users know it: swapped memory is one way of the two that go one step size at a time."""
        if self.engine.name == "swapped":
            return "inplace" if self._options.engine == "inplace" else "virtual"
        return self.engine.name

    def _note(self, result: SearchResult) -> None:
        """Enter what this measurement says of the loss that was trained, and warn of what several say together."""
        slope, evidence, slopes = self._direction.slope, self._checks.trained_loss, self._checks.slopes
        if self._compared is not None:
            # A loss that cancels to nearly 0, as in policy gradients, is told apart by how much it changes.
            changes = [abs(loss - self._base) for _, loss in result.probes if math.isfinite(loss)]
            self._compared(max(abs(self._trained or 0.0), abs(self._base), median(changes or [0.0])))
        if self._trained is not None:
            evidence.num += 1
        if evidence.differs and not evidence.told:
            warn(evidence.told_as(in_eval_mode=self._in_eval_mode), SlopeMismatchWarning)
        if slope is not None and slope > 0:
            slopes.note(self._slope_ratio)
            slopes.told |= evidence.told
        if slopes.differ and not slopes.told:
            warn(slopes.told_as(), SlopeMismatchWarning)
        elif self._slope_warning is not None:
            warn(self._slope_warning, SlopeMismatchWarning)

    def _draws_random_numbers(self) -> bool:
        """Whether the closure did in its last call on any rank, by the way that losses take."""
        ranks = self._closure.ranks
        if not isinstance(ranks, Alone):
            return self._closure.random
        flag = torch.tensor(float(self._closure.random), device=self._pairs[0].weight.device)
        return ranks.agree(flag).loss > 0

    def _kept(self, eta: float) -> float:
        rounded, norm_sq = self.engine.rounded, self._direction.norm_sq
        return retained_share(self._pairs, rounded, -eta, norm_sq, self._closure.ranks)

    def _spare_forwards(self) -> int:
        return self._options.max_forwards - self._closure.calls

    def _noise(self) -> float:
        if self._options.noise is not None:
            return self._options.noise
        low = any(
            is_low(pair.weight.dtype) or torch.is_autocast_enabled(pair.weight.device.type) for pair in self._pairs
        )
        return self._closure.noise(low_and_unseen=low)

    def _verify(self, result: SearchResult) -> None:
        """Compare the engine with the oracle, and the slope with the gradient's, now and then."""
        if not math.isfinite(self._base):
            return
        noise = max(self._noise(), result.noise)
        if self._spare_forwards() > 0:
            reach = 1.5 * result.critical_lr if result.status == "converged" else math.inf
            confirm(self.engine, self._checks, self._base, result.probes, noise, reach)
        # Now and then: a loop that mixes up its batches does so all the time.
        slope = self._direction.slope
        if slope is not None and slope > 0 and self._checks.slopes.is_due and self._spare_forwards() > 0:
            self._slope_ratio, self._slope_warning = check_slope(
                self.engine,
                self._base,
                slope,
                result,
                noise,
                kept=self._kept,
                random=self._closure.random,
                spare_forwards=self._spare_forwards(),
            )

    def _refuse_constant(self, result: SearchResult) -> None:
        reason = constant_loss(self._base, result.probes)
        if reason is not None and not self.engine.writes:
            # Perhaps the parameters are read where no mode can see it.
            raise EngineUnsupportedError("the loss is the same at every step size")
        if reason is not None:
            raise ConstantLossError(reason, self, result)


def constant_loss(base: float, probes: Sequence[tuple[float, float]]) -> str | None:
    """Return what is wrong where every probe of several has the base loss, as by design that of exp(x − x.detach())."""
    if len(probes) < 2 or {loss for _, loss in probes} != {base}:
        return None
    return (
        f"loss_fn must depend on the parameters that the direction moves, got {base} at every step size up to "
        f"{max(eta for eta, _ in probes):.3g}; compute the loss anew from the model in every call, and leave detached "
        "copies of it out, as in exp(logp - logp.detach())"
    )


def _has_dropout(model: nn.Module) -> bool:
    return any(isinstance(module, _DropoutNd) and module.training and module.p > 0 for module in model.modules())


def finish(run: Run, search: Search) -> SearchResult:
    """Go through a search with the run's own engine."""
    try:
        step_sizes = next(search)
    except StopIteration as stop:
        # There was nothing to evaluate: a base loss that was handed in is not finite.
        found: SearchResult = stop.value
        return found
    while True:
        # Outside of the try: a closure that runs out of batches raises StopIteration as well.
        losses = run.engine.losses(step_sizes)
        try:
            step_sizes = search.send(losses)
        except StopIteration as stop:
            result: SearchResult = stop.value
            return result
