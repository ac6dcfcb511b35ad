"""find_lr: what it follows, what it suggests, and that nothing of the run is left changed."""

import math
import random
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

import sharpkern
from sharpkern import find_lr

Batch = tuple[torch.Tensor, torch.Tensor]


class Run:
    """Two layers with everything that 40 steps would disturb, in the midst of training."""

    def __init__(self, momentum: float = 0.0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))
        weights, biases = ([p for p in self.model.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
        self.optimizer = SGD(
            [{"params": weights, "lr": 0.1}, {"params": biases, "lr": 0.01, "weight_decay": 0.01}], momentum=momentum
        )
        inputs = torch.randn(160, 6)
        labels = (inputs @ torch.randn(6, 3)).argmax(1)
        self.batches = list(zip(inputs.split(32), labels.split(32), strict=True))
        for batch in self.batches[:3]:
            self.optimizer.zero_grad()
            self.loss_of(batch).backward()
            self.optimizer.step()

    def loss_of(self, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def state(self) -> list[Any]:
        """Objects and values of the run, the versions that autograd looks at among them."""
        tensors = [*self.model.state_dict().values(), *(p.grad for p in self.model.parameters())]
        held = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        tensors += [one for one in held if one is not None]
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
        values = [t.detach().clone().numpy().tobytes() for t in (*tensors, streams[0])]
        versions = [p._version for p in self.model.parameters()]
        gradients = [id(p.grad) for p in self.model.parameters()]
        return [values, versions, gradients, groups, streams[1:], [m.training for m in self.model.modules()]]


@pytest.mark.parametrize(("momentum", "factor"), [(0.0, 3.1), (0.9, 1.1)])
def test_it_follows_half_of_the_critical_rate(momentum: float, factor: float) -> None:
    run = Run(momentum)
    before = run.state()
    found = find_lr(run.model, run.optimizer, run.batches, run.loss_of)
    assert run.state() == before
    assert [one.step for one in found.trail] == list(range(40))
    # The rule, told of what was measured.
    lr = None
    for one in found.trail:
        if one.status == "ascent" and lr is not None:
            lr /= 2
        elif one.critical_lr > 0:
            lr = 0.05 * one.critical_lr if lr is None else min(2 * lr, 0.5 * one.critical_lr)
        assert one.lr == lr
    assert found.median == statistics.median(one.lr for one in found.trail[20:])
    assert (found.factor, found.lr) == (factor, factor * found.median)
    assert str(found) == f"lr {found.lr:.3g} = {factor} × {found.median:.3g}, the median of 20 rates"


def test_the_steps_are_those_of_the_optimizer() -> None:
    """The same steps taken by hand, with the rates of the trail."""
    run, other = Run(0.9), Run(0.9)
    found = find_lr(run.model, run.optimizer, run.batches, run.loss_of)
    for one, batch in zip(found.trail, other.batches * 8, strict=True):
        other.optimizer.zero_grad()
        loss = other.loss_of(batch)
        loss.backward()
        assert loss.item() == pytest.approx(one.loss, rel=1e-5)
        for group, ratio in zip(other.optimizer.param_groups, (1.0, 0.1), strict=True):
            group["lr"] = one.lr * ratio
        other.optimizer.step()


def test_several_optimizers_are_followed_as_one() -> None:
    whole, split = Run(), Run()
    found = find_lr(whole.model, whole.optimizer, whole.batches, whole.loss_of)
    optimizers = [SGD([group]) for group in split.optimizer.param_groups]
    assert find_lr(split.model, optimizers, split.batches, split.loss_of) == found


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 9, 60])
def test_what_raises_on_the_way_leaves_the_run_as_it_was(error: type[BaseException], call: int) -> None:
    run = Run(0.9)
    before, count = run.state(), 0

    def loss_of(batch: Batch) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == call:
            raise error("stop")
        return run.loss_of(batch)

    with pytest.raises(error, match="stop"):
        find_lr(run.model, run.optimizer, run.batches, loss_of)
    assert run.state() == before


def test_a_loader_is_put_back_too() -> None:
    run = Run()
    data = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*run.batches, strict=True)))
    generator = torch.Generator().manual_seed(5)
    loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True, generator=generator)
    before, streams = run.state(), generator.get_state()
    find_lr(run.model, run.optimizer, loader, run.loss_of)
    assert run.state() == before
    assert torch.equal(generator.get_state(), streams)


def test_the_suggested_rate_trains_well() -> None:
    """Least squares, where gradient descent on the whole is best near 2/(λ_1 + λ_n)."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1, bias=False).double(), torch.randn(64, 4, dtype=torch.float64)
    curvature = torch.linalg.eigvalsh(2 * x.T @ x / 64)
    optimizer = SGD(model.parameters(), lr=1e-6)
    found = find_lr(model, optimizer, [x], lambda x: model(x).square().mean())
    assert 0.3 < found.lr * float(curvature[0] + curvature[-1]) / 2 < 4


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop])
def test_other_optimizers_are_refused_with_the_way_out(kind: Any) -> None:
    run = Run()
    optimizer = kind(run.model.parameters(), lr=1e-3)
    message = f"optimizer must be torch.optim.SGD, .* got {kind.__name__}, .* may be far off; .* sharpkern.LRCap"
    with pytest.raises(TypeError, match=message):
        find_lr(run.model, optimizer, run.batches, run.loss_of)


def test_where_nothing_can_be_found_it_says_why() -> None:
    run = Run()
    before = run.state()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        find_lr([], run.optimizer, run.batches, run.loss_of)

    def some() -> Iterator[Batch]:
        yield from run.batches

    for batches in ([], some()):
        with pytest.raises(ValueError, match="batches must give 40 batches or begin anew where they end"):
            find_lr(run.model, run.optimizer, batches, run.loss_of)
    with pytest.raises(RuntimeError, match=r"the loss must stay finite .* got nan and 'the gradient .* in step 0"):
        find_lr(run.model, run.optimizer, run.batches, lambda batch: run.loss_of(batch) * math.nan)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    with pytest.raises(ValueError, match=r"at a positive learning rate, got .* before a scheduler that warms up"):
        find_lr(run.model, run.optimizer, run.batches, run.loss_of)
    for group, rate in zip(run.optimizer.param_groups, (0.1, 0.01), strict=True):
        group["lr"] = rate
    assert run.state() == before


def test_it_is_public() -> None:
    assert sharpkern.find_lr is find_lr
    assert sharpkern.LRSuggestion.__doc__.startswith("A learning rate, and what it comes from.")
