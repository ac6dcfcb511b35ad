"""form_steps_ and sum_steps against the operations of one tensor, bit for bit."""

import pytest
import torch
from sharpkern.kernels import whole_steps as module
from sharpkern.kernels._launch import Case, Config
from sharpkern.kernels.optimizer_steps import form_step
from sharpkern.kernels.whole_steps import form_steps_, step_sums, sum_steps

from tests.helpers.rules import FULLEST, reading
from tests.kernels.budget import DTYPES, same_bits
from tests.kernels.test_form_from_state import trained

SIZES = (0, 1, 63, 1000, 4097)
ALPHA = torch.tensor([-0.3])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Chunks of 1024 elements, so that small tensors have several, the last of them ragged."""
    monkeypatch.setattr(module, "_CONFIGS", (Case(None, None, None, Config(block=256, threads=64)),))
    monkeypatch.setattr(module, "_TILES", 4)


def lists(name, sizes=SIZES, dtype=torch.float32):
    """Operands of several tensors that take one step: rule, θ, g and state, numbers and options."""
    thetas, grads, states = [], [], []
    for size in sizes:
        (rule, theta, grad, state), numbers, options = reading(*trained(name, max(1, size), 3))
        parts = [None if tensor is None else tensor[:size].to(dtype) for tensor in (theta, grad)]
        thetas.append(parts[0])
        grads.append(parts[1])
        states += [None if tensor is None else tensor[:size] for tensor in state]
    return (rule, thetas, grads, states), numbers, options


def one_by_one(operands):
    rule, thetas, grads, states = operands
    num = len(states) // len(thetas)
    for i, (theta, grad) in enumerate(zip(thetas, grads, strict=True)):
        yield rule, theta, grad, states[i * num : (i + 1) * num]


@pytest.mark.parametrize("alpha", [ALPHA, None, torch.zeros(1)], ids=["step", "update", "no step"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FULLEST)
def test_forms_are_those_of_one_tensor(name, dtype, alpha):
    (rule, thetas, grads, states), numbers, options = operands = lists(name, dtype=dtype)
    written = [torch.full_like(theta, torch.nan, dtype=torch.float32) for theta in thetas]
    form_steps_(rule, written, thetas, grads, states, alpha, numbers, **options)
    for found, one in zip(written, one_by_one(operands[0]), strict=True):
        assert same_bits(found, form_step(*one, alpha, numbers, dtype=torch.float32, **options)[0])


@pytest.mark.parametrize("name", FULLEST)
def test_sums_are_those_of_one_tensor(name):
    operands, numbers, options = lists(name)
    expected = torch.stack([step_sums(*one, numbers, **options) for one in one_by_one(operands)])
    assert same_bits(sum_steps(*operands, numbers, **options), expected)


def test_state_that_is_not_there_and_odd_addresses_are_launches_of_their_own():
    numbers = (0.1, 1.0, 1.0, 0.9, 1.0)
    thetas = [torch.randn(100), torch.randn(101)[1:], torch.randn(10, 10).t()]
    grads = [torch.randn_like(theta) for theta in thetas]
    states = [None, torch.randn(100), torch.randn(10, 10).t()]
    written = [torch.empty_like(theta) for theta in thetas]
    form_steps_("sgd", written, thetas, grads, states, ALPHA, numbers, flag=True)
    for found, one in zip(written, one_by_one(("sgd", thetas, grads, states)), strict=True):
        assert same_bits(found, form_step(*one, ALPHA, numbers, flag=True)[0])


def test_the_launch_can_be_made_again_with_another_step():
    (rule, thetas, grads, states), numbers, options = lists("AdamW")
    written = [torch.empty_like(theta) for theta in thetas]
    launch = form_steps_.accept(rule, written, thetas, grads, states, ALPHA, numbers, **options)
    launch()
    launch(alpha=2 * ALPHA)
    again = [torch.empty_like(theta) for theta in thetas]
    form_steps_(rule, again, thetas, grads, states, 2 * ALPHA, numbers, **options)
    assert all(map(same_bits, written, again))


def test_no_tensors_are_no_launch():
    form_steps_("sgd", [], [], [], [], ALPHA, (0.0, 1.0, 1.0, 0.9, 1.0))
    assert sum_steps("sgd", [], [], [], (0.0, 1.0, 1.0, 0.9, 1.0)).shape == (0, 2)


V = torch.zeros(4)
SGD = (0.0, 1.0, 1.0, 0.9, 1.0)
REFUSED = {
    "lists of other lengths": (([V], [V, V], [V, V], [V, V], ALPHA), "must have one tensor, and 1 of the state, for"),
    "state of one parameter": (([V.clone(), V.clone()], [V, V], [V, V], [V], ALPHA), "got 2, 2, 2 and 1"),
    "output of another shape": (([torch.zeros(3)], [V], [V], [V], ALPHA), r"theta\[0\] must have the shape of"),
    "gradient of another shape": (([V.clone()], [V], [V[:3]], [V], ALPHA), "grad must have the shape of theta"),
    "state of another shape": (([V.clone()] * 2, [V, V], [V, V], [V, V[:3]], ALPHA), "momentum_buffer must have the"),
    "outputs that overlap": (([V], [V], [V], [V], ALPHA), "an output must not share memory"),
    "two steps": (([V.clone()], [V], [V], [V], torch.zeros(2)), "alpha must hold one step size, got 2"),
    "another device": (([V.clone()], [V], [V.to("meta")], [V], ALPHA), "grad must be a dense CUDA tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_rule_got(name):
    operands, wording = REFUSED[name]
    with pytest.raises(ValueError, match=wording):
        form_steps_("sgd", *operands, SGD)
