"""The one way to losses along a direction: bind it, agree on it between ranks, choose an engine, open it, fall back."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sharpkern import ops
from sharpkern._undo import Trace, alone, undone
from sharpkern.distributed.declared import Ranks
from sharpkern.distributed.layout import Layout, layout_of
from sharpkern.distributed.lockstep import Lockstep
from sharpkern.distributed.ranks import Alone, Peers, as_one
from sharpkern.distributed.replay import Replay, is_known
from sharpkern.engines.agreement import agreed
from sharpkern.engines.batched.engine import BatchedEngine
from sharpkern.engines.evaluation.closure import Closure, LossFn
from sharpkern.engines.evaluation.compiled import Eagerly, FromGraphs
from sharpkern.engines.evaluation.guard import Guard, evaluating
from sharpkern.engines.evaluation.parametrizations import empty_cache
from sharpkern.engines.evaluation.precision import LossPrecision
from sharpkern.engines.inplace import Backup, InPlaceEngine
from sharpkern.engines.judging import Facts
from sharpkern.engines.known import KnownFacts, checks_of
from sharpkern.engines.settling import Unsettled, named_ranks, outermost, ranks_for, size_of
from sharpkern.engines.swapped import Memory, SwappedEngine, may_swap
from sharpkern.engines.tracked import TrackedParam, track
from sharpkern.engines.virtual.engine import VirtualEngine
from sharpkern.engines.virtual.first_pass import FirstPass
from sharpkern.engines.virtual.layers import Kept
from sharpkern.errors import EngineFallbackWarning, EngineUnsupportedError, warn
from sharpkern.ops.update import ParamUpdate

Result = TypeVar("Result")

# Reentrant checkpoints warn that no gradients will come of a pass, which has none.
_FALSE_ALARM = (
    "ignore",
    re.compile("None of the inputs have requires_grad=True"),
    UserWarning,
    re.compile(r"torch\.utils\.checkpoint"),
    0,
)

ENGINES = ("auto", "virtual", "batched", "inplace")

# What takes the place of an engine that is unable, and how that measures.
_NEXT = {
    "batched": ("virtual", "one step size at a time"),
    "virtual": ("inplace", "in place, θ is written and restored"),
}

# Bytes of parameters up to which "auto" takes the memory for another set of them, and is quicker.
_SWAPPED_BYTES = 2**29


class Engine(Protocol):
    """Evaluates losses along the direction, from the same random state each time.

    Attributes:
        name: of its kind.
        writes: θ itself is written, so that whatever reads it sees θ − ηΔθ.
    """

    name: str
    writes: bool

    @property
    def rounded(self) -> set[int]:
        """Indices of the pairs whose θ + αΔθ was rounded to the weight's dtype."""

    def losses(self, step_sizes: Sequence[float]) -> list[float]:
        """Losses at θ − ηΔθ for each step size η."""

    def oracle_loss(self, eta: float) -> float:
        """The loss at θ − ηΔθ by other means, to check one of an engine that does not write θ."""

    def close(self) -> None:
        """Leave the parameters as they were, bit for bit. May be called again, also after an interrupt."""


class Moving(Protocol):
    """What moves: a `sharpkern.Direction`, or what stands in for one."""

    parameters: Any
    slope: float | None
    norm_sq: float
    lr: float | None

    def bind(self, model: nn.Module) -> "Moving":
        """The same on the parameters of ``model``, once it is certain that it belongs to them."""

    def moves(self) -> Iterable[tuple[Tensor, ParamUpdate]]:
        """Every parameter that moves, with its move."""

    def shares(self) -> list[tuple[Tensor, float, float]]:
        """Every parameter with its share of the slope and of |Δθ|², as far as this rank knows them."""


@dataclass(frozen=True)
class Target:
    """A closure that is evaluated in a session, and what is known of it.

    Attributes:
        loss_fn: the user's.
        closure: evaluates it.
        checks: what has been found out about it.
        compiled: it, the model or one of its modules was compiled, so that no mode may look on.
    """

    loss_fn: LossFn
    closure: Closure
    checks: KnownFacts
    compiled: bool


class Session:
    """One model and one direction, while nothing of the run changes; made by `in_session`.

    Attributes:
        model: as given.
        direction: bound to the model, with the numbers that all ranks agree on.
        pairs: the parameters that move.
        ranks: that decide alike.
        base_loss: L(θ) that was handed in, the mean over the ranks; None where it was not.
        guard: of everything else.
        outer: the model, or the data-parallel wrapper that the closures call it through.
        layout: of the model's weights on this rank.
        settled_by: the closure that was evaluated to find out about the ranks, until that is counted; or None.
    """

    def __init__(
        self,
        model: nn.Module,
        direction: Any,
        pairs: Sequence[TrackedParam],
        ranks: Peers,
        guard: Guard,
        lockstep: Lockstep,
        base_loss: float | None,
        outer: nn.Module,
        layout: Layout,
    ) -> None:
        self.model, self.direction, self.pairs, self.ranks, self.base_loss = model, direction, pairs, ranks, base_loss
        self.guard, self._lockstep, self.outer = guard, lockstep, outer
        self.layout = layout
        self.settled_by: LossFn | None = None
        self._begun: list[KnownFacts] = []

    def settle(self, ranks: Unsettled, loss_fn: LossFn | None, plan: str) -> None:
        """Find out which ranks decide together where nothing tells of them."""
        if not ranks.all_come():
            self.ranks = Alone()
            return
        loss = None
        if loss_fn is not None:
            closure = Closure(loss_fn, self.guard, LossPrecision(), ranks, self._lockstep)
            loss = closure(Eagerly(ranks.listening))
            self.settled_by = loss_fn
        if self.direction is None:
            # Gradients tell whether ranks that hold the same weights train one model.
            given = self.guard.gradient_of if loss is not None else lambda _: None
            moves = [(p, given(p)) for p in self.model.parameters() if p.requires_grad]
            self.ranks = ranks.settled(Facts(*size_of(moves), loss, plan, is_update=loss is None))
        else:
            size = size_of((pair.parameter, pair.move.update) for pair in self.pairs)
            self.ranks = ranks.settled(Facts(*size, loss, f"{plan}, {self.direction.lr}"))

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Run a pass, or a part of one, that fails on all ranks if it fails on one."""
        with as_one(self.ranks):
            try:
                yield
            except BaseException:
                self._lockstep.keep_up()
                raise
            self._lockstep.finish()

    def part(self, make: Callable[[], Any]) -> "Session":
        """The same session along a part of its direction, while all other parameters rest."""
        part = copy(self)
        with as_one(self.ranks):
            part.direction = make().bind(self.model)
            part.pairs = track(part.direction.moves())
        part.direction, part.base_loss = agreed(self.ranks, part.direction, None, is_part=True)
        return part

    def target(self, loss_fn: LossFn) -> Target:
        """Enter a closure."""
        closure = Closure(loss_fn, self.guard, LossPrecision(), self.ranks, self._lockstep)
        if loss_fn is self.settled_by:
            closure.calls, self.settled_by = 1, None
        checks = checks_of(self.model, loss_fn, alone=isinstance(self.ranks, Alone))
        closure.is_compiled = is_compiled(self.model, loss_fn)
        return Target(loss_fn, closure, checks, closure.is_compiled)

    def begin(self, checks: KnownFacts) -> None:
        """Count a measurement, once for all closures of the same code, which check for one another."""
        if not any(checks is begun for begun in self._begun):
            self._begun.append(checks)
            checks.begin()

    def run(
        self, target: Target, use: Callable[[Engine], Result], *, engine: str = "auto", quickest: str = "virtual"
    ) -> Result:
        """Call ``use`` with an engine, and with the next one in its place if it turns out unable and none was named."""
        chosen, swaps = self.choose(target, engine, quickest)
        name = "swapped" if swaps else chosen
        found: dict[str, str] = {}
        while True:
            # One step size at a time takes less memory.
            unable = (EngineUnsupportedError, torch.OutOfMemoryError) if name == "batched" else EngineUnsupportedError
            try:
                with self.open(target, name) as opened:
                    result = use(opened)
            except unable as reason:
                if name != "swapped" and (engine != "auto" or name not in _NEXT):
                    raise
                found[name] = str(reason)
                name = chosen if name == "swapped" else _NEXT[name][0]
            else:
                # Where no engine is able, it is not the engines' fault.
                for left, why in found.items():
                    if left in _NEXT:
                        warn(f"measuring {_NEXT[left][1]}: {why}", EngineFallbackWarning)
                target.checks.unsupported |= found
                return result

    def choose(self, target: Target, engine: str, quickest: str = "virtual") -> tuple[str, bool]:
        """Name of an engine, and whether one that swaps memory may take its place: what all ranks are able to."""
        with as_one(self.ranks):
            name = self._own_choice(target, engine, quickest)
            swaps = self._may_swap(target, engine, name)
        writes, stays = self.ranks.any_of([name == "inplace", not swaps])
        return "inplace" if writes else name, not stays

    def _own_choice(self, target: Target, engine: str, quickest: str) -> str:
        if engine == "batched" and not self.ranks.alike:
            raise EngineUnsupportedError(
                "ranks that run other modules than others take one step size at a time; use engine='auto'"
            )
        scripted = any(isinstance(module, torch.jit.ScriptModule) for module in self.model.modules())
        if engine in ("virtual", "batched") and scripted:
            raise EngineUnsupportedError(
                "the model is scripted: its reads of parameters cannot be seen; use engine='auto'"
            )
        copied = self.layout.copied
        if engine in ("virtual", "batched") and copied:
            raise EngineUnsupportedError(f"{copied}; use engine='auto', which writes and restores this rank's shards")
        if engine != "auto":
            return engine
        name = "inplace" if copied or target.compiled else quickest
        while name in target.checks.unsupported:
            name, _ = _NEXT[name]
        return name

    def _may_swap(self, target: Target, engine: str, chosen: str) -> bool:
        """Whether the engine that swaps memory may take the place of the one that was chosen, and is quicker."""
        unable = target.compiled or self.layout.copied or "swapped" in target.checks.unsupported
        if chosen == "batched" or engine == "virtual" or unable:
            return False
        is_large = sum(pair.weight.nbytes for pair in self.pairs) > _SWAPPED_BYTES
        return not (chosen == "virtual" and is_large) and may_swap(self.model, self.pairs, self.guard)

    @contextmanager
    def open(
        self,
        target: Target,
        name: str,
        *,
        kept: Kept | None = None,
        memory: Memory | None = None,
        backup: Backup = "auto",
    ) -> Iterator[Engine]:
        """Make an engine, and close it whatever happens: at the end of the session at the latest."""
        trace = self.guard.trace
        with as_one(self.ranks):
            engine = self._made(target, name, kept, memory, backup)
        trace.add(engine.close)
        try:
            yield engine
        finally:
            engine.close()
            trace.drop(engine.close)

    def _made(self, target: Target, name: str, kept: Kept | None, memory: Memory | None, backup: Backup) -> Engine:
        closure = target.closure
        if name == "virtual":
            return VirtualEngine(self.pairs, closure, kept=kept)
        if name == "swapped":
            return SwappedEngine(self.model, self.pairs, closure, memory)
        if name == "batched":
            return BatchedEngine(self.pairs, closure, kept)
        watching = FirstPass(self.model, closure, may_repoint=self.layout.repoints)
        # On a GPU a mode is what takes the host's time.
        on_gpu = any(ops.has_kernels(pair.weight.device) for pair in self.pairs)
        around = FromGraphs() if target.compiled else Eagerly(watching if on_gpu else watching.mode)
        return InPlaceEngine(self.pairs, closure, around, backup, self.layout.publish)


def in_session(
    use: Callable[[Session], Result],
    model: nn.Module,
    direction: Any,
    loss_fns: Iterable[LossFn],
    *,
    reduce: Callable[[Tensor], Tensor] | None = None,
    ranks: Ranks | str | None = None,
    base_loss: float | None = None,
    grad: bool = False,
    plan: object = None,
) -> Result:
    """Call ``use`` for losses along a direction that leave no trace, on all ranks alike."""
    loss_fns = tuple(loss_fns)
    compared = None if plan is None else loss_fns[0]
    plan = f"{use.__qualname__} {plan}"
    begin = partial(
        _begin,
        model,
        direction,
        loss_fns,
        reduce=reduce,
        told=ranks,
        base_loss=base_loss,
        grad=grad,
        plan=plan,
        compared=compared,
    )
    with alone:
        trace = Trace()
        return undone(lambda: use(begin(trace)), trace)


@contextmanager
def open_session(model: nn.Module, direction: Any, loss_fns: Iterable[LossFn]) -> Iterator[Session]:
    """A session as a context, for what holds engines open between other work; interrupts may leave traces of it."""
    with alone:
        trace = Trace()
        try:
            yield _begin(model, direction, tuple(loss_fns), trace)
        finally:
            trace.put_back()
        trace.tell()


def _begin(
    model: nn.Module,
    direction: Any,
    loss_fns: Sequence[LossFn],
    trace: Trace,
    *,
    reduce: Callable[[Tensor], Tensor] | None = None,
    told: Ranks | str | None = None,
    base_loss: float | None = None,
    grad: bool = False,
    plan: str = "",
    compared: LossFn | None = None,
) -> Session:
    """Note everything, change only then what has to be, and agree."""
    if evaluating:
        raise RuntimeError("loss_fn must only return the loss, got one that measures; measure before or after it")
    outer = outermost(model, loss_fns)
    layout = layout_of(outer)
    ranks = ranks_for(model, reduce, outer, told)
    if isinstance(ranks, Unsettled) and compared is None and not ranks.were_together:
        ranks = named_ranks(outer) or Alone(reduce)
    pairs: Sequence[TrackedParam] = ()
    replay = None
    if layout.replays or not ranks.alike:
        # Unless all ranks know what a pass communicates, they tell each other.
        unknown = ranks.any_of([not is_known(outer)])[0]
        replay = Replay(outer, ranks.announced() if unknown else None)
    with as_one(ranks):
        if direction is not None:
            direction = direction.bind(model)
            _check_pieces(direction, layout if outer is model or layout.pieces is None else layout_of(model))
            pairs = track(direction.moves())
        ranks.note(model.parameters() if layout.pieces is None else layout.pieces)
        layout.prepare(trace)
        lockstep = Lockstep(outer, replay)
        # Before the guard, which notes the modules' hooks.
        lockstep.watch(trace)
        trace.add(evaluating.clear)
        guard = Guard(trace, model, () if direction is None else direction.parameters, loss_fns)
    trace.add(guard.restore)
    guard.hide_gradients()
    empty_cache()
    torch.set_grad_enabled(grad)
    # All that Python remembers of warnings already given stays as it is, unlike with catch_warnings.
    warnings.filters.insert(0, _FALSE_ALARM)  # type: ignore[attr-defined]
    session = Session(model, direction, pairs, ranks, guard, lockstep, base_loss, outer, layout)
    if isinstance(ranks, Unsettled):
        session.settle(ranks, None if ranks.were_together else compared, plan)
    if direction is not None:
        session.direction, session.base_loss = agreed(session.ranks, direction, base_loss)
    return session


def _check_pieces(direction: Any, layout: Layout) -> None:
    """Refuse a direction of tensors that are not what moves this model."""
    if getattr(direction, "_of_pieces", False):
        own = set(map(id, layout.pieces or ()))
        if not all(id(piece) in own for piece in direction.parameters):
            raise TypeError(
                "model must be the DeepSpeed engine whose optimizer the direction is of, got another module, or the "
                "one inside of it; pass the engine"
            )
    elif layout.pieces is not None and layout.repoints:
        raise TypeError(
            "direction must be of the engine's optimizer where ZeRO-3 holds no parameter as a whole, got one of "
            "parameters; make it by Direction.from_optimizer(engine.optimizer)"
        )


def is_compiled(model: nn.Module, loss_fn: LossFn) -> bool:
    """Whether the model, one of its modules or the closure was compiled by torch.compile or torch.jit."""
    # Of micro-batches' closures, the first.
    loss_fn = getattr(loss_fn, "first", loss_fn)
    if hasattr(loss_fn, "_torchdynamo_orig_callable") or isinstance(loss_fn, torch.jit.ScriptFunction):
        return True
    return any(
        isinstance(module, torch.jit.ScriptModule)
        or hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
