"""The batched engine by itself: passes, memory, fallbacks, and that nothing of a pass outlives it."""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern
from sharpkern import ops
from sharpkern.engines.batched import engine as batched
from sharpkern.engines.batched import vmap
from sharpkern.engines.batched.engine import NUM_PARALLEL, BatchedEngine
from sharpkern.engines.session import KnownFacts
from sharpkern.engines.timing import EngineTimes
from sharpkern.engines.virtual import torch_calls as calls
from sharpkern.engines.virtual.engine import VirtualEngine
from sharpkern.measures import critical
from sharpkern.measures.critical import measure
from sharpkern.measures.result import Options
from sharpkern.measures.self_checks import confirm
from tests.helpers.cases import CASES
from tests.helpers.models import MLP
from tests.helpers.oracle import LossFn, deep_copy_losses, engine_losses, engine_on, random_direction

STEP_SIZES = [0.01 * k for k in range(NUM_PARALLEL)]
X = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(16) % 10


def squared(model: nn.Module) -> LossFn:
    return lambda: model(X).square().mean()


def scene(model: nn.Module | None = None) -> tuple[nn.Module, LossFn, sharpkern.Direction]:
    """A model, its loss, and the direction of its gradient."""
    model = model or MLP()
    loss_fn = squared(model)
    loss_fn().backward()
    return model, loss_fn, sharpkern.Direction.from_gradients(model)


def batched_tensors() -> int:
    """How many tensors of torch.func.vmap are alive."""
    gc.collect()
    return sum(
        issubclass(type(thing), Tensor) and torch._C._functorch.is_batchedtensor(thing) for thing in gc.get_objects()
    )


@pytest.mark.parametrize("name", ["gpt", "resnet", "encoder"])
def test_leaving_vmap_by_hand_gives_what_torch_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == name)
    model = case.build()
    loss_fn, direction = case.closure(model), random_direction(model)
    left: list[None] = []
    apply = vmap._OnSteps.apply
    monkeypatch.setattr(vmap._OnSteps, "apply", lambda *args: left.append(None) or apply(*args))
    by_hand = engine_losses("batched", model, loss_fn, direction, STEP_SIZES)
    assert not left
    monkeypatch.setattr(vmap, "_sole_vmap", lambda: None)
    assert engine_losses("batched", model, loss_fn, direction, STEP_SIZES) == by_hand
    assert left


# -- passes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("failures", "chunk_size", "num_calls"), [(1, 4, 3), (2, 2, 6), (3, 1, 11)])
def test_a_pass_that_runs_out_of_memory_is_made_in_parts(failures: int, chunk_size: int, num_calls: int) -> None:
    model, loss_fn, direction = scene()
    expected = deep_copy_losses(model, squared, direction, STEP_SIZES)
    made: list[None] = []

    def large() -> Tensor:
        made.append(None)
        if len(made) <= failures:
            raise torch.OutOfMemoryError("out of memory")
        return loss_fn()

    with engine_on("batched", model, large, direction) as (engine, closure):
        assert isinstance(engine, BatchedEngine)
        assert engine.losses(STEP_SIZES) == pytest.approx(expected, rel=1e-6)
        assert (engine.chunk_size, len(made), len(engine.seconds)) == (chunk_size, num_calls, 1)
        assert closure.calls == NUM_PARALLEL, "losses that it never got were counted"
        engine.losses(STEP_SIZES)
        assert len(made) == num_calls + NUM_PARALLEL // chunk_size, "it tried the large pass again"


def test_a_single_step_size_that_does_not_fit_is_an_error() -> None:
    model, _, direction = scene()
    error = torch.OutOfMemoryError("out of memory")
    made: list[None] = []

    def too_large() -> Tensor:
        made.append(None)
        raise error

    with pytest.raises(torch.OutOfMemoryError) as raised:
        engine_losses("batched", model, too_large, direction, STEP_SIZES)
    assert raised.value is error
    assert len(made) == 4


def test_only_full_passes_are_timed() -> None:
    model, loss_fn, direction = scene()
    with engine_on("batched", model, loss_fn, direction) as (engine, closure):
        assert isinstance(engine, BatchedEngine)
        for num_steps, num_times in ((1, 0), (NUM_PARALLEL, 1), (3, 1), (NUM_PARALLEL, 2)):
            engine.losses(STEP_SIZES[:num_steps])
            assert len(engine.seconds) == num_times
        assert closure.calls == 1 + 8 + 3 + 8
        assert engine.work == 16 * (32 + 32 + 10)


# -- fallbacks --------------------------------------------------------------------------------------------------------

LSTM = next(case for case in CASES if case.name == "lstm")


@pytest.fixture
def preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """In loops engine="auto" begins with the batched engine, as on a GPU where it is quicker."""
    monkeypatch.setattr(critical, "_may_batch", lambda *_: True)
    monkeypatch.setattr(EngineTimes, "engine", lambda self: "batched")


def measured(model: nn.Module, loss_fn: LossFn, direction: sharpkern.Direction) -> sharpkern.Measurement:
    return measure(model, loss_fn, direction, Options(), pace=EngineTimes())[0]


def test_what_vmap_cannot_do_is_said_by_the_engine_that_was_named() -> None:
    model = LSTM.build()
    with pytest.raises(
        sharpkern.EngineUnsupportedError, match=r"cannot be had from one call of loss_fn, as .* \(.*lstm"
    ):
        sharpkern.critical_sharpness(model, LSTM.closure(model), random_direction(model), engine="batched")


def test_the_next_engine_takes_over_with_one_warning(preferred: None) -> None:
    model = LSTM.build()
    loss_fn, direction = LSTM.closure(model), random_direction(model)
    with pytest.warns(sharpkern.EngineFallbackWarning, match=r"one step size at a time: .*lstm") as caught:
        first = measured(model, loss_fn, direction)
    assert len(caught) == 1
    # Another warning would be an error here.
    second = measured(model, loss_fn, direction)
    expected = sharpkern.critical_sharpness(model, loss_fn, direction, engine="virtual")
    assert first.engine == second.engine == "virtual"
    assert first.critical_lr == second.critical_lr == expected.critical_lr


def test_from_the_batched_engine_down_to_the_one_that_writes(preferred: None) -> None:
    model, _, direction = scene(nn.Linear(16, 4))
    alias = model.weight.detach()
    loss_fn = lambda: (X @ torch.from_numpy(alias.numpy()).T + model.bias).square().mean()
    with pytest.warns(sharpkern.EngineFallbackWarning, match="numpy reads parameters through a tensor") as caught:
        found = measured(model, loss_fn, direction)
    assert [str(warning.message).split(":")[0] for warning in caught] == [
        "measuring one step size at a time",
        "measuring in place, θ is written and restored",
    ]
    expected = sharpkern.critical_sharpness(model, loss_fn, direction, engine="inplace")
    assert (found.engine, found.critical_lr) == ("inplace", expected.critical_lr)


def test_out_of_memory_at_any_number_leads_to_the_virtual_engine(preferred: None) -> None:
    model, loss_fn, direction = scene()

    def large() -> Tensor:
        loss = loss_fn()
        if torch._C._functorch.is_batchedtensor(loss):
            raise torch.OutOfMemoryError("out of memory")
        return loss

    with pytest.warns(sharpkern.EngineFallbackWarning, match="one step size at a time: out of memory"):
        found = measured(model, large, direction)
    alone = sharpkern.critical_sharpness(*scene(copy.deepcopy(model)), engine="virtual")
    assert (found.engine, found.status) == ("virtual", "converged")
    # The evaluations that failed are none.
    assert (found.forwards, found.critical_lr) == (alone.forwards, alone.critical_lr)


def test_a_closure_that_differentiates_is_measured_one_step_size_at_a_time(preferred: None) -> None:
    """The error that vmap leads to is that of a user's mistake, for which the engine must not take it."""
    model, loss_fn, direction = scene()

    def penalised() -> Tensor:
        with torch.enable_grad():
            loss = loss_fn()
            slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            return loss + sum(slope.square().sum() for slope in slopes)

    with pytest.warns(sharpkern.EngineFallbackWarning, match="does not require grad"):
        found = measured(model, penalised, replace(direction, slope=None))
    assert (found.engine, found.status) == ("virtual", "converged")


def test_a_mistaken_closure_gets_the_error_of_a_single_step_size(preferred: None) -> None:
    model, loss_fn, direction = scene()

    def backward() -> Tensor:
        loss = loss_fn()
        loss.backward()
        return loss

    # Without a warning of the engines, which are not to blame.
    with pytest.raises(ValueError, match=r"take backward\(\) out of it"):
        measured(model, backward, direction)


# -- the check by other means -----------------------------------------------------------------------------------------

# Of the loss 1 − η + η², which crosses 1 at 1.
PROBES = ((0.5, 0.75), (0.9, 0.91), (10.0, 91.0))


class WrongNearby(VirtualEngine):
    """Its losses are right far out, and near the crossing off by a tenth of how far the loss falls."""

    def __init__(self) -> None:
        self.compared: list[float] = []

    def oracle_loss(self, eta: float) -> float:
        self.compared.append(eta)
        return 1 - eta + eta**2 + (0.025 if eta < 2 else 0.0)


def test_an_engine_is_compared_near_the_crossing() -> None:
    with pytest.raises(sharpkern.EngineUnsupportedError, match=r"at the step size 0\.5 the virtual engine's loss is"):
        confirm(WrongNearby(), KnownFacts(), 1.0, PROBES, 1e-6, reach=1.5)
    # Where the loss is large it is right, which tells nothing of the crossing.
    checks = KnownFacts()
    confirm(WrongNearby(), checks, 1.0, PROBES, 1e-6)
    assert checks.agrees == {"virtual"}, "the trap no longer springs"


def test_without_a_probe_near_the_crossing_that_stands_out_a_far_one_is_compared() -> None:
    engine, checks = WrongNearby(), KnownFacts()
    confirm(engine, checks, 1.0, [(1e-6, 1 - 1e-6), (10.0, 91.0)], 1e-6, reach=1.5)
    assert (engine.compared, checks.agrees) == ([10.0], {"virtual"})


@pytest.mark.parametrize("engine", ["virtual", "batched"])
def test_measurements_compare_near_the_crossing(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[float] = []
    oracle_loss = VirtualEngine.oracle_loss
    monkeypatch.setattr(
        VirtualEngine, "oracle_loss", lambda self, eta: (compared.append(eta), oracle_loss(self, eta))[1]
    )
    model, loss_fn, direction = scene()
    found = sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine, initial_lr=100.0)
    assert found.status == "converged"
    assert max(eta for eta, _ in found.probes) > 1.5 * found.critical_lr
    assert len(compared) == 1
    assert compared[0] <= 1.5 * found.critical_lr


# -- what outlives a pass ---------------------------------------------------------------------------------------------


class Caching(nn.Module):
    """Keeps activations as models do: as attributes, in lists, in dictionaries of dictionaries."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(8, 4)
        self.last: Tensor | None = None
        self.seen: list[Tensor] = []
        self.cache: dict[str, Any] = {"layers": {}}
        self.nested = nested

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.first(x)
        self.seen.append(self.last)
        if self.nested:
            self.cache["layers"]["first"] = self.last
        return self.second(self.last)


def test_what_modules_keep_is_put_back() -> None:
    model, loss_fn, direction = scene(Caching(nested=False))
    last, seen, before = model.last, list(model.seen), batched_tensors()
    found = sharpkern.critical_sharpness(model, loss_fn, direction, engine="batched")
    assert found.status == "converged"
    assert model.last is last
    assert all(a is b for a, b in zip(model.seen, seen, strict=True))
    assert batched_tensors() == before


def nonlocal_logits(model: nn.Module) -> LossFn:
    logits = None

    def loss_fn() -> Tensor:
        nonlocal logits
        logits = model(X)
        return logits.square().mean()

    return loss_fn


def appended(model: nn.Module) -> LossFn:
    kept: list[Tensor] = []
    return lambda: (kept.append(model(X).detach()), kept[-1].square().mean())[1]


def kept_out_of_reach(model: nn.Module) -> LossFn:
    """Attributes of Python modules are not looked into."""
    module = ModuleType("cache")

    def loss_fn() -> Tensor:
        module.logits = model(X)
        return module.logits.square().mean()

    return loss_fn


@pytest.mark.parametrize(
    ("build", "closure"),
    [(MLP, nonlocal_logits), (MLP, appended), (lambda: Caching(nested=True), squared)],
    ids=["nonlocal", "list", "nested"],
)
def test_a_closure_may_keep_its_tensors_where_they_are_put_back(
    build: Callable[[], nn.Module], closure: Callable[[nn.Module], LossFn]
) -> None:
    model, _, direction = scene(build())
    loss_fn, before = closure(model), batched_tensors()
    found = sharpkern.critical_sharpness(model, loss_fn, direction, engine="batched")
    assert (found.engine, found.status) == ("batched", "converged")
    assert batched_tensors() == before


def test_a_closure_that_keeps_its_tensors_elsewhere_is_measured_one_step_size_at_a_time(preferred: None) -> None:
    model, _, direction = scene()
    loss_fn = kept_out_of_reach(model)
    with pytest.raises(
        sharpkern.EngineUnsupportedError, match=r"loss_fn keeps tensors .* take \.detach\(\)\.clone\(\)"
    ):
        sharpkern.critical_sharpness(model, loss_fn, direction, engine="batched")
    with pytest.warns(sharpkern.EngineFallbackWarning, match="loss_fn keeps tensors"):
        found = measured(model, loss_fn, direction)
    assert (found.engine, found.status) == ("virtual", "converged")


def test_without_the_refusal_the_run_would_fail_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, direction = scene()
    kept = ModuleType("cache")

    def loss_fn() -> Tensor:
        kept.logits = model(X)
        return kept.logits.square().mean()

    monkeypatch.setattr(batched, "refuse_leaked_tensors", lambda _: nullcontext())
    engine_losses("batched", model, loss_fn, direction, STEP_SIZES)
    with pytest.raises(RuntimeError, match="escaped from inside a function being vmapped"):
        kept.logits.argmax(-1)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """What is made stays in the collector's first generation."""
    gc.disable()
    yield
    gc.enable()


def test_kept_tensors_of_others_are_no_reason_to_refuse(uncollected: None) -> None:
    model, loss_fn, direction = scene(Caching(nested=False))
    kept: list[Tensor] = []
    keep = lambda x: (kept.append(x), x)[1]
    torch.func.vmap(keep)(X)
    gc.collect(0)
    torch.func.vmap(keep)(X)
    for _ in range(2):
        engine_losses("batched", model, loss_fn, direction, STEP_SIZES)
    assert len(kept) == 2


def test_tensors_in_cycles_are_freed() -> None:
    model, loss_fn, direction = scene()

    class Node:
        pass

    def cyclic() -> Tensor:
        node = Node()
        node.self, node.logits = node, model(X)
        return node.logits.square().mean()

    losses = engine_losses("batched", model, cyclic, direction, STEP_SIZES)
    assert losses == engine_losses("batched", model, loss_fn, direction, STEP_SIZES)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool, uncollected: None) -> None:
    model, loss_fn, direction = scene()

    def collecting() -> Tensor:
        assert not gc.isenabled()
        return loss_fn()

    if enabled:
        gc.enable()
    engine_losses("batched", model, collecting, direction, STEP_SIZES)
    assert gc.isenabled() == enabled


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "dtype"),
    # One step size in one wide dtype on a CPU needs no operation.
    [("virtual", torch.bfloat16), *(("batched", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64))],
)
def test_step_sizes_reach_operations_as_wide_tensors(
    engine: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 25."""
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 10)).to(dtype)
    alphas: list[Any] = []
    form = ops.form

    def spy(W: Tensor, D: Tensor, alpha: Any, **options: Any) -> Tensor:
        alphas.append((type(alpha), alpha.dtype, alpha.device == W.device, alpha.dim()))
        return form(W, D, alpha, **options)

    monkeypatch.setattr(ops, "form", spy)
    loss_fn = lambda: model(X.to(dtype)).float().square().mean()
    engine_losses(engine, model, loss_fn, random_direction(model), STEP_SIZES)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert set(alphas) == {(Tensor, wide, True, 1)}


def cross_entropy(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, LABELS)


def negative_log_likelihood(logits: Tensor) -> Tensor:
    return F.nll_loss(logits.log_softmax(-1), LABELS)


def mean_square(logits: Tensor) -> Tensor:
    return F.mse_loss(logits, F.one_hot(LABELS, 10).to(logits.dtype))


def by_hand(logits: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(1, LABELS[:, None]).mean()


def by_hand_in_float32(logits: Tensor) -> Tensor:
    return by_hand(logits.float())


def under_autocast(loss: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], LossFn]:
    def closure(model: nn.Module) -> LossFn:
        def loss_fn() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(X)
            return loss(logits)

        return loss_fn

    return closure


def are_low(losses: list[float]) -> list[bool]:
    return [float(torch.tensor(loss).bfloat16()) == loss for loss in losses]


@pytest.mark.parametrize("loss", [cross_entropy, negative_log_likelihood, mean_square, by_hand_in_float32])
def test_no_loss_is_in_sixteen_bits_under_autocast(
    loss: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 16."""
    model = MLP()
    closure, direction = under_autocast(loss), random_direction(model)
    losses = engine_losses("batched", model, closure(model), direction, STEP_SIZES)
    assert losses == pytest.approx(engine_losses("virtual", model, closure(model), direction, STEP_SIZES), rel=2e-3)
    assert losses == pytest.approx(deep_copy_losses(model, closure, direction, STEP_SIZES), rel=1e-2)
    assert not any(are_low(losses))
    if loss is not by_hand_in_float32:
        monkeypatch.setattr(calls, "LOSSES", frozenset())
        coarse = engine_losses("batched", model, closure(model), direction, STEP_SIZES)
        assert all(are_low(coarse)), "the trap no longer springs"


def pseudo_labels(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, logits.argmax(-1))


def pseudo_targets(logits: Tensor) -> Tensor:
    return F.mse_loss(logits, logits.round())


@pytest.mark.parametrize("loss", [pseudo_labels, pseudo_targets])
def test_targets_may_be_computed_by_the_model(loss: Callable[[Tensor], Tensor]) -> None:
    """Their number, which tells the noise of a loss, must not be one of several step sizes."""
    model = MLP()
    direction = random_direction(model)
    loss_fn = under_autocast(loss)(model)
    several, single = (
        sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine) for engine in ("batched", "virtual")
    )
    assert several.base_loss == pytest.approx(single.base_loss, rel=1e-2)


def test_a_loss_made_by_hand_in_sixteen_bits_is_said_to_be_coarse() -> None:
    model = MLP()
    loss_fn = under_autocast(by_hand)(model)
    with pytest.warns(sharpkern.LossPrecisionWarning, match=r"logits\.float\(\)"):
        sharpkern.critical_sharpness(model, loss_fn, random_direction(model), engine="batched")


# -- torch's rules ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("sharpkern_tests::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


def test_functions_without_a_rule_are_right_and_nobody_hears_of_them(capfd: pytest.CaptureFixture[str]) -> None:
    """Some of torch's warnings go past Python's filters."""
    model = nn.utils.parametrizations.weight_norm(nn.Linear(16, 10))
    closure = lambda model: lambda: torch.ops.sharpkern_tests.cube(model(X)).square().mean()
    direction = random_direction(model)
    expected = deep_copy_losses(model, closure, direction, STEP_SIZES)
    assert engine_losses("batched", model, closure(model), direction, STEP_SIZES) == pytest.approx(expected, rel=1e-6)
    assert capfd.readouterr().err == ""
    with pytest.warns(UserWarning, match="performance drop"):
        torch.func.vmap(torch.histc)(torch.rand(3, 5))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def all_reduced(loss: Tensor) -> Tensor:
    loss = loss.clone()
    torch.distributed.all_reduce(loss)
    return loss


def functionally_all_reduced(loss: Tensor) -> Tensor:
    from torch.distributed import _functional_collectives

    return _functional_collectives.all_reduce(loss, "sum", torch.distributed.group.WORLD) * 1


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("collective", [all_reduced, functionally_all_reduced])
def test_collectives_of_several_step_sizes_are_refused(
    collective: Callable[[Tensor], Tensor], process_group: None
) -> None:
    model, loss_fn, direction = scene()
    reduced = lambda: collective(loss_fn())
    expected = engine_losses("inplace", model, loss_fn, direction, STEP_SIZES)
    assert engine_losses("virtual", model, reduced, direction, STEP_SIZES) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(sharpkern.EngineUnsupportedError, match=r"collective|c10d::allreduce_"):
        engine_losses("batched", model, reduced, direction, STEP_SIZES)
    assert engine_losses("batched", model, loss_fn, direction, STEP_SIZES) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("engine", ["virtual", "batched"])
def test_the_loss_is_reduced_for_each_step_size(engine: str) -> None:
    model, loss_fn, direction = scene()
    reduced: list[torch.Size] = []

    def reduce(loss: Tensor) -> Tensor:
        reduced.append(loss.shape)
        return 2 * loss

    found = sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine, reduce=reduce)
    plain = sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine)
    assert found.base_loss == 2 * plain.base_loss
    assert len(reduced) >= found.forwards
    assert set(reduced) == {torch.Size([])}
