"""What launchers refuse before a launch: a kernel given such operands would write garbage and say nothing."""

# One case a line reads as the table it is.
# ruff: noqa: E501

import pytest
import torch
from sharpkern.kernels.axpy import axpy_
from sharpkern.kernels.cross_entropy import linear_cross_entropy
from sharpkern.kernels.embedding import embedding
from sharpkern.kernels.form import form
from sharpkern.kernels.form_adam import form_adam
from sharpkern.kernels.form_sgd import form_sgd
from sharpkern.kernels.norm import MAX_LENGTH, layer_norm, rms_norm
from sharpkern.kernels.reduce import reduce

A = torch.zeros(2)
V, M = torch.zeros(4), torch.zeros(4, 6)
SEVEN = torch.zeros(7)
IDS = torch.zeros(3, dtype=torch.int64)
HIDDEN = torch.zeros(2, 3, 6)
SHARED = torch.zeros(12)

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
    "adam scalars": (lambda: form_adam(V, V, V, V, A, A), ValueError, r"scalars must be 7 float32 numbers on cpu, got \[2\].*adam_scalars"),
    "sgd scalars": (lambda: form_sgd(V, V, None, A, SEVEN), ValueError, "scalars must be 3 float32 numbers.*sgd_scalars"),
    "one moment": (lambda: form_adam(V, V, V, None, A, SEVEN), ValueError, "exp_avg and exp_avg_sq must both be given"),
    "nothing to go by": (lambda: form_adam(V, None, None, None, A, SEVEN), ValueError, "exp_avg and exp_avg_sq must both be given"),
    "moment of another shape": (lambda: form_adam(V, V, V[:3], V[:3], A, SEVEN), ValueError, "exp_avg must have the shape of theta"),
    # Embedding.
    "floating indices": (lambda: embedding(V, M, M, A), TypeError, "indices must be int64 or int32, got torch.float32"),
    "columns apart": (lambda: embedding(IDS, M[:, ::2], M[:, ::2], A), ValueError, "W must be a matrix .* next to each other"),
    "tables of different shapes": (lambda: embedding(IDS, M, M[:3], A), ValueError, r"D must be a matrix of the shape of W, \[4, 6\]"),
    # Norms.
    "no input per step size": (lambda: rms_norm(M, torch.ones(6), None, A, eps=1e-6), ValueError, r"x must have shape \[2, ..., C\]"),
    "long rows": (lambda: rms_norm(torch.zeros(2, 1, MAX_LENGTH + 1), V, None, A, eps=1e-6), ValueError, "C at most 16384"),
    "weight of another length": (lambda: rms_norm(HIDDEN, V, None, A, eps=1e-6), ValueError, "weight must be a contiguous vector .*, 6, got shape"),
    "direction without a bias": (lambda: layer_norm(HIDDEN, M[0], None, None, M[0], A, eps=1e-6), ValueError, "bias_direction must be None without a bias"),
    # Head and loss.
    "hidden of another width": (lambda: linear_cross_entropy(HIDDEN[..., :5], M, None, IDS, A), ValueError, r"hidden must have shape \[2, tokens, 6\]"),
    "labels of another length": (lambda: linear_cross_entropy(HIDDEN, M, None, IDS[:2], A), ValueError, r"labels must have shape \[3\]"),
    "class probabilities": (lambda: linear_cross_entropy(HIDDEN, M, None, IDS.float(), A), TypeError, "labels must be int64 or int32"),
    "transposed head": (lambda: linear_cross_entropy(HIDDEN, torch.zeros(6, 4).t(), None, IDS, A), ValueError, "W must be a contiguous matrix"),
    "reduction": (lambda: linear_cross_entropy(HIDDEN, M, None, IDS, A, reduction="none"), ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
    "softcap": (lambda: linear_cross_entropy(HIDDEN, M, None, IDS, A, softcap=0.0), ValueError, "softcap must be positive, got 0.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_with_what_rule_got_and_remedy(case):
    call, error, wording = CASES[case]
    with pytest.raises(error, match=wording):
        call()
    assert not V.any()
    assert not M.any()
    assert not SHARED.any()
