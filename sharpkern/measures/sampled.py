"""λ_c of a whole batch from a sample of its micro-batches: evaluates, checks, and refuses where it may mislead."""

import math
from collections.abc import MutableSequence, Sequence
from dataclasses import replace

from torch.nn.modules.batchnorm import _BatchNorm

from sharpkern.distributed.sharding import fsdp_modules, is_sharded
from sharpkern.engines.known import KnownFacts
from sharpkern.engines.session import Engine, Session, Target
from sharpkern.engines.settling import size_of
from sharpkern.errors import SampleWarning, warn
from sharpkern.measures.micro_batches import Step
from sharpkern.measures.result import Measurement, Options
from sharpkern.measures.run import SAME_ARITHMETIC, SAME_LOSS, Run
from sharpkern.measures.self_checks import confirm, looked_at_twice
from sharpkern.search.line_search import SearchMemory, SearchResult
from sharpkern.search.sampled import OtherSlopeError, SampledResult, SampledSearch, first_size

# Excesses of the slope, in standard errors, that several measurements together do not reach by chance.
_IMPOSSIBLE = 4.0
# A norm of the gradient that is so near a number of two digits was made that number, torch adding 1e-6.
_ROUND, _ROUND_16_BITS = 3e-6, 3e-5


class NoSampleError(Exception):
    """A sample would not tell of the whole batch, or may not."""


class Micro:
    """The micro-batches of all ranks, evaluated by one engine.

    Attributes:
        num: of all ranks.
        groups: numbers of each rank's.
        base: losses of training, or None.
        weights: of all.
    """

    def __init__(self, session: Session, step: Step) -> None:
        self._ranks, self._parts = session.ranks, step.parts
        each = len(self._parts)
        if any(self._ranks.any_of([self._ranks.means([float(each)])[0] != each])):
            raise NoSampleError("ranks differ in the number of their micro-batches")
        known = self._ranks.gather([float(step.losses is not None), *(step.losses or [0.0] * each)])
        self.weights = [weight for rank in self._ranks.gather(step.weights) for weight in rank]
        self.num = len(self.weights)
        self.groups = [range(start, start + each) for start in range(0, self.num, each)]
        losses = [loss for _, *rank in known for loss in rank]
        is_known = all(flag for flag, *_ in known) and all(map(math.isfinite, losses))
        self.base = losses if is_known else None
        # Mean over ranks of the first member that each evaluates, by step size: for the independent check.
        self.watched: dict[float, float] = {}
        self.watched_part: int | None = None

    def evaluate(self, engine: Engine, target: Target, numbers: Sequence[int], eta: float) -> list[float]:
        """Losses of some micro-batches, as many of each rank."""
        own = self.groups[self._ranks.number]
        losses = []
        for number in numbers:
            if number not in own:
                continue
            part = number - own.start
            target.closure.loss_fn = self._parts[part]
            (mean,) = engine.losses([eta])
            losses.append(target.closure.own)
            self.watched_part = part if self.watched_part is None else self.watched_part
            if part == self.watched_part:
                self.watched[eta] = mean
        of_rank = [iter(rank) for rank in self._ranks.gather(losses)]
        each = len(own)
        return [next(of_rank[number // each]) for number in numbers]


class SampledRun(Run):
    """One measurement from a sample, by one engine."""

    def __init__(
        self,
        session: Session,
        target: Target,
        engine: Engine,
        options: Options,
        step: Step,
        excesses: MutableSequence[float] | None = None,
    ) -> None:
        super().__init__(session, target, engine, options)
        if session.ranks.splits and not session.ranks.alike:
            raise NoSampleError("ranks that split a model hold the same micro-batches")
        self._session, self._target, self._step = session, target, step
        self._micro = Micro(session, step)
        self._excesses = self._checks.excesses if excesses is None else excesses
        self._found: SampledResult | None = None

    def of_sample(self, memory: SearchMemory | None, draw: float) -> SearchResult:
        """Search on a sample, or on all micro-batches where that turns out to be needed."""
        micro, options, direction = self._micro, self._options, self._direction
        assert options.sample is not None
        size = first_size(micro.num, options.sample, options.tolerance, len(micro.groups))
        if size == micro.num:
            raise NoSampleError("")
        self._refuse_unlike(micro)
        clip = 1.0 if self._step.clip is None else self._step.clip
        self._direction = replace(direction, slope=direction.slope / clip)
        evidence = self._checks.trained_loss
        is_known = micro.base is not None and evidence.is_known
        self._look_at_first(is_known)
        search = SampledSearch(
            self._direction.slope,
            micro.groups,
            size,
            base=micro.base,
            weights=micro.weights,
            may_grow=options.sample == "auto",
            rtol=options.tolerance,
            noise=self._noise() if not is_known else self._checks.noise,
            norm_sq=direction.norm_sq,
            initial_lr=options.initial_lr or direction.lr,
            memory=memory,
            max_forwards=options.max_forwards,
            draw=draw,
        )
        if is_known:
            search.trust_base(is_exact=True)
        try:
            self._found = self._drive(search)
        except OtherSlopeError as other:
            raise NoSampleError(_clipped(str(other))) from other
        result, self._base = self._found.found, self._found.base_loss
        excess = self._found.excess
        if excess is not None and excess < -_IMPOSSIBLE and self._found.size == micro.num:
            tell_whole(self._checks, _summed(f"the slope is {-excess:.0f} standard errors above that of a sample"))
        elif excess is not None:
            self._excesses.append(excess)
        self._refuse_constant(result)
        self._check_engine(result)
        if 0 < result.critical_lr < math.inf:
            self._retained = self._kept(result.critical_lr)
        return result

    def _drive(self, search: SampledSearch) -> SampledResult:
        micro, asking = self._micro, search.ask()
        compares = micro.base is not None and not self._checks.trained_loss.is_known
        try:
            numbers, eta = next(asking)
            while True:
                losses = micro.evaluate(self.engine, self._target, numbers, eta)
                if compares and eta == 0.0:
                    self._compare(search, numbers, losses)
                    compares = False
                numbers, eta = asking.send(losses)
        except StopIteration as stop:
            found: SampledResult = stop.value
            return found

    def _compare(self, search: SampledSearch, numbers: Sequence[int], losses: Sequence[float]) -> None:
        """Compare the losses that were trained with those of the members, and take them for all where they agree."""
        given = self._micro.base
        assert given is not None
        off = [abs(given[i] - loss) / max(abs(loss), 1e-300) for i, loss in zip(numbers, losses, strict=True)]
        tolerance = max(
            SAME_ARITHMETIC, 20 * self._noise(), 4 * self._closure.largest(self._closure.precision.widened_roundoff)
        )
        same = max(off) <= min(SAME_LOSS, 2 * self._noise())
        trained, own = (sum(one) / len(numbers) for one in ([given[i] for i in numbers], losses))
        self._checks.trained_loss.note(trained, own, own, tolerance, max(abs(trained), abs(own)), same=same)
        if same or max(off) > tolerance:
            search.trust_base(is_exact=same)

    def measurement(self, result: SearchResult, seconds: float) -> Measurement:
        """The result, with what is known of the sample."""
        measured = super().measurement(result, seconds)
        assert self._found is not None
        return replace(
            measured,
            forwards=self._closure.calls / len(self._step.parts),
            sample_size=self._found.size,
            num_micro_batches=self._micro.num,
            beta=self._found.beta,
        )

    def _refuse_unlike(self, micro: Micro) -> None:
        """Refuse a sample where the whole batch's loss is not known to be the mean of the micro-batches'."""
        model, checks = self._model, self._checks
        sharded = [p for p in model.parameters() if is_sharded(p)]
        if any(p.device_mesh.ndim > 1 for p in sharded) or (sharded and not fsdp_modules(model)):  # type: ignore[attr-defined]
            raise NoSampleError("ranks that split tensors hold the same micro-batches")
        normed = any(isinstance(one, _BatchNorm) and one.training for one in model.modules())
        if normed and micro.base is None:
            raise NoSampleError(
                "BatchNorm in train mode makes the loss of a split batch another one; where micro-batches were trained "
                "one by one, hand over their losses, loss=[...]"
            )
        if self._step.clip is None and self._may_be_clipped():
            raise NoSampleError(_clipped("the gradient's norm is a round number"))
        excesses = checks.excesses
        if self._step.clip is None and sum(excesses) > _IMPOSSIBLE * math.sqrt(len(excesses) or 1):
            raise NoSampleError(_clipped("samples were steeper than the slope of the whole batch time and again"))

    def _may_be_clipped(self) -> bool:
        """Whether the gradient's norm is a number that people clip to."""
        gradient_of = self._session.guard.gradient_of
        given = [(p, g) for p in self._session.guard.parameters if (g := gradient_of(p)) is not None]
        norm = math.sqrt(size_of(given, self._session.ranks)[2])
        low = any(gradient.dtype.itemsize < 4 for _, gradient in given)
        # None are there where the direction was made of other batches, or by hand.
        near, share = float(f"{norm:.1e}") or 1.0, _ROUND_16_BITS if low else _ROUND
        (mean,) = self._session.ranks.means([float(abs(norm / near - 1) < share + 1e-6 / near)])
        return mean > 0

    def _look_at_first(self, is_known: bool) -> None:
        """See in one micro-batch how exact losses are, whether they are repeatable, and what dropout does to them."""
        if is_known:
            return
        self._closure.loss_fn = self._step.parts[0]
        (loss,) = self.engine.losses([0.0])
        if self._draws_random_numbers():
            raise NoSampleError(
                "loss_fn draws other random numbers than training did; wrap each closure in sharpkern.MicroBatch, call "
                "it in training, and pass it to the measurement, so that dropout masks are repeated"
            )
        if not self._checks.repeatable:
            looked_at_twice(loss, lambda: self.engine.losses([0.0])[0], self._target, self._noise())

    def _check_engine(self, result: SearchResult) -> None:
        """Compare the engine with the oracle on one micro-batch, now and then."""
        watched, part = dict(self._micro.watched), self._micro.watched_part
        base = watched.pop(0.0, None)
        if part is None or base is None:
            return
        self._closure.loss_fn = self._step.parts[part]
        confirm(self.engine, self._checks, base, list(watched.items()), max(self._noise(), result.noise))


def by_sample(
    session: Session,
    target: Target,
    options: Options,
    step: Step,
    memory: SearchMemory | None,
    draw: float,
    excesses: MutableSequence[float] | None = None,
) -> tuple[Run, SearchResult] | None:
    """A measurement from a sample; None where none was asked for, or the whole batch has to be measured."""

    def sampled(engine: Engine) -> tuple[Run, SearchResult]:
        run = SampledRun(session, target, engine, options, step, excesses)
        return run, run.of_sample(memory, draw)

    if options.sample is None:
        return None
    try:
        return session.run(target, sampled, engine=options.engine)
    except NoSampleError as reason:
        tell_whole(target.checks, str(reason))
        target.closure.calls = math.ceil(target.closure.calls / len(step.parts))
        return None
    finally:
        target.closure.loss_fn = step.closure


def tell_whole(checks: KnownFacts, reason: str) -> None:
    """Warn once why the whole batch is measured, where that is not for being as quick."""
    if reason and not checks.told_whole:
        checks.told_whole = True
        warn(f"the whole batch is measured in place of a sample: {reason}", SampleWarning)


def _summed(seen: str) -> str:
    return (
        f"{seen}, as where the gradient is the sum of the micro-batches' and not their mean (divide outside of the "
        "closure: (part() / len(parts)).backward()), or where their losses bend within a tiny step"
    )


def _clipped(seen: str) -> str:
    return (
        f"{seen}, as where gradients are clipped: pass clip=(norm before clipping, max_norm), or clip=1.0 where "
        "nothing was clipped"
    )
