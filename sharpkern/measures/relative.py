"""Relative critical sharpness: the curvature of one task's loss along the update of another."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn
from typing_extensions import Unpack

from sharpkern.directions.direction import Direction
from sharpkern.engines.session import Session, in_session
from sharpkern.engines.swapped import Memory
from sharpkern.engines.tracked import TrackedParam
from sharpkern.engines.virtual.layers import Kept
from sharpkern.errors import EngineUnsupportedError
from sharpkern.measures.critical import check_arguments, measure
from sharpkern.measures.micro_batches import Several, Step
from sharpkern.measures.result import Measurement, MeasureOptions, Options
from sharpkern.measures.run import Run
from sharpkern.tensors.free import free_bytes

_ROOM_ON_CPU = 2**30


def relative_critical_sharpness(
    model: nn.Module, tasks: Mapping[str, Several], direction: Direction, **options: Unpack[MeasureOptions]
) -> dict[str, Measurement]:
    """Measure λ_c^{task→direction} = 2/η_c of every task's loss along one update.

    The slope of a task's loss along the update is not known beforehand; the search finds it from the probes. A task
    whose loss rises from the first step on has status "ascent" and sharpness inf: a legitimate outcome here.

    Args:
        model: evaluated by the tasks' closures.
        tasks: name of the task → closure that returns its scalar loss, as ``loss_fn`` of `critical_sharpness`; or a
            sequence of closures, or of (closure, weight), whose mean is the task's loss.
        direction: Δθ, such as the update of an optimizer on a mix of the tasks' data.
        **options: of `critical_sharpness`, ``base_loss`` excepted.

    Returns:
        dict: name of the task → its measurement, in the order of ``tasks``; sharpness in 1/learning-rate.

    Raises:
        TypeError: ``tasks`` is no mapping, or as `critical_sharpness`.
        ValueError: there is no task, or as `critical_sharpness`.

    Memory: as one `critical_sharpness`. Weights that were formed for one task serve all that ask for the same step
    sizes. By the virtual engine, those of linear layers: up to 1 GiB on a CPU, a quarter of the free memory on a GPU.

    Determinism: as deterministic as the closures.

    Source: Kalra et al. 2026, arXiv 2601.16979.

    Examples:
        >>> import torch, sharpkern
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> tasks = {"steep": lambda: 4 * model.weight.square().sum(), "flat": lambda: model.weight.square().sum()}
        >>> tasks["flat"]().backward()
        >>> measured = sharpkern.relative_critical_sharpness(model, tasks, sharpkern.Direction.from_gradients(model))
        >>> {name: round(m.sharpness, 3) for name, m in measured.items()}
        {'steep': 2.0, 'flat': 2.0}
    """
    if not isinstance(tasks, Mapping):
        raise TypeError(f"tasks must map names to closures, got {type(tasks).__name__}; pass {{'name': loss_fn}}")
    if not tasks:
        raise ValueError("tasks must hold at least one closure, got none; pass {'name': loss_fn}")
    chosen = Options.of(relative_critical_sharpness, options)
    if chosen.sample is not None:
        raise ValueError(
            "sample needs the slope of the loss along the direction, which a task's is not known; leave sample out"
        )
    check_arguments(model, direction)
    steps = {name: Step.of(loss_fn) for name, loss_fn in tasks.items()}
    without_slope = replace(direction, slope=None)
    found = _together(model, steps, without_slope, chosen) if len(tasks) > 1 else {}
    return {
        name: found[name] if name in found else measure(model, loss_fn, without_slope, chosen)[0]
        for name, loss_fn in tasks.items()
    }


def _together(
    model: nn.Module, steps: Mapping[str, Step], direction: Direction, options: Options
) -> dict[str, Measurement]:
    """Measure several tasks side by side, so that weights formed for one serve all that ask for the same step sizes."""

    def measured(session: Session) -> dict[str, Measurement]:
        kept, memory = Kept(_room(session.pairs)), None
        with ExitStack() as engines:
            searches = []
            for name, step in steps.items():
                step.settle(session)
                target = session.target(step.closure)
                engine_name, swaps = session.choose(target, options.engine)
                if swaps:
                    memory = memory or Memory(session.pairs)
                    engine_name = "swapped"
                if engine_name != "inplace":
                    engine = engines.enter_context(session.open(target, engine_name, kept=kept, memory=memory))
                    searches.append(_Task(name, Run(session, target, engine, options)))
            for task in searches:
                # One after the other: what is found out about a closure holds for all of the same code.
                while task.step_sizes == (0.0,):
                    task.advance()
            while asked := Counter(task.step_sizes for task in searches if task.step_sizes):
                for task in sorted((task for task in searches if task.step_sizes), key=lambda task: task.step_sizes):
                    kept.enabled = asked[task.step_sizes] > 1
                    task.advance()
            return {task.name: task.measurement for task in searches if task.measurement is not None}

    reduce, ranks, plan = options.reduce, options.ranks, options.plan
    loss_fns = [loss_fn for step in steps.values() for loss_fn in step.loss_fns]
    return in_session(measured, model, direction, loss_fns, reduce=reduce, ranks=ranks, plan=plan)


class _Task:
    """One task's measurement on its way.

    Attributes:
        name: as given.
        step_sizes: where its loss is needed next; none when it is finished, or given up.
        measurement: when it is finished.
    """

    def __init__(self, name: str, run: Run) -> None:
        self.name, self._run = name, run
        self._search = run.search(None)
        self._seconds = 0.0
        self.measurement: Measurement | None = None
        self.step_sizes = next(self._search)

    def advance(self) -> None:
        """Evaluate the task's loss where it is needed."""
        started = time.perf_counter()
        try:
            losses = self._run.engine.losses(self.step_sizes)
        except (EngineUnsupportedError, torch.OutOfMemoryError):
            # By itself, or by another engine, it may do.
            self.step_sizes = ()
            return
        try:
            self.step_sizes = self._search.send(losses)
        except (EngineUnsupportedError, torch.OutOfMemoryError):
            self.step_sizes = ()
        except StopIteration as stop:
            self.step_sizes = ()
            self.measurement = self._run.measurement(stop.value, self._seconds + time.perf_counter() - started)
        self._seconds += time.perf_counter() - started


def _room(pairs: Sequence[TrackedParam]) -> int:
    """Bytes that formed weights may take between tasks."""
    devices = {pair.weight.device for pair in pairs}
    device = devices.pop()
    if device.type != "cuda":
        return _ROOM_ON_CPU
    return 0 if devices else free_bytes(device) // 4
