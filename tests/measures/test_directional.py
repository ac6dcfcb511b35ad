"""Directional sharpness against closed forms and dense Hessians, by both methods."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sharpkern.directions.direction import Direction
from sharpkern.errors import EngineFallbackWarning, RetainedWarning
from sharpkern.measures.directional import DirectionalSharpness, directional_sharpness
from tests.helpers.models import OutOfSight


def classifier(dtype=torch.float32, dropout=0.0):
    """A small network with its batch, after a backward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 4)).to(
        dtype
    )
    inputs, labels = torch.randn(64, 6, dtype=dtype), torch.randint(0, 4, (64,))

    def loss_fn():
        return F.cross_entropy(model(inputs), labels)

    loss_fn().backward()
    return model, inputs, labels, loss_fn


def dense_answer(model, inputs, labels, direction):
    """ΔθᵀHΔθ/Δθᵀg from the whole Hessian in float64."""
    model = copy.deepcopy(model).double()
    names, shapes = zip(*((n, p.shape) for n, p in model.named_parameters()), strict=True)

    def flat_loss(flat):
        pieces = flat.split([s.numel() for s in shapes])
        table = {n: piece.view(s) for n, piece, s in zip(names, pieces, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, table, inputs.double()), labels)

    theta = nn.utils.parameters_to_vector(model.parameters()).detach().requires_grad_()
    delta = torch.cat([t.double().flatten() for t in direction.tensors])
    (gradient,) = torch.autograd.grad(flat_loss(theta), theta)
    return (delta @ torch.autograd.functional.hessian(flat_loss, theta.detach()) @ delta / (delta @ gradient)).item()


@pytest.mark.parametrize(("method", "error"), [("hvp", 1e-5), ("forward", 0.01)])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_equals_the_dense_hessian(kind, method, error):
    model, inputs, labels, loss_fn = classifier()
    direction = Direction.from_optimizer(kind(model.parameters(), lr=1e-3))
    expected = dense_answer(model, inputs, labels, direction)
    assert directional_sharpness(model, loss_fn, direction, method=method) == pytest.approx(expected, rel=error)


@pytest.mark.parametrize("method", ["hvp", "forward", "gradient"])
def test_in_float64(method):
    model, inputs, labels, loss_fn = classifier(torch.float64)
    direction = Direction.from_gradients(model)
    expected = dense_answer(model, inputs, labels, direction)
    assert directional_sharpness(model, loss_fn, direction, method=method) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["hvp", "forward", "gradient"])
def test_scales_with_the_direction_and_not_with_the_loss(method):
    model, _, _, loss_fn = classifier(torch.float64)
    gradients = {p: p.grad for p in model.parameters()}
    one = directional_sharpness(model, loss_fn, Direction.from_tensors(gradients, model), method=method)
    three = Direction.from_tensors({p: 3 * g for p, g in gradients.items()}, model)
    assert directional_sharpness(model, loss_fn, three, method=method) == pytest.approx(3 * one, rel=1e-4)
    same = directional_sharpness(
        model, lambda: 1e3 * loss_fn(), Direction.from_tensors(gradients, model), method=method
    )
    assert same == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("method", ["hvp", "forward", "gradient"])
def test_clipped_gradients_do_not_bias_it(method):
    model, inputs, labels, loss_fn = classifier()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    direction = Direction.from_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    expected = dense_answer(model, inputs, labels, direction)
    assert directional_sharpness(model, loss_fn, direction, method=method) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("method", ["hvp", "forward", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore::sharpkern.RetainedWarning")
def test_a_loss_without_a_value_has_no_curvature(method, value):
    model, _, _, loss_fn = classifier()
    direction = Direction.from_gradients(model)
    assert math.isnan(directional_sharpness(model, lambda: loss_fn() + value, direction, method=method))


def test_a_direction_without_curvature_is_not_refused_for_its_rounding():
    model, inputs, labels, _ = classifier()
    # Softmax does not see what is added to all of its inputs.
    model.bias = nn.Parameter(torch.zeros(1))
    loss_fn = lambda: F.cross_entropy(nn.Sequential.forward(model, inputs) + model.bias, labels)
    direction = Direction.from_tensors({model.bias: torch.ones(1)}, model)
    value = directional_sharpness(model, loss_fn, direction, method="hvp")
    assert math.isnan(value) or value.error > 1


@pytest.mark.parametrize("method", ["hvp", "forward", "gradient"])
def test_a_frozen_parameter_moves_where_the_direction_says_so(method):
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
    model = nn.ParameterList([weight])
    direction = Direction.from_tensors({weight: torch.ones(3, dtype=torch.float64)}, model)
    # f = Σ(1 − η)³: f″/−f′ = 6/3 per unit of a direction of ones.
    value = directional_sharpness(model, lambda: model[0].pow(3).sum(), direction, method=method)
    assert value == pytest.approx(2, rel=1e-4)
    assert not weight.requires_grad


@pytest.mark.parametrize("method", ["hvp", "forward", "gradient"])
def test_leaves_no_trace_and_repeats_itself_under_dropout(method):
    model, _, _, loss_fn = classifier(dropout=0.5)
    direction = Direction.from_gradients(model)
    gradients = [p.grad for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    stream = torch.get_rng_state()
    first = directional_sharpness(model, loss_fn, direction, method=method)
    assert directional_sharpness(model, loss_fn, direction, method=method) == first
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_fused_attention_by_both_methods():
    torch.manual_seed(0)
    model, hidden = nn.Linear(8, 24, bias=False), torch.randn(4, 2, 6, 8)

    def loss_fn():
        q, k, v = model(hidden).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).square().mean()

    loss_fn().backward()
    direction = Direction.from_gradients(model)
    exact = directional_sharpness(model, loss_fn, direction, method="hvp")
    assert directional_sharpness(model, loss_fn, direction) == pytest.approx(exact, rel=0.01)


def test_a_fused_kernel_is_refused_by_the_product_and_measured_by_the_differences():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), torch.randn(20, 6)

    def fused():
        return model[1](OutOfSight.apply(model[0](inputs))).square().mean()

    def plain():
        return model[1](model[0](inputs).square()).square().mean()

    fused().backward()
    direction = Direction.from_gradients(model)
    with pytest.raises(
        RuntimeError, match=r"must be differentiable, got \|g\|² = .* of which autograd sees .*without fused"
    ):
        directional_sharpness(model, fused, direction, method="hvp")
    exact = directional_sharpness(model, plain, direction, method="hvp")
    assert directional_sharpness(model, fused, direction) == pytest.approx(exact, rel=0.01)


def test_falls_back_to_the_inplace_engine_with_a_warning(no_swapping: None):
    model, _, _, loss_fn = classifier()
    direction = Direction.from_gradients(model)
    expected = directional_sharpness(model, loss_fn, direction, method="hvp")

    def opaque():
        # What a kernel that takes raw pointers does: the virtual engine cannot put another weight there.
        model[0].weight.data_ptr()
        return loss_fn()

    with pytest.warns(EngineFallbackWarning, match="measuring in place"):
        value = directional_sharpness(model, opaque, direction)
    assert value == pytest.approx(expected, rel=0.01)


def test_steps_that_rounding_swallows_are_told(monkeypatch):
    # The share itself has its own tests; here it is only bad luck.
    monkeypatch.setattr("sharpkern.measures.directional.retained_share", lambda *_: 0.5)
    model, _, _, loss_fn = classifier()
    with pytest.warns(RetainedWarning, match=r"only 0\.50 of the displacement by ±.*·Δθ survives .*float32 masters"):
        directional_sharpness(model, loss_fn, Direction.from_gradients(model))


def test_a_closure_that_draws_a_new_batch_each_time_is_refused():
    model, inputs, _, _ = classifier()
    batches = iter(range(1000))
    with pytest.raises(ValueError, match=r"must return the same loss whenever it is called, got .* and then"):
        directional_sharpness(
            model, lambda: model(inputs.roll(next(batches), 1)).square().mean(), Direction.from_gradients(model)
        )


def test_unknown_method_is_refused():
    model, _, _, loss_fn = classifier()
    with pytest.raises(
        ValueError, match="method must be one of 'forward', 'gradient', 'hvp', got 'exact'; leave it out for"
    ):
        directional_sharpness(model, loss_fn, Direction.from_gradients(model), method="exact")


def test_no_slope_is_nan_by_the_product():
    weight = nn.Parameter(torch.zeros(2))
    model = nn.ParameterList([weight])
    direction = Direction.from_tensors({weight: torch.ones(2)}, model)
    assert math.isnan(directional_sharpness(model, lambda: model[0].square().sum(), direction, method="hvp"))


@pytest.mark.parametrize("method", ["hvp", "forward", "gradient"])
def test_is_a_number_that_knows_how_it_was_measured(method):
    model, inputs, labels, loss_fn = classifier()
    direction = Direction.from_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    calls = 0

    def counted():
        nonlocal calls
        calls += 1
        return loss_fn()

    value = directional_sharpness(model, counted, direction, method=method)
    expected = dense_answer(model, inputs, labels, direction)
    assert abs(value - expected) <= value.error * abs(value)
    assert 0 < value.error < (0.05 if method == "forward" else 1e-4)
    assert value.forwards == calls
    assert (value.step_size is None) == (method == "hvp")
    assert isinstance(value, float)
    assert f"{value:.3e} {value}" == f"{float(value):.3e} {float(value)}"
    for other in (pickle.loads(pickle.dumps(value)), copy.copy(value), copy.deepcopy(value)):
        assert type(other) is DirectionalSharpness
        assert (other, vars(other)) == (value, vars(value))


def test_a_step_of_ones_own():
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    model = nn.ParameterList([weight])
    direction = Direction.from_tensors({weight: torch.ones(1, dtype=torch.float64)}, model)
    # f = (1 − η)⁴ by the values at 0 and ±h: f′ = −(4 + 4h²), f″ = 12 + 2h².
    for step in (0.1, 0.3):
        value = directional_sharpness(model, lambda: model[0].pow(4).sum(), direction, step_size=step)
        assert value == pytest.approx((12 + 2 * step**2) / (4 + 4 * step**2), rel=1e-9)
        assert value.step_size == step
        assert abs(value - 3) < value.error * value < 3 * abs(value - 3)
    # Base loss and three pairs: the checks were made the first time.
    assert value.forwards == 7


def test_a_step_too_small_for_the_loss_is_nan_and_says_which():
    model, _, _, loss_fn = classifier()
    value = directional_sharpness(model, loss_fn, Direction.from_gradients(model), step_size=1e-6)
    assert math.isnan(value)
    assert math.isnan(value.error)
    assert value.step_size == 1e-6


def test_what_rounding_of_the_weights_left_out_is_in_the_error(monkeypatch):
    model, _, _, loss_fn = classifier()
    direction = Direction.from_gradients(model)
    whole = directional_sharpness(model, loss_fn, direction)
    monkeypatch.setattr("sharpkern.measures.directional.retained_share", lambda *_: 0.93)
    part = directional_sharpness(model, loss_fn, direction)
    assert part == whole
    assert part.error == pytest.approx(whole.error + 0.07, abs=1e-5)


def test_rounding_of_low_precision_products_is_in_the_error():
    model, inputs, labels, _ = classifier()
    direction = Direction.from_gradients(model)
    expected = dense_answer(model, inputs, labels, direction)

    def loss_fn():
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(inputs).float(), labels)

    value = directional_sharpness(model, loss_fn, direction, method="hvp")
    assert 1e-4 < abs(value / expected - 1) < value.error


@pytest.mark.parametrize(
    ("step_size", "method", "error", "message"),
    [
        (0.0, "forward", ValueError, r"step_size must be positive and finite, got 0\.0; leave it out for the best"),
        (-0.1, "forward", ValueError, r"step_size must be positive and finite, got -0\.1"),
        (math.inf, "forward", ValueError, "step_size must be positive and finite, got inf"),
        (math.nan, "hvp", ValueError, "step_size must be positive and finite, got nan"),
        ("0.1", "forward", TypeError, "step_size must be a number, positive and finite, got '0.1'; leave it out"),
        (True, "forward", TypeError, "step_size must be a number, positive and finite, got True"),
        (0.1, "hvp", ValueError, r"step_size must be left out with method='hvp', which takes no step, got 0\.1"),
    ],
)
def test_steps_that_are_none_are_refused(step_size, method, error, message):
    model, _, _, loss_fn = classifier()
    with pytest.raises(error, match=message):
        directional_sharpness(model, loss_fn, Direction.from_gradients(model), method=method, step_size=step_size)


@pytest.mark.parametrize("swapping", [True, False])
def test_two_gradients_say_what_the_exact_product_says(swapping, request):
    if not swapping:
        request.getfixturevalue("no_swapping")
    model, _, _, loss_fn = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    direction = Direction.from_optimizer(optimizer)
    exact = directional_sharpness(model, loss_fn, direction, method="hvp")
    before = [(p.data_ptr(), p._version, p.grad) for p in model.parameters()]
    first = directional_sharpness(model, loss_fn, direction, method="gradient")
    second = directional_sharpness(model, loss_fn, direction, method="gradient")
    for value in (first, second):
        assert value == pytest.approx(exact, rel=max(1e-4, 3 * value.error))
        assert value.error < 0.02
    assert second.forwards <= first.forwards
    given = directional_sharpness(model, loss_fn, direction, method="gradient", step_size=first.step_size)
    assert (given.step_size, float(given)) == (first.step_size, float(first))
    after = [(p.data_ptr(), p._version, p.grad) for p in model.parameters()]
    assert all(a[:2] == b[:2] and a[2] is b[2] for a, b in zip(before, after, strict=True))


def test_two_gradients_of_different_batches_are_refused():
    model, inputs, labels, _ = classifier()
    batches = iter(range(100))
    loss_fn = lambda: F.cross_entropy(model(inputs.roll(next(batches), 0) * (1 + next(batches))), labels)
    with pytest.raises(ValueError, match="must return the same loss whenever it is called"):
        directional_sharpness(model, loss_fn, Direction.from_gradients(model), method="gradient")
