"""Traps that give a wrong number without an error. Where it can be, the cure is taken away and the trap springs."""

import copy
import tracemalloc
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sharpkern
from sharpkern.engines.evaluation import guard as guards
from sharpkern.engines.retained import retained_share
from sharpkern.engines.tracked import track
from sharpkern.engines.virtual import torch_calls as calls
from sharpkern.engines.virtual.engine import VirtualEngine
from sharpkern.measures import run as _run
from sharpkern.memory.counter import peak_bytes
from tests.helpers.cases import TORCH_CASES
from tests.helpers.models import MLP
from tests.helpers.oracle import deep_copy_losses, engine_losses, random_direction

STEP_SIZES = (1e-2, 0.1)


def classification(model: nn.Module, seed: int = 1) -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(32, 16, generator=generator), torch.randint(0, 10, (32,), generator=generator)
    return lambda: F.cross_entropy(model(x), y)


def with_gradient(model: nn.Module, loss_fn: Callable[[], torch.Tensor], lr: float = 0.1) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    optimizer.zero_grad()
    loss_fn().backward()
    return optimizer


# Trap 1: an enclosing autocast keeps casts of the weights.
def test_in_place_under_an_outer_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MLP()
    loss_fn, direction = classification(model), random_direction(model)

    def losses() -> list[float]:
        with torch.autocast("cpu", torch.bfloat16):
            loss_fn()
            return engine_losses("inplace", model, loss_fn, direction, STEP_SIZES)

    right = losses()
    expected = engine_losses("virtual", model, loss_fn, direction, STEP_SIZES)
    assert right == pytest.approx(expected, rel=2e-2)
    assert right[0] != right[1]
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)
    with torch.autocast("cpu", torch.bfloat16):
        loss_fn()
        stale = engine_losses("inplace", model, loss_fn, direction, STEP_SIZES)
    assert stale[0] == stale[1], "the trap no longer springs"


def test_the_virtual_engine_does_not_mind_an_outer_autocast() -> None:
    model = MLP()
    loss_fn, direction = classification(model), random_direction(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = engine_losses("virtual", model, loss_fn, direction, (0.0, *STEP_SIZES))
    assert losses == pytest.approx(engine_losses("virtual", model, loss_fn, direction, (0.0, *STEP_SIZES)), rel=2e-2)
    assert len(set(losses)) == 3


# Trap 3: the loop prefetches, and the batch at hand is the next one.
def test_a_closure_over_the_next_batch_is_noticed() -> None:
    model = MLP()
    own, following = classification(model, seed=1), classification(model, seed=2)
    for _ in range(30):
        with_gradient(model, own).step()
    direction = sharpkern.Direction.from_optimizer(with_gradient(model, own))
    with pytest.warns(sharpkern.SlopeMismatchWarning, match="the batch that the gradient is of"):
        sharpkern.critical_sharpness(model, following, direction)


class Bent(nn.Module):
    """A loss whose fall along the gradient is over long before it rises: at a hundred thousandth of η_c."""

    def __init__(self) -> None:
        super().__init__()
        self.steep, self.wide = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()))

    def forward(self) -> torch.Tensor:
        return 0.1 * torch.exp(1000 * self.steep) + self.wide**2


@pytest.mark.parametrize("factor", [1.0, 64.0], ids=["its own", "scaled"])
def test_a_loss_that_bends_early_is_not_taken_for_another_batchs(factor: float) -> None:
    model = Bent().double()
    model().backward()
    direction = sharpkern.Direction.from_gradients(model)
    direction = replace(direction, slope=factor * direction.slope)
    expected = pytest.warns(sharpkern.SlopeMismatchWarning) if factor != 1 else nullcontext()
    with expected:
        found = sharpkern.critical_sharpness(model, model, direction, initial_lr=1.0)
    assert found.critical_lr == pytest.approx((1 + 1.1**0.5) / 2, rel=0.02)


def test_checks_are_made_again_and_again_and_the_own_batch_passes() -> None:
    model = MLP()
    loss_fn = classification(model)
    optimizer = with_gradient(model, loss_fn)
    checks = []
    for _ in range(8):
        measured = sharpkern.critical_sharpness(model, loss_fn, sharpkern.Direction.from_optimizer(optimizer))
        checks.append(measured.forwards - len(measured.probes) - 1)
    # Repeatability, oracle and slope on measurements 1, 2, 4, 8, the slope unless a probe serves.
    assert checks[2] == checks[4] == checks[5] == checks[6] == 0
    assert all(2 <= checks[due] <= 3 for due in (0, 1, 3, 7))


# Trap 9: adding and then subtracting does not restore.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = MLP(64).to(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    direction = random_direction(model)
    x = torch.randn(8, 16, dtype=dtype)
    engine_losses("inplace", model, lambda: model(x).float().square().mean(), direction, (0.3, 0.1, 0.01))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    changed = [
        (b.clone().add_(d, alpha=-0.3).add_(d, alpha=0.3) != b).float().mean()
        for b, d in zip(before, direction.tensors, strict=True)
    ]
    assert max(changed) > 0.03, "the trap no longer springs"


# Trap 10: dropout without a fixed seed.
@pytest.mark.parametrize("engine", ["virtual", "inplace"])
def test_dropout_masks_are_equal_at_every_probe(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5), nn.Linear(64, 10))
    loss_fn, direction = classification(model), random_direction(model)
    losses = engine_losses(engine, model, loss_fn, direction, (0.0, 0.1, 0.0, 0.1))
    assert losses[:2] == losses[2:]
    monkeypatch.setattr(guards.Guard, "rewind", lambda self: None)
    losses = engine_losses(engine, model, loss_fn, direction, (0.0, 0.1, 0.0, 0.1))
    assert losses[0] != losses[2], "the trap no longer springs"


# Trap 11: BatchNorm in train mode counts every probe.
def test_running_statistics_are_those_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 10))
    before = copy.deepcopy(dict(model.named_buffers()))
    sharpkern.critical_sharpness(model, classification(model), random_direction(model))
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    monkeypatch.setattr(guards, "_restore_content", lambda *_: None)
    sharpkern.critical_sharpness(model, classification(model), random_direction(model))
    assert not all(torch.equal(b, before[name]) for name, b in model.named_buffers()), "the trap no longer springs"


# Trap 13: Dynamo traces the mode's arithmetic and the mode sees it again.
@pytest.mark.long
def test_compiled_models(monkeypatch: pytest.MonkeyPatch) -> None:
    case = TORCH_CASES[0]
    plain = case.build()
    direction = random_direction(plain)
    expected = deep_copy_losses(plain, case.closure, direction, STEP_SIZES)
    torch._dynamo.reset()
    graphs: list[object] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(plain, backend=counting)
    loss_fn = case.closure(compiled)
    loss_fn()
    with torch.no_grad():
        loss_fn()
    num_graphs = len(graphs)
    assert num_graphs > 0
    assert engine_losses("inplace", compiled, loss_fn, direction, STEP_SIZES) == pytest.approx(expected, rel=1e-6)
    assert len(graphs) == num_graphs, "measuring recompiled the model"
    assert engine_losses("virtual", compiled, loss_fn, direction, STEP_SIZES) == pytest.approx(expected, rel=1e-6)
    assert len(graphs) == num_graphs, "Dynamo saw the mode"
    assert sharpkern.critical_sharpness(compiled, loss_fn, direction).engine == "inplace"

    # Whether a graph comes of it depends on what else the process has compiled; that Dynamo looks does not.
    looked = lambda: torch._dynamo.utils.counters["frames"]["total"]
    num_frames = looked()
    engine_losses("virtual", compiled, loss_fn, direction, STEP_SIZES)
    assert looked() == num_frames
    monkeypatch.setattr(torch.compiler, "set_stance", lambda *_: nullcontext())
    with warnings.catch_warnings():
        # Dynamo complains of caches in the mode, which it should not get to see.
        warnings.simplefilter("ignore")
        engine_losses("virtual", compiled, loss_fn, direction, STEP_SIZES)
    assert looked() > num_frames, "the trap no longer springs"


# Trap 14: reads of the weights that the mode cannot see.
Made = tuple[nn.Module, Callable[[], torch.Tensor]]


def scripted() -> Made:
    model = MLP()
    traced = torch.jit.trace(model, torch.randn(2, 16))
    return traced, classification(traced)


def aliased() -> Made:
    """An alias where nobody looks for one: variables of Python modules are not followed."""
    model, elsewhere = nn.Linear(16, 10), ModuleType("elsewhere")
    elsewhere.weight = model.weight.detach()
    x, y = torch.randn(32, 16), torch.randint(0, 10, (32,))
    return model, lambda: F.cross_entropy(F.linear(x, elsewhere.weight, model.bias), y)


def partly_aliased() -> Made:
    """The weight is read once in sight, so that coverage alone is content."""
    model, loss_fn = aliased()
    return model, lambda: loss_fn() + model.weight.square().sum()


def opaque() -> Made:
    model = nn.Linear(16, 10)
    x = torch.randn(32, 16)
    return model, lambda: model(x).square().mean() + float(model.weight.detach().numpy().std())


@pytest.mark.filterwarnings("ignore:.torch.jit.\\w+. is deprecated")
@pytest.mark.parametrize("make", [scripted, aliased, partly_aliased, opaque])
def test_hidden_reads_lead_to_the_engine_that_writes(make: Callable) -> None:
    model, loss_fn = make()
    direction = random_direction(model)
    expected = sharpkern.critical_sharpness(model, loss_fn, direction, engine="inplace")
    with nullcontext() if make is scripted else pytest.warns(sharpkern.EngineFallbackWarning, match="in place"):
        measured = sharpkern.critical_sharpness(model, loss_fn, direction)
    assert measured.engine == "inplace"
    assert measured.critical_lr == pytest.approx(expected.critical_lr, rel=1e-6, nan_ok=True)
    with pytest.raises(sharpkern.EngineUnsupportedError):
        sharpkern.critical_sharpness(model, lambda: loss_fn(), direction, engine="virtual")


def test_without_coverage_and_oracle_a_hidden_read_is_a_wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss_fn = aliased()
    direction = random_direction(model)
    (right,) = engine_losses("inplace", model, loss_fn, direction, (0.5,))
    monkeypatch.setattr(VirtualEngine, "_unread", lambda self: set())
    (wrong,) = engine_losses("virtual", model, loss_fn, direction, (0.5,))
    assert wrong != pytest.approx(right, rel=1e-3), "the trap no longer springs"


# Trap 15: a loss in bf16 is too coarse.
@pytest.mark.parametrize("engine", ["virtual", "inplace"])
def test_losses_are_computed_in_float32(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MLP().bfloat16()
    x, y = torch.randn(32, 16, dtype=torch.bfloat16), torch.randint(0, 10, (32,))

    def coarse() -> list[bool]:
        etas = [0.01 * k for k in range(1, 8)]
        losses = engine_losses(engine, model, lambda: F.cross_entropy(model(x), y), random_direction(model), etas)
        return [float(torch.tensor(loss).bfloat16()) == loss for loss in losses]

    assert not any(coarse())
    monkeypatch.setattr(calls, "LOSSES", frozenset())
    assert all(coarse()), "the trap no longer springs"


def test_a_loss_returned_in_sixteen_bits_is_said_to_be_coarse() -> None:
    model = MLP()
    loss_fn = classification(model)
    with pytest.warns(sharpkern.LossPrecisionWarning, match=r"logits\.float\(\)"):
        sharpkern.critical_sharpness(model, lambda: loss_fn().bfloat16(), random_direction(model))


# Trap 17: autograd must notice that the weights were written.
def test_in_place_writes_bump_the_version_counter() -> None:
    model = MLP()
    loss_fn = classification(model)
    loss = loss_fn()
    engine_losses("inplace", model, loss_fn, random_direction(model), STEP_SIZES)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Trap 19: small steps vanish in 16-bit weights.
def test_the_share_that_rounding_swallows_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MLP()
    masters = {p: p.detach().clone() for p in model.parameters()}
    model.bfloat16()
    x, y = torch.randn(32, 16, dtype=torch.bfloat16), torch.randint(0, 10, (32,))
    loss_fn = lambda: F.cross_entropy(model(x), y)
    loss_fn().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    plain = sharpkern.Direction.from_optimizer(optimizer)
    mastered = sharpkern.Direction.from_optimizer(optimizer, masters=masters)
    assert any(master is not None for master in mastered.masters)

    shares = {}
    for name, direction in {"plain": plain, "masters": mastered}.items():
        pairs = track(direction.moves())
        shares[name] = retained_share(pairs, {pair.owner for pair in pairs}, -3e-2)
    assert shares["plain"] < 0.8
    assert shares["masters"] == pytest.approx(1, abs=0.1)

    assert sharpkern.critical_sharpness(model, loss_fn, mastered, noise=1e-3).retained > 0.9
    monkeypatch.setattr(_run, "retained_share", lambda *_: shares["plain"])
    with pytest.warns(sharpkern.RetainedWarning, match=rf"only {shares['plain']:.2f} .* masters"):
        measured = sharpkern.critical_sharpness(model, loss_fn, plain, noise=1e-3)
    assert measured.retained == shares["plain"]


@pytest.mark.parametrize("engine", ["virtual", "inplace", "batched"])
def test_masters_lose_nothing_to_rounding_in_any_engine(engine: str, no_swapping: None) -> None:
    """In place the weights hold the last step that was written, and not the rounding of their masters."""
    model = MLP(128)
    masters = {p: p.detach().clone() for p in model.parameters()}
    model.bfloat16()
    x, y = torch.randn(64, 16, dtype=torch.bfloat16), torch.randint(0, 10, (64,))
    loss_fn = lambda: F.cross_entropy(model(x).float(), y)
    loss_fn().backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    direction = sharpkern.Direction.from_optimizer(optimizer, masters=masters)
    measured = sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine)
    assert measured.status == "converged"
    assert measured.retained == pytest.approx(1, abs=0.02)


def test_norm_weights_are_used_in_full_precision() -> None:
    """A bf16 weight near 1 cannot move by 1e-3, the norm's output can."""
    norm = nn.LayerNorm(64).bfloat16()
    x = torch.randn(256, 64, dtype=torch.bfloat16)
    direction = sharpkern.Direction.from_tensors({norm.weight: torch.ones(64)}, norm)
    loss_fn = lambda: norm(x).float().square().mean()
    base, moved = engine_losses("virtual", norm, loss_fn, direction, (0.0, 1e-3))
    assert moved / base == pytest.approx((1 - 1e-3) ** 2, abs=3e-4)
    base, moved = engine_losses("inplace", norm, loss_fn, direction, (0.0, 1e-3))
    assert moved == base, "the trap no longer springs"


# Trap 28: a memory test that cannot fail.
def test_the_counter_sees_what_tracemalloc_does_not() -> None:
    allocate = lambda: torch.empty(50_000_000).add_(1)
    assert peak_bytes(allocate) == 200_000_000
    tracemalloc.start()
    kept = allocate()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000 < kept.nbytes


# A closure that draws a new batch at each call, guard (h).
def test_a_closure_that_draws_its_batch_is_refused_with_both_numbers() -> None:
    model = MLP()
    batches = iter(torch.randn(100, 32, 16))
    with pytest.raises(ValueError, match=r"same loss .* got \d+\.\d+ and then \d+\.\d+ .* fetch the batch once"):
        sharpkern.critical_sharpness(model, lambda: model(next(batches)).square().mean(), random_direction(model))


def test_a_mismatch_with_the_oracle_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MLP()
    monkeypatch.setattr(VirtualEngine, "oracle_loss", lambda self, eta: 0.5)
    with pytest.raises(sharpkern.EngineUnsupportedError, match=r"an independent evaluation gives 0\.5"):
        sharpkern.critical_sharpness(model, classification(model), random_direction(model), engine="virtual")


def test_dropout_is_no_mismatch_of_slopes() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    loss_fn = classification(model)
    direction = sharpkern.Direction.from_optimizer(with_gradient(model, loss_fn))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sharpkern.critical_sharpness(model, loss_fn, direction).status == "converged"
