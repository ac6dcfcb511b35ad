"""The engines on a GPU: losses, random streams, memory. Skipped without one."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import sharpkern
from sharpkern import ops
from sharpkern.bench.accuracy import judged
from sharpkern.bench.cases import Bench, checks
from sharpkern.bench.timing import Machine
from tests.helpers.cases import CASES, TORCH_CASES, Case, tokens
from tests.helpers.models import GPT
from tests.helpers.oracle import LossFn, assert_as_exact_as_copies, deep_copy_losses, engine_losses, random_direction

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device"),
]


DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions are in TF32 by default, which these comparisons would see."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def next_token(model: torch.nn.Module, dtype: torch.dtype | None) -> LossFn:
    x = tokens(length=64).to(DEVICE)

    def loss_fn() -> torch.Tensor:
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    return loss_fn


# The masks of deep copies would be drawn from a stream that fork_rng does not rewind here.
WITHOUT_DROPOUT = [case for case in TORCH_CASES if case.name not in ("gpt", "encoder")]
PRECISION_CASES = [case for case in CASES if case.name in ("gpt-eval", "llama", "olmo2", "resnet")]


# Copies of a recurrent layer have not their weights in one piece.
@pytest.mark.filterwarnings("ignore:RNN module weights")
@pytest.mark.parametrize("case", WITHOUT_DROPOUT, ids=lambda case: case.name)
@pytest.mark.parametrize("engine", ["virtual", "inplace"])
def test_losses_equal_those_of_deep_copies(case: Case, engine: str) -> None:
    model = case.build().to(DEVICE)
    direction = random_direction(model)
    expected = deep_copy_losses(model, case.closure, direction, (0.0, 0.01, 0.1))
    losses = engine_losses(engine, model, case.closure(model), direction, (0.0, 0.01, 0.1))
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["virtual", "inplace"])
@pytest.mark.parametrize("case", PRECISION_CASES, ids=lambda case: case.name)
def test_losses_are_as_exact_as_those_of_deep_copies(case: Case, engine: str, dtype: torch.dtype) -> None:
    assert_as_exact_as_copies(case, engine, dtype, DEVICE)


@pytest.mark.parametrize("engine", ["virtual", "inplace"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "autocast"])
def test_a_measured_run_is_the_run(engine: str, dtype: torch.dtype | None) -> None:
    def run(measured: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        torch.manual_seed(0)
        model = GPT(context=64).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        loss_fn = next_token(model, dtype)
        for _ in range(20):
            optimizer.zero_grad()
            loss_fn().backward()
            if measured:
                direction = sharpkern.Direction.from_optimizer(optimizer)
                sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine, rtol=0.1)
            optimizer.step()
        return copy.deepcopy(model.state_dict()), torch.get_device_module(DEVICE).get_rng_state()

    (without, stream), (again, _) = run(False), run(False)
    assert all(torch.equal(without[name], again[name]) for name in without), "the run itself is not repeatable"
    with_, stream_after = run(True)
    assert torch.equal(stream, stream_after)
    assert all(torch.equal(without[name], with_[name]) for name in without)


def test_the_virtual_engine_needs_the_largest_weight_matrix() -> None:
    model = GPT(vocabulary=512, width=1024, layers=4, dropout=0.0).to(DEVICE)
    x = torch.randint(0, 512, (1, 16), device=DEVICE)
    loss_fn = lambda: F.cross_entropy(model(x).flatten(0, 1), x.flip(1).flatten())
    direction = random_direction(model)
    sharpkern.critical_sharpness(model, loss_fn, direction)

    def peak(function: Callable[[], object]) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    with torch.no_grad():
        plain = peak(loss_fn)
    largest = max(p.nbytes for p in model.parameters())
    assert peak(lambda: sharpkern.critical_sharpness(model, loss_fn, direction)) - plain <= 1.2 * largest


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_direction_from_state_takes_no_memory(kind: type[torch.optim.Optimizer]) -> None:
    model = GPT(vocabulary=512, width=1024, layers=4, dropout=0.0).to(DEVICE)
    x = torch.randint(0, 512, (1, 16), device=DEVICE)
    loss_fn = lambda: F.cross_entropy(model(x).flatten(0, 1), x.flip(1).flatten())
    optimizer = kind(model.parameters(), lr=1e-3)
    loss_fn().backward()
    optimizer.step()
    before = torch.cuda.memory_allocated()
    lazy = sharpkern.Direction.from_optimizer(optimizer)
    assert torch.cuda.memory_allocated() - before < 1 << 20
    resident = sharpkern.Direction.from_optimizer(optimizer, resident=True)
    assert lazy.slope == pytest.approx(resident.slope, rel=1e-6)
    step_sizes = (0.0, 1e-3, 1e-2)
    expected = engine_losses("virtual", model, loss_fn, resident, step_sizes)
    for engine in ("virtual", "inplace"):
        assert engine_losses(engine, model, loss_fn, lazy, step_sizes) == pytest.approx(expected, rel=1e-5)


def test_a_direction_of_bf16_weights_is_kept_in_bf16_where_there_is_room() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    model = GPT(vocabulary=512, width=256, layers=2, dropout=0.0).to(DEVICE, torch.bfloat16)
    x = torch.randint(0, 512, (1, 16), device=DEVICE)
    loss_fn = lambda: F.cross_entropy(model(x).flatten(0, 1).float(), x.flip(1).flatten())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_fn().backward()
    optimizer.step()
    kept = sharpkern.Direction.from_optimizer(optimizer)
    assert kept.nbytes == sum(p.nbytes for p in model.parameters())
    lazy = sharpkern.Direction.from_optimizer(optimizer, resident=False)
    assert kept.slope == pytest.approx(lazy.slope, rel=1e-2)
    for engine in ("virtual", "inplace"):
        losses = engine_losses(engine, model, loss_fn, kept, (0.0, 1e-3, 1e-2))
        assert losses == pytest.approx(engine_losses(engine, model, loss_fn, lazy, (0.0, 1e-3, 1e-2)), rel=2e-3)


def test_auto_takes_the_kernels_here() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    # A warning, which is an error here, says that they do not work.
    W, alpha = torch.randn(1000, device=DEVICE), torch.full((1,), 0.5, device=DEVICE)
    assert torch.equal(ops.form(W, W, alpha), ops.form(W, W, alpha, backend="triton"))


def test_every_kernel_agrees_with_float64_and_with_itself() -> None:
    bench = Bench(Machine(torch.device(DEVICE)), quick=True)
    rows = [row for calls in checks(bench).values() for row in judged(bench, calls())]
    assert [row for row in rows if not row["passed"]] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_language_models_logits_never_exist(dtype: torch.dtype) -> None:
    tokens, width, vocabulary = 2048, 64, 100_000
    model = torch.nn.Sequential(torch.nn.Embedding(vocabulary, width), torch.nn.Linear(width, vocabulary, bias=False))
    model.to(DEVICE, dtype)
    x = torch.randint(0, vocabulary, (1, tokens + 1), device=DEVICE)
    closure = lambda model: lambda: F.cross_entropy(model(x[:, :-1]).flatten(0, 1).float(), x[:, 1:].flatten())
    direction = random_direction(model)
    (loss,) = deep_copy_losses(model, closure, direction, (0.01,))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert engine_losses("virtual", model, closure(model), direction, (0.01,)) == pytest.approx([loss], rel=1e-3)
    assert torch.cuda.max_memory_allocated() - before < tokens * vocabulary
