"""One task's loss along another task's update."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sharpkern
from sharpkern import ops
from sharpkern.engines.virtual import layers
from sharpkern.measures import relative
from sharpkern.ops.arithmetic import add_step
from tests.helpers.cases import tokens
from tests.helpers.models import GPT
from tests.helpers.oracle import random_direction


class TwoTasks(nn.Module):
    """Quadratic losses with minima at different places."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))

    def loss(self, curvature: float, minimum: tuple[float, float]) -> torch.Tensor:
        return 0.5 * curvature * (self.theta - torch.tensor(minimum, dtype=torch.float64)).square().sum()


def test_each_task_has_its_closed_form() -> None:
    model = TwoTasks()
    tasks = {
        "own": lambda: model.loss(2.0, (0.0, 0.0)),
        "aside": lambda: model.loss(3.0, (0.0, 1.0)),
        "against": lambda: model.loss(1.0, (3.0, 3.0)),
    }
    tasks["own"]().backward()
    direction = sharpkern.Direction.from_gradients(model)
    measured = sharpkern.relative_critical_sharpness(model, tasks, direction, rtol=1e-3)
    assert list(measured) == list(tasks)
    # λ_c of task 1 along d: dᵀH₁d / dᵀg₁.
    assert measured["own"].sharpness == pytest.approx(2.0, rel=1e-3)
    assert measured["aside"].sharpness == pytest.approx(3 * 8 / (3 * 2), rel=1e-3)
    assert (measured["against"].status, measured["against"].sharpness) == ("ascent", math.inf)
    assert all(m.slope is None for m in measured.values())


def test_bad_tasks() -> None:
    model = TwoTasks()
    model.loss(1.0, (0.0, 0.0)).backward()
    direction = sharpkern.Direction.from_gradients(model)
    with pytest.raises(TypeError, match="tasks must map names to closures, got list"):
        sharpkern.relative_critical_sharpness(model, [], direction)
    with pytest.raises(ValueError, match="at least one closure"):
        sharpkern.relative_critical_sharpness(model, {}, direction)
    with pytest.raises(TypeError, match=r"direction must be a sharpkern\.Direction"):
        sharpkern.relative_critical_sharpness(model, {"a": lambda: model.loss(1.0, (0.0, 0.0))}, None)


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of every weight matrix that was formed, times the step sizes it was formed for."""
    sizes: list[int] = []
    form = ops.form

    def spy(W: torch.Tensor, D: torch.Tensor, alpha: torch.Tensor, **options: object) -> torch.Tensor:
        sizes.append(W.numel() * alpha.numel() * (W.dim() == 2))
        return form(W, D, alpha, **options)

    def short(base: torch.Tensor, *rest: object) -> torch.Tensor:
        sizes.append(base.numel() * (base.dim() == 2))
        return add_step(base, *rest)

    monkeypatch.setattr(ops, "form", spy)
    monkeypatch.setattr("sharpkern.engines.tracked.add_step", short)
    return sizes


def language_tasks(model: nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
    """The losses of four batches, of which the last two are the same."""
    x = tokens(batch=4)
    batches = {"a": x, "b": x.flip(0, 1), "c": x.roll(1, 1), "d": x.roll(1, 1)}
    return {
        name: lambda y=y: F.cross_entropy(model(y[:, :-1]).flatten(0, 1), y[:, 1:].flatten())
        for name, y in batches.items()
    }


@pytest.mark.parametrize("engine", ["virtual", "batched"])
def test_weights_formed_for_one_task_serve_the_others(
    engine: str, formed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_IN_CACHE", ())
    model = GPT()
    tasks, direction = language_tasks(model), random_direction(model)
    alone = {}
    # Checks are due again in the fourth.
    for name in "abcd":
        alone |= sharpkern.relative_critical_sharpness(model, {name: tasks[name]}, direction, engine=engine)
    formed.clear()
    sharpkern.relative_critical_sharpness(model, {"c": tasks["c"]}, direction, engine=engine)
    of_one = sum(formed)
    formed.clear()
    twice = sharpkern.relative_critical_sharpness(model, {n: tasks[n] for n in "cd"}, direction, engine=engine)
    of_two = sum(formed)
    # What is left is the head that is tied to the embedding, which is looked up besides.
    embedding = model.tokens.weight.numel() * sum(len(m.probes) for m in twice.values())
    assert of_one < of_two <= 1.05 * of_one + embedding
    together = sharpkern.relative_critical_sharpness(model, {n: tasks[n] for n in "abc"}, direction, engine=engine)
    for name, measurement in together.items():
        # The first of all made the checks besides.
        same = {"seconds": 0, "forwards": 0}
        assert replace(measurement, **same) == replace(alone[name], **same)


def test_what_does_not_fit_is_formed_anew(
    formed: list[int], no_swapping: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GPT()
    tasks, direction = language_tasks(model), random_direction(model)
    two = {name: tasks[name] for name in "cd"}
    # With the checks of the first and the second.
    for _ in range(2):
        sharpkern.relative_critical_sharpness(model, two, direction)
    formed.clear()
    kept = sharpkern.relative_critical_sharpness(model, two, direction)
    shared = sum(formed)
    formed.clear()
    monkeypatch.setattr(relative, "_ROOM_ON_CPU", 0)
    anew = sharpkern.relative_critical_sharpness(model, two, direction)
    assert sum(formed) > 1.5 * shared
    assert [m.sharpness for m in anew.values()] == [m.sharpness for m in kept.values()]


def test_a_task_that_an_engine_is_unable_for_is_measured_by_another() -> None:
    model = GPT(dropout=0.0)
    tasks = language_tasks(model)
    tasks["e"] = lambda: tasks["a"]() + float(model.norm.weight.detach().numpy().sum())
    with pytest.warns(sharpkern.EngineFallbackWarning, match="in place"):
        measured = sharpkern.relative_critical_sharpness(model, tasks, random_direction(model))
    assert list(measured) == list(tasks)
    assert [m.engine for m in measured.values()] == ["virtual"] * 4 + ["inplace"]


@pytest.mark.parametrize("engine", ["auto", "virtual", "batched"])
def test_a_task_that_runs_out_of_memory_beside_others_is_measured_by_itself(engine: str) -> None:
    model = GPT(dropout=0.0)
    tasks, direction = language_tasks(model), random_direction(model)
    alone = sharpkern.relative_critical_sharpness(model, {"b": tasks["b"]}, direction, engine=engine)
    calls: list[None] = []

    def large() -> torch.Tensor:
        calls.append(None)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return tasks["b"]()

    measured = sharpkern.relative_critical_sharpness(
        model, {"a": tasks["a"], "b": large, "c": tasks["c"]}, direction, engine=engine
    )
    assert list(measured) == ["a", "b", "c"]
    same = {"seconds": 0, "forwards": 0}
    assert replace(measured["b"], **same) == replace(alone["b"], **same)


def test_checks_are_made_once_for_tasks_of_the_same_code() -> None:
    model = GPT()
    measured = sharpkern.relative_critical_sharpness(model, language_tasks(model), random_direction(model))
    checks = [m.forwards - len(m.probes) - 1 for m in measured.values()]
    # Whether the loss is repeatable, and whether another way to evaluate it agrees.
    assert sum(checks) == 2
