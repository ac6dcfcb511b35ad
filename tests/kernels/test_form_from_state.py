"""form_step against what the optimizer's own step does, in fp64 and in the dtype at hand."""

import copy

import pytest
import torch
from sharpkern.kernels import _launch
from sharpkern.kernels._launch import _device_numbers, device_numbers
from sharpkern.kernels.form import form
from sharpkern.kernels.optimizer_steps import form_step
from torch import Tensor

from tests.helpers.rules import FULLEST, RULES, reading
from tests.kernels.budget import DTYPES, SIZES, assert_within_budget, randn, same_bits

# Every rule with a state of every kind, and every size of the fullest ones: how a tensor ends has nothing to do with
# what is in the state.
SITUATIONS = [(name, 1000, steps) for name in RULES for steps in (0, 1, 5)]
SITUATIONS += [pytest.param(name, size, 5, marks=pytest.mark.long) for name in FULLEST for size in SIZES if size > 1000]
SITUATIONS += [(name, size, 5) for name in FULLEST for size in SIZES if size < 1000]

LR = 0.0625
ALPHA = torch.tensor([-LR, 0.0, 0.3])


def trained(name, size, steps, dtype=torch.float32, **change):
    """A parameter with a gradient that its optimizer has not seen, after some steps."""
    kind, options = RULES[name]
    parameter = torch.nn.Parameter(randn(size).to(dtype))
    optimizer = kind([parameter], lr=LR, **options | change)
    for step in range(steps + 1):
        parameter.grad = randn(size, seed=step + 1).to(dtype)
        if step < steps:
            optimizer.step()
    return parameter, optimizer


def stepped(parameter, optimizer, dtype):
    """The parameter after one more step of a copy of everything in another dtype, lr = LR."""
    moved = torch.nn.Parameter(parameter.detach().to(dtype, copy=True))
    twin = type(optimizer)([moved], lr=LR)
    vars(twin).update({key: value for key, value in vars(optimizer).items() if key not in {"param_groups", "state"}})
    twin.param_groups[0] = {**optimizer.param_groups[0], "params": [moved]}
    if parameter in optimizer.state:
        twin.state[moved] = copy.deepcopy(optimizer.state[parameter])
    for key, value in twin.state.get(moved, {}).items():
        if isinstance(value, Tensor) and key != "step":
            twin.state[moved][key] = value.to(dtype)
    moved.grad = parameter.grad.to(dtype)
    twin.step()
    return moved.detach()


def from_state(parameter, optimizer, alpha=ALPHA, dtype=None, out=None, **change):
    operands, numbers, options = reading(parameter, optimizer, **change)
    return form_step(*operands, alpha, numbers, **options, dtype=dtype, out=out)


def adam_numbers(step, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0):
    """The numbers of Adam at a step."""
    root = (1 - beta2**step) ** 0.5
    return weight_decay, 1.0, 1.0, 1 - beta1, beta2, 1 - beta2, 1 / (1 - beta1**step), root, eps


def largest_term(optimizer):
    """Of an update, about: those of RMSprop are up to 1 / √(1 − α) = 10 each in its first steps."""
    return 10 if isinstance(optimizer, torch.optim.RMSprop) else 1


def assert_is_the_step(out, parameter, optimizer):
    """Slice 0 is what the step writes, slice 1 the parameter, slice 2 as far along the same line as its α says."""
    exact = stepped(parameter, optimizer, torch.float64)
    in_torch = stepped(parameter, optimizer, torch.float32)
    theta = parameter.detach().double()
    # The terms of the update cancel at some elements: they are rounded at the size of the terms.
    floor = 4 * torch.finfo(torch.float32).eps * LR * (largest_term(optimizer) + (theta - exact).abs() / LR)
    assert_within_budget(out[0], exact, in_torch, floor=floor)
    assert same_bits(out[1], parameter.detach())
    line = theta + (exact - theta) * (ALPHA[2].double() / ALPHA[0].double())
    assert_within_budget(out[2], line, line.float(), roundings=1.0, floor=6 * floor)


@pytest.mark.parametrize(("name", "size", "steps"), SITUATIONS)
def test_it_is_what_the_step_does(name, size, steps):
    parameter, optimizer = trained(name, size, steps)
    assert_is_the_step(from_state(parameter, optimizer), parameter, optimizer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_state_and_weights_of_different_dtypes(dtype, state_dtype):
    parameter, optimizer = trained("AdamW", 1000, 3, eps=1e-3)
    parameter = torch.nn.Parameter(parameter.detach().to(dtype))
    parameter.grad = randn(1000, seed=9, dtype=dtype)
    state = {k: v.to(state_dtype) if k != "step" else v for k, v in next(iter(optimizer.state.values())).items()}
    optimizer.state[parameter] = state
    out = from_state(parameter, optimizer, ALPHA[:1])
    exact = stepped(parameter, optimizer, torch.float64)
    floor = 1e-6 * LR * (1 + (parameter.detach().double() - exact).abs() / LR)
    assert out.dtype == dtype
    assert_within_budget(out[0], exact, exact.to(dtype), floor=floor)


def test_a_gradient_already_in_the_state_is_not_applied_again():
    parameter, optimizer = trained("AdamW", 1000, 3)
    wanted = from_state(parameter, optimizer)
    before = parameter.detach().clone()
    optimizer.step()
    state = optimizer.state[parameter]
    numbers = adam_numbers(float(state["step"]), weight_decay=0.1)
    moments = (state["exp_avg"], state["exp_avg_sq"], None)
    out = form_step("adam", before, None, moments, ALPHA, numbers, decoupled=True)
    assert torch.allclose(out, wanted, rtol=1e-5, atol=1e-7)


def test_without_first_momentum_nothing_of_a_large_old_moment_is_left():
    grad, stale = randn(100, scale=1e-3), torch.full((100,), 1e6)
    zeros, numbers = torch.zeros(100), adam_numbers(5, beta1=0.0, eps=1.0)
    out, fresh = (form_step("adam", zeros, grad, (m, zeros, None), ALPHA[:1], numbers) for m in (stale, zeros))
    assert same_bits(out, fresh)


@pytest.mark.parametrize("name", FULLEST)
class TestTheUpdateItself:
    def test_is_the_step_per_unit_learning_rate(self, name):
        parameter, optimizer = trained(name, 1000, 3)
        out = from_state(parameter, optimizer, None)
        exact = (parameter.detach().double() - stepped(parameter, optimizer, torch.float64)) / LR
        assert out.shape == (1, 1000)
        floor = 8 * torch.finfo(torch.float32).eps * exact.abs().clamp(min=largest_term(optimizer))
        assert_within_budget(out[0], exact, exact.float(), floor=floor)

    def test_is_what_the_weights_move_along(self, name):
        parameter, optimizer = trained(name, 1000, 3)
        delta = from_state(parameter, optimizer, None)[0]
        assert same_bits(from_state(parameter, optimizer, ALPHA), form(parameter.detach(), delta, ALPHA))

    def test_without_decay_the_weights_are_not_read(self, name):
        parameter, optimizer = trained(name, 1000, 3, weight_decay=0.0)
        wanted = from_state(parameter, optimizer, None)
        parameter.data.fill_(torch.nan)
        assert same_bits(from_state(parameter, optimizer, None), wanted)

    def test_rate_multiplies_it(self, name):
        parameter, optimizer = trained(name, 1000, 3)
        delta, scaled = (from_state(parameter, optimizer, None, rate=rate) for rate in (1.0, 0.3))
        assert same_bits(scaled, delta * 0.3)
        assert same_bits(from_state(parameter, optimizer, rate=0.3), form(parameter.detach(), scaled[0], ALPHA))

    @pytest.mark.parametrize("steps", [0, 3])
    def test_grad_factor_undoes_a_loss_scale(self, name, steps):
        parameter, optimizer = trained(name, 1000, steps)
        wanted = from_state(parameter, optimizer)
        parameter.grad *= 1024
        assert same_bits(from_state(parameter, optimizer, grad_factor=1 / 1024), wanted)
        # Lion's first step has no size.
        assert same_bits(from_state(parameter, optimizer), wanted) == (name == "Lion" and steps == 0)


def test_numbers_are_copied_once_for_all_probes_of_a_measurement():
    _device_numbers.cache_clear()
    parameter, optimizer = trained("AdamW", 10, 3)
    for _ in range(5):
        from_state(parameter, optimizer)
    from_state(parameter, optimizer, rate=0.5)
    assert _device_numbers.cache_info()[:2] == (4, 2)


def test_numbers_of_one_stream_are_not_used_on_another(monkeypatch):
    # What the cache drops, the allocator gives out again in the order of the stream that it was made on.
    like = torch.zeros(1)
    vectors = []
    for stream in (7, 8, 7):
        monkeypatch.setattr(_launch, "stream_of", lambda device, stream=stream: stream)
        vectors.append(device_numbers(0.1, 1 / 3, like=like))
    assert vectors[0] is vectors[2]
    assert vectors[0] is not vectors[1]
    assert same_bits(vectors[1], torch.tensor([0.1, 1 / 3]))


def test_state_is_not_written_and_out_is():
    parameter, optimizer = trained("AdamW", 1000, 3)
    before = copy.deepcopy(optimizer.state[parameter])
    out = torch.full((3, 1000), torch.nan)
    assert from_state(parameter, optimizer, out=out) is out
    assert out.isfinite().all()
    assert all(same_bits(before[key], optimizer.state[parameter][key]) for key in before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_dtype_is_free(dtype):
    parameter, optimizer = trained("SGD, momentum", 1000, 3)
    out = from_state(parameter, optimizer, ALPHA[:1], dtype=dtype)
    exact = stepped(parameter, optimizer, torch.float64)
    assert_within_budget(out[0], exact, stepped(parameter, optimizer, torch.float32).to(dtype), floor=1e-8)


def test_runs_twice_to_the_same_bits():
    parameter, optimizer = trained("AdamW", 4097, 2)
    assert same_bits(from_state(parameter, optimizer), from_state(parameter, optimizer))
