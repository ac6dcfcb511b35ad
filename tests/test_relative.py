"""One task's loss along another task's update."""

import math

import pytest
import torch
from torch import nn

import sharpkern


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
