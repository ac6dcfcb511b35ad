"""Bad input: what, the rule, what was got, the remedy; and nothing changed."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sharpkern
from sharpkern import Direction
from tests.engines.test_non_intrusive import differing, snapshot
from tests.helpers.models import MLP
from tests.helpers.oracle import random_direction


@dataclass
class Scene:
    """A model with gradients, a direction and a closure; each case spoils one of them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: Callable[[], torch.Tensor]
    other: nn.Module

    @property
    def direction(self) -> Direction:
        return random_direction(self.model)

    def measure(self, loss_fn: Any = None, direction: Any = None, model: Any = None, **options: Any) -> object:
        return sharpkern.critical_sharpness(
            self.model if model is None else model,
            self.loss_fn if loss_fn is None else loss_fn,
            self.direction if direction is None else direction,
            **options,
        )

    def tensors(self, **changed: torch.Tensor) -> Direction:
        return Direction.from_tensors({name.replace("__", "."): tensor for name, tensor in changed.items()}, self.model)


@pytest.fixture
def scene() -> Scene:
    model = MLP()
    x, y = torch.randn(16, 16), torch.randint(0, 10, (16,))
    loss_fn = lambda: F.cross_entropy(model(x), y)
    loss_fn().backward()
    return Scene(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, other=MLP())


def without_gradients(scene: Scene) -> object:
    return Direction.from_optimizer(torch.optim.SGD(scene.other.parameters(), lr=0.1))


def sparse_gradients(scene: Scene) -> object:
    embedding = nn.Embedding.from_pretrained(torch.ones(5, 3), freeze=False, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    return Direction.from_optimizer(torch.optim.SGD(embedding.parameters(), lr=0.1))


def one_parameter(parameter: nn.Parameter, gradient: torch.Tensor, lr: float = 0.1) -> Direction:
    parameter.grad = gradient
    return Direction.from_optimizer(torch.optim.SGD([parameter], lr=lr))


def complex_parameters(scene: Scene) -> object:
    return one_parameter(nn.Parameter(torch.ones(3, dtype=torch.cfloat)), torch.ones(3, dtype=torch.cfloat))


def meta_tensors(scene: Scene) -> object:
    return one_parameter(nn.Parameter(torch.ones(3, device="meta")), torch.ones(3, device="meta"))


def non_finite_gradients(scene: Scene) -> object:
    return one_parameter(nn.Parameter(torch.ones(3)), torch.full((3,), torch.inf))


def strangers(scene: Scene) -> object:
    scene.other(torch.ones(4, 16)).sum().backward()
    return scene.measure(direction=Direction.from_optimizer(torch.optim.SGD(scene.other.parameters(), lr=0.1)))


def lbfgs(scene: Scene) -> object:
    return Direction.from_optimizer(torch.optim.LBFGS(scene.model.parameters(), lr=0.1))


def writes_a_parameter(scene: Scene) -> object:
    def loss_fn() -> torch.Tensor:
        scene.model[0].weight.mul_(0.5)
        return scene.loss_fn()

    return scene.measure(loss_fn)


def steps_the_optimizer(scene: Scene) -> object:
    def loss_fn() -> torch.Tensor:
        loss = scene.loss_fn()
        for parameter in scene.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        scene.optimizer.step()
        return loss

    return scene.measure(loss_fn)


counter = itertools.count(1)
W = "0__weight"

CASES: dict[str, tuple[type[Exception], str, Callable[[Scene], object]]] = {
    "vector loss": (
        ValueError,
        r"loss_fn must return a scalar, got .* \[16, 10\]; reduce it",
        lambda s: s.measure(lambda: s.model(torch.ones(16, 16))),
    ),
    "int loss": (
        TypeError,
        r"loss_fn must return a 0-dim .* got int 3; return the loss itself",
        lambda s: s.measure(lambda: 3),
    ),
    "no loss": (TypeError, "loss_fn must return a 0-dim .* got NoneType", lambda s: s.measure(lambda: None)),
    "count as loss": (
        TypeError,
        r"floating-point loss, got torch.int64",
        lambda s: s.measure(lambda: s.model(torch.ones(2, 16)).argmax()),
    ),
    "detached constant": (
        ValueError,
        "depend on the parameters .* got 2.0 .* anew",
        lambda s: s.measure(lambda: torch.tensor(2.0), engine="inplace"),
    ),
    "other loss at each call": (
        ValueError,
        "same loss whenever .* fetch the batch once",
        lambda s: s.measure(lambda: s.loss_fn() + next(counter)),
    ),
    "closure writes": (ValueError, "only evaluate the loss, got a write to a parameter by mul_", writes_a_parameter),
    "closure steps": (ValueError, "only evaluate the loss, got a write", steps_the_optimizer),
    "loss_fn is a tensor": (TypeError, "loss_fn must be callable .* got Tensor", lambda s: s.measure(torch.ones(()))),
    "wrong base_loss": (
        ValueError,
        "base_loss must be what loss_fn returns .* leave base_loss out",
        lambda s: s.measure(base_loss=9.0),
    ),
    "base_loss is text": (TypeError, "base_loss must be a number, got 'low'", lambda s: s.measure(base_loss="low")),
    "wrong shape": (
        ValueError,
        r"direction for '0.weight' must have the parameter's shape \[32, 16\], got \[16, 32\]; pass it transposed",
        lambda s: s.tensors(**{W: torch.ones(16, 32)}),
    ),
    "wrong dtype": (TypeError, "floating", lambda s: s.tensors(**{W: torch.ones(32, 16, dtype=torch.int64)})),
    "wrong device": ((ValueError, TypeError), "device", lambda s: s.tensors(**{W: torch.ones(32, 16, device="meta")})),
    "nan direction": (ValueError, "finite", lambda s: s.tensors(**{W: torch.full((32, 16), torch.nan)})),
    "zero direction": (ValueError, "zero", lambda s: s.tensors(**{W: torch.zeros(32, 16)})),
    "unknown name": (ValueError, "0.weight", lambda s: s.tensors(**{"0__weigth": torch.ones(32, 16)})),
    "not a direction": (
        TypeError,
        "direction must be a sharpkern.Direction, got dict",
        lambda s: s.measure(direction={}),
    ),
    "other model's direction": (ValueError, "model", strangers),
    "no gradients": (ValueError, r"backward\(\)", without_gradients),
    "sparse gradients": ((ValueError, TypeError), "sparse", sparse_gradients),
    "lr 0": (
        ValueError,
        "positive learning rate .* got 0",
        lambda s: one_parameter(nn.Parameter(torch.ones(3)), torch.ones(3), lr=0.0),
    ),
    "complex parameters": ((ValueError, TypeError), "complex", complex_parameters),
    "meta tensors": ((ValueError, TypeError), "meta", meta_tensors),
    "non-finite gradients": (ValueError, "finite", non_finite_gradients),
    "optimizer needs a closure": ((ValueError, TypeError), "Direction.between", lbfgs),
    "between with lr 0": (ValueError, "lr must be", lambda s: Direction.between(s.model, s.other, 0.0)),
    "rtol 0": (ValueError, r"rtol must be a number in \(0, 1\), got 0", lambda s: s.measure(rtol=0)),
    "rtol negative": (ValueError, r"rtol must be .*, got -1; leave it out for 0.01", lambda s: s.measure(rtol=-1)),
    "rtol text": (TypeError, "rtol must be a number", lambda s: s.measure(rtol="1e-2")),
    "rtol nan": (ValueError, "rtol", lambda s: s.measure(rtol=float("nan"))),
    "one forward": (ValueError, "max_forwards must be at least 2 .* got 1", lambda s: s.measure(max_forwards=1)),
    "forwards as float": (TypeError, "max_forwards must be an int", lambda s: s.measure(max_forwards=10.0)),
    "unknown engine": (
        ValueError,
        "engine must be one of 'auto', 'virtual', 'batched', 'inplace', got 'fast'",
        lambda s: s.measure(engine="fast"),
    ),
    "unknown method": (
        ValueError,
        "method must be one of 'auto', 'bisection', got 'brent'",
        lambda s: s.measure(method="brent"),
    ),
    "negative noise": (ValueError, "noise must be", lambda s: s.measure(noise=-1e-3)),
    "initial_lr 0": (ValueError, "initial_lr must be positive", lambda s: s.measure(initial_lr=0.0)),
    "reduce is no function": (TypeError, "reduce must be callable", lambda s: s.measure(reduce="mean")),
    "certify is a number": (TypeError, "certify must be True or False", lambda s: s.measure(certify=1)),
    "model without parameters": (ValueError, "model must have parameters", lambda s: s.measure(model=nn.ReLU())),
    "model is a function": (
        TypeError,
        "model must be a torch.nn.Module, got function",
        lambda s: s.measure(model=lambda x: x),
    ),
    "monitor every 0": (
        ValueError,
        "every must be at least 1, got 0",
        lambda s: sharpkern.Monitor(s.model, s.optimizer, every=0),
    ),
    "monitor of a model": (
        TypeError,
        "optimizer must be a torch.optim.Optimizer or a list of them, got MLP",
        lambda s: sharpkern.Monitor(s.model, s.model),
    ),
    "monitor logs to a name": (
        TypeError,
        "log must be callable",
        lambda s: sharpkern.Monitor(s.model, s.optimizer, log="wandb"),
    ),
    "monitor warns below a word": (
        TypeError,
        "warn_below must be a number or None, got 'low'",
        lambda s: sharpkern.Monitor(s.model, s.optimizer, warn_below="low"),
    ),
    "monitor warns below nothing": (
        ValueError,
        "warn_below must be a positive finite ratio, got 0",
        lambda s: sharpkern.Monitor(s.model, s.optimizer, warn_below=0),
    ),
    "empty history": (
        ValueError,
        "history must hold a measurement",
        lambda s: sharpkern.Monitor(s.model, s.optimizer).to_csv("never.csv"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_and_changes_nothing(name: str, scene: Scene) -> None:
    error, message, act = CASES[name]
    before = snapshot(scene.model, scene.optimizer)
    versions = [p._version for p in scene.model.parameters()]
    with pytest.raises(error, match=message):
        act(scene)
    assert differing(before, snapshot(scene.model, scene.optimizer)) == []
    if "detached" not in name:
        assert [p._version for p in scene.model.parameters()] == versions


def test_a_loss_that_is_nan_at_the_start_is_a_status(scene: Scene) -> None:
    measured = scene.measure(lambda: scene.loss_fn() * torch.nan)
    assert (measured.status, measured.forwards) == ("nonfinite", 1)
    assert math.isnan(measured.sharpness)
