"""A cap on the learning rate of any schedule: a share of the critical learning rate, measured as the run goes on."""

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Required

from sharpkern.directions.parts import Part, parts_of
from sharpkern.monitoring.monitor import RECENT, SHARE, Monitor, Record, critical_lrs

_OPTIONS = ("share", "warm_steps", "freeze_after")
# How far a schedule may go beyond its peak by rounding.
_ROUNDING = 1e-6


class CapOptions(TypedDict, total=False):
    """The keyword arguments of `LRCap`."""

    peak: Required[float]
    share: float
    warm_steps: int
    freeze_after: int | None


@dataclass(frozen=True)
class CapRecord:
    """What a cap made of one measured step.

    Attributes:
        step: number of the Monitor's call.
        scheduled: learning rate of the schedule, in the direction's reference group.
        lr: the rate that the step takes in its place.
        limit: what the peak is held to from here on, a learning rate; inf as long as nothing was found.
        why: "schedule", the rate is below the limit; "capped"; "halved", the median of η_c is 0.
    """

    step: int
    scheduled: float
    lr: float
    limit: float
    why: str


class LRCap:
    """Holds the learning rate of any schedule below a share of η_c. **It changes the run**, as nothing else here does.

    With η̂ the median of the last 5 measured η_c (0 for "ascent", the bound for "unbounded"), a step takes

        min(schedule, η̂/4)                        in the first 40 steps,
        schedule/peak · min(peak, η̂/4)            afterwards, which keeps the schedule's shape.

    Where the median is 0 the limit η̂/4 is halved instead. All groups are scaled alike. Only inside of
    ``optimizer.step()`` the optimizer holds the capped rates: schedulers, loggers and checkpoints see the scheduled
    ones, also where a ``GradScaler`` skips the step.

    Call ``cap.step()`` in every step, between ``monitor(...)`` and ``optimizer.step()``; where a closure holds the
    backward pass, in the closure. It is for peaks that may be 10 or 100 times too large, and in place of a long
    warm-up. A large η_c is no reason to raise a rate, and the cap never does. With momentum it saves most runs and not
    all; docs/decisions.md has the evidence.

    Args:
        monitor: measures the run that is capped, at the steps of `LRCap.every`.
        optimizer: whose rates are capped: the monitor's, or a list or container, as `sharpkern.Monitor` takes them.
        peak: the schedule's highest learning rate in the reference group, which is the first with a positive rate and a
            gradient; of a constant rate, that rate.
        share: of η̂ that the rate may take.
        warm_steps: in which the rate follows η̂; with momentum keep some 15 steps of warm-up in the schedule as well.
        freeze_after: measurements from this step on no longer count; None lets all of them count.

    Attributes:
        history: one `CapRecord` per measured step; `sharpness/capped_lr` and `sharpness/cap` go to the monitor's log.
        num_steps: steps that were taken under the cap.
        limit: of the rate, share · η̂; inf as long as nothing was measured.

    Raises:
        TypeError: an argument is of the wrong kind, or the optimizer's step runs no hooks.
        ValueError: an argument is out of range, or another cap holds the optimizer.

    Memory: none.

    Examples:
        >>> import torch, sharpkern
        >>> _ = torch.manual_seed(0)
        >>> model, x, y = torch.nn.Linear(4, 1), torch.randn(8, 4), torch.randn(8, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
        >>> schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        >>> monitor = sharpkern.Monitor(model, optimizer, every=sharpkern.LRCap.every(10))
        >>> cap = sharpkern.LRCap(monitor, optimizer, peak=100.0)
        >>> for step in range(20):
        ...     loss_fn = lambda: torch.nn.functional.mse_loss(model(x), y)
        ...     optimizer.zero_grad()
        ...     loss = loss_fn()
        ...     loss.backward()
        ...     _ = monitor(loss_fn, loss=loss)
        ...     cap.step()
        ...     optimizer.step()
        ...     schedule.step()
        >>> cap.history[0].why, cap.history[0].lr == monitor.history[0].measurement.critical_lr / 4
        ('capped', True)
    """

    def __init__(
        self,
        monitor: Monitor,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        peak: float,
        share: float = SHARE,
        warm_steps: int = 40,
        freeze_after: int | None = None,
    ) -> None:
        if not isinstance(monitor, Monitor):
            raise TypeError(f"monitor must be a sharpkern.Monitor, got {type(monitor).__name__}; pass the loop's own")
        _check_number("peak", peak, math.inf, "pass the highest learning rate of the schedule")
        _check_number("share", share, 1.0, "leave it out for 0.25")
        _check_counts(warm_steps, freeze_after)
        self._parts = {id(part.optimizer): part for part in parts_of(optimizer)}
        for part in self._parts.values():
            if not getattr(type(part.optimizer).step, "hooked", False):
                raise TypeError(
                    "optimizer must be a torch.optim.Optimizer whose step runs its hooks, got "
                    f"{type(part.optimizer).__name__}; cap the one inside of it"
                )
            hooks = part.optimizer._optimizer_step_pre_hooks.values()
            if any(isinstance(getattr(hook, "__self__", None), LRCap) for hook in hooks):
                raise ValueError(
                    "optimizer must have one cap, got one that is capped already; call the remove() of that cap first"
                )
            if not all(place.has_lr for place in part.places()):
                raise ValueError(
                    f"optimizer must have a learning rate in all groups, got {type(part.optimizer).__name__}, which "
                    "finds its own step; leave the cap out"
                )
        self._monitor, self._peak, self._share = monitor, float(peak), float(share)
        self._warm_steps, self._freeze_after = warm_steps, freeze_after
        self.history: list[CapRecord] = []
        self.num_steps = 0
        self.limit = math.inf
        self._critical_lrs: list[float] = []
        self._seen = monitor.history[-1] if monitor.history else None
        self._factor = 1.0
        # The reference group, and all rates that were scheduled when the factor was worked out.
        self._reference = 0
        self._rates: dict[int, list[float]] = {}
        # Optimizers whose step has yet to take the factor, and whether it has been counted.
        self._waiting: set[int] = set()
        self._counted = True
        # The step that is under way, and its groups with their scheduled and their capped rates.
        self._step: tuple[FrameType, Optimizer] | None = None
        self._capped: list[tuple[dict[str, Any], Any, Any]] = []
        self._handles = [
            handle
            for part in self._parts.values()
            for handle in (
                part.optimizer.register_step_pre_hook(self._before),
                part.optimizer.register_step_post_hook(self._after),
                part.optimizer.register_state_dict_pre_hook(lambda _: self.put_back()),
            )
        ]

    @staticmethod
    def every(then: int = 10, *, warm_steps: int = 40, freeze_after: int | None = None) -> Callable[[int], bool]:
        """When to measure: steps 0 to 5, every second of the warm steps, and every so many ``then``.

        Args:
            then: interval after the warm steps.
            warm_steps: as of the cap.
            freeze_after: as of the cap; nothing is measured from there on.

        Returns:
            Callable: for ``Monitor(every=...)``.

        Raises:
            TypeError: an argument is no int.
            ValueError: an argument is out of range.
        """
        _check_count("then", then, 1, "leave it out for 10")
        _check_counts(warm_steps, freeze_after)

        def is_due(step: int) -> bool:
            warm = step < 6 or (step < warm_steps and step % 2 == 0)
            return (freeze_after is None or step < freeze_after) and (warm or step % then == 0)

        return is_due

    def step(self) -> None:
        """Work out the rate of the next ``optimizer.step()``; called again before it, it does the same again.

        Raises:
            ValueError: the schedule has gone beyond ``peak``.
            RuntimeError: rates were changed after a step that raised, see `put_back`.
        """
        self.put_back()
        scheduled = self._scheduled()
        self._rates = {id(part.optimizer): rates_of(part) for part in self._parts.values()}
        if scheduled > self._peak * (1 + _ROUNDING):
            raise ValueError(
                f"peak must be the highest learning rate of the schedule, {self._peak:g}, got {scheduled:g} from it; "
                "pass the highest as peak="
            )
        # In the first steps the schedule itself is capped, and its peak afterwards.
        top = scheduled if self.num_steps < self._warm_steps else self._peak
        records = self._new_records()
        if records and (self._freeze_after is None or self.num_steps < self._freeze_after):
            # In units of the cap's own group: the direction's may be another one where gradients come and go.
            ratios = [scheduled / record.lr if record.lr and scheduled > 0 else 1.0 for record in records]
            found = [eta * ratio for one, ratio in zip(records, ratios, strict=True) for eta in critical_lrs([one])]
            self._critical_lrs = [*self._critical_lrs, *found][-RECENT:]
            if self._critical_lrs:
                median = statistics.median(self._critical_lrs)
                self.limit = self._share * median if median > 0 else min(self.limit, top) / 2
        lr = min(scheduled, scheduled / top * min(top, self.limit)) if scheduled > 0 else 0.0
        self._factor = lr / scheduled if lr < scheduled else 1.0
        self._waiting, self._counted = set(self._parts), False
        if records:
            self._tell(records[-1].step, scheduled, lr)
        if self._step is not None and is_called_from(sys._getframe(1), self._step[0]):
            self._scale(self._step[1])

    def put_back(self) -> None:
        """Give the optimizer its scheduled rates back, as every step does; for loops that go on after one has raised.

        Raises:
            RuntimeError: something else has changed them since.
        """
        capped, self._capped = self._capped, []
        changed = [(taken, group["lr"]) for group, _, taken in capped if float(group["lr"]) != float(taken)]
        for group, scheduled, taken in capped:
            now = group["lr"]
            if float(now) != float(taken):
                continue
            if isinstance(now, Tensor):
                now.copy_(scheduled)
            else:
                group["lr"] = scheduled
        for taken, now in changed:
            raise RuntimeError(
                f"the learning rate must stay {float(taken):g} in a step that is capped, got {float(now):g}; call "
                "the scheduler after optimizer.step(), and cap.put_back() before it where the step has raised"
            )

    def remove(self) -> None:
        """Take the cap off the optimizer."""
        for handle in self._handles:
            handle.remove()
        self.put_back()
        self._step = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the monitor's: plain numbers."""
        limit = self.limit if self.limit < math.inf else None
        return {"num_steps": self.num_steps, "critical_lrs": list(self._critical_lrs), "limit": limit}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Args:
            state: what `state_dict` returned.

        Raises:
            ValueError: it is something else; the cap stays as it was.
        """
        if not isinstance(state, Mapping) or not {"num_steps", "critical_lrs", "limit"} <= set(state):
            raise ValueError(f"state must be what state_dict() of an LRCap returned, got {state!r}; load that")
        num_steps, found, limit = state["num_steps"], state["critical_lrs"], state["limit"]
        rates = [*found, *([] if limit is None else [limit])] if isinstance(found, (list, tuple)) else [None]
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 0:
            raise ValueError(f"state['num_steps'] must be a count of steps, got {num_steps!r}; load what it gave")
        if not all(isinstance(one, (int, float)) and 0 <= one < math.inf for one in rates):
            raise ValueError(f"state must hold learning rates, got {found!r} and {limit!r}; load what it gave")
        self.num_steps, self._critical_lrs = num_steps, list(found)
        self.limit = math.inf if limit is None else limit
        self._new_records()

    def _new_records(self) -> list[Record]:
        """The monitor's records since the last call."""
        new: list[Record] = []
        for record in reversed(self._monitor.history):
            if record is self._seen:
                break
            new.insert(0, record)
        self._seen = new[-1] if new else self._seen
        return new

    def _scheduled(self) -> float:
        """The learning rate of the reference group, which stays the same one; 0 where no group has a positive one."""
        places = [place for part in self._parts.values() for place in part.places()]
        rates = {id(place.group): place.lr() for place in places}
        # A closure's gradients may be yet to come.
        known = [place for place in places if place.parameter.grad is not None] or places
        if rates.get(self._reference, 0.0) == 0:
            self._reference = next((id(place.group) for place in known if place.lr() > 0), 0)
        return rates.get(self._reference, 0.0)

    def _tell(self, step: int, scheduled: float, lr: float) -> None:
        halved = self._critical_lrs and statistics.median(self._critical_lrs) == 0
        why = "schedule" if lr == scheduled else "halved" if halved else "capped"
        self.history.append(CapRecord(step, scheduled, lr, self.limit, why))
        values = {"sharpness/capped_lr": lr} | ({"sharpness/cap": self.limit} if self.limit < math.inf else {})
        self._monitor.send(values, step)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        frame = sys._getframe(1)
        if self._step is not None and is_called_from(frame, self._step[0]):
            # The step of a base class, which has the same hooks, and is a part of this one.
            return
        self.put_back()
        self._step = frame, optimizer
        if id(optimizer) in self._waiting:
            if rates_of(self._parts[id(optimizer)]) != self._rates[id(optimizer)]:
                self._step = None
                raise RuntimeError(
                    "learning rates must stay what they were in cap.step(), got others in optimizer.step(); call the "
                    "scheduler after optimizer.step()"
                )
            self._scale(optimizer)
        elif not any(map(callable, (*args[1:], *kwargs.values()))):
            self._refuse_uncapped()

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._step is None or sys._getframe(1) is not self._step[0]:
            return
        self._step = None
        self.put_back()
        if id(optimizer) not in self._waiting:
            self._refuse_uncapped()
        self._waiting.discard(id(optimizer))
        self.num_steps += not self._counted
        self._counted = True

    def _refuse_uncapped(self) -> None:
        raise RuntimeError(
            "cap.step() must be called before every optimizer.step(), got a step without it; call it also where the "
            "monitor is not due, or take the cap off with cap.remove()"
        )

    @torch.no_grad()
    def _scale(self, optimizer: Optimizer) -> None:
        """Give an optimizer its capped rates."""
        if self._factor == 1.0:
            return
        groups = {id(place.group): place.group for place in self._parts[id(optimizer)].places()}
        tensors: set[int] = set()
        for group in groups.values():
            assert isinstance(group, dict)
            lr = group["lr"]
            if not isinstance(lr, Tensor):
                group["lr"] = lr * self._factor
                self._capped.append((group, lr, group["lr"]))
            elif id(lr) not in tensors:
                # Groups may share one.
                tensors.add(id(lr))
                scheduled = lr.clone()
                self._capped.append((group, scheduled, lr.mul_(self._factor).clone()))


def cap_of(monitor: Monitor, optimizer: Optimizer | Sequence[Optimizer], options: CapOptions | None) -> LRCap | None:
    """The cap that a callback's option asks for."""
    if options is not None and not (isinstance(options, Mapping) and options.keys() - {"peak"} <= set(_OPTIONS)):
        raise TypeError(f"cap must be a dictionary of {{'peak': ...}} and of {_OPTIONS}, got {options!r}; see LRCap")
    if options is not None and "peak" not in options:
        raise TypeError(f"cap must have a 'peak', got {options!r}; pass the schedule's highest learning rate")
    return None if options is None else LRCap(monitor, optimizer, **options)


def with_cap(state: dict[str, Any], cap: LRCap | None) -> dict[str, Any]:
    """A monitor's state and that of its cap."""
    return state if cap is None else {**state, "cap": cap.state_dict()}


def load_cap(cap: LRCap | None, state: Mapping[str, Any]) -> None:
    """Take up what `with_cap` made, unless there is no cap, or was none."""
    if cap is not None and "cap" in state:
        cap.load_state_dict(state["cap"])


def is_called_from(frame: FrameType, caller: FrameType) -> bool:
    """Whether a frame is another one, or was called from it."""
    above: FrameType | None = frame
    while above is not None and above is not caller:
        above = above.f_back
    return above is not None


def rates_of(part: Part) -> list[float]:
    """The learning rates that an optimizer holds."""
    return [place.lr() for place in part.places()]


def _check_counts(warm_steps: Any, freeze_after: Any) -> None:
    _check_count("warm_steps", warm_steps, 0, "leave it out for 40")
    if freeze_after is not None:
        _check_count("freeze_after", freeze_after, 1, "leave it out to let all measurements count")


def _check_number(name: str, value: Any, below: float, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a positive number, got {value!r}; {remedy}")
    if not 0 < value < below:
        raise ValueError(f"{name} must be positive and below {below:g}, got {value}; {remedy}")


def _check_count(name: str, value: Any, least: int, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}; {remedy}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}; {remedy}")
