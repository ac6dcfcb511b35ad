"""Critical sharpness beside the loss, every few steps of a training loop."""

import math
import operator
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from sharpkern._support.files import append_line
from sharpkern.directions.direction import Direction
from sharpkern.directions.parts import parts_of
from sharpkern.distributed.declared import splits
from sharpkern.distributed.deepspeed import clip_of
from sharpkern.distributed.ranks import as_one
from sharpkern.distributed.sharding import local, reshard
from sharpkern.engines.evaluation.closure import LossFn
from sharpkern.engines.settling import outermost, ranks_for
from sharpkern.engines.timing import EngineTimes
from sharpkern.errors import HeadroomWarning, NoUpdateError, UnmovedWarning, warn
from sharpkern.measures.blockwise import Blocks, blocks_of, measure_blocks
from sharpkern.measures.critical import measure, step_of
from sharpkern.measures.micro_batches import Clip, Losses, Several
from sharpkern.measures.precompile import told_of_compiling
from sharpkern.measures.result import Measurement, MeasureOptions, Options
from sharpkern.measures.run import constant_loss
from sharpkern.monitoring.logs import sender
from sharpkern.monitoring.reports import Reports
from sharpkern.search.line_search import SearchMemory

# Measured steps that the median of η_c is taken of, for an alarm, a suggested learning rate and a cap; and the share of
# it that a learning rate may be.
RECENT, SHARE = 5, 0.25


@dataclass(frozen=True)
class Record:
    """One measured step.

    Attributes:
        step: number of the Monitor's call, from 0.
        lr: learning rate of the direction's reference group at that step.
        measurement: of the gradient's own batch.
        heldout: of the held-out loss along the same direction, or None.
        blocks: of the batch's loss with one block moving at a time, by the block's name; empty where not asked for.
    """

    step: int
    lr: float | None
    measurement: Measurement
    heldout: Measurement | None = None
    blocks: Mapping[str, Measurement] = field(default_factory=dict)

    def row(self) -> dict[str, float | int | str | None]:
        """The record as one flat row; learning rates, and sharpness in 1/learning-rate."""
        m, heldout = self.measurement, self.heldout
        return {
            "step": self.step,
            "lr": self.lr,
            "loss": m.base_loss,
            "lambda_c": m.sharpness,
            "critical_lr": m.critical_lr,
            # How many times the learning rate could be taken before the loss rises; a bound on it says nothing.
            "headroom": m.critical_lr / self.lr if self.lr and m.status != "unbounded" else None,
            "status": m.status,
            "error": m.error,
            "directional_sharpness": m.directional_sharpness,
            "forwards": m.forwards,
            "engine": m.engine,
            "retained": m.retained,
            "seconds": m.seconds,
            "heldout_loss": heldout.base_loss if heldout else None,
            "heldout_lambda_c": heldout.sharpness if heldout else None,
            "heldout_critical_lr": heldout.critical_lr if heldout else None,
            "heldout_status": heldout.status if heldout else None,
            **{f"by_block/{name}": one.sharpness for name, one in self.blocks.items()},
        }


class CallbackOptions(MeasureOptions, total=False):
    """The keyword arguments that `Monitor` shares with the callbacks of frameworks."""

    every: int | Callable[[int], bool]
    warn_below: float | None
    blocks: bool | Blocks


class MonitorOptions(CallbackOptions, total=False):
    """The keyword arguments of `Monitor`."""

    log: Any
    masters: Mapping[nn.Parameter, Tensor] | None
    scaler: Any


class Monitor(Reports):
    """Measures critical sharpness in a training loop; call it after ``backward()`` and before ``optimizer.step()``.

    Args:
        model: the model that is trained.
        optimizer: its optimizer, or a list or container of those that step together; Δθ is the update that their next
            step would make. An `UnmovedWarning` tells, once, of parameters with gradients that none of them holds.
        every: measure on every so many calls, from the first on; or a function of the call's number that says whether.
        log: called with a flat dictionary, and with ``step=`` where it takes that; or an object with ``add_scalar``,
            such as TensorBoard's ``SummaryWriter``. ``wandb.log`` is called so that nothing of the loop's own is
            dropped, and the curves stand against ``sharpness/step``. Where no rise was found there is
            ``sharpness/critical_lr_bound`` in place of λ_c and η_c. Or the path of a ``.jsonl`` file: each measurement
            appends a line of JSON with its whole row, null where there is no finite value, and a cap one of its own;
            on several ranks the first one does.
        blocks: True, or blocks as for `blockwise_critical_sharpness`, to measure λ_c of each block in every measured
            step too: some forward passes more for each. They are logged as ``sharpness/by_block/<name>``.
        masters: full-precision copies of 16-bit parameters, see `Direction.from_optimizer`.
        scaler: the loop's ``GradScaler``, if it has one: scaled gradients cannot be told from others without it.
        warn_below: ratio below which a `HeadroomWarning` is raised where the median of the last 5 measured η_c/η falls
            below it, once for each fall: 1.0 where the steps themselves raise the loss of their batch. None for never.
            Good runs fall below 1.5 now and then. The loss itself warns as early.
        **options: of `sharpkern.critical_sharpness`, such as ``rtol`` or ``engine``. On a GPU, outside of distributed
            runs, "auto" times passes of one and of 8 step sizes, once for each size of batch, and takes the quicker:
            name an engine where two runs have to agree to the last bit.

    Attributes:
        history: one `Record` per measured step.
        skipped: (step, reason) of steps that were due but whose update is none: learning rate 0, gradients that are all
            0 or not finite, a step that moves nothing or not to finite weights; or whose loss is the same everywhere.
        step: number of the next call, from 0; may be set, where a run that is taken up knows its step.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range.

    Memory: while it measures, one Δθ of the size of the parameters, and what the engine takes; nothing between.

    Examples:
        >>> import torch, sharpkern
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> monitor = sharpkern.Monitor(model, optimizer, every=10)
        >>> x, y = torch.randn(8, 4), torch.randn(8, 1)
        >>> for step in range(20):
        ...     loss_fn = lambda: torch.nn.functional.mse_loss(model(x), y)
        ...     optimizer.zero_grad()
        ...     loss = loss_fn()
        ...     loss.backward()
        ...     _ = monitor(loss_fn, loss=loss)
        ...     optimizer.step()
        >>> [record.step for record in monitor.history]
        [0, 10]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        every: int | Callable[[int], bool] = 1,
        log: Any = None,
        blocks: bool | Blocks = False,
        masters: Mapping[nn.Parameter, Tensor] | None = None,
        scaler: Any = None,
        warn_below: float | None = None,
        **options: Unpack[MeasureOptions],
    ) -> None:
        if not callable(every) and (isinstance(every, bool) or not isinstance(every, int)):
            raise TypeError(f"every must be an int or a function of the step, got {every!r}; leave it out for 1")
        if not callable(every) and every < 1:
            raise ValueError(f"every must be at least 1, got {every}; leave it out for 1")
        # Any other text is more likely the name of a logger.
        is_path = isinstance(log, os.PathLike) or (isinstance(log, str) and log.endswith(".jsonl"))
        if log is not None and not is_path and not callable(log) and not hasattr(log, "add_scalar"):
            raise TypeError(
                "log must be callable, have add_scalar, or be the path of a .jsonl file, got "
                f"{log if isinstance(log, str) else type(log).__name__}; pass wandb.log"
            )
        if warn_below is not None and (isinstance(warn_below, bool) or not isinstance(warn_below, (int, float))):
            raise TypeError(f"warn_below must be a number or None, got {warn_below!r}; pass 1.0, or leave it out")
        if warn_below is not None and not 0 < warn_below < math.inf:
            raise ValueError(f"warn_below must be a positive finite ratio, got {warn_below}; pass 1.0, or leave it out")
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got {type(model).__name__}; pass the model that is trained"
            )
        parts_of(optimizer)
        self._model = model
        self._optimizer = optimizer
        self._every = every
        self._send_to = None if log is None or is_path else sender(log)
        self._file = log if is_path else None
        self._options = Options.of(Monitor, options)
        self._blocks = blocks if isinstance(blocks, bool) else blocks_of(model, blocks, self._options.ranks)
        self._block_memories: dict[str, SearchMemory] = {}
        self._masters = masters
        self._scaler = scaler
        self._warn_below = warn_below
        self._is_below = False
        self._has_told_unmoved = False
        self.step = 0
        self._memory: SearchMemory | None = None
        self._heldout_memory: SearchMemory | None = None
        self._pace, self._heldout_pace = EngineTimes(), EngineTimes()
        self.history: list[Record] = []
        self.skipped: list[tuple[int, str]] = []

    @property
    def is_due(self) -> bool:
        """Whether the next call measures; asks ``every`` where that is a function, as the call will."""
        return bool(self._every(self.step) if callable(self._every) else self.step % self._every == 0)

    def __call__(
        self,
        loss_fn: Several,
        heldout: LossFn | None = None,
        *,
        loss: Losses = None,
        direction: Direction | Callable[[], Direction] | None = None,
        weights: Sequence[float] | None = None,
        clip: Clip = None,
    ) -> Measurement | None:
        """Measure if this step is due; of several closures, the micro-batches of the step."""
        due, step = self.is_due, self.step
        self.step += 1
        if not due:
            return None
        made = self._make(step, direction, [loss_fn] if heldout is None else [loss_fn, heldout])
        if made is None:
            return None
        direction, other = made, None
        try:
            with told_of_compiling(self._model):
                measurement, self._memory = measure(
                    self._model,
                    loss_fn,
                    direction,
                    self._options,
                    trained_loss=loss,
                    memory=self._memory,
                    pace=self._pace,
                    weights=weights,
                    clip=clip,
                    draw=step,
                )
        except NoUpdateError as error:
            # Shares of a direction may each be zero, and only all of them together say that there is none.
            self.skipped.append((step, str(error)))
            return None
        reason = constant_loss(measurement.base_loss, measurement.probes)
        if reason is not None:
            # By design, perhaps, as a loss of ratios to itself is; on all ranks alike.
            self.skipped.append((step, reason))
            return measurement
        if heldout is not None:
            # The slope of another batch's loss is not the gradient's: the search finds it by itself.
            sideways = replace(direction, slope=None)
            other, self._heldout_memory = measure(
                self._model,
                heldout,
                sideways,
                replace(self._options, sample=None),
                memory=self._heldout_memory,
                pace=self._heldout_pace,
            )
        parts: Mapping[str, Measurement] = {}
        if self._blocks:
            blocks = blocks_of(self._model, None, self._options.ranks) if self._blocks is True else self._blocks
            options, known = self._options, None if callable(loss_fn) else loss
            of_step = step_of(
                self._model, loss_fn, direction, options, weights=weights, losses=known, clip=clip, name="loss"
            )
            parts = measure_blocks(self._model, of_step, direction, blocks, options, self._block_memories, step)
        record = Record(step, direction.lr, measurement, other, parts)
        self.history.append(record)
        self._send(record)
        self._warn(record)
        return measurement

    def _make(
        self, step: int, direction: Direction | Callable[[], Direction] | None, loss_fns: Sequence[Any]
    ) -> Direction | None:
        """The direction of a step, or None on all ranks where one has none."""
        try:
            outer = outermost(self._model, loss_fns)
            ranks = ranks_for(self._model, self._options.reduce, outer, self._options.ranks)
            with as_one(ranks):
                if direction is None:
                    direction = Direction._from_optimizer(
                        self._optimizer,
                        self._masters,
                        self._scaler,
                        is_share=splits(self._options.ranks),
                        clip=clip_of(outer),
                    )
                    self._tell_unmoved()
                return direction if isinstance(direction, Direction) else direction()
        except NoUpdateError as error:
            # A warm-up that starts at 0, a step that the loss scaler will skip: the run goes on, and so does this.
            self.skipped.append((step, str(error)))
            return None

    def _tell_unmoved(self) -> None:
        """Warn once of parameters whose gradients belong to a step that another optimizer takes."""
        parts = parts_of(self._optimizer)
        # DeepSpeed's optimizers hold tensors of their own for all of the model.
        if self._has_told_unmoved or any(part.wrapped is not None for part in parts):
            return
        known = {id(place.parameter) for part in parts for place in part.places()}
        known.update(id(p) for p, master in (self._masters or {}).items() if id(master) in known)
        reshard(self._model)
        unmoved = [
            name
            for name, p in self._model.named_parameters()
            if id(p) not in known and p.requires_grad and p.grad is not None and local(p.grad).any()
        ]
        if unmoved and _is_first_rank():
            self._has_told_unmoved = True
            warn(
                f"{len(unmoved)} parameters of the model hold gradients and stand in no optimizer of the monitor (the "
                f"first is '{unmoved[0]}'), so the step that is measured leaves them where they are; where another "
                "optimizer moves them in the same step, pass all of them, as Monitor(model, [optimizer, other])",
                UnmovedWarning,
            )

    def suggest_lr(self) -> float | None:
        """A quarter of the median of the last 5 measured η_c: an upper bound for the schedule.

        "ascent" counts as 0, "unbounded" as its bound. `sharpkern.LRCap` holds a schedule below it. It is no reason to
        raise a rate: η_c grows with the rate, so that it never says stop.

        Returns:
            float: a learning rate of the reference group, the other groups keeping their ratios to it; 0.0 where most
            of these updates go uphill; None where nothing was measured, as just after a checkpoint was loaded, which
            holds no history. When the reference group changes, as when the first one is frozen, wait for 5 more.
        """
        recent = critical_lrs(self.history)[-RECENT:]
        return SHARE * statistics.median(recent) if recent else None

    def __str__(self) -> str:
        if not self.history:
            return "λ_c not measured yet"
        record = self.history[-1]
        m = record.measurement
        if m.status != "converged":
            return f"step {record.step}: loss {m.base_loss:.4g}, λ_c {m.status}"
        against = f" = {m.critical_lr / record.lr:.3g} × lr" if record.lr else ""
        return f"step {record.step}: loss {m.base_loss:.4g}, λ_c {m.sharpness:.4g}, η_c {m.critical_lr:.3g}{against}"

    def state_dict(self) -> dict[str, Any]:
        """The step count and what warm-starts the next search: plain numbers, for a checkpoint."""
        of_blocks = {name: memory.to_dict() for name, memory in self._block_memories.items()}
        return {
            "step": self.step,
            "memory": self._memory.to_dict() if self._memory else None,
            "heldout_memory": self._heldout_memory.to_dict() if self._heldout_memory else None,
            "is_below": self._is_below,
            **({"block_memories": of_blocks} if of_blocks else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Args:
            state: what `state_dict` returned, of this version or an older one. Where its guess for the next search is
                no possible one, such as nan, that search begins anew.

        Raises:
            ValueError: it is something else; the Monitor stays as it was.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"state must be what state_dict() returned, got {type(state).__name__}")
        missing = {"step", "memory", "heldout_memory"} - set(state)
        if missing:
            raise ValueError(f"state must be what state_dict() returned, got one without {sorted(missing)}")
        step, is_below = state["step"], state.get("is_below", False)
        if isinstance(step, bool) or not hasattr(step, "__index__") or step < 0:
            raise ValueError(f"state['step'] must be a count of calls, got {step!r}; load what state_dict() gave")
        if not isinstance(is_below, bool):
            raise ValueError(f"state['is_below'] must be True or False, got {is_below!r}; load what state_dict() gave")
        saved, of_blocks = (state["memory"], state["heldout_memory"]), state.get("block_memories", {})
        if not isinstance(of_blocks, Mapping):
            raise ValueError(
                f"state['block_memories'] must map names of blocks to memories, got {of_blocks!r}; load what "
                "state_dict() gave"
            )
        memories = [None if memory is None else SearchMemory.from_dict(memory) for memory in saved]
        block_memories = {name: SearchMemory.from_dict(memory) for name, memory in of_blocks.items()}
        # Nothing changes before all of it is known to be good.
        self.step, self._is_below = operator.index(step), is_below
        self._memory, self._heldout_memory = memories
        self._block_memories = block_memories

    def _warn(self, record: Record) -> None:
        """Warn where the median of η_c/η has fallen below the ratio since the last measurement."""
        if self._warn_below is None:
            return
        recent = list(islice((one for one in reversed(self.history) if one.lr and critical_lrs([one])), RECENT))
        if len(recent) < RECENT or recent[0] is not record:
            return
        headroom = statistics.median(one.measurement.critical_lr / one.lr for one in recent if one.lr)
        fell, self._is_below = headroom < self._warn_below and not self._is_below, headroom < self._warn_below
        if fell and _is_first_rank():
            median = statistics.median(critical_lrs(recent))
            # What it is to be below, and what the last measurements ask for.
            suggested = median * min(SHARE, 1 / self._warn_below)
            remedy = f"try {suggested:.3g} or less" if median else "look at the direction, which goes uphill"
            warn(
                f"step {record.step}: the learning rate is {record.lr:.3g}, and of the last {RECENT} measurements the "
                f"median of η_c is {median:.3g} and that of η_c over the learning rate {headroom:.3g}, below "
                f"{self._warn_below:.3g}; {remedy}, lengthen the warm-up, or cap the rate by sharpkern.LRCap",
                HeadroomWarning,
            )

    def send(self, values: Mapping[str, Any], step: int) -> None:
        """Send values of a step to where the measurements go."""
        if self._send_to is not None:
            self._send_to(values, step)
        elif self._file is not None and _is_first_rank():
            append_line(self._file, {"step": step, **values})

    def _send(self, record: Record) -> None:
        if self._file is not None:
            self.send(record.row(), record.step)
            return
        status, heldout = record.measurement.status, record.heldout
        # A bound is no value: of a curve it would leave nothing to see but itself.
        names = [] if status == "unbounded" else ["lambda_c", "critical_lr", "headroom"]
        names += ["forwards", "directional_sharpness", "lr", "loss"]
        names += [] if heldout is None or heldout.status == "unbounded" else ["heldout_lambda_c"]
        names += [f"by_block/{name}" for name, one in record.blocks.items() if one.status != "unbounded"]
        row = record.row()
        # What is not a number stays out of the curves; what came of the measurement is told beside.
        values = {f"sharpness/{name}": value for name in names if _is_finite(value := row[name])}
        values |= {"sharpness/converged": 0.0, f"sharpness/{status}": 1.0}
        if status == "unbounded":
            values["sharpness/critical_lr_bound"] = record.measurement.critical_lr
        self.send(values, record.step)


def critical_lrs(records: Iterable[Record]) -> list[float]:
    """What is known of η_c in records, 0 where the loss rises at once and the bound where no rise was found."""
    measured = [record.measurement for record in records]
    return [m.critical_lr for m in measured if m.status in {"converged", "ascent", "unbounded"}]


def _is_finite(value: float | int | str | None) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_first_rank() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
