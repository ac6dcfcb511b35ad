"""A learning rate for SGD, found by following η_c for 40 steps that are undone again."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from sharpkern._undo import Trace, alone, undone
from sharpkern.directions.parts import Optimizers, Part, parts_of
from sharpkern.engines.evaluation.guard import Guard
from sharpkern.monitoring.monitor import Monitor, critical_lrs
from sharpkern.tensors.random_state import note_generators

Batch = TypeVar("Batch")

_NUM_STEPS, _SETTLED = 40, 20
# What trains best, over the median of the rates that follow η_c/2: chosen on small tasks, see docs/decisions.md.
_SGD, _MOMENTUM = 3.1, 1.1
# A loss of so many times the first one, and more, is of a run that is lost.
_LOST = 5.0


class Followed(NamedTuple):
    """One step on the way to a learning rate.

    Attributes:
        step: its number.
        lr: that it took, None before η_c was known.
        critical_lr: η_c before it, nan where there is none.
        status: of that measurement, or why there is none.
        loss: of its batch.
    """

    step: int
    lr: float | None
    critical_lr: float
    status: str
    loss: float


@dataclass(frozen=True)
class LRSuggestion:
    """A learning rate, and what it comes from.

    Attributes:
        lr: peak for a schedule, of the reference group, which is the first with a positive rate and a gradient; the
            other groups keep their ratios to it.
        median: of the rates of steps 20 to 39, which follow η_c/2.
        factor: lr/median, 3.1 for SGD and 1.1 with momentum.
        trail: the steps.
    """

    lr: float
    median: float
    factor: float
    trail: tuple[Followed, ...]

    def __str__(self) -> str:
        return f"lr {self.lr:.3g} = {self.factor} × {self.median:.3g}, the median of {len(self.trail[_SETTLED:])} rates"


def find_lr(
    model: nn.Module, optimizer: Optimizers, batches: Iterable[Batch], loss_of: Callable[[Batch], Tensor]
) -> LRSuggestion:
    """Suggest a learning rate for SGD, with or without momentum.

    It takes 40 steps on a copy of the optimizer, with half of the measured η_c as learning rate (at most doubled from
    step to step, begun at a tenth of it), and then puts everything back: weights, buffers, gradients and random streams
    are bit for bit what they were, also after an error or an interrupt; the optimizer is only read. On small tasks
    half of the suggestions were within 1.6 times of the best of a sweep, for a cosine schedule with a short warm-up.
    One was 30 times too large: where the loss does not fall in ``trail``, do not take the rate. The evidence is in
    docs/decisions.md.

    Args:
        model: in the mode that it trains in.
        optimizer: a `torch.optim.SGD`, or several that step together, whose rates give the ratios between groups.
        batches: 40 of them; begun anew where fewer come, as of a list or a loader. What an iterator has handed out is
            gone.
        loss_of: takes a batch and returns its scalar loss.

    Returns:
        LRSuggestion: the rate with its evidence.

    Raises:
        TypeError: the optimizer is another one than SGD, whose best rate this does not find.
        ValueError: there are too few batches.
        RuntimeError: the loss grew, or no step could be measured.

    Memory: a copy of the parameters and of the momentum, a gradient, and what a measurement takes.

    Examples:
        >>> import torch, sharpkern
        >>> _ = torch.manual_seed(0)
        >>> model, x, y = torch.nn.Linear(4, 1), torch.randn(64, 4), torch.randn(64, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> batches = list(zip(x.split(16), y.split(16)))
        >>> found = sharpkern.find_lr(model, optimizer, batches, lambda b: (model(b[0]) - b[1]).square().mean())
        >>> print(found)
        lr ... = 3.1 × ..., the median of 20 rates
    """
    parts = parts_of(optimizer)
    for part in parts:
        if not isinstance(part.optimizer, torch.optim.SGD) or type(part.optimizer).step is not torch.optim.SGD.step:
            raise TypeError(
                f"optimizer must be torch.optim.SGD, with or without momentum, got {type(part.optimizer).__name__}, "
                "for which a rate found this way may be far off; hold the rate of a schedule below η_c/4 by "
                "sharpkern.LRCap instead"
            )
    groups = [group for part in parts for group in part.optimizer.param_groups]
    if any(group["maximize"] for group in groups) or not any(float(group["lr"]) > 0 for group in groups):
        raise ValueError(
            "optimizer must lower its loss at a positive learning rate, got "
            f"{[(float(group['lr']), group['maximize']) for group in groups]} as (lr, maximize); call find_lr before a "
            "scheduler that warms up from 0 is made"
        )
    if not callable(loss_of) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be iterable and loss_of callable, got {type(batches).__name__} and "
            f"{type(loss_of).__name__}; pass a list or a loader, and a function of a batch"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; pass the model that is trained")

    def search() -> list[Followed]:
        parameters = [p for part in parts for group in part.optimizer.param_groups for p in group["params"]]
        guard = Guard(trace, model, parameters, [loss_of])
        sources = (batches, getattr(batches, "sampler", None))
        trace.add(guard.restore, *note_generators(getattr(source, "generator", None) for source in sources))
        # One by one: before torch 2.7 it took no several.
        trace.add(*(partial(_unsafe_preserve_version_counter(p).__exit__, None, None, None) for p in parameters))
        trace.add(*(partial(_write, p, p.detach().clone()) for p in parameters))
        guard.hide_gradients()
        return list(_follow(model, _copy_of(parts), _endless(batches), loss_of))

    with alone:
        trace = Trace()
        trail = undone(search, trace)
    rates = [one.lr for one in trail[_SETTLED:] if one.lr is not None]
    if not rates:
        raise RuntimeError(
            f"the loss must stay finite and measurable for {_NUM_STEPS} steps, got {trail[-1].loss:g} and "
            f"{trail[-1].status!r} in step {trail[-1].step}; check the loss, or begin from other weights"
        )
    momentum = any(group["momentum"] > 0 for part in parts for group in part.optimizer.param_groups)
    median, factor = statistics.median(rates), _MOMENTUM if momentum else _SGD
    return LRSuggestion(factor * median, median, factor, tuple(trail))


def _follow(
    model: nn.Module, optimizer: torch.optim.SGD, batches: Iterator[Batch], loss_of: Callable[[Batch], Tensor]
) -> Iterator[Followed]:
    """Train with half of η_c as learning rate."""
    monitor = Monitor(model, optimizer)
    given = [group["lr"] for group in optimizer.param_groups]
    lr: float | None = None
    least = 0.0
    for step in range(_NUM_STEPS):
        batch = next(batches)
        optimizer.zero_grad()
        trained = loss_of(batch)
        trained.backward()
        measurement = monitor(partial(loss_of, batch), loss=trained)
        loss = float(trained.detach())
        least = abs(loss) if step == 0 else least
        known = critical_lrs(record for record in monitor.history[-1:] if record.measurement is measurement)
        if known and known[0] > 0:
            half = 0.5 * known[0]
            lr = 0.1 * half if lr is None else min(2 * lr, half)
        elif known and lr is not None:
            lr = 0.5 * lr
        status = monitor.skipped[-1][1] if measurement is None else measurement.status
        yield Followed(step, lr, math.nan if measurement is None else measurement.critical_lr, status, loss)
        if not loss <= _LOST * (least + 1):
            return
        if lr is not None:
            reference = monitor.history[-1].lr
            assert reference is not None
            for group, one in zip(optimizer.param_groups, given, strict=True):
                group["lr"] = one * (lr / reference)
            optimizer.step()
            for group, one in zip(optimizer.param_groups, given, strict=True):
                group["lr"] = one


def _copy_of(parts: list[Part]) -> torch.optim.SGD:
    """The same optimizer of the same parameters, with a momentum of its own."""
    groups = [{**group, "lr": float(group["lr"])} for part in parts for group in part.optimizer.param_groups]
    copy = torch.optim.SGD(groups)
    for part in parts:
        for parameter, state in part.optimizer.state.items():
            copy.state[parameter] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
    return copy


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Go through the batches again and again."""
    while True:
        found = False
        for batch in batches:
            found = True
            yield batch
        if not found:
            raise ValueError(
                f"batches must give {_NUM_STEPS} batches or begin anew where they end, got no more; pass a list or a "
                "loader"
            )


@torch.no_grad()
def _write(parameter: Any, value: Tensor) -> None:
    parameter.copy_(value)
