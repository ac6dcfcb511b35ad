"""Every operation as torch sees it: schemas, fakes, compilers, vmap, backends; and the torch backend in numbers."""

import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import sharpkern
from sharpkern import ops
from sharpkern.ops import arithmetic, registry

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ALPHA = torch.tensor([-0.3, 0.0, 0.7])
ADAM = {"beta1": 0.9, "beta2": 0.99, "correction1": 0.2, "correction2": 0.05, "eps": 1e-6, "weight_decay": 0.1}
ADAM_NUMBERS = (0.1, 1.0, 1.0, 0.1, 0.99, 0.01, 5.0, 0.2236, 1e-6)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def five() -> list[Tensor]:
    return [randn(5, 7, seed=i).abs() for i in range(5)]


def lists() -> list[Tensor]:
    return [randn(3, 4), randn(0), randn(5)]


def statistics() -> tuple[Tensor, Tensor, Tensor]:
    return torch.full((4,), -math.inf), torch.zeros(4), torch.full((4,), math.nan)


def states() -> list[Tensor | None]:
    """Of two parameters, moments and no largest second one."""
    return [*five()[:2], None, *five()[2:4], None]


# Name of the overload → its arguments.
CASES: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "axpy_.default": lambda: ((lists(), lists(), lists(), ALPHA[:1]), {}),
    "form.default": lambda: ((randn(6, 5).t(), randn(6, 5).t().bfloat16(), ALPHA), {"dtype": torch.float16}),
    "form.out": lambda: (
        (randn(6, 5), randn(6, 5), ALPHA),
        {"out": torch.empty(3, 6, 5, dtype=torch.bfloat16), "seed": 3},
    ),
    "form_step.default": lambda: (("adam", *five()[:2], five()[2:], ALPHA, ADAM_NUMBERS), {"decoupled": True}),
    "form_step.out": lambda: (
        ("sgd", *five()[:2], [None], None, (0.1, 1.0, 2.0, 0.9, 1.0)),
        {"flag": True, "out": torch.empty(1, 5, 7)},
    ),
    "form_steps_.default": lambda: (
        ("adam", [torch.empty(5, 7), torch.empty(5, 7)], five()[:2], five()[2:4], states(), ALPHA[:1], ADAM_NUMBERS),
        {"decoupled": True},
    ),
    "sum_steps.default": lambda: (("adam", five()[:2], five()[2:4], states(), ADAM_NUMBERS), {"decoupled": True}),
    "step_sums.default": lambda: (("adam", *five()[:2], [*five()[2:4], None], ADAM_NUMBERS), {"decoupled": True}),
    "reduce.default": lambda: ((lists(), lists(), lists()), {}),
    "linear.default": lambda: (
        (randn(1, 4, 5), randn(6, 5), randn(6, 5), ALPHA),
        {"dtype": torch.float64},
    ),
    "embedding.default": lambda: ((torch.tensor([[1, 4], [0, 1]]), randn(5, 3), randn(5, 3), ALPHA), {}),
    "rms_norm.default": lambda: ((randn(3, 4, 6), randn(6), randn(6), ALPHA), {"eps": 1e-5}),
    "layer_norm.default": lambda: (
        (randn(3, 2, 4, 6), randn(6), randn(6), randn(6), None, ALPHA),
        {"eps": 1e-5, "dtype": torch.bfloat16},
    ),
    "online_cross_entropy_.default": lambda: (
        (*statistics(), randn(4, 9), torch.arange(7, 11), 2),
        {"softcap": 20.0},
    ),
}


def overload(name: str) -> Any:
    packet, which = name.split(".")
    return getattr(getattr(torch.ops.sharpkern, packet), which)


def test_every_operation_has_a_case() -> None:
    # What is registered wraps its torch implementation.
    public = [name for name, value in vars(ops).items() if hasattr(value, "__wrapped__")]
    overloads = {f"{name}.{which}" for name in public for which in getattr(torch.ops.sharpkern, name).overloads()}
    assert overloads == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_torch_accepts_the_operation(name: str) -> None:
    args, kwargs = CASES[name]()
    done = torch.library.opcheck(overload(name), args, kwargs)
    assert set(done.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", CASES)
def test_compiled_whole_it_is_the_same(name: str) -> None:
    torch._dynamo.reset()
    operation = overload(name)
    args, kwargs = CASES[name]()
    expected = operation(*args, **kwargs)
    compiled_args, compiled_kwargs = CASES[name]()
    compiled = torch.compile(lambda args, kwargs: operation(*args, **kwargs), fullgraph=True, backend="aot_eager")
    got = compiled(compiled_args, compiled_kwargs)
    # Operations that return nothing have written their arguments.
    written = zip(_tensors(compiled_args, compiled_kwargs), _tensors(args, kwargs), strict=True)
    for a, b in written if got is None else [(got, expected)]:
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def test_memory_plans_see_shapes_without_values() -> None:
    with FakeTensorMode():
        W = torch.empty(100_000, 4096, dtype=torch.bfloat16)
        assert ops.form(W, W, torch.empty(8)).shape == (8, 100_000, 4096)
        assert ops.linear(W[None, :9], W, W, torch.empty(8)).shape == (8, 9, 100_000)
        assert ops.embedding(torch.empty(2, 9, dtype=torch.long), W, W, torch.empty(8)).shape == (8, 2, 9, 4096)


# vmap


MATRIX, OTHER, VECTOR, INPUT = randn(4, 3), randn(4, 3, seed=1), randn(3), randn(1, 2, 3)
*STATE, LARGEST = five()


@pytest.mark.parametrize(
    "call",
    [
        lambda alpha: ops.form(MATRIX, OTHER, alpha),
        lambda alpha: ops.form_sgd(MATRIX, OTHER, None, alpha),
        lambda alpha: ops.form_adam(*STATE, alpha, **ADAM),
        lambda alpha: ops.form_adam(*STATE, alpha, max_exp_avg_sq=LARGEST, **ADAM),
        lambda alpha: ops.embedding(torch.tensor([1, 2]), MATRIX, OTHER, alpha),
        lambda alpha: ops.rms_norm(INPUT, VECTOR, VECTOR, alpha, eps=1e-5),
        lambda alpha: ops.layer_norm(INPUT, VECTOR, VECTOR, None, None, alpha, eps=1e-5),
    ],
    ids=["form", "form_sgd", "form_adam", "form_adam, amsgrad", "embedding", "rms_norm", "layer_norm"],
)
def test_step_sizes_may_be_mapped(call: Callable[[Tensor], Tensor], capfd: pytest.CaptureFixture[str]) -> None:
    mapped = torch.func.vmap(call)(ALPHA[:, None])
    assert torch.equal(mapped, torch.stack([call(alpha) for alpha in ALPHA[:, None]]))
    # Of a rule that is missing torch's warning goes past Python's filters.
    assert capfd.readouterr().err == ""


def test_inputs_and_weights_may_be_mapped() -> None:
    x, weights = randn(3, 1, 2, 4), randn(4, 3)
    normed = torch.func.vmap(lambda x, a: ops.rms_norm(x, weights[:, 0], weights[:, 1], a, eps=1e-5))
    by_hand = [
        ops.rms_norm(one, weights[:, 0], weights[:, 1], a, eps=1e-5) for one, a in zip(x, ALPHA[:, None], strict=True)
    ]
    assert torch.equal(normed(x, ALPHA[:, None]), torch.stack(by_hand))
    formed = torch.func.vmap(lambda W: ops.form(W, W, ALPHA), in_dims=1)(weights)
    assert torch.equal(formed, torch.stack([ops.form(W, W, ALPHA) for W in weights.unbind(1)]))


# Backends


def test_an_explicit_backend_never_falls_back() -> None:
    W = randn(4)
    with pytest.raises(ValueError, match=r"W must be a dense CUDA tensor, got torch\.strided on cpu"):
        ops.form(W, W, ALPHA, backend="triton")
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, got 'cuda'; leave it out"):
        ops.form(W, W, ALPHA, backend="cuda")  # type: ignore[arg-type]


def test_the_environment_takes_the_place_of_auto_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    W = randn(4)
    monkeypatch.setenv("SHARPKERN_BACKEND", "triton")
    with pytest.raises(ValueError, match="SHARPKERN_BACKEND=triton needs tensors on a GPU, got form on cpu; unset it"):
        ops.form(W, W, ALPHA)
    assert ops.form(W, W, ALPHA, backend="torch").shape == (3, 4)
    monkeypatch.setenv("SHARPKERN_BACKEND", "")
    assert ops.form(W, W, ALPHA).shape == (3, 4)
    monkeypatch.setenv("SHARPKERN_BACKEND", "tritn")
    with pytest.raises(ValueError, match="SHARPKERN_BACKEND must be one of auto, triton, torch, got 'tritn'"):
        ops.form(W, W, ALPHA)


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let "auto" take the kernels on CPU tensors; the list names what was launched. They refuse float64."""
    launched: list[str] = []

    def launcher(name: str, kernel: str) -> Any:
        def accept(*operands: Any, **options: Any) -> Callable[[], Any]:
            if any(isinstance(operand, Tensor) and operand.dtype == torch.float64 for operand in operands):
                raise TypeError("must be float32, float16 or bfloat16")
            return lambda: (launched.append(name), inspect.unwrap(getattr(ops, name))(*operands, **options))[1]

        return SimpleNamespace(accept=accept)

    monkeypatch.setattr(registry, "has_kernels", lambda device: True)
    monkeypatch.setattr(registry, "_launcher", launcher)
    registry._kernels_work.cache_clear()
    yield launched
    registry._kernels_work.cache_clear()


def test_auto_takes_the_kernel_and_torch_for_what_the_kernel_refuses(as_if_on_a_gpu: list[str]) -> None:
    W = randn(4)
    ops.form(W, W, ALPHA)
    # The first call tries one kernel out.
    assert as_if_on_a_gpu == ["form", "form"]
    formed = ops.form(W.double(), W.double(), ALPHA.double())
    assert torch.equal(formed[1], W.double())
    ops.axpy_([W.clone()], [W], [W], ALPHA[:1])
    ops.form(W, W, ALPHA, backend="torch")
    assert as_if_on_a_gpu == ["form", "form", "axpy_"]


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_auto_does_not_hide_what_goes_wrong_in_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    W = randn(4)
    ops.form(W, W, ALPHA)

    def wrong() -> Tensor:
        raise ValueError("from inside Triton")

    monkeypatch.setattr(registry, "_launcher", lambda *_: SimpleNamespace(accept=lambda *_, **__: wrong))
    with pytest.raises(ValueError, match="from inside Triton"):
        ops.form(W, W, ALPHA)


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_a_triton_that_does_not_work_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, kernel: str) -> Callable[..., Any]:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(registry, "_launcher", broken)
    W = randn(4)
    with pytest.warns(sharpkern.KernelWarning, match=r"with plain torch on cpu.*Failed to find C compiler.*=triton to"):
        formed = ops.form(W, W, ALPHA)
    assert torch.equal(formed, ops.form(W, W, ALPHA, backend="torch"))
    with pytest.raises(RuntimeError, match="C compiler"):
        ops.form(W, W, ALPHA, backend="triton")


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_a_triton_older_than_the_kernels_are_checked_with_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.5.1")
    with pytest.warns(sharpkern.KernelWarning, match=r"it is older than 3\.6"):
        ops.form(randn(4), randn(4), ALPHA)


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_a_kernel_that_gives_wrong_numbers_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_launcher", lambda *_: SimpleNamespace(accept=lambda W, *_: lambda: W[None] + 1))
    W = randn(4)
    with pytest.warns(sharpkern.KernelWarning, match="a kernel gave wrong numbers"):
        assert torch.equal(ops.form(W, W, ALPHA)[1], W)


def test_without_triton_the_cpu_works_and_the_name_of_the_package_is_said() -> None:
    script = """
import sys
sys.modules["triton"] = None
import torch, sharpkern
from sharpkern import ops
W = torch.ones(3)
assert ops.form(W, W, torch.ones(1)).sum() == 6
try:
    ops.form(W, W, torch.ones(1), backend="triton")
except ImportError as error:
    assert "needs triton, which is not installed" in str(error), error
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


def test_parameters_are_taken_as_they_are_and_results_belong_to_no_graph() -> None:
    W, v = torch.nn.Parameter(randn(4, 3)), torch.nn.Parameter(randn(3))
    for result in (
        ops.form(W, W, ALPHA),
        ops.form(W, W, ALPHA, out=torch.empty(3, 4, 3)),
        ops.form_sgd(W, W, None, ALPHA),
        ops.linear(randn(1, 2, 3), W, W, ALPHA),
        ops.embedding(torch.tensor([1]), W, W, ALPHA),
        ops.rms_norm(randn(3, 2, 3), v, v, ALPHA, eps=1e-5),
        ops.reduce([W], [W], [W]),
    ):
        assert not result.requires_grad
    ops.axpy_([W], [randn(4, 3)], [randn(4, 3)], ALPHA[:1])
    assert W.requires_grad


# The torch backend


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("delta_dtype", DTYPES)
def test_formed_weights_are_rounded_once(
    base_dtype: torch.dtype, delta_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "CPU_CHUNK", 100)
    base, delta = torch.randn(37, 11).to(base_dtype), torch.randn(37, 11).to(delta_dtype)
    alpha = torch.tensor([-0.0123], dtype=torch.float64)
    exact = base.double() - 0.0123 * delta.double()
    (formed,) = ops.form(base, delta, alpha)
    assert formed.dtype == base_dtype
    # Half a unit in the last place, and the roundings of the wider arithmetic before.
    eps, wide = torch.finfo(base_dtype).eps, torch.finfo(arithmetic.compute_dtype(base_dtype, delta_dtype)).eps
    budget = (eps / 2 + (2 * wide if eps == wide else wide)) * exact.abs() + 4 * wide * delta.double().abs() * 0.0123
    assert ((formed.double() - exact).abs() <= budget + 1e-7 * (base_dtype == torch.float16)).all()


SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sums", "form", "num", "numbers"),
    [(ops.adam_sums, ops.form_adam, 4, ADAM), (ops.sgd_sums, ops.form_sgd, 3, SGD)],
    ids=["adam", "sgd"],
)
def test_sums_over_a_step_are_those_of_its_update_before_any_rounding(
    sums: Any, form: Any, num: int, numbers: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    operands = [tensor.to(dtype) for tensor in five()[:num]]
    numbers = {**numbers, "grad_factor": -0.5, "rate": 0.3}
    delta = form(*operands, None, **numbers, dtype=arithmetic.compute_dtype(dtype))[0].double()
    grad = operands[1].double()
    monkeypatch.setattr(arithmetic, "CPU_CHUNK", 14)
    got = sums(*operands, **numbers)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx([(delta * grad).sum().item(), delta.square().sum().item()], rel=1e-13)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
def test_sums_over_a_step_of_any_shape(shape: tuple[int, ...]) -> None:
    tensor = torch.full(shape, 2.0)
    slope, norm_sq = ops.sgd_sums(tensor, tensor, None)
    assert slope == norm_sq == 4 * tensor.numel()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (63,), (1000, 130), (3, 0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "CPU_CHUNK", 64)
    base, delta = torch.randn(shape).to(dtype), torch.randn(shape)
    expected = torch.stack([(base.float() + alpha * delta).to(dtype) for alpha in (0.5, 2.0)])
    alphas = torch.tensor([0.5, 2.0])
    assert torch.equal(ops.form(base, delta, alphas), expected)
    out = torch.full((2, *shape), torch.nan, dtype=dtype)
    assert ops.form(base, delta, alphas, out=out) is out
    assert torch.equal(out, expected)


def test_strides_are_kept_and_the_inputs_untouched() -> None:
    base, delta = torch.randn(8, 5).t(), torch.randn(8, 5).t()
    copies = base.clone(), delta.clone()
    (formed,) = ops.form(base, delta, torch.tensor([2.0]))
    assert formed.stride() == base.stride()
    assert torch.equal(base, copies[0])
    assert torch.equal(delta, copies[1])


def test_a_step_of_zero_is_the_weight_itself() -> None:
    base, delta = torch.tensor([-0.0, 1.0]), torch.tensor([1.0, math.inf])
    (formed,) = ops.form(base, delta, torch.zeros(1))
    assert torch.equal(formed.view(torch.int32), base.view(torch.int32))


def test_step_sizes_are_not_rounded_to_the_weights_dtype() -> None:
    """The CPU's own bf16 add rounds alpha to bf16, up to 0.2 %."""
    base, delta = torch.zeros(1, dtype=torch.bfloat16), torch.full((1,), 256.0, dtype=torch.bfloat16)
    alpha = 1.00390625  # half-way between two bf16 numbers
    wide = ops.form(base, delta, torch.tensor([alpha]), dtype=torch.float32)
    assert wide.item() == 257.0
    assert base.add(delta, alpha=alpha).item() != 257.0, "the trap no longer springs"


def test_tensors_of_other_shapes_are_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"D must have the shape of W, \[4, 3\], got \[3\]; pass the tensors of one"):
        ops.form(randn(4, 3), randn(3), ALPHA)
    with pytest.raises(ValueError, match=r"out must have shape \[3, 4\], got \[4\]; leave it out"):
        ops.form(randn(4), randn(4), ALPHA, out=torch.empty(4))
    with pytest.raises(ValueError, match=r"momentum_buffer must have the shape of theta, \[4\], got \[1\]"):
        ops.form_sgd(randn(4), randn(4), randn(1), ALPHA, momentum=0.9)


def test_stochastic_rounding_keeps_small_steps_on_average() -> None:
    W, D = torch.ones(200, 100, dtype=torch.bfloat16), torch.ones(200, 100)
    alphas = torch.tensor([0.0, 1e-3, 2e-3])
    formed = ops.form(W, D, alphas, seed=5).float().mean((1, 2)) - 1
    assert formed[0] == 0
    # 20 000 draws of one unit, 2⁻⁷, with probability 0.128: a standard deviation of 2 %.
    assert formed[1:].tolist() == pytest.approx([1e-3, 2e-3], rel=0.08)
    assert (ops.form(W, D, alphas)[1] == 1).all(), "rounding to nearest loses the step"
    # The same random numbers for every step size: what went up goes up at a larger step.
    small, large = ops.form(W, D, alphas[1:], seed=5)
    assert (large >= small).all()
    transposed = ops.form(W.t(), D.t(), alphas, seed=5)
    assert torch.equal(transposed, ops.form(W, D, alphas, seed=5).mT)


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [True, False])
def test_a_linear_layer_is_that_of_weights_formed_in_the_dtype_of_its_input(
    dtype: torch.dtype, weight_dtype: torch.dtype, shared: bool
) -> None:
    x, W, D = randn(1 if shared else 3, 5, 7).to(dtype), randn(4, 7).to(weight_dtype), randn(4, 7, seed=1)
    formed = ops.form(W, D, ALPHA, dtype=dtype)
    y = ops.linear(x, W, D, ALPHA)
    expected = torch.stack([F.linear(x[0 if shared else k], formed[k]) for k in range(3)])
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    wider = ops.linear(x, W, D, ALPHA, dtype=torch.float64)
    torch.testing.assert_close(wider, x.double() @ formed.double().mT, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", [(0, 4, 7), (5, 0, 7), (5, 4, 0)])
def test_a_linear_layer_of_any_size(shape: tuple[int, int, int]) -> None:
    M, N, C = shape
    y = ops.linear(torch.ones(1, M, C), torch.ones(N, C), torch.ones(N, C), ALPHA)
    assert torch.equal(y, torch.zeros(3, M, N))


def test_an_index_outside_the_table_gives_nan() -> None:
    rows = ops.embedding(torch.tensor([0, 5, -1]), randn(5, 2), randn(5, 2), ALPHA)
    assert rows.isnan().any(-1).tolist() == [[False, True, True]] * 3
