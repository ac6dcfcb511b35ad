"""adam_sums and sgd_sums against fp64 sums over the update that form_adam and form_sgd return."""

# One case a line reads as the table it is.
# ruff: noqa: E501

import itertools

import pytest
import torch
from sharpkern.kernels import _launch
from sharpkern.kernels import step_sums as module
from sharpkern.kernels._launch import Case, Config, device_numbers
from sharpkern.kernels.form_adam import form_adam
from sharpkern.kernels.form_sgd import form_sgd
from sharpkern.kernels.step_sums import _adam_sums_kernel, _sgd_sums_kernel, adam_sums, sgd_sums

from tests.kernels.budget import DTYPES, same_bits
from tests.kernels.test_form_from_state import ADAM, SGD, SIZES_AND_STEPS, adam_numbers, trained


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(module, "_CONFIGS", (Case(None, None, None, Config(block=512, threads=64)),))
    monkeypatch.setattr(module, "_TILES", 4)


def adam_state(parameter, optimizer):
    """Operands of adam_sums, and the largest v with the numbers."""
    state, group = optimizer.state.get(parameter, {}), optimizer.param_groups[0]
    step = float(state.get("step", 0)) + 1
    numbers = adam_numbers(step, **{name: group[name] for name in ("betas", "eps", "weight_decay")})
    numbers |= {"decoupled": isinstance(optimizer, torch.optim.AdamW), "max_exp_avg_sq": state.get("max_exp_avg_sq")}
    operands = parameter.detach(), parameter.grad, state.get("exp_avg"), state.get("exp_avg_sq")
    return operands, {**numbers, "grad_factor": -1.0 if group["maximize"] else 1.0}


def sgd_state(parameter, optimizer):
    """The same of sgd_sums."""
    group = optimizer.param_groups[0]
    numbers = {name: group[name] for name in ("weight_decay", "momentum", "dampening", "nesterov")}
    operands = parameter.detach(), parameter.grad, optimizer.state.get(parameter, {}).get("momentum_buffer")
    return operands, {**numbers, "grad_factor": -1.0 if group["maximize"] else 1.0}


# Sums, update, and the state after three steps of an optimizer with everything that the update can have.
KINDS = {
    "AdamW": (adam_sums, form_adam, torch.optim.AdamW, {"weight_decay": 0.1}, adam_state),
    "Adam": (adam_sums, form_adam, torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}, adam_state),
    "SGD": (sgd_sums, form_sgd, torch.optim.SGD, {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True}, sgd_state),
}


def case(kind, size=1000):
    sums, form, optimizer_class, options, state = KINDS[kind]
    return sums, form, *state(*trained(optimizer_class, options, size, 3))


def assert_exact_to_fp64(sums, form, operands, numbers):
    got = sums(*operands, **numbers)
    assert got.dtype == torch.float64
    delta = form(*operands, None, dtype=torch.float32, **numbers)[0].double()
    grad = operands[1].double()
    exact = torch.stack([(delta * grad).sum(), (delta * delta).sum()])
    # Products are exact and sums are fp64: only the order of additions differs.
    magnitude = torch.stack([(delta * grad).abs().sum(), (delta * delta).sum()])
    assert ((got - exact).abs() <= 1e-13 * magnitude).all()


@pytest.mark.parametrize(("size", "steps"), SIZES_AND_STEPS)
@pytest.mark.parametrize(("optimizer_class", "options"), ADAM)
def test_adam(optimizer_class, options, steps, size):
    assert_exact_to_fp64(adam_sums, form_adam, *adam_state(*trained(optimizer_class, options, size, steps)))


@pytest.mark.parametrize(("size", "steps"), SIZES_AND_STEPS)
@pytest.mark.parametrize("options", SGD)
def test_sgd(options, steps, size):
    assert_exact_to_fp64(sgd_sums, form_sgd, *sgd_state(*trained(torch.optim.SGD, options, size, steps)))


@pytest.mark.parametrize(("dtype", "grad_dtype", "state_dtype"), list(itertools.product(DTYPES, DTYPES, DTYPES)))
@pytest.mark.parametrize("kind", KINDS)
def test_operands_of_different_dtypes(kind, dtype, grad_dtype, state_dtype):
    sums, form, (theta, grad, *moments), numbers = case(kind)
    # Above the least number of fp16, below which a second moment would be gone.
    moments = [(1e3 * moment).to(state_dtype) for moment in moments]
    assert_exact_to_fp64(sums, form, (theta.to(dtype), grad.to(grad_dtype), *moments), numbers)


@pytest.mark.parametrize("kind", KINDS)
def test_any_dense_layout(kind):
    sums, form, operands, numbers = case(kind, 1200)
    numbers = {k: v.view(40, 30).t() if isinstance(v, torch.Tensor) else v for k, v in numbers.items()}
    assert_exact_to_fp64(sums, form, [tensor.view(40, 30).t() for tensor in operands], numbers)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_in_the_sum_is_the_stored_one(kind):
    sums, _, (theta, grad, *state), numbers = case(kind)
    slope, norm_sq = sums(theta, grad, *state, **numbers)
    scaled = sums(theta, 1024 * grad, *state, **{**numbers, "grad_factor": 1 / 1024})
    assert scaled.tolist() == [1024 * slope, norm_sq]


@pytest.mark.parametrize("kind", KINDS)
def test_rate_multiplies_the_update(kind):
    sums, _, operands, numbers = case(kind)
    slope, norm_sq = sums(*operands, **numbers)
    assert sums(*operands, **numbers, rate=0.5).tolist() == [0.5 * slope, 0.25 * norm_sq]


@pytest.mark.parametrize("kind", KINDS)
def test_without_decay_the_weights_do_not_enter(kind):
    sums, _, (theta, *state), numbers = case(kind)
    numbers = {**numbers, "weight_decay": 0.0}
    assert same_bits(sums(torch.full_like(theta, torch.nan), *state, **numbers), sums(theta, *state, **numbers))


# Numpy says where NaN comes from, which a GPU does not.
nan_is_meant = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


# A tile that reaches beyond the tensor works out 0 / 0 there.
@nan_is_meant
def test_no_epsilon_is_needed_past_the_last_element():
    operands, numbers = adam_state(*trained(torch.optim.AdamW, {"eps": 0.0}, 127, 2))
    assert adam_sums(*operands, **numbers).isfinite().all()


@nan_is_meant
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_slope(kind, value):
    sums, _, operands, numbers = case(kind, 4097)
    operands[1][4000] = value
    assert not sums(*operands, **numbers)[0].isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_runs_twice_to_the_same_bits_and_writes_nothing(kind):
    sums, _, operands, numbers = case(kind, 4097)
    before = [tensor.clone() for tensor in operands]
    assert same_bits(sums(*operands, **numbers), sums(*operands, **numbers))
    assert all(map(same_bits, operands, before))


def test_nothing_sums_to_zero():
    empty = torch.empty(3, 0, 2)
    assert torch.equal(sgd_sums(empty, empty, None), torch.zeros(2, dtype=torch.float64))


CHUNK = 1 << 14


@pytest.mark.parametrize(
    ("kernel", "num_moments", "numbers", "update", "flags"),
    [
        # θ = 1, g = 2, b = 3: g + θ/2 + b/2.
        (_sgd_sums_kernel, 1, (0.5, 0.5, 1.0, 1.0, 1.0), 4.0, {"NESTEROV": False}),
        # θ = 1, m = 3, v = 4: m / (√v + 1) + θ/2.
        (_adam_sums_kernel, 2, (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0), 1.5, {"DECOUPLED": True}),
    ],
)
def test_offsets_beyond_int32(kernel, num_moments, numbers, update, flags, first_program):
    # Untouched memory is never mapped: tensors of 4 GB cost a few pages each.
    torch.utils.deterministic.fill_uninitialized_memory = False
    n = 2**31 + 1000
    operands = [torch.empty(n, dtype=torch.bfloat16) for _ in range(2 + num_moments)]
    for value, tensor in zip((1.0, 2.0, 3.0, 4.0), operands, strict=False):
        tensor[2**31 :] = value
    absent = [None] * (num_moments - 1)
    partial = torch.full((2**31 // CHUNK + 1, 2), torch.nan, dtype=torch.float64)
    first_program(2**31 // CHUNK)
    sizes = {"TILES": 8, "BLOCK": CHUNK // 8, "LANE": 8}
    kernel[(1,)](partial, *operands, *absent, device_numbers(*numbers, like=partial), n, DECAYED=True, **flags, **sizes)
    assert partial[-1].tolist() == [2000.0 * update, 1000.0 * update**2]
    assert partial[:-1].isnan().all()


V, M = torch.zeros(4), torch.zeros(4, 6)
NUMBERS = {"beta1": 0.9, "beta2": 0.999, "correction1": 0.1, "correction2": 0.001, "eps": 1e-8}

REFUSED = {
    "no gradient": (lambda: adam_sums(V, None, V, V, **NUMBERS), TypeError, "grad must be a tensor, got None; the sums over a step"),
    "no gradient of SGD": (lambda: sgd_sums(V, None, V), TypeError, "grad must be a tensor, got None"),
    "fp64 weights": (lambda: sgd_sums(V.double(), V, V), TypeError, "theta must be float32, float16 or bfloat16, got torch.float64; convert it"),
    "fp64 moments": (lambda: adam_sums(V, V, V, V.double(), **NUMBERS), TypeError, "exp_avg_sq must be float32, .* got torch.float64"),
    "largest moment on no GPU": (lambda: adam_sums(V, V, V, V, max_exp_avg_sq=V.to("meta"), **NUMBERS), ValueError, "max_exp_avg_sq must be a dense CUDA tensor, got torch.strided on meta; move"),
    "buffer of another shape": (lambda: sgd_sums(V, V, V[:3]), ValueError, r"momentum_buffer must have the shape of theta, \[4\], got \[3\]"),
    "transposed gradient": (lambda: sgd_sums(M, torch.zeros(6, 4).t(), M), ValueError, r"grad must have the strides of theta, \[6, 1\], got \[1, 4\]; copy it into"),
    "gaps": (lambda: sgd_sums(M[:, ::2], M[:, ::2], None), ValueError, "theta must fill its memory without gaps"),
    "one moment": (lambda: adam_sums(V, V, V, None, **NUMBERS), ValueError, "exp_avg and exp_avg_sq must both be given"),
    "step 0": (lambda: adam_sums(V, V, V, V, **{**NUMBERS, "correction1": 0.0}), ValueError, "correction1 must be positive, got 0.0; count steps from 1"),
    "infinite factor": (lambda: adam_sums(V, V, V, V, grad_factor=torch.inf, **NUMBERS), ValueError, "grad_factor must be finite, got inf"),
    "rate on the device": (lambda: sgd_sums(V, V, V, rate=torch.ones(())), TypeError, "rate must be a Python number, got Tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_rule_got_and_remedy(name):
    call, error, wording = REFUSED[name]
    with pytest.raises(error, match=wording):
        call()


@pytest.mark.parametrize("kind", KINDS)
def test_more_programs_than_a_grid_has(kind, monkeypatch):
    sums, _, operands, numbers = case(kind)
    monkeypatch.setattr(_launch, "MAX_PROGRAMS", 0)
    with pytest.raises(ValueError, match="a launch must have at most 0 programs, got 1; call once per part"):
        sums(*operands, **numbers)
