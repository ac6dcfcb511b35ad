"""A part of a direction: its own slope and norm, and everything else of the whole."""

import copy
import math

import pytest
import torch
from torch import nn

import sharpkern
from sharpkern import Direction
from tests.helpers.models import MLP


def model_with_gradient() -> nn.Module:
    model = MLP()
    model(torch.randn(8, 16)).square().mean().backward()
    return model


MAKERS = {
    "sgd": lambda m: Direction.from_optimizer(torch.optim.SGD(m.parameters(), lr=0.1)),
    "lazy adamw": lambda m: Direction.from_optimizer(torch.optim.AdamW(m.parameters(), lr=0.1), resident=False),
    "adafactor": lambda m: Direction.from_optimizer(torch.optim.Adafactor(m.parameters(), lr=0.1)),
    "gradients": Direction.from_gradients,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("by", ["name", "module", "parameters"])
def test_slope_and_norm_are_those_of_the_part(make, by: str) -> None:
    model = model_with_gradient()
    whole = make(model)
    part = whole.only({"name": "2", "module": model[2], "parameters": model[2].parameters()}[by])
    if by == "name":
        assert (part.parameters, part.slope, repr(part)) == ((), None, f"Direction(a part of {whole!r}, by name)")
        assert math.isnan(part.norm_sq)
        with pytest.raises(ValueError, match=r"call bind\(model\)"):
            _ = part.tensors
        part = part.bind(model)
    deltas = dict(zip(whole.parameters, whole.tensors, strict=True))
    own = list(model[2].parameters())
    assert list(part.parameters) == own
    assert all(torch.equal(delta, deltas[p]) for p, delta in zip(own, part.tensors, strict=True))
    assert part.norm_sq == pytest.approx(sum(deltas[p].double().square().sum().item() for p in own))
    assert part.slope == pytest.approx(sum((deltas[p].double() * p.grad.double()).sum().item() for p in own))
    assert part.lr == whole.lr
    assert part.nbytes <= whole.nbytes


def test_a_slope_that_is_not_known_of_the_whole_is_not_known_of_a_part() -> None:
    model = model_with_gradient()
    tensors = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    assert Direction.from_tensors(tensors, model).only(model[0]).slope is None


def test_a_part_of_a_part_and_of_names() -> None:
    model = model_with_gradient()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(before)
    part = Direction.between(before, after, lr=0.1).only(["0", "2"]).only("*.weight")
    assert [id(p) for p in part.bind(model).parameters] == [id(model[0].weight), id(model[2].weight)]
    assert [id(p) for p in copy.deepcopy(part).bind(model).parameters] == [id(p) for p in part.bind(model).parameters]


def test_it_is_refused_when_the_whole_has_changed() -> None:
    model = model_with_gradient()
    whole = Direction.from_gradients(model)
    early, named = whole.only(model[2]), whole.only("2")
    model[2].weight.grad.mul_(2)
    for late in (lambda: whole.only(model[2]), lambda: early.bind(model), lambda: named.bind(model)):
        with pytest.raises(ValueError, match="direction must hold what it was made with"):
            late()


def test_memory_that_is_shared_moves_with_either_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model[2].weight.data = model[0].weight.data.T
    x = torch.randn(4, 3)
    loss_fn = lambda: model(x).square().mean()
    loss_fn().backward()
    whole = Direction.from_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    part = whole.only("0").bind(model)
    assert len(part.parameters) == 2
    assert part.slope is None
    assert part.norm_sq == pytest.approx(whole.norm_sq)
    assert sharpkern.critical_sharpness(model, loss_fn, part).sharpness == pytest.approx(
        sharpkern.critical_sharpness(model, loss_fn, whole).sharpness, rel=0.03
    )


def test_masters_go_along() -> None:
    model = model_with_gradient().bfloat16()
    masters = {p: p.detach().float() for p in model.parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    whole = Direction.from_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), masters=masters)
    assert [id(m) for m in whole.only(model[2]).masters] == [id(masters[p]) for p in model[2].parameters()]


def test_what_does_not_move_is_no_part() -> None:
    model = model_with_gradient()
    model[0].weight.grad.zero_()
    whole = Direction.from_gradients(model)
    assert len(whole.only(model[0]).parameters) == 1
    with pytest.raises(sharpkern.NoUpdateError, match="got none of 1 among the 6 that move; name others"):
        whole.only(model[0].weight)
    with pytest.raises(TypeError, match="must be parameters, modules, or patterns of parameters' names, got float"):
        whole.only(0.5)
    with pytest.raises(ValueError, match="got '9', which matches none; near it"):
        whole.only("9").bind(model)
