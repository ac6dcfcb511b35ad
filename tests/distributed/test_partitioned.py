"""An optimizer whose state is split over the ranks is measured around its step, as one process would be."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sharpkern
from sharpkern import Direction
from sharpkern.integrations.around_step import AroundStep
from tests.helpers.processes import on_ranks


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).double()


def loss_of(model: nn.Module, step: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(32, 64, generator=generator).double() for _ in range(2))
    return lambda: F.mse_loss(model(x), y)


def partitioned(rank: int) -> dict[str, Any]:
    """Each rank steps some of the parameters; a schedule changes the rate of all."""
    with warnings.catch_warnings():
        # Of its own imports.
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    torch.manual_seed(0)
    model = DistributedDataParallel(network())
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(zero, lambda step: 1 / (step + 1))
    monitor = sharpkern.Monitor(model, zero)
    losses: list[Callable[[], Tensor]] = []
    AroundStep(zero, lambda: True, lambda direction: monitor(lambda: losses[-1](), direction=direction))
    refused = ""
    for step in range(3):
        losses.append(loss_of(model, 2 * step + rank))
        zero.zero_grad()
        losses[-1]().backward()
        try:
            Direction.from_optimizer(zero)
        except TypeError as error:
            refused = str(error)
        zero.step()
        schedule.step()
    return {
        "refused": refused,
        "rows": [(r.lr, r.measurement.status, r.measurement.sharpness) for r in monitor.history],
    }


@pytest.mark.long
def test_it_is_refused_before_the_step_and_measured_around_it(tmp_path: Path) -> None:
    here, there = (results["zero"] for results in on_ranks({"zero": partitioned}, 2, tmp_path))
    assert isinstance(here, dict), here
    assert here == there
    assert re.search("got ZeroRedundancyOptimizer, whose step needs the others; .*AroundStep", here["refused"])
    # One process with the data of both.
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    monitor = sharpkern.Monitor(model, optimizer)
    for step in range(3):
        halves = [loss_of(model, 2 * step + rank) for rank in range(2)]
        loss_fn = lambda halves=halves: (halves[0]() + halves[1]()) / 2
        optimizer.zero_grad()
        loss_fn().backward()
        monitor(loss_fn)
        optimizer.step()
        schedule.step()
    for (lr, status, sharpness), record in zip(here["rows"], monitor.history, strict=True):
        assert (lr, status) == (record.lr, "converged")
        assert sharpness == pytest.approx(record.measurement.sharpness, rel=1e-5)
