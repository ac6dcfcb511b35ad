"""Inside of ``parametrize.cached()`` weights are made once: of θ for the run, and of θ − ηΔθ for each evaluation."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import sharpkern
from sharpkern import Direction
from tests.helpers.oracle import LossFn, engine_losses

STEP_SIZES = (0.0, 0.05, 0.5)


class Counting(nn.Module):
    """A parametrization that counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[None] = []

    def forward(self, weight: Tensor) -> Tensor:
        self.calls.append(None)
        return weight / weight.norm()


class Recurrent(nn.Module):
    """Reads parametrized weights at every step, for which the cache is made."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(6, 8))
        self.back = parametrizations.orthogonal(nn.Linear(8, 8))
        self.last = nn.Linear(8, 3)
        self.counting = Counting()
        parametrize.register_parametrization(self.last, "weight", self.counting)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 8, dtype=x.dtype)
        for _ in range(3):
            state = torch.tanh(self.first(x) + self.back(state))
        return self.last(state) + self.last(-2 * state)


def classified(model: nn.Module) -> LossFn:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 6, generator=generator).double(), torch.randint(0, 3, (32,), generator=generator)
    return lambda: F.cross_entropy(model(x), y)


MEASURES: dict[str, Callable[[nn.Module, LossFn, Direction], object]] = {
    **{
        engine: lambda *args, engine=engine: engine_losses(engine, *args, STEP_SIZES)
        for engine in ("virtual", "batched", "inplace")
    },
    "critical": lambda *args: sharpkern.critical_sharpness(*args, rtol=1e-3).critical_lr,
    "relative": lambda model, loss_fn, direction: [
        m.critical_lr
        for m in sharpkern.relative_critical_sharpness(model, {"a": loss_fn, "b": loss_fn}, direction).values()
    ],
    "forward": sharpkern.directional_sharpness,
    "hvp": lambda *args: sharpkern.directional_sharpness(*args, method="hvp"),
    "hessian": lambda model, loss_fn, _: sharpkern.hessian_sharpness(model, loss_fn).value,
    "gradient": lambda model, loss_fn, _: [
        float(t.sum()) for t in sharpkern.gradient_direction(model, [loss_fn, loss_fn]).tensors
    ],
}


@pytest.mark.parametrize("name", MEASURES)
def test_a_measurement_inside_of_the_cache_is_the_one_outside(name: str) -> None:
    torch.manual_seed(0)
    model = Recurrent().double()
    loss_fn, measure = classified(model), MEASURES[name]
    loss_fn().backward()
    direction = Direction.from_gradients(model)
    outside = measure(model, loss_fn, direction)
    with parametrize.cached():
        model.zero_grad()
        loss_fn().backward()
        cache, kept = parametrize._cache, dict(parametrize._cache)
        assert measure(model, loss_fn, Direction.from_gradients(model)) == pytest.approx(outside, rel=1e-6)
        assert parametrize._cache is cache
        assert parametrize._cache_enabled == 1
        assert len(kept) == 3
        assert all(cache[key] is tensor for key, tensor in kept.items())
    assert (parametrize._cache, parametrize._cache_enabled) == ({}, 0)


@pytest.mark.parametrize("engine", ["virtual", "inplace"])
def test_a_weight_is_made_once_for_each_evaluation(engine: str) -> None:
    model = Recurrent().double()
    loss_fn = classified(model)
    loss_fn().backward()
    direction = Direction.from_gradients(model)
    with parametrize.cached():
        loss_fn()
        model.counting.calls.clear()
        calls = lambda: len(model.counting.calls)
        seen: list[int] = []
        engine_losses(engine, model, lambda: (loss_fn(), seen.append(calls()))[0], direction, STEP_SIZES)
        # The guard puts the list back before every evaluation.
        assert seen == [1, 1, 1]
        assert calls() == 0


def test_the_cache_is_as_before_after_an_error() -> None:
    model = Recurrent().double()
    loss_fn = classified(model)
    loss_fn().backward()
    direction = Direction.from_gradients(model)

    def failing() -> Tensor:
        with parametrize.cached():
            raise RuntimeError(f"stop at {loss_fn()}")

    with parametrize.cached():
        loss_fn()
        kept = parametrize._cache
        with pytest.raises(RuntimeError, match="stop"):
            sharpkern.critical_sharpness(model, failing, direction)
        assert parametrize._cache is kept
        assert (len(kept), parametrize._cache_enabled) == (3, 1)
