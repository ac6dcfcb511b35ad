"""What the torch backend refuses before it writes anything: torch would broadcast, truncate, or fail half-way."""

# One case a line reads as the table it is.
# ruff: noqa: E501

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from inspect import unwrap as body
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sharpkern import ops
from sharpkern.ops.linear_cross_entropy import linear_cross_entropy

ROOT = Path(__file__).parents[2]
ADAM = {"beta1": 0.9, "beta2": 0.99, "correction1": 0.2, "correction2": 0.05, "eps": 1e-6}
INDICES, LABELS = torch.tensor([1, 2]), torch.tensor([0, 4, 8])

W, D, WIDE = torch.ones(4, 6), torch.ones(4, 6), torch.ones(4, 6, dtype=torch.float64)
V, X = torch.ones(6), torch.ones(2, 3, 6)
ALPHA = torch.tensor([-0.1, -0.2])
ONE = ALPHA[:1]
INT, COMPLEX, META = W.int(), W.to(torch.complex64), W.to("meta")
SPARSE = W.to_sparse()


def form(D: Tensor = D, alpha: Any = ALPHA, **options: Any) -> Tensor:
    return ops.form(W, D, alpha, **options)


def axpy(theta: list[Tensor], base: list[Tensor] | None = None, delta: list[Tensor] | None = None, alpha: Tensor = ONE) -> None:  # fmt: skip
    ops.axpy_(theta, base or [W] * len(theta), delta or [D] * len(theta), alpha)


def adam(*state: Tensor | None, alpha: Tensor | None = ALPHA, **options: Any) -> Tensor:
    return ops.form_adam(W, *state, alpha, **{**ADAM, **options})


def sgd(*state: Any, alpha: Tensor | None = ALPHA, **options: Any) -> Tensor:
    return ops.form_sgd(W, *state, alpha, **options)


def linear(x: Tensor = X, W: Tensor = W, D: Tensor = D, alpha: Tensor = ALPHA, **options: Any) -> Tensor:
    return ops.linear(x, W, D, alpha, **options)


def embedding(indices: Tensor = INDICES, W: Tensor = W, D: Tensor = D, alpha: Tensor = ALPHA, **options: Any) -> Tensor:
    return ops.embedding(indices, W, D, alpha, **options)


def rms(x: Tensor = X, weight: Tensor = V, direction: Tensor | None = V, alpha: Tensor = ALPHA, **options: Any) -> Tensor:  # fmt: skip
    return ops.rms_norm(x, weight, direction, alpha, eps=1e-5, **options)


def layer(x: Tensor = X, bias: Tensor | None = V, direction: Tensor | None = V, alpha: Tensor = ALPHA, **options: Any) -> Tensor:  # fmt: skip
    return ops.layer_norm(x, V, V, bias, direction, alpha, eps=1e-5, **options)


def entropy(logits: Tensor | None = None, labels: Tensor = LABELS, first: int = 0, softcap: float | None = None, **statistics: Tensor) -> None:  # fmt: skip
    given = {"maximum": torch.ones(3), "total": torch.ones(3), "target": torch.ones(3), **statistics}
    logits = torch.ones(3, 9) if logits is None else logits
    ops.online_cross_entropy_(**given, logits=logits, labels=labels, first=first, softcap=softcap)


def overlapping(*shape: int) -> Tensor:
    return torch.zeros(1).expand(shape)


SHARED = torch.ones(3)
BUFFER = torch.ones(3, 4, 6)
OVERLAP = "an output must not share memory with another operand, got tensors that overlap; copy one"
FLOATS = "float32, float16, bfloat16 or float64"
REFUSALS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    # Dtypes
    "form int": (lambda: form(INT), TypeError, f"D must be {FLOATS}, got torch.int32; convert it with .to()"),
    "form complex": (lambda: form(COMPLEX), TypeError, f"D must be {FLOATS}, got torch.complex64; convert it"),
    "form dtype": (lambda: form(dtype=torch.int32), TypeError, f"dtype must be {FLOATS}, got torch.int32; convert the result instead"),
    "form out": (lambda: form(out=torch.zeros(2, 4, 6, dtype=torch.int32)), TypeError, f"out must be {FLOATS}, got torch.int32; leave it out to allocate"),
    "form none": (lambda: form(None), TypeError, "D must be a tensor, got None; pass the one of the parameter"),
    "axpy int": (lambda: axpy([INT.clone()]), TypeError, f"theta[0] must be {FLOATS}, got torch.int32; convert it"),
    "reduce complex": (lambda: ops.reduce([W], [W], [COMPLEX]), TypeError, f"grad[0] must be {FLOATS}, got torch.complex64"),
    "adam int": (lambda: adam(D, D, INT), TypeError, f"exp_avg_sq must be {FLOATS}, got torch.int32"),
    "adam dtype": (lambda: adam(D, D, D, dtype=torch.int64), TypeError, f"dtype must be {FLOATS}, got torch.int64"),
    "sgd int": (lambda: sgd(D, INT), TypeError, f"momentum_buffer must be {FLOATS}, got torch.int32"),
    "sgd sums int": (lambda: ops.sgd_sums(W, INT, None), TypeError, f"grad must be {FLOATS}, got torch.int32"),
    "linear int": (lambda: linear(D=INT), TypeError, f"D must be {FLOATS}, got torch.int32; convert it"),
    "linear dtype": (lambda: linear(dtype=torch.int32), TypeError, f"dtype must be {FLOATS}, got torch.int32; convert the result instead"),
    "embedding float": (lambda: embedding(INDICES.float()), TypeError, "indices must be int64 or int32, got torch.float32; convert them"),
    "embedding bool": (lambda: embedding(INDICES > 1), TypeError, "indices must be int64 or int32, got torch.bool; convert them"),
    "embedding dtype": (lambda: embedding(dtype=torch.int32), TypeError, f"dtype must be {FLOATS}, got torch.int32"),
    "rms dtype": (lambda: rms(dtype=torch.int32), TypeError, f"dtype must be {FLOATS}, got torch.int32"),
    "rms int": (lambda: rms(X.int()), TypeError, f"x must be {FLOATS}, got torch.int32"),
    "layer complex": (lambda: layer(direction=V.to(torch.complex64)), TypeError, f"bias_direction must be {FLOATS}, got torch.complex64"),
    "entropy labels": (lambda: entropy(labels=LABELS.float()), TypeError, "labels must be int64 or int32, got torch.float32; class probabilities are not supported"),
    "entropy half": (lambda: entropy(torch.ones(3, 9).half()), TypeError, "logits must be float32 or float64, got torch.float16; sums of exponentials need the digits"),
    "entropy mixed": (lambda: entropy(torch.ones(3, 9).double()), TypeError, "maximum must be torch.float64, as logits are, got torch.float32; convert one of them"),
    # Layouts and devices
    "form sparse": (lambda: form(SPARSE), ValueError, "D must be a dense tensor, got torch.sparse_coo; convert it with .to_dense()"),
    "form sparse out": (lambda: form(out=BUFFER[:2].to_sparse()), ValueError, "out must be a dense tensor, got torch.sparse_coo"),
    "reduce sparse": (lambda: ops.reduce([W], [SPARSE], [W]), ValueError, "delta[0] must be a dense tensor, got torch.sparse_coo"),
    "linear sparse": (lambda: linear(D=SPARSE), ValueError, "D must be a dense tensor, got torch.sparse_coo"),
    "embedding sparse": (lambda: embedding(D=SPARSE), ValueError, "D must be a dense tensor, got torch.sparse_coo"),
    # Step sizes
    "alpha 0-dim": (lambda: form(alpha=torch.tensor(-0.1)), ValueError, "alpha must be a vector of step sizes, got shape []; reshape it"),
    "alpha 2-dim": (lambda: form(alpha=ALPHA[None]), ValueError, "alpha must be a vector of step sizes, got shape [1, 2]; reshape it with .reshape(-1)"),
    "alpha empty": (lambda: form(alpha=ALPHA[:0]), ValueError, "alpha must hold one step size at least, got shape [0]; pass torch.zeros(1) for no step"),
    "alpha number": (lambda: form(alpha=-0.1), TypeError, "alpha must be a tensor, got float; pass torch.tensor([...]) on the device"),
    "alpha list": (lambda: sgd(D, None, alpha=[-0.1]), TypeError, "alpha must be a tensor, got list; pass torch.tensor([...]) on the device"),
    "alpha int": (lambda: form(alpha=torch.tensor([1])), TypeError, "alpha must be a float32 or float64 tensor, got torch.int64; pass torch.tensor([...], device='cpu')"),
    "alpha axpy": (lambda: axpy([W.clone()], alpha=ALPHA), ValueError, "alpha must hold one step size, got 2; call once per step size"),
    "alpha adam": (lambda: adam(D, D, D, alpha=ALPHA[:0]), ValueError, "alpha must hold one step size at least, got shape [0]; pass torch.zeros(1) for no step"),
    "alpha sgd": (lambda: sgd(D, None, alpha=ALPHA[None]), ValueError, "alpha must be a vector of step sizes"),
    "alpha linear": (lambda: linear(X[:1], alpha=ALPHA[:0]), ValueError, "alpha must hold one step size at least, got shape [0]"),
    "alpha embedding": (lambda: embedding(alpha=ALPHA[:0]), ValueError, "alpha must hold one step size at least, got shape [0]; pass torch.zeros(1) for no step"),
    "alpha rms": (lambda: rms(X[:0], alpha=ALPHA[:0]), ValueError, "alpha must hold one step size at least, got shape [0]; pass torch.zeros(1) for no step"),
    # Shapes
    "axpy lengths": (lambda: axpy([W.clone()], base=[W, W]), ValueError, "theta, base, delta must be equally long, got [1, 2, 1]; pass one of each per parameter"),
    "axpy shapes": (lambda: axpy([W.clone(), W.clone()], delta=[D, D[:1]]), ValueError, "delta[1] must have the shape of theta[1], [4, 6], got [1, 6]; pass the tensors of one parameter"),
    "reduce lengths": (lambda: ops.reduce([W], [W, W], [W]), ValueError, "theta, delta, grad must be equally long, got [1, 2, 1]"),
    "reduce shapes": (lambda: ops.reduce([W], [W], [D.t()]), ValueError, "grad[0] must have the shape of theta[0], [4, 6], got [6, 4]"),
    "linear direction": (lambda: linear(D=D.t()), ValueError, "D must have the shape of W, [4, 6], got [6, 4]; pass the tensors of one parameter"),
    "linear vector": (lambda: linear(W=V, D=V), ValueError, "W must be a matrix [outputs, inputs], got shape [6]; pass the layer's weight"),
    "linear steps": (lambda: linear(torch.ones(3, 3, 6)), ValueError, "x must have shape [2 or 1, M, 6], one input per step size or one for all, got [3, 3, 6]; flatten the dimensions between"),
    "linear columns": (lambda: linear(X[..., :5]), ValueError, "x must have shape [2 or 1, M, 6], one input per step size or one for all, got [2, 3, 5]"),
    "linear tokens": (lambda: linear(X[:, :, None]), ValueError, "x must have shape [2 or 1, M, 6], one input per step size or one for all, got [2, 3, 1, 6]"),
    "embedding vector": (lambda: embedding(W=V, D=V), ValueError, "W must be a matrix [rows, columns], got shape [6]; pass the embedding's weight"),
    "rms steps": (lambda: rms(X[:1]), ValueError, "x must have shape [2, ..., C] with one input per step size, got [1, 3, 6]; expand it if the inputs are equal"),
    "rms vector": (lambda: rms(V[:2]), ValueError, "x must have shape [2, ..., C] with one input per step size, got [2]"),
    "rms weight": (lambda: rms(weight=V[:1]), ValueError, "weight must be a vector of the length of x's rows, 6, got shape [1]"),
    "rms direction": (lambda: rms(direction=V[:1]), ValueError, "weight_direction must be a vector of the length of x's rows, 6, got shape [1]"),
    "layer steps": (lambda: layer(X[:1]), ValueError, "x must have shape [2, ..., C] with one input per step size, got [1, 3, 6]"),
    "layer bias": (lambda: layer(bias=V[:1]), ValueError, "bias must be a vector of the length of x's rows, 6, got shape [1]"),
    "layer no bias": (lambda: layer(bias=None), ValueError, "bias_direction must be None without a bias, got a tensor; pass the bias that it moves"),
    "entropy vector": (lambda: entropy(V), ValueError, "logits must be a matrix [tokens, columns], got shape [6]; flatten the tokens"),
    "entropy length": (lambda: entropy(labels=LABELS[:1]), ValueError, "labels must be a vector of one number per token, 3, got shape [1]; flatten it"),
    "entropy statistics": (lambda: entropy(total=torch.ones(3, 3)), ValueError, "total must be a vector of one number per token, 3, got shape [3, 3]; flatten it"),
    # Numbers
    "entropy first": (lambda: entropy(first=-1), ValueError, "first must not be negative, got -1; pass the vocabulary row of the chunk's column 0"),
    "softcap zero": (lambda: entropy(softcap=0.0), ValueError, "softcap must be positive and finite, got 0.0; leave it out for none"),
    "softcap negative": (lambda: entropy(softcap=-1.0), ValueError, "softcap must be positive and finite, got -1.0"),
    "softcap infinite": (lambda: entropy(softcap=math.inf), ValueError, "softcap must be positive and finite, got inf"),
    "softcap nan": (lambda: entropy(softcap=math.nan), ValueError, "softcap must be positive and finite, got nan"),
    "seed dtype": (lambda: form(seed=1), TypeError, "seed must be None unless the result is bfloat16, got a result of torch.float32; leave it out"),
    "seed negative": (lambda: form(seed=-1, dtype=torch.bfloat16), ValueError, "seed must be in [0, 2**31), got -1; reduce it modulo 2**31"),
    "seed large": (lambda: form(seed=2**31, dtype=torch.bfloat16), ValueError, "seed must be in [0, 2**31), got 2147483648"),
    "correction zero": (lambda: adam(D, D, D, correction1=0.0), ValueError, "correction1 must be positive, got 0.0; count steps from 1"),
    "correction negative": (lambda: adam(D, D, D, correction2=-1.0), ValueError, "correction2 must be positive, got -1.0"),
    "correction nan": (lambda: ops.adam_sums(W, D, D, D, **{**ADAM, "correction2": math.nan}), ValueError, "correction2 must be finite, got nan"),
    "rate infinite": (lambda: adam(D, D, D, rate=math.inf), ValueError, "rate must be finite, got inf; look at the optimizer's group and the loss scale"),
    "loss scale": (lambda: sgd(D, None, grad_factor=math.inf), ValueError, "grad_factor must be finite, got inf"),
    # What is not there
    "adam one moment": (lambda: adam(D, D, None), ValueError, "exp_avg and exp_avg_sq must both be given or, with a gradient, both be None, got True and False with gradient True; pass the optimizer's state"),
    "adam nothing": (lambda: adam(None, None, None), ValueError, "got False and False with gradient False; pass the optimizer's state"),
    "sgd no gradient": (lambda: sgd(None, D), TypeError, "grad must be a tensor, got None; pass the one of the parameter"),
    "sums no gradient": (lambda: ops.adam_sums(W, None, D, D, **ADAM), TypeError, "grad must be a tensor, got None; the sums over a step are taken before it, with its gradient"),
    # Shared memory
    "axpy twice": (lambda: axpy([SHARED, SHARED], [V[:3]] * 2, [V[3:]] * 2), ValueError, OVERLAP),
    "axpy part": (lambda: axpy([BUFFER[0], BUFFER[:, 0]], [W, W[:3]], [D, D[:3]]), ValueError, OVERLAP),
    "axpy in place": (lambda: axpy([BUFFER[0]], [BUFFER[0]]), ValueError, OVERLAP),
    "axpy expanded": (lambda: axpy([overlapping(4, 6)]), ValueError, "theta[0] must have memory for each of its elements, got shape [4, 6] with strides [0, 0]; pass a contiguous copy"),
    "form expanded": (lambda: form(out=overlapping(2, 4, 6)), ValueError, "out must have memory for each of its elements, got shape [2, 4, 6] with strides [0, 0, 0]"),
    "form one slice": (lambda: form(out=BUFFER[0].expand(2, 4, 6)), ValueError, "out must have memory for each of its elements, got shape [2, 4, 6] with strides [0, 6, 1]"),
    "form into D": (lambda: form(BUFFER[1], out=BUFFER[:2]), ValueError, OVERLAP),
    "form into alpha": (lambda: form(alpha=BUFFER[0, 0, :2], out=BUFFER[:2]), ValueError, OVERLAP),
    "form shifted": (lambda: form(BUFFER.view(-1)[1:25].view(4, 6), ONE, out=BUFFER[:1]), ValueError, OVERLAP),
    "adam into m": (lambda: adam(D, BUFFER[1], D, out=BUFFER[:2]), ValueError, OVERLAP),
    "sgd into g": (lambda: sgd(BUFFER[1], None, out=BUFFER[:2]), ValueError, OVERLAP),
    "entropy shared": (lambda: entropy(maximum=SHARED, target=SHARED), ValueError, OVERLAP),
    "entropy expanded": (lambda: entropy(total=overlapping(3)), ValueError, "total must have memory for each of its elements, got shape [3] with strides [0]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_before_anything_is_written(case: str) -> None:
    call, error, wording = REFUSALS[case]
    with pytest.raises(error, match=re.escape(wording)):
        call()
    assert bool((SHARED == 1).all() and (BUFFER == 1).all() and (W == 1).all() and (V == 1).all())


# torch sends an operation with an operand on the meta device to its fake: what it does on others is asked directly.
ELSEWHERE: dict[str, tuple[Callable[[], object], str]] = {
    "ops form": (lambda: form(META), "all operands must be on one device, got cpu, meta; move them to one device"),
    "ops form alpha": (lambda: form(alpha=ALPHA.to("meta")), "all operands must be on one device, got cpu, meta"),
    "ops axpy": (lambda: axpy([BUFFER[0]], [META]), "all operands must be on one device, got cpu, meta"),
    "form": (lambda: body(ops.form)(W, META, ALPHA), "D must be on cpu as the other operands, got meta; move it there"),
    "form alpha": (lambda: body(ops.form)(W, D, ALPHA.to("meta")), "alpha must be on cpu as the other operands, got meta"),
    "form out": (lambda: body(ops.form)(W, D, ALPHA, out=BUFFER[:2].to("meta")), "out must be on cpu as the other operands, got meta"),
    "axpy": (lambda: body(ops.axpy_)([BUFFER[0]], [W], [META], ONE), "delta[0] must be on cpu as the other operands, got meta"),
    "axpy devices": (lambda: body(ops.axpy_)([BUFFER[0], META], [W, META], [D, META], ONE), "all tensors must be on one device, got cpu, meta; call once per device"),
    "sgd": (lambda: body(ops.form_step)("sgd", W, D, [META], ALPHA, (0.0, 1.0, 1.0, 0.9, 1.0)), "momentum_buffer must be on cpu as the other operands, got meta"),
    "reduce": (lambda: body(ops.reduce)([W], [META], [W]), "delta[0] must be on cpu as the other operands, got meta"),
    "linear": (lambda: body(ops.linear)(X, W.to("meta"), D, ALPHA), "W must be on cpu as the other operands, got meta"),
    "embedding": (lambda: body(ops.embedding)(INDICES.to("meta"), W, D, ALPHA), "indices must be on cpu as the other operands, got meta"),
    "rms": (lambda: body(ops.rms_norm)(X, V, V.to("meta"), ALPHA, eps=1e-5), "weight_direction must be on cpu as the other operands, got meta"),
}  # fmt: skip


@pytest.mark.parametrize("case", ELSEWHERE)
def test_operands_on_several_devices_are_refused(case: str) -> None:
    call, wording = ELSEWHERE[case]
    with pytest.raises(ValueError, match=re.escape(wording)):
        call()


def test_the_head_refuses_an_infinite_cap() -> None:
    with pytest.raises(ValueError, match="softcap must be finite, got inf; leave it out for none"):
        linear_cross_entropy(W, torch.ones(9, 6), torch.tensor([0, 1, 2, 3]), softcap=math.inf)


# What looks like the above and is right


def test_columns_of_one_matrix_are_written_side_by_side() -> None:
    fused = torch.zeros(4, 6)
    parts = [fused[:, :3], fused[:, 3:]]
    axpy(parts, [W[:, :3]] * 2, [D[:, :3]] * 2)
    assert torch.equal(fused, W + ONE * D)


def test_one_result_may_take_the_place_of_an_operand() -> None:
    place = torch.full((4, 6), 2.0)
    assert torch.equal(form(place, ONE, out=place.unsqueeze(0))[0], W + 2 * ONE)


def test_any_number_of_step_sizes_and_any_length_of_rows() -> None:
    x, vector = torch.ones(17, 1, 16_385), torch.ones(16_385)
    alpha = torch.linspace(-1, 0, 17)
    assert torch.allclose(rms(x, vector, vector, alpha)[:, 0, 0], 1 + alpha, atol=1e-4)


def test_an_empty_chunk_of_the_vocabulary_changes_nothing() -> None:
    maximum = torch.tensor([1.0, 2.0, 3.0])
    entropy(torch.ones(3, 0), maximum=maximum)
    assert maximum.tolist() == [1.0, 2.0, 3.0]


def test_a_table_without_rows_gives_nan() -> None:
    rows = embedding(W=W[:0], D=D[:0])
    assert rows.shape == (2, 2, 6)
    assert rows.isnan().all()


def test_a_table_without_rows_gives_nan_with_triton() -> None:
    pytest.importorskip("triton", reason="triton is a Linux package")
    # Triton decides on its import whether to interpret.
    script = """
import torch
from sharpkern import ops
table = torch.ones(0, 6)
rows = ops.embedding(torch.tensor([1, 2]), table, table, torch.tensor([-0.1]), backend="triton")
print(tuple(rows.shape), bool(rows.isnan().all()))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "(1, 2, 6) True\n"), done.stderr
