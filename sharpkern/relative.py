"""Relative critical sharpness: the curvature of one task's loss along the update of another."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sharpkern.critical import measure
from sharpkern.direction import Direction
from sharpkern.measurement import Measurement, Options


def relative_critical_sharpness(
    model: nn.Module, tasks: Mapping[str, Callable[[], Tensor]], direction: Direction, **options: Any
) -> dict[str, Measurement]:
    """Measure λ_c^{task→direction} = 2/η_c of every task's loss along one update.

    The slope of a task's loss along the update is not known beforehand; the search finds it from the probes. A task
    whose loss rises from the first step on has status "ascent" and sharpness inf: a legitimate outcome here.

    Args:
        model: evaluated by the tasks' closures.
        tasks: name of the task → closure that returns its scalar loss, as ``loss_fn`` of `critical_sharpness`.
        direction: Δθ, such as the update of an optimizer on a mix of the tasks' data.
        **options: of `critical_sharpness`, ``base_loss`` excepted.

    Returns:
        dict: name of the task → its measurement, in the order of ``tasks``; sharpness in 1/learning-rate.

    Raises:
        TypeError: ``tasks`` is no mapping, or as `critical_sharpness`.
        ValueError: there is no task, or as `critical_sharpness`.

    Memory: as one `critical_sharpness`; tasks are measured one after another.

    Determinism: as deterministic as the closures.

    Source: Kalra et al. 2026, arXiv 2601.16979.

    Example:
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
    chosen = Options.of("relative_critical_sharpness", options)
    without_slope = replace(direction, slope=None) if isinstance(direction, Direction) else direction
    return {name: measure(model, loss_fn, without_slope, chosen)[0] for name, loss_fn in tasks.items()}
