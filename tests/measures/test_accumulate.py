"""Directions from batches: equal to what a training loop's own gradient and optimizer say, and the model untouched."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sharpkern import Direction
from sharpkern.measures.batch_directions import adamw_direction, gradient_direction
from tests.helpers.cases import tokens
from tests.helpers.models import GPT, ResNet


def language_losses(model: nn.Module, num: int = 5) -> list:
    rows = tokens(batch=4)
    batches = [rows.roll(i, 1).flip(0) if i % 2 else rows.roll(i, 1) for i in range(num)]
    return [lambda x=x: F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()) for x in batches]


def test_the_mean_gradient_of_all_batches() -> None:
    model = GPT(dropout=0.0)
    losses = language_losses(model)
    direction = gradient_direction(model, iter(losses))
    torch.stack([loss() for loss in losses]).mean().backward()
    expected = Direction.from_gradients(model)
    assert direction.slope == pytest.approx(expected.slope, rel=1e-5)
    for one, other in zip(direction.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("num", [1, 2, 5])
def test_the_step_of_torchs_own_adamw_that_saw_the_same_batches_at_the_same_weights(num: int) -> None:
    model = GPT(dropout=0.0).double()
    losses = language_losses(model, num)
    settings = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3}
    direction = adamw_direction(model, losses, **settings)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, **settings)
    for loss in losses:
        model.zero_grad()
        loss().backward()
        for own, other in zip(twin.parameters(), model.parameters(), strict=True):
            own.data.copy_(other.data)
            own.grad = other.grad
        optimizer.step()
    assert direction.slope is None
    assert direction.lr is None
    for delta, before, after in zip(direction.tensors, model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(delta, (before - after).detach() / 1e-2, rtol=1e-9, atol=1e-12)


def test_a_parameter_that_a_batch_does_not_use_counts_its_own_gradients() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(3)])
    losses = [lambda: model[0].sum() + 2 * model[1].sum(), lambda: model[0].sum()]
    direction = adamw_direction(model, losses, weight_decay=0.0)
    # A constant gradient gives 1 at every count; the third parameter never moves.
    assert [round(d.item(), 6) for d in direction.tensors] == [1.0, 1.0]
    assert [p is q for p, q in zip(direction.parameters, model, strict=False)] == [True, True]


def test_moments_of_16_bit_weights_are_float32() -> None:
    model = nn.Linear(4, 1, bias=False).bfloat16()
    # In bfloat16 the second moment would stand still at a hundredth of itself per batch.
    losses = [lambda: 0.1 * model.weight.sum().float()] * 100
    (delta,) = adamw_direction(model, losses, betas=(0.9, 0.999), weight_decay=0.0).tensors
    assert delta.dtype is torch.float32
    torch.testing.assert_close(delta, torch.ones(1, 4), rtol=1e-3, atol=0)


def test_the_mean_of_16_bit_gradients_is_float32() -> None:
    model = nn.Linear(4, 1, bias=False).bfloat16()
    gradient = torch.tensor([[1.0, 0.3, 0.01, 7.0]]).bfloat16()
    # In bfloat16 the sum stands still once it is 256 times the gradient, a number of batches ago.
    (delta,) = gradient_direction(model, [lambda: (model.weight * gradient).sum()] * 1024).tensors
    torch.testing.assert_close(delta, gradient.float())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\); leave them out"),
        ({"eps": -1.0}, "eps must be a finite number >= 0, got -1.0; leave it out"),
        ({"weight_decay": math.inf}, "weight_decay must be a finite number >= 0, got inf; leave it out"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adamw_direction(LINEAR, [lambda: LINEAR.weight.sum()], **settings)


@pytest.mark.parametrize("make", [gradient_direction, adamw_direction])
def test_nothing_of_the_run_changes(make) -> None:
    model = ResNet()
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    x = torch.randn(8, 1, 8, 8)

    def loss() -> torch.Tensor:
        return F.dropout(model(x), 0.5).square().mean()

    loss().backward()
    gradients = [p.grad for p in model.parameters()]
    contents = [None if g is None else g.clone() for g in gradients]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    with torch.no_grad():
        direction = make(model, [loss, loss])
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(g is None or torch.equal(g, c) for g, c in zip(gradients, contents, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter is not frozen for parameter in direction.parameters)
    again = make(model, [loss, loss])
    assert all(torch.equal(one, other) for one, other in zip(direction.tensors, again.tensors, strict=True))


LINEAR = nn.Linear(2, 1)


@pytest.mark.parametrize("make", [gradient_direction, adamw_direction])
@pytest.mark.parametrize(
    ("model", "losses", "error", "message"),
    [
        (LINEAR, [], ValueError, "losses must hold at least one closure, got none; pass one for each batch"),
        (LINEAR, [lambda: 1.0], TypeError, "loss_fn must return a 0-dim .* got float 1.0; return the loss itself"),
        (LINEAR, [lambda: LINEAR.weight], ValueError, r"got a tensor of shape \[1, 2\]; reduce it"),
        (LINEAR, [lambda: torch.ones(())], ValueError, "a loss with its graph, got one without"),
        (LINEAR.weight, [lambda: LINEAR.weight.sum()], TypeError, r"model must be a torch\.nn\.Module, got Parameter"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(make, model, losses, error, message) -> None:
    with pytest.raises(error, match=message):
        make(model, losses)
    assert LINEAR.weight.grad is None


def test_a_model_that_steps_within_backward_is_refused_before_it_does() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.weight.register_post_accumulate_grad_hook(lambda parameter: optimizer.step())
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"hooks .*\(register_post_accumulate_grad_hook\), got one on .*\[1, 2\]"):
        gradient_direction(model, [lambda: model.weight.sum()])
    assert torch.equal(model.weight, before)
