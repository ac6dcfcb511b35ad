"""Time and memory of searches in a training loop, by each engine, in plain forward passes and bytes of tensors."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from runs import GPT, Batch, Loss, digits, mlp, text, token_loss
from timing import Counted, Seconds
from torch import nn
from torch.nn import functional as F

import sharpkern
from sharpkern.bench.models import engines
from sharpkern.engines.batched import NUM_PARALLEL
from sharpkern.memory.counter import peak_bytes

ENGINES = ("virtual", "batched", "inplace")
# Steps of training before the first search, and searches before those that count, which make the checks.
_TRAINED, _WARM_UP = 10, 2
# Engines may differ by as much as their searches' tolerance, in log units.
_SAME = 0.03


@dataclass(frozen=True)
class Workload:
    """A model in training.

    Attributes:
        name: for the table.
        make: builds model and optimizer.
        batch: inputs and targets of a step.
        loss_of: loss of outputs and targets.
        tokens: tokens, or samples, of a batch.
        steps: of training whose searches count.
    """

    name: str
    make: Callable[[], tuple[nn.Module, torch.optim.Optimizer]]
    batch: Callable[[int], Batch]
    loss_of: Loss
    tokens: int
    steps: int


def workloads(quick: bool) -> list[Workload]:
    """Return what is measured: from models whose calls take longer than their products to one where these count.

    Args:
        quick: a few searches each, and no large model.
    """
    small = [_digits(3 if quick else 31), _gpt(32, 3 if quick else 31)]
    if quick:
        return small
    small_batch = {"width": 432, "num_layers": 6, "num_heads": 8, "context": 1024}
    wide = {"width": 512, "num_layers": 9, "num_heads": 8, "context": 256}
    middle = {"width": 256, "num_layers": 6, "num_heads": 8, "context": 1024}
    return [*small, _gpt(32, 15, **small_batch), _gpt(32, 9, **wide), _gpt(256, 3, **wide), _gpt(1024, 3, **middle)]


def _digits(steps: int) -> Workload:
    images, targets = digits()

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = mlp()
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def batch(step: int) -> Batch:
        rows = torch.randint(0, len(images), (64,), generator=torch.Generator().manual_seed(step))
        return images[rows], targets[rows]

    return Workload("MLP", make, batch, F.cross_entropy, 64, steps)


def _gpt(num_tokens: int, steps: int, **sizes: int) -> Workload:
    data = text()

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = GPT(**sizes)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    def batch(step: int) -> Batch:
        tokens = data[None, step * num_tokens : (step + 1) * num_tokens + 1]
        return tokens[:, :-1], tokens[:, 1:]

    return Workload("GPT", make, batch, token_loss, num_tokens, steps)


def cost_rows(workload: Workload) -> list[dict[str, Any]]:
    """Train a model with a monitor per engine, warm-started each from its own last search, in turns.

    Passes, searches and plain forwards take turns, and medians are compared, so that a busy machine slows all alike.

    Args:
        workload: what to train.

    Returns:
        One row per engine.

    Raises:
        RuntimeError: the engines disagree, and times are worth nothing.
    """
    torch.manual_seed(0)
    model, optimizer = workload.make()
    monitors = {engine: sharpkern.Monitor(model, optimizer, engine=engine) for engine in ENGINES}
    plain: list[float] = []
    building: list[float] = []
    searches: dict[str, list[_Search]] = defaultdict(list)
    for step in range(_TRAINED + _WARM_UP + workload.steps):
        loss_fn = Counted(model, workload.loss_of, workload.batch(step))
        optimizer.zero_grad()
        loss_fn().backward()
        if step >= _TRAINED:
            first = step % len(ENGINES)
            for engine in ENGINES[first:] + ENGINES[:first]:
                plain.append(Seconds.of(loss_fn.plain).wall)
                searches[engine].append(_Search.by(monitors[engine], loss_fn))
            building.append(Seconds.of(lambda: sharpkern.Direction.from_optimizer(optimizer)).wall)
        if step < _TRAINED + _WARM_UP + workload.steps - 1:
            optimizer.step()
    counted = _converged({engine: searches[engine][_WARM_UP:] for engine in ENGINES})
    plain_seconds = median(plain)
    direction = sharpkern.Direction.from_optimizer(optimizer)
    eta = counted["virtual"][-1].critical_lr
    step_sizes = [eta * (k + 1) / NUM_PARALLEL for k in range(NUM_PARALLEL)]
    per_step_size = _per_step_size(model, loss_fn, direction, step_sizes, workload.steps)

    def losses(engine: str) -> list[float]:
        with engines([engine], model, loss_fn, direction) as (opened,):
            return opened.losses(step_sizes)

    forward_peak = peak_bytes(loss_fn.plain)
    parameters = [p.numel() * p.element_size() for p in model.parameters()]
    rows = []
    for engine, of_one in counted.items():
        peak = peak_bytes(lambda e=engine: losses(e))
        rows.append(
            {
                "model": workload.name,
                "tokens": workload.tokens,
                "parameters": sum(p.numel() for p in model.parameters()),
                "engine": engine,
                "searches": len(of_one),
                "forwards": median(search.forwards for search in of_one),
                "passes": median(search.passes for search in of_one),
                "plain_forward_ms": 1e3 * plain_seconds,
                "search_in_plain_forwards": median(search.seconds for search in of_one) / plain_seconds,
                "step_size_in_plain_forwards": per_step_size[engine],
                "pass_over_virtual_pass": NUM_PARALLEL * per_step_size[engine] / per_step_size["virtual"]
                if engine == "batched"
                else None,
                "direction_in_plain_forwards": median(building) / plain_seconds,
                "extra_bytes": peak - forward_peak,
                "largest_matrix_bytes": max(parameters),
                "parameter_bytes": sum(parameters),
            }
        )
    return rows


@dataclass(frozen=True)
class _Search:
    critical_lr: float
    status: str
    forwards: int
    passes: int
    seconds: float

    @classmethod
    def by(cls, monitor: sharpkern.Monitor, loss_fn: Counted) -> "_Search":
        calls = loss_fn.calls
        found = monitor(loss_fn)
        assert found is not None
        return cls(found.critical_lr, found.status, found.forwards, loss_fn.calls - calls, found.seconds)


def _converged(searches: dict[str, list[_Search]]) -> dict[str, list[_Search]]:
    """Return the searches of the steps at which every engine found a crossing.

    Raises:
        RuntimeError: there are none, or the engines found different ones.
    """
    steps = [found for found in zip(*searches.values(), strict=True) if all(s.status == "converged" for s in found)]
    kept = {engine: [found[i] for found in steps] for i, engine in enumerate(searches)}
    for engine, found in kept.items():
        off = [abs(math.log(one.critical_lr / kept["virtual"][i].critical_lr)) for i, one in enumerate(found)]
        if not off or median(off) > _SAME:
            raise RuntimeError(f"engine {engine} disagrees with virtual, nothing is timed: {searches}")
    return kept


def _per_step_size(
    model: nn.Module, loss_fn: Counted, direction: sharpkern.Direction, step_sizes: list[float], repeats: int
) -> dict[str, float]:
    """Return what each engine takes for one of several step sizes, in plain forwards."""
    found = {}
    # What one engine writes the others must not read.
    for names in (("virtual", "batched"), ("inplace",)):
        with engines(names, model, loss_fn, direction) as opened:
            calls = [loss_fn.plain, *(partial(engine.losses, step_sizes) for engine in opened)]
            turns = [[Seconds.of(call).wall for call in calls] for _ in range(max(5, repeats) + 1)]
        plain, *taken = (median(column) for column in zip(*turns[1:], strict=True))
        found |= {name: seconds / (len(step_sizes) * plain) for name, seconds in zip(names, taken, strict=True)}
    return found
