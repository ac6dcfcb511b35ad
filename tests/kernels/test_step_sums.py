"""step_sums against fp64 sums over the update that form_step returns."""

# One case a line reads as the table it is.
# ruff: noqa: E501

import itertools

import pytest
import torch
from sharpkern.kernels import _launch
from sharpkern.kernels import whole_steps as module
from sharpkern.kernels._launch import Case, Config, device_numbers
from sharpkern.kernels._steps import rule_of
from sharpkern.kernels._tables import tables
from sharpkern.kernels.optimizer_steps import form_step
from sharpkern.kernels.whole_steps import _step_sums_kernel, step_sums

from tests.helpers.rules import FULLEST, reading
from tests.kernels.budget import DTYPES, same_bits
from tests.kernels.test_form_from_state import SITUATIONS, trained


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(module, "_CONFIGS", (Case(None, None, None, Config(block=512, threads=64)),))
    monkeypatch.setattr(module, "_TILES", 4)


def sums(operands, numbers, options):
    return step_sums(*operands, numbers, **options)


def assert_exact_to_fp64(operands, numbers, options):
    got = sums(operands, numbers, options)
    assert got.dtype == torch.float64
    delta = form_step(*operands, None, numbers, dtype=torch.float32, **options)[0].double()
    grad = operands[2].double()
    exact = torch.stack([(delta * grad).sum(), (delta * delta).sum()])
    # Products are exact and sums are fp64: only the order of additions differs.
    magnitude = torch.stack([(delta * grad).abs().sum(), (delta * delta).sum()])
    assert ((got - exact).abs() <= 1e-13 * magnitude).all()


@pytest.mark.parametrize(("name", "size", "steps"), SITUATIONS)
def test_everyrule_of(name, size, steps):
    assert_exact_to_fp64(*reading(*trained(name, size, steps)))


@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "state_dtype"),
    [(a, b, DTYPES[(i + j) % 3]) for (i, a), (j, b) in itertools.product(enumerate(DTYPES), repeat=2)],
)
@pytest.mark.parametrize("name", FULLEST)
def test_operands_of_different_dtypes(name, dtype, grad_dtype, state_dtype):
    (rule, theta, grad, state), numbers, options = reading(*trained(name, 1000, 3))
    # Above the least number of fp16, below which a second moment would be gone.
    # A mean has to stay below the root of the mean square.
    scales = (1e3, 1, 1e3) if rule == "rmsprop" else (1e3, 1e3, 1e3)
    scaled = [None if tensor is None else scale * tensor for tensor, scale in zip(state, scales, strict=False)]
    state = [None if tensor is None else tensor.to(state_dtype) for tensor in scaled]
    assert_exact_to_fp64((rule, theta.to(dtype), grad.to(grad_dtype), state), numbers, options)


@pytest.mark.parametrize("name", FULLEST)
def test_any_dense_layout(name):
    (rule, theta, grad, state), numbers, options = reading(*trained(name, 1200, 3))
    turned = lambda tensor: None if tensor is None else tensor.view(40, 30).t()
    assert_exact_to_fp64((rule, turned(theta), turned(grad), [turned(tensor) for tensor in state]), numbers, options)


@pytest.mark.parametrize("name", FULLEST)
def test_the_gradient_in_the_sum_is_the_stored_one(name):
    parameter, optimizer = trained(name, 1000, 3)
    slope, norm_sq = sums(*reading(parameter, optimizer))
    parameter.grad *= 1024
    assert sums(*reading(parameter, optimizer, grad_factor=1 / 1024)).tolist() == [1024 * slope, norm_sq]


@pytest.mark.parametrize("name", FULLEST)
def test_rate_multiplies_the_update(name):
    parameter, optimizer = trained(name, 1000, 3)
    slope, norm_sq = sums(*reading(parameter, optimizer))
    assert sums(*reading(parameter, optimizer, rate=0.5)).tolist() == [0.5 * slope, 0.25 * norm_sq]


@pytest.mark.parametrize("name", FULLEST)
def test_without_decay_the_weights_do_not_enter(name):
    parameter, optimizer = trained(name, 1000, 3)
    wanted = sums(*reading(parameter, optimizer, weight_decay=0.0))
    parameter.data.fill_(torch.nan)
    assert same_bits(sums(*reading(parameter, optimizer, weight_decay=0.0)), wanted)


# Numpy says where NaN comes from, which a GPU does not.
nan_is_meant = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


# A tile that reaches beyond the tensor works out 0 / 0 there.
@nan_is_meant
@pytest.mark.parametrize("name", ["AdamW", "RMSprop, all"])
def test_no_epsilon_is_needed_past_the_last_element(name):
    assert sums(*reading(*trained(name, 127, 2, eps=0.0))).isfinite().all()


@nan_is_meant
@pytest.mark.parametrize("name", FULLEST)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_slope(name, value):
    parameter, optimizer = trained(name, 4097, 3)
    parameter.grad[4000] = value
    assert not sums(*reading(parameter, optimizer))[0].isfinite()


@pytest.mark.parametrize("name", FULLEST)
def test_runs_twice_to_the_same_bits_and_writes_nothing(name):
    operands, *rest = reading(*trained(name, 4097, 3))
    read = [tensor for tensor in (*operands[1:3], *operands[3]) if tensor is not None]
    before = [tensor.clone() for tensor in read]
    assert same_bits(sums(operands, *rest), sums(operands, *rest))
    assert all(map(same_bits, read, before))


def test_nothing_sums_to_zero():
    empty = torch.empty(3, 0, 2)
    numbers = (0.0, 1.0, 1.0, 0.0, 1.0)
    assert torch.equal(step_sums("sgd", empty, empty, (None,), numbers), torch.zeros(2, dtype=torch.float64))


CHUNK = 1 << 14


@pytest.mark.parametrize(
    ("rule", "numbers", "update", "flags"),
    [
        # θ = 1, g = 2, b = 3: g + θ/2 + b/2.
        ("sgd", (0.5, 1.0, 1.0, 0.5, 1.0), 4.0, {"DECOUPLED": False, "FLAG": False}),
        # θ = 1, m = 3, v = 4: m / (√v + 1) + θ/2.
        ("adam", (0.5, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0), 1.5, {"DECOUPLED": True, "FLAG": False}),
    ],
)
def test_offsets_beyond_int32(rule, numbers, update, flags, first_program):
    # Untouched memory is never mapped: tensors of 4 GB cost a few pages each.
    torch.utils.deterministic.fill_uninitialized_memory = False
    n = 2**31 + 1000
    tile = rule_of(rule)
    num_state = max(1, len(tile.TOGETHER))
    theta, grad, *state = operands = [torch.empty(n, dtype=torch.bfloat16) for _ in range(2 + num_state)]
    for value, tensor in zip((1.0, 2.0, 3.0, 4.0), operands, strict=False):
        tensor[2**31 :] = value
    state = (*state, *[None] * (3 - num_state))
    partial = torch.full((2**31 // CHUNK + 1, 2), torch.nan, dtype=torch.float64)
    found = tables(CHUNK, *([tensor] for tensor in (grad, theta, grad, *state)))
    (batch,) = found.batches
    first_program(2**31 // CHUNK)
    _step_sums_kernel[1,](
        partial,
        found.rows,
        batch.chunks,
        device_numbers(*numbers, like=partial),
        batch.dtypes,
        batch.aligned,
        tile.update,
        True,
        **flags,
        CHUNK=CHUNK,
        BLOCK=CHUNK // 8,
        LANE=8,
    )
    assert partial[-1].tolist() == [2000.0 * update, 1000.0 * update**2]
    assert partial[:-1].isnan().all()


V, M = torch.zeros(4), torch.zeros(4, 6)
ADAM, SGD = (0.0, 1.0, 1.0, 0.1, 0.999, 0.001, 10.0, 0.03, 1e-8), (0.0, 1.0, 1.0, 0.9, 1.0)


def _adam(*operands, numbers=ADAM):
    theta, grad, *state = operands
    return step_sums("adam", theta, grad, (*state, *[None] * (3 - len(state))), numbers)


def _sgd(theta, grad, buffer, numbers=SGD):
    return step_sums("sgd", theta, grad, (buffer,), numbers)


REFUSED = {
    "no gradient": (lambda: _adam(V, None, V, V), TypeError, "grad must be a tensor, got None; the sums over a step"),
    "no gradient of SGD": (lambda: _sgd(V, None, V), TypeError, "grad must be a tensor, got None"),
    "fp64 weights": (lambda: _sgd(V.double(), V, V), TypeError, "theta must be float32, float16 or bfloat16, got torch.float64; convert it"),
    "fp64 moments": (lambda: _adam(V, V, V, V.double()), TypeError, "exp_avg_sq must be float32, .* got torch.float64"),
    "largest moment on no GPU": (lambda: _adam(V, V, V, V, V.to("meta")), ValueError, "max_exp_avg_sq must be a dense CUDA tensor, got torch.strided on meta; move"),
    "buffer of another shape": (lambda: _sgd(V, V, V[:3]), ValueError, r"momentum_buffer must have the shape of theta, \[4\], got \[3\]"),
    "transposed gradient": (lambda: _sgd(M, torch.zeros(6, 4).t(), M), ValueError, r"grad must have the strides of theta, \[6, 1\], got \[1, 4\]; copy it into"),
    "gaps": (lambda: _sgd(M[:, ::2], M[:, ::2], None), ValueError, "theta must fill its memory without gaps"),
    "one moment": (lambda: _adam(V, V, V, None), ValueError, "exp_avg and exp_avg_sq must both be given"),
    "infinite factor": (lambda: _adam(V, V, V, V, numbers=(0.0, torch.inf, *ADAM[2:])), ValueError, "grad_factor must be finite, got inf"),
    "rate on the device": (lambda: _sgd(V, V, V, numbers=(0.0, 1.0, torch.ones(()), 0.9, 1.0)), TypeError, "rate must be a Python number, got Tensor"),
    "numbers of another rule": (lambda: _sgd(V, V, V, numbers=ADAM), ValueError, "state and numbers must be momentum_buffer and weight_decay, .*, got 1 and 9 of them"),
    "state of another rule": (lambda: step_sums("lion", V, V, (V, V), SGD), ValueError, "state and numbers must be exp_avg and .*, got 2 and 5 of them"),
    "no rule": (lambda: step_sums("adagrad", V, V, (V,), SGD), ValueError, "rule must be the name of a file of kernels/rules, got 'adagrad'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_rule_got_and_remedy(name):
    call, error, wording = REFUSED[name]
    with pytest.raises(error, match=wording):
        call()


@pytest.mark.parametrize("name", FULLEST)
def test_more_programs_than_a_grid_has(name, monkeypatch):
    operands = reading(*trained(name, 1000, 3))
    monkeypatch.setattr(_launch, "MAX_PROGRAMS", 0)
    with pytest.raises(ValueError, match="a launch must have at most 0 programs, got 1; call once per part"):
        sums(*operands)


def test_the_tiles_read_what_the_rules_say():
    from sharpkern.ops.rules import RULES as IN_TORCH

    for name, rule in IN_TORCH.items():
        tile = rule_of(name)
        assert (rule.state, rule.together, rule.numbers) == (tile.STATE, tile.TOGETHER, tile.NUMBERS)
