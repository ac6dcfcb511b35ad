"""What the engines are compared with: losses of deep copies whose parameters were really moved."""

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sharpkern import Direction
from sharpkern.engines.choose import Engine, is_compiled, open_engine
from sharpkern.engines.closure import Closure
from sharpkern.engines.guards import preserved
from sharpkern.engines.precision import LossPrecision
from sharpkern.engines.table import make_pairs

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
    pairs = make_pairs(direction.parameters, direction.tensors, direction.masters)
    with preserved(model, direction.parameters) as guard:
        closure = Closure(loss_fn, guard, LossPrecision())
        with open_engine(name, pairs, closure, compiled=is_compiled(model, loss_fn)) as engine:
            engine: Engine
            yield engine, closure


def engine_losses(
    name: str, model: nn.Module, loss_fn: LossFn, direction: Direction, step_sizes: Sequence[float]
) -> list[float]:
    """L(θ − ηΔθ) by an engine."""
    with engine_on(name, model, loss_fn, direction) as (engine, _):
        return engine.losses(step_sizes)
