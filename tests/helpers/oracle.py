"""What the engines are compared with: losses of deep copies whose parameters were really moved."""

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from sharpkern import Direction
from sharpkern.engines.session import Engine, open_session
from tests.helpers.cases import Case

LossFn = Callable[[], Tensor]


def random_direction(model: nn.Module, scale: float = 1.0) -> Direction:
    """Random numbers of the size of each parameter, so that a step of 1e-2 is a relative change of 1e-2."""
    generator = torch.Generator().manual_seed(2)
    tensors = {
        p: scale * (p.detach().float().std(correction=0) + 1e-2) * torch.randn(p.shape, generator=generator).to(p)
        for p in model.parameters()
    }
    return Direction.from_tensors(tensors, model)


@torch.no_grad()
def deep_copy_losses(
    model: nn.Module, closure: Callable[[nn.Module], LossFn], direction: Direction, step_sizes: Sequence[float]
) -> list[float]:
    """L(θ − ηΔθ), each of a deep copy, from the present random state."""
    deltas = {id(p): d for p, d in zip(direction.parameters, direction.tensors, strict=True)}
    losses = []
    for eta in step_sizes:
        moved = copy.deepcopy(model)
        for original, parameter in zip(model.parameters(), moved.parameters(), strict=True):
            if id(original) in deltas:
                wide = torch.promote_types(parameter.dtype, torch.float32)
                parameter.copy_(parameter.to(wide) - eta * deltas[id(original)].to(wide))
        with torch.random.fork_rng(devices=[]):
            losses.append(closure(moved)().item())
    return losses


@contextmanager
def engine_on(name: str, model: nn.Module, loss_fn: LossFn, direction: Direction):
    """An open engine with its guard, as a measurement would have it; yields (engine, closure)."""
    with open_session(model, direction, [loss_fn]) as session:
        target = session.target(loss_fn)
        with session.open(target, name) as engine:
            engine: Engine
            yield engine, target.closure


def engine_losses(
    name: str, model: nn.Module, loss_fn: LossFn, direction: Direction, step_sizes: Sequence[float]
) -> list[float]:
    """L(θ − ηΔθ) by an engine."""
    with engine_on(name, model, loss_fn, direction) as (engine, _):
        return engine.losses(step_sizes)


def assert_as_exact_as_copies(case: Case, engine: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Fail where an engine's losses are further from float64 than twice those of deep copies in the same dtype."""
    step_sizes = (0.0, 0.01, 1.0)
    # In 16 bits both err at random: how far copies do is seen at several step sizes, or is a matter of luck.
    more = (0.1, 0.2, 0.4, 0.6, 0.8) if torch.finfo(dtype).bits == 16 else ()
    model = case.build().to(device, dtype)
    exact_model = copy.deepcopy(model).double()
    direction = random_direction(model)
    exact_direction = Direction.from_tensors(
        {p: t.double() for p, t in zip(exact_model.parameters(), direction.tensors, strict=True)}, exact_model
    )
    exact = deep_copy_losses(exact_model, case.closure, exact_direction, (*step_sizes, *more))
    copies = deep_copy_losses(model, case.closure, direction, (*step_sizes, *more))
    losses = engine_losses(engine, model, case.closure(model), direction, step_sizes)
    budget = 2 * max(abs(a - b) for a, b in zip(copies, exact, strict=True)) + 1e-6 * abs(exact[0])
    assert losses == pytest.approx(exact[:3], rel=0, abs=budget)
    # Or else the comparison would tell nothing.
    assert abs(exact[2] - exact[0]) > budget
