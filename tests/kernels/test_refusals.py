"""What launchers refuse before a launch: a kernel given such operands would write garbage and say nothing."""

# One case a line reads as the table it is.
# ruff: noqa: E501

import itertools

import pytest
import torch
from sharpkern.kernels import _accepts, _launch
from sharpkern.kernels.axpy import axpy_
from sharpkern.kernels.cross_entropy import MAX_WIDTH, online_cross_entropy_
from sharpkern.kernels.embedding import embedding
from sharpkern.kernels.form import form
from sharpkern.kernels.linear import linear
from sharpkern.kernels.norm import MAX_LENGTH, layer_norm, rms_norm
from sharpkern.kernels.optimizer_steps import form_step
from sharpkern.kernels.reduce import reduce
from sharpkern.kernels.whole_steps import step_sums

ADAM, SGD = (0.0, 1.0, 1.0, 0.1, 0.999, 0.001, 10.0, 0.03, 1e-8), (0.0, 1.0, 1.0, 0.9, 1.0)


def _axpy(theta, base, delta, alpha):
    axpy_([theta], [base], [delta], alpha)


def _reduce(theta, delta, grad):
    reduce([theta], [delta], [grad])


def _form_adam(theta, grad, exp_avg, exp_avg_sq, max_exp_avg_sq=None, alpha=None, out=None, numbers=ADAM):
    form_step("adam", theta, grad, (exp_avg, exp_avg_sq, max_exp_avg_sq), alpha, numbers, out=out)


def _form_sgd(theta, grad, momentum_buffer, alpha=None, out=None, numbers=SGD):
    form_step("sgd", theta, grad, (momentum_buffer,), alpha, numbers, out=out)


def _adam_sums(theta, grad, exp_avg, exp_avg_sq, max_exp_avg_sq):
    step_sums("adam", theta, grad, (exp_avg, exp_avg_sq, max_exp_avg_sq), ADAM)


def _sgd_sums(theta, grad, momentum_buffer):
    step_sums("sgd", theta, grad, (momentum_buffer,), SGD)


def _online_cross_entropy(maximum, total, target, logits, labels):
    online_cross_entropy_(maximum, total, target, logits, labels, 0)


# Every kernel: a call, and the shapes of its operands by name; "indices" and "labels" hold integers.
KERNELS = {
    "axpy_": (_axpy, {"theta": (4, 6), "base": (4, 6), "delta": (4, 6), "alpha": (1,)}),
    "form": (form, {"W": (4, 6), "D": (4, 6), "alpha": (2,), "out": (2, 4, 6)}),
    "form_adam": (_form_adam, {"theta": (4, 6), "grad": (4, 6), "exp_avg": (4, 6), "exp_avg_sq": (4, 6), "max_exp_avg_sq": (4, 6), "alpha": (2,), "out": (2, 4, 6)}),
    "form_sgd": (_form_sgd, {"theta": (4, 6), "grad": (4, 6), "momentum_buffer": (4, 6), "alpha": (2,), "out": (2, 4, 6)}),
    "adam_sums": (_adam_sums, {"theta": (4, 6), "grad": (4, 6), "exp_avg": (4, 6), "exp_avg_sq": (4, 6), "max_exp_avg_sq": (4, 6)}),
    "sgd_sums": (_sgd_sums, {"theta": (4, 6), "grad": (4, 6), "momentum_buffer": (4, 6)}),
    "reduce": (_reduce, {"theta": (4, 6), "delta": (4, 6), "grad": (4, 6)}),
    "linear": (linear, {"x": (2, 3, 6), "W": (4, 6), "D": (4, 6), "alpha": (2,)}),
    "embedding": (embedding, {"indices": (3,), "W": (4, 6), "D": (4, 6), "alpha": (2,)}),
    "rms_norm": (rms_norm, {"x": (2, 3, 6), "weight": (6,), "weight_direction": (6,), "alpha": (2,)}),
    "layer_norm": (layer_norm, {"x": (2, 3, 6), "weight": (6,), "weight_direction": (6,), "bias": (6,), "bias_direction": (6,), "alpha": (2,)}),
    "online_cross_entropy_": (_online_cross_entropy, {"maximum": (3,), "total": (3,), "target": (3,), "logits": (3, 6), "labels": (3,)}),
}  # fmt: skip

OPERANDS = [(kernel, name) for kernel, (_, shapes) in KERNELS.items() for name in shapes]

# Operands that are copied where they are not contiguous or have one element, and those whose length is free.
ANY_LAYOUT = {("embedding", "indices"), ("linear", "x"), ("rms_norm", "x"), ("layer_norm", "x"), ("axpy_", "alpha")}
FREE = {("embedding", "indices")}

# Of the kernels that write what they are given: what they write.
WRITTEN = {
    "axpy_": ("theta",),
    "form": ("out",),
    "form_adam": ("out",),
    "form_sgd": ("out",),
    "online_cross_entropy_": ("maximum", "total", "target"),
}
OVERLAPS = [
    (kernel, output, other)
    for kernel, outputs in WRITTEN.items()
    for output, other in itertools.product(outputs, KERNELS[kernel][1])
    if output != other
]

REQUIRED = {"rms_norm": {"eps": 1e-6}, "layer_norm": {"eps": 1e-6}}


def valid(kernel):
    """Operands that fit, all zero."""
    integer = {"indices", "labels"}
    return {
        name: torch.zeros(shape, dtype=torch.int64 if name in integer else torch.float32)
        for name, shape in KERNELS[kernel][1].items()
    }


def call(kernel, operands):
    KERNELS[kernel][0](**operands, **REQUIRED.get(kernel, {}))


def assert_refused(kernel, operands, error, wording):
    with pytest.raises(error, match=wording):
        call(kernel, operands)
    assert not any(tensor.any() for tensor in operands.values() if tensor.device.type == "cpu")


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_the_refusals_start_from_is_taken(kernel):
    call(kernel, valid(kernel))


@pytest.mark.parametrize(("kernel", "name"), OPERANDS)
def test_wrong_dtype(kernel, name):
    operands = valid(kernel)
    operands[name] = operands[name].double()
    assert_refused(kernel, operands, TypeError, rf"{name}(\[0\])? must be .*, got torch.float64")


@pytest.mark.parametrize(("kernel", "name"), OPERANDS)
def test_no_gpu(kernel, name):
    operands = valid(kernel)
    operands[name] = operands[name].to("meta")
    assert_refused(
        kernel, operands, ValueError, rf"{name}(\[0\])? must be (a dense CUDA tensor|on cpu), got .*meta; move"
    )


@pytest.mark.parametrize(("kernel", "name"), OPERANDS)
def test_another_gpu(kernel, name, monkeypatch):
    monkeypatch.setattr(_accepts, "runs_on", lambda device: True)
    operands = valid(kernel)
    operands[name] = operands[name].to("meta")
    assert_refused(kernel, operands, ValueError, r"must be on .*(cpu, got meta|meta, got cpu); move it there")


@pytest.mark.parametrize(("kernel", "name"), [pair for pair in OPERANDS if pair[1] != "alpha"])
def test_no_memory(kernel, name):
    # As a sharded module leaves its gathered parameters behind: a kernel would read from address 0.
    operands = valid(kernel)
    operands[name].untyped_storage().resize_(0)
    with pytest.raises(
        ValueError, match=rf"{name}(\[0\])? must have its elements in memory, got a Tensor at address 0"
    ):
        call(kernel, operands)


@pytest.mark.parametrize(("kernel", "name"), [pair for pair in OPERANDS if pair not in ANY_LAYOUT])
def test_gaps_between_elements(kernel, name):
    operands = valid(kernel)
    operands[name] = operands[name].new_zeros(*operands[name].shape, 2)[..., 0]
    assert_refused(kernel, operands, ValueError, "without gaps|contiguous|strides|next to each other")


@pytest.mark.parametrize(("kernel", "name"), [pair for pair in OPERANDS if pair not in FREE])
def test_wrong_shape(kernel, name):
    operands = valid(kernel)
    operands[name] = operands[name].new_zeros(17, *operands[name].shape[1:-1], operands[name].shape[-1] + 1)
    assert_refused(kernel, operands, ValueError, "must (have|be|hold) .*, got")


@pytest.mark.parametrize(("kernel", "output", "other"), OVERLAPS)
def test_output_over_an_operand(kernel, output, other):
    operands = valid(kernel)
    memory = torch.zeros(1024, dtype=torch.uint8)
    for name in (output, other):
        tensor = operands[name]
        operands[name] = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    assert_refused(kernel, operands, ValueError, "an output must not share memory with another operand")


@pytest.mark.parametrize("kernel", KERNELS)
def test_more_programs_than_a_grid_has(kernel, monkeypatch):
    monkeypatch.setattr(_launch, "MAX_PROGRAMS", 0)
    assert_refused(
        kernel, valid(kernel), ValueError, r"a launch must have at most 0 programs, got \d; call once per part"
    )


# The kernels whose rows may be so short that memory holds more of them than a grid has programs.
@pytest.mark.parametrize(
    "too_long",
    [
        lambda: rms_norm(torch.zeros(1, 1, 1).expand(1, 2**31, 1), torch.ones(1), None, A[:1], eps=1e-6),
        lambda: embedding(IDS[:1].expand(2**31), M[:, :1], M[:, :1], A),
    ],
)
def test_rows_beyond_the_largest_grid_are_refused_before_anything_is_allocated(too_long):
    with pytest.raises(ValueError, match="a launch must have at most 2147483647 programs, got 2147483648"):
        too_long()


def test_hip_counts_threads(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.3")
    config = _launch.Config(block=2048, threads=256)
    assert _launch.grid(2**24 - 1, config) == (2**24 - 1,)
    with pytest.raises(ValueError, match="at most 16777215 programs, got 16777216"):
        _launch.grid(2**24, config)


A = torch.zeros(2)
V, M = torch.zeros(4), torch.zeros(4, 6)
IDS = torch.zeros(3, dtype=torch.int64)
HIDDEN = torch.zeros(2, 3, 6)
SHARED = torch.zeros(12)
STATISTICS = [torch.zeros(3) for _ in range(3)]

CASES = {
    # Numbers: dtype and device.
    "fp64 weights": (lambda: form(V.double(), V, A), TypeError, r"W must be float32, float16 or bfloat16, got torch.float64; convert it"),
    "integer direction": (lambda: form(V, V.int(), A), TypeError, "D must be float32, float16 or bfloat16, got torch.int32"),
    "complex in a list": (lambda: axpy_([V], [V.to(torch.complex64)], [V], A), TypeError, r"base\[0\] must be float32"),
    "fp64 result": (lambda: form(V, V, A, dtype=torch.float64), TypeError, "dtype must be float32, float16 or bfloat16, got torch.float64"),
    "fp64 out": (lambda: form(V, V, A, out=torch.zeros(2, 4).double()), TypeError, "out must be float32"),
    "meta tensor": (lambda: form(V, V.to("meta"), A), ValueError, "D must be a dense CUDA tensor, got torch.strided on meta; move it"),
    "sparse tensor": (lambda: form(M.to_sparse(), M, A), ValueError, "W must be a dense CUDA tensor, got torch.sparse_coo"),
    # Step sizes.
    "alpha a number for one write": (lambda: axpy_([V], [V], [V], 0.1), TypeError, "alpha must be a float32 tensor, got float"),
    "alpha a number": (lambda: form(V, V, 0.1), TypeError, r"alpha must be a float32 tensor, got float; pass torch.tensor"),
    "alpha fp64": (lambda: form(V, V, A.double()), TypeError, "alpha must be a float32 tensor, got torch.float64"),
    "alpha 0-dim": (lambda: form(V, V, A[0]), ValueError, r"alpha must be a contiguous vector of 1 to 16 step sizes, got shape \[\]"),
    "no step size": (lambda: form(V, V, A[:0]), ValueError, r"1 to 16 step sizes, got shape \[0\]"),
    "too many step sizes": (lambda: form(V, V, torch.zeros(17)), ValueError, r"got shape \[17\]; call once per part"),
    "strided alpha": (lambda: form(V, V, torch.zeros(4)[::2]), ValueError, "alpha must be a contiguous vector"),
    "several alphas for one write": (lambda: axpy_([V], [V.clone()], [V.clone()], A), ValueError, "alpha must hold one step size, got 2; call once"),
    # Shapes and strides.
    "transposed direction": (lambda: form(M, M.t(), A), ValueError, r"D must have the shape of W, \[4, 6\], got \[6, 4\]"),
    "other strides": (lambda: form(M, torch.zeros(6, 4).t(), A), ValueError, r"D must have the strides of W, \[6, 1\], got \[1, 4\]; copy it into"),
    "gaps": (lambda: form(M[:, ::2], M[:, ::2], A), ValueError, "W must fill its memory without gaps, got shape"),
    "expanded": (lambda: form(V.expand(3, 4), V.expand(3, 4), A), ValueError, "W must fill its memory without gaps"),
    "out of another shape": (lambda: form(V, V, A, out=torch.zeros(3, 4)), ValueError, r"out must have shape \[2, 4\], got \[3, 4\]; leave it out"),
    "out of other strides": (lambda: form(M, M, A, out=torch.zeros(2, 6, 4).mT), ValueError, "each slice of out must have the parameter's strides"),
    "out onto itself": (lambda: form(V, V, A, out=V.new_zeros(4).expand(2, 4)), ValueError, "and not overlap the next"),
    "out over an input": (lambda: form(SHARED[:4], V, A, out=SHARED[2:10].view(2, 4)), ValueError, "an output must not share memory"),
    "backup is the parameter": (lambda: axpy_([V], [V], [V.clone()], A[:1]), ValueError, "an output must not share memory"),
    "parameter twice": (lambda: axpy_([V, V], [M[0, :4], M[1, :4]], [M[2, :4], M[3, :4]], A[:1]), ValueError, "an output must not share"),
    "backup of another parameter": (lambda: axpy_([SHARED[:4], SHARED[4:8]], [V, SHARED[2:6]], [V, V], A[:1]), ValueError, "an output must not share"),
    "lists of different lengths": (lambda: axpy_([V], [V], [], A), ValueError, r"theta, base, delta must be equally long, got \[1, 1, 0\]"),
    "sums of different lengths": (lambda: reduce([V], [], [V]), ValueError, "theta, delta, grad must be equally long"),
    "sums of different shapes": (lambda: reduce([V], [V[:3]], [V]), ValueError, r"delta\[0\] must have the shape of theta\[0\]"),
    # Stochastic rounding.
    "seed for fp32": (lambda: form(V, V, A, seed=1), TypeError, "seed must be None unless the result is bfloat16, got a result of torch.float32"),
    "negative seed": (lambda: form(V, V, A, dtype=torch.bfloat16, seed=-1), ValueError, r"seed must be in \[0, 2\*\*31\), got -1"),
    # Optimizer state.
    "one moment": (lambda: _form_adam(V, V, V, None), ValueError, "exp_avg and exp_avg_sq must both be given"),
    "nothing to go by": (lambda: _form_adam(V, None, None, None), ValueError, "exp_avg and exp_avg_sq must both be given"),
    "no gradient": (lambda: _form_sgd(V, None, V), TypeError, "grad must be a tensor, got None; pass the one of the parameter"),
    "moment of another shape": (lambda: _form_adam(V, V, V[:3], V[:3]), ValueError, "exp_avg must have the shape of theta"),
    "infinite correction": (lambda: _form_adam(V, V, V, V, numbers=(*ADAM[:6], torch.inf, *ADAM[7:])), ValueError, "1 / correction1 must be finite, got inf; look at"),
    "infinite factor": (lambda: _form_adam(V, V, V, V, numbers=(0.0, torch.inf, *ADAM[2:])), ValueError, "grad_factor must be finite, got inf; look at the optimizer's group and the loss scale"),
    "rate not a number": (lambda: _form_sgd(V, V, None, numbers=(0.0, 1.0, torch.nan, 0.9, 1.0)), ValueError, "rate must be finite, got nan; look at"),
    "factor on the device": (lambda: _form_sgd(V, V, None, numbers=(0.0, torch.ones(()), *SGD[2:])), TypeError, r"grad_factor must be a Python number, got Tensor; read it once with float\(\)"),
    # Embedding.
    "floating indices": (lambda: embedding(V, M, M, A), TypeError, "indices must be int64 or int32, got torch.float32"),
    "columns apart": (lambda: embedding(IDS, M[:, ::2], M[:, ::2], A), ValueError, "W must be a matrix .* next to each other"),
    "tables of different shapes": (lambda: embedding(IDS, M, M[:3], A), ValueError, r"D must be a matrix of the shape of W, \[4, 6\]"),
    # Linear layer.
    "linear dtype": (lambda: linear(HIDDEN, M, M, A, dtype=torch.float64), TypeError, "dtype must be float32, float16 or bfloat16, got torch.float64; convert the result instead"),
    "transposed weight": (lambda: linear(HIDDEN, M.t(), M.t(), A), ValueError, r"W must be a matrix .* next to each other, got shape \[6, 4\] with strides \[1, 6\]; pass a contiguous copy"),
    "direction of another shape": (lambda: linear(HIDDEN, M, M[:3], A), ValueError, r"D must be a matrix of the shape of W, \[4, 6\]"),
    "inputs of another number of step sizes": (lambda: linear(torch.zeros(3, 3, 6), M, M, A), ValueError, r"x must have shape \[2 or 1, M, 6\], one input per step size or one for all, got \[3, 3, 6\]; flatten"),
    "inputs of another length": (lambda: linear(HIDDEN[..., :5], M, M, A), ValueError, r"x must have shape \[2 or 1, M, 6\], one input .*, got \[2, 3, 5\]"),
    "inputs of four dimensions": (lambda: linear(HIDDEN[:, None], M, M, A), ValueError, r"got \[2, 1, 3, 6\]; flatten the dimensions between"),
    # Norms.
    "no input per step size": (lambda: rms_norm(M, torch.ones(6), None, A, eps=1e-6), ValueError, r"x must have shape \[2, ..., C\]"),
    "long rows": (lambda: rms_norm(torch.zeros(2, 1, MAX_LENGTH + 1), V, None, A, eps=1e-6), ValueError, "C at most 16384"),
    "weight of another length": (lambda: rms_norm(HIDDEN, V, None, A, eps=1e-6), ValueError, "weight must be a contiguous vector .*, 6, got shape"),
    "direction without a bias": (lambda: layer_norm(HIDDEN, M[0], None, None, M[0], A, eps=1e-6), ValueError, "bias_direction must be None without a bias"),
    # Loss.
    "logits of three dimensions": (lambda: online_cross_entropy_(*STATISTICS, HIDDEN, IDS, 0), ValueError, r"logits must be a matrix \[tokens, at most 4096\]"),
    "wide chunk": (lambda: online_cross_entropy_(*STATISTICS, torch.zeros(3, MAX_WIDTH + 1), IDS, 0), ValueError, r"got shape \[3, 4097\] .*; call once per part of the vocabulary"),
    "labels of another length": (lambda: online_cross_entropy_(*STATISTICS, torch.zeros(3, 6), IDS[:2], 0), ValueError, "labels must be a contiguous vector of one number per token, 3"),
    "class probabilities": (lambda: online_cross_entropy_(*STATISTICS, torch.zeros(3, 6), IDS.float(), 0), TypeError, "labels must be int64 or int32, got torch.float32; class"),
    "bf16 logits": (lambda: online_cross_entropy_(*STATISTICS, torch.zeros(3, 6).bfloat16(), IDS, 0), TypeError, "logits must be float32, got torch.bfloat16"),
    "statistic twice": (lambda: online_cross_entropy_(V[:3], V[:3], *STATISTICS[:1], torch.zeros(3, 6), IDS, 0), ValueError, "an output must not share memory"),
    "negative row": (lambda: online_cross_entropy_(*STATISTICS, torch.zeros(3, 6), IDS, -1), ValueError, "first must not be negative, got -1"),
    "no softcap": (lambda: online_cross_entropy_(*STATISTICS, torch.zeros(3, 6), IDS, 0, softcap=0.0), ValueError, "softcap must be positive and finite, got 0.0"),
    "infinite softcap": (lambda: online_cross_entropy_(*STATISTICS, torch.zeros(3, 6), IDS, 0, softcap=torch.inf), ValueError, "softcap must be positive and finite, got inf"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_with_what_rule_got_and_remedy(case):
    refused, error, wording = CASES[case]
    with pytest.raises(error, match=wording):
        refused()
    assert not any(tensor.any() for tensor in (V, M, SHARED, *STATISTICS))


def test_a_launcher_says_what_it_would_raise_and_launches_nothing():
    out = torch.full((2, 4), torch.nan)
    assert form.refusal(V, V, A, out=out) is None
    assert out.isnan().all()
    refusal = form.refusal(V.double(), V, A)
    assert isinstance(refusal, TypeError)
    assert "W must be float32" in str(refusal)
