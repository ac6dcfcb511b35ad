"""Directions that are refused: each error says what, by which rule, what it got and what to do, and changes nothing."""

import copy
import math
import re

import pytest
import torch
from torch import nn

from sharpkern.directions.direction import Direction
from sharpkern.errors import NoUpdateError

SGD, ADAM, ADAMW, NADAM = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam


def linear(value: float = 1.0) -> nn.Linear:
    """A 2 × 3 layer whose weight has gradient ``value`` everywhere, its bias none."""
    layer = nn.Linear(3, 2)
    layer.weight.grad = torch.full((2, 3), value)
    return layer


def with_grad(value: float, kind=SGD, **options):
    return kind(linear(value).parameters(), **{"lr": 0.1} | options)


def with_one_zero(kind, **options):
    optimizer = with_grad(1.0, kind, **options)
    optimizer.param_groups[0]["params"][0].grad[0, 0] = 0.0
    return optimizer


def sparse_optimizer():
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    return SGD(embedding.parameters(), lr=0.1)


def complex_optimizer():
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    return SGD([p], lr=0.1)


def twice_optimizer():
    p = linear().weight
    with pytest.warns(UserWarning, match="duplicate"):
        return SGD([p, p], lr=0.1)


def scaled_overflow():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    return Direction.from_optimizer(with_grad(math.inf), scaler=scaler)


def infinite_rate():
    optimizer = with_grad(1.0)
    optimizer.param_groups[0]["lr"] = math.inf
    return optimizer


class Fails(torch.optim.Optimizer):
    def step(self, closure=None):
        raise RuntimeError("no luck")


class Uncopyable(SGD):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.pending = (i for i in range(3))


def tensors(**given):
    return Direction.from_tensors(given, nn.Linear(3, 2))


def between(before, after, lr=1.0):
    return Direction.between(before, after, lr)


OPTIMIZERS = {
    "no optimizer": (
        lambda: "sgd",
        TypeError,
        "optimizer must be a torch.optim.Optimizer or a list of them, got str; pass",
    ),
    "no gradient": (
        lambda: SGD(nn.Linear(3, 2).parameters(), lr=0.1),
        ValueError,
        "optimizer must hold a gradient, got none in 2 parameters; call Direction.from_optimizer after loss.backward()",
    ),
    "sparse": (
        sparse_optimizer,
        ValueError,
        "(shape [10, 3]) must be dense, got torch.sparse_coo; build the embedding",
    ),
    "complex": (complex_optimizer, TypeError, "must be real and floating-point, got torch.complex64; keep complex"),
    "meta": (
        lambda: SGD(nn.Linear(3, 2, device="meta").parameters(), lr=0.1),
        ValueError,
        "must hold values, got a meta tensor; load the weights before measuring",
    ),
    "lr 0": (lambda: with_grad(1.0, lr=0.0), ValueError, "positive learning rate in a group with a gradient, got 0 in"),
    "lr 0, other": (
        lambda: with_grad(1.0, NADAM, lr=0.0),
        ValueError,
        "got 0 in all of them; measure when the schedule",
    ),
    "lr inf": (infinite_rate, ValueError, "lr of group 0 must be a finite number >= 0, got inf; check what sets it"),
    "nan gradient": (
        lambda: with_grad(math.nan),
        ValueError,
        "the gradient of parameter 0 of group 0 (shape [2, 3]) must be finite, got nan or inf; find what overflowed",
    ),
    "inf gradient": (lambda: with_grad(math.inf, ADAMW), ValueError, "must be finite, got nan or inf"),
    "nan, other": (lambda: with_grad(math.nan, NADAM), ValueError, "the gradient of parameter 0 of group 0 (shape [2"),
    "zeros": (lambda: with_grad(0.0), NoUpdateError, "other than zero, got 1 and all gradients are zero: measure betw"),
    "zeros, other": (
        lambda: with_grad(0.0, NADAM),
        NoUpdateError,
        "optimizer must hold a gradient other than zero, got 1 and all gradients are zero: measure between backward()",
    ),
    "0/0": (
        lambda: with_one_zero(ADAM, eps=0.0),
        NoUpdateError,
        "direction for parameter 0 of group 0 (shape [2, 3]) must be finite, got nan or inf; check the gradients",
    ),
    "twice": (twice_optimizer, ValueError, "must stand in the optimizer once, got it twice; pass tied weights as"),
    "closure": (
        lambda: with_grad(1.0, torch.optim.LBFGS),
        TypeError,
        "optimizer must step without a closure, got LBFGS, whose step needs one; take the direction around the real "
        "step, with sharpkern.integrations.around_step.AroundStep or by hand: before = {p: p.detach().clone() for p in "
        "model.parameters()}; optimizer.step(); direction = Direction.between(before, model, lr), to be measured with",
    ),
    "fails": (
        lambda: Fails(linear().parameters(), {"lr": 0.1}),
        TypeError,
        "must be able to step on a copy of itself, got Fails, which fails with RuntimeError: no luck; take the "
        "direction around the real step, with sharpkern.integrations.around_step.AroundStep or by hand: before = {p:",
    ),
    "uncopyable": (
        lambda: with_grad(1.0, Uncopyable),
        TypeError,
        "got Uncopyable, which fails with TypeError: cannot p",
    ),
}

OTHERS = {
    "overflow of the scaler": (scaled_overflow, ValueError, "skip this measurement: GradScaler will skip the step"),
    "scaler": (
        lambda: Direction.from_optimizer(with_grad(1.0), scaler=1024.0),
        TypeError,
        "scaler must be a torch.amp.GradScaler, got float; with another loss scaler unscale the gradients first",
    ),
    "master key": (
        lambda: Direction.from_optimizer(with_grad(1.0), masters={"weight": torch.ones(2, 3)}),
        TypeError,
        "masters must have the model's parameters as keys, got str; pass {parameter: fp32 tensor}",
    ),
    "master shape": (
        lambda: Direction.from_optimizer(with_grad(1.0), masters={linear().weight: torch.ones(3, 2)}),
        ValueError,
        "masters must be floating-point, of their parameter's shape and on its device, [2, 3] on cpu, got torch.",
    ),
    "masters of another model": (
        lambda: Direction.from_optimizer(with_grad(1.0), masters={linear().weight: torch.ones(2, 3)}),
        ValueError,
        "masters must belong to parameters that the optimizer holds, or be what it holds, got neither; build the",
    ),
    "gradients of no module": (
        lambda: Direction.from_gradients(with_grad(1.0)),
        TypeError,
        "model must be a torch.nn.Module, got SGD; pass the module that is trained",
    ),
    "no gradients": (
        lambda: Direction.from_gradients(nn.Linear(3, 2)),
        ValueError,
        "model must hold a gradient in some parameter, got none; call loss.backward() before Direction.from_gradients",
    ),
    "nan gradients": (
        lambda: Direction.from_gradients(linear(math.nan)),
        ValueError,
        "direction for 'weight' must be finite, got nan or inf",
    ),
    "zero gradients": (lambda: Direction.from_gradients(linear(0.0)), ValueError, "got all zeros; check that the loss"),
    "no mapping": (
        lambda: Direction.from_tensors([torch.ones(2, 3)], linear()),
        TypeError,
        "tensors must be a mapping of",
    ),
    "unknown name": (
        lambda: tensors(wieght=torch.ones(2, 3)),
        ValueError,
        "direction must name parameters of the model, got 'wieght'; the closest it has: 'weight'",
    ),
    "key": (
        lambda: Direction.from_tensors({0: torch.ones(2)}, linear()),
        TypeError,
        "keyed by names or parameters, got int",
    ),
    "foreign parameter": (
        lambda: Direction.from_tensors({linear().weight: torch.ones(2, 3)}, linear()),
        ValueError,
        "direction must be for the model's own parameters, got another of shape [2, 3]; take the keys from",
    ),
    "transposed": (
        lambda: tensors(weight=torch.ones(3, 2)),
        ValueError,
        "direction for 'weight' must have the parameter's shape [2, 3], got [3, 2]; pass it transposed",
    ),
    "shape": (lambda: tensors(bias=torch.ones(3)), ValueError, "shape [2], got [3]; check which parameter it is for"),
    "integers": (
        lambda: tensors(bias=torch.ones(2, dtype=torch.int64)),
        TypeError,
        "direction for 'bias' must be a real floating-point tensor, got torch.int64; convert it with .to(",
    ),
    "complex": (lambda: tensors(bias=torch.ones(2) * 1j), TypeError, "real floating-point tensor, got torch.complex64"),
    "number": (
        lambda: tensors(bias=1.0),
        TypeError,
        "direction for 'bias' must be a real floating-point tensor, got float",
    ),
    "device": (
        lambda: tensors(bias=torch.ones(2, device="meta")),
        ValueError,
        "direction for 'bias' must be on the parameter's device cpu, got meta; move it there with",
    ),
    "sparse": (
        lambda: tensors(bias=torch.ones(2).to_sparse()),
        ValueError,
        "'bias' must be dense, got torch.sparse_coo",
    ),
    "nan": (
        lambda: tensors(bias=torch.tensor([1.0, math.nan])),
        ValueError,
        "direction for 'bias' must be finite, got nan",
    ),
    "all zeros": (lambda: tensors(bias=torch.zeros(2)), ValueError, "got all zeros; pass a tensor that moves some"),
    "nothing": (lambda: tensors(), ValueError, "direction must move some parameter, got all zeros; pass a tensor"),
    "lr of between": (
        lambda: between(linear(), linear(), 0.0),
        ValueError,
        "lr must be a positive finite number, got 0.0",
    ),
    "unchanged": (
        lambda: between(*[linear()] * 2),
        ValueError,
        "got all zeros; before and after are equal: clone the",
    ),
    "weights": (
        lambda: between(linear(), 3),
        TypeError,
        "after must be a module or a mapping of names or parameters to",
    ),
    "whole checkpoint": (
        lambda: between({"model": {}, "step": 3}, linear()),
        ValueError,
        "before must hold floating-point tensors, got none; pass the weights themselves, not the checkpoint",
    ),
    "other names": (
        lambda: between({"wieght": torch.ones(2, 3)}, linear()),
        ValueError,
        "after must hold 'wieght' like the other side, got no such name, only 'weight'; pass the same set of weights",
    ),
    "name gone": (
        lambda: between({"a": torch.ones(1)}, {"a": torch.zeros(1), "b": torch.ones(1)}),
        ValueError,
        "before must hold 'b' like the other side, got no such name, only 'a'",
    ),
    "other parameters": (
        lambda: between({linear().weight: torch.ones(2, 3)}, linear()),
        ValueError,
        "after must hold the parameter of shape [2, 3] that the other side has, got no such entry; key both sides",
    ),
    "shapes of weights": (
        lambda: between({"weight": torch.ones(3, 2)}, linear()),
        ValueError,
        "'weight' must have one shape before and after, got [3, 2] and [2, 3]; pass two states of the same model",
    ),
    "complex weights": (
        lambda: between({"a": torch.ones(2) * 1j}, {"a": torch.zeros(2) * 1j}),
        TypeError,
        "'a' must be real and floating-point, got torch.complex64",
    ),
    "bind to no module": (
        lambda: Direction.from_gradients(linear()).bind("model"),
        TypeError,
        "model must be a torch.nn",
    ),
    "bind to nothing": (
        lambda: Direction.from_gradients(linear()).bind(nn.Tanh()),
        ValueError,
        "model must have param",
    ),
    "bind unknown names": (
        lambda: between({"wieght": torch.ones(2, 3)}, {"wieght": torch.zeros(2, 3)}).bind(linear()),
        ValueError,
        "direction must name parameters of the model, got 'wieght'; the closest it has: 'weight'",
    ),
    "bind other shapes": (
        lambda: between({"weight": torch.ones(3, 2)}, {"weight": torch.zeros(3, 2)}).bind(linear()),
        ValueError,
        "direction for 'weight' must have the parameter's shape [2, 3], got [3, 2]; pass it transposed",
    ),
    "bind buffers only": (
        lambda: between({"running_mean": torch.ones(6)}, {"running_mean": torch.zeros(6)}).bind(nn.BatchNorm1d(6)),
        ValueError,
        "got all zeros; only buffers differ between before and after",
    ),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_an_optimizer_is_refused_and_stays_as_it_was(case):
    make, error, words = OPTIMIZERS[case]
    optimizer = make()
    before = copy.deepcopy(getattr(optimizer, "__dict__", {}).get("state"))
    with pytest.raises(error, match=re.escape(words)):
        Direction.from_optimizer(optimizer)
    assert len(getattr(optimizer, "__dict__", {}).get("state") or {}) == len(before or {})


@pytest.mark.parametrize("case", OTHERS)
def test_bad_input_is_refused_with_its_remedy(case):
    make, error, words = OTHERS[case]
    with pytest.raises(error, match=re.escape(words)):
        make()


def test_what_is_frozen_and_merely_stands_in_the_optimizer_may_be_of_any_kind():
    """Torch's optimizers step past what has no gradient."""
    layer = linear()
    frozen = [nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False) for dtype in (torch.int8, torch.complex64)]
    unused = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    for kind in (SGD, NADAM):
        direction = Direction.from_optimizer(kind([*frozen, unused, *layer.parameters()], lr=0.1))
        assert [id(p) for p in direction.parameters] == [id(layer.weight)]


@pytest.mark.parametrize("kind", [SGD, ADAMW, NADAM])
def test_weights_and_state_that_are_not_finite_leave_no_update(kind):
    """The gradients are finite: clipped, for example, by a loop that goes on."""
    layer = linear()
    optimizer = kind(layer.parameters(), lr=0.1, weight_decay=0.1)
    with torch.no_grad():
        layer.weight[0, 0] = math.inf
    with pytest.raises(NoUpdateError, match="must be finite, got nan or inf; check the gradients, weights and optim"):
        Direction.from_optimizer(optimizer)
    with pytest.raises(NoUpdateError, match="must be finite"):
        Direction.from_optimizer(optimizer, resident=False)
