"""DeepSpeed's engines where something fails, where little is evaluated, where little memory is, and what is refused."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import sharpkern
from sharpkern.distributed.deepspeed import wrapped
from sharpkern.integrations.deepspeed import BeforeStep
from sharpkern.memory.counter import peak_bytes
from tests.helpers.processes import on_ranks
from tests.helpers.zero import (
    adamw,
    closures,
    engine_of,
    given,
    gpt,
    loss_of,
    mean_of,
    mine,
    started,
    tensors_of,
    tokens,
    train,
)

pytest.importorskip("deepspeed", reason="needs deepspeed")
pytestmark = pytest.mark.long

# Little is gathered at a time, and let go of soon.
SMALL_GROUPS = {
    "sub_group_size": 3000,
    "stage3_param_persistence_threshold": 50,
    "stage3_prefetch_bucket_size": 1000,
    "stage3_max_reuse_distance": 0,
}

# Failures


class Trips:
    """Raises in one evaluation of one kind, on rank 1, and counts in what no container holds: those are put back."""

    def __init__(self, where: str, number: int) -> None:
        self._where, self._number = where, number
        self._count = itertools.count(1)
        self.armed = False

    def __call__(self, where: str) -> None:
        if self.armed and where == self._where and next(self._count) == self._number and distributed.get_rank() == 1:
            raise ArithmeticError(f"tripped {where}")


def trained(stage: int, zero: dict[str, Any] | None, trips: Trips | None) -> tuple[list[str], list[Tensor]]:
    """A run whose first measurement fails on one rank, or that is not measured: how they end, and all that it holds."""
    engine = engine_of(gpt(), stage, zero=zero)
    monitor = sharpkern.Monitor(engine, engine.optimizer)
    said = []

    def measure(parts: Any) -> None:
        def loss_fn() -> Tensor:
            trips("before")
            loss = mean_of(parts)
            trips("after")
            return loss

        trips.armed = True
        try:
            said.append(monitor(loss_fn).status)
        except (ArithmeticError, sharpkern.RankError) as error:
            said.append(str(error))
        trips.armed = False

    if trips is not None:
        engine.module.blocks[1].mlp.register_forward_pre_hook(lambda *_: trips("inside"))
    train(engine, 3, measure if trips else None)
    train(engine, 2, None, start=3)
    return said, list(tensors_of(engine))


def failing(
    rank: int, stage: int, where: str, number: int, zero: dict[str, Any] | None = None
) -> tuple[list[str], bool]:
    """How measurements end, and whether the run is the same as without."""
    started()
    said, after = trained(stage, zero, Trips(where, number))
    _, without = trained(stage, zero, None)
    return said, all(map(torch.equal, after, without))


FAILURES = {
    f"{stage} {where} {number} {'' if zero is None else 'small'}": {
        "stage": stage,
        "where": where,
        "number": number,
        "zero": zero,
    }
    for stage, zero in ((1, None), (3, None), (3, SMALL_GROUPS))
    for where, number in (("before", 1), ("inside", 2), ("inside", 3), ("after", 3))
}

# What else there is


def overflow(rank: int) -> tuple[list[str], int, int]:
    """Why steps were skipped whose gradient is infinite, on one rank, and how many DeepSpeed and the monitor took."""
    started()
    engine = engine_of(gpt(), 2, fp16={"enabled": True, "initial_scale_power": 8})
    monitor = sharpkern.Monitor(engine, engine.optimizer)
    for step in range(3):
        parts = closures(engine, step, 1)
        loss = parts[0]()
        engine.backward(loss * (torch.inf if step == 1 and rank == 1 else 1))
        monitor(parts[0])
        engine.step()
    return [reason for _, reason in monitor.skipped], engine.skipped_steps, len(monitor.history)


def sampled(rank: int, stage: int) -> list[tuple[float, float, int | None]]:
    """η_c of all micro-batches and of a sample, whose clipping DeepSpeed does inside of its step."""
    started()
    engine = engine_of(gpt(), stage, accumulate=1, gradient_clipping=0.3)
    found = []
    for step in range(3):
        parts = [partial(loss_of, engine, row) for row in mine(tokens(step, rows=64)).split(2)]
        engine.backward(mean_of(parts))
        numbers = []
        for sample in (None, "auto"):
            monitor = sharpkern.Monitor(engine, engine.optimizer, sample=sample)
            monitor.step = step
            m = monitor(parts)
            numbers.append((m.critical_lr, m.error, m.sample_size))
        engine.step()
        (whole, *_), (critical_lr, error, size) = numbers
        found.append((abs(critical_lr / whole - 1), error / whole, size))
    return found


def others(rank: int, stage: int) -> dict[str, float]:
    """Other quantities along the step, here and in one process on all rows."""
    started()
    engine, whole = engine_of(gpt(), stage), gpt()
    optimizer = adamw(whole.parameters())
    found = {}
    for model, inner, rows in ((engine, engine.optimizer, mine(tokens(0))), (whole, optimizer, tokens(0))):
        loss_fn = partial(loss_of, model, rows)
        engine.backward(loss_fn()) if model is engine else loss_fn().backward()
        alone = {} if model is engine else {"ranks": "alone"}
        direction = sharpkern.Direction.from_optimizer(inner)
        tasks = {"twice": lambda loss_fn=loss_fn: 2 * loss_fn()}
        if model is engine and stage == 0:
            # Whole parameters may be measured without the engine around them.
            model = engine.module
        found[inner is engine.optimizer] = {
            "λ_c": sharpkern.critical_sharpness(model, loss_fn, direction, rtol=1e-4, **alone).sharpness,
            "relative": sharpkern.relative_critical_sharpness(model, tasks, direction, **alone)["twice"].sharpness,
            "along": float(sharpkern.losses_along(model, loss_fn, direction, [0.1], **alone)[0]),
        }
    return {name: found[True][name] / found[False][name] - 1 for name in found[True]}


def memory(rank: int) -> dict[int, tuple[int, int, int]]:
    """By stage: peak bytes of a measurement beyond those of a pass, of this rank's pieces in fp32, and of the model."""
    started()
    found = {}
    for stage in (1, 3):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))
        engine = engine_of(model, stage, zero={"stage3_param_persistence_threshold": 0})
        x = torch.randn(2, 256)
        loss_fn = lambda engine=engine, x=x: engine(x).square().mean()
        size = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()) * 4

        def plain(loss_fn: Any = loss_fn) -> None:
            with torch.no_grad():
                loss_fn()

        def measure(loss_fn: Any = loss_fn, engine: Any = engine) -> None:
            direction = sharpkern.Direction.from_optimizer(engine.optimizer)
            assert sharpkern.critical_sharpness(engine, loss_fn, direction).status == "converged"

        for _ in range(2):
            engine.backward(loss_fn())
            engine.step()
        engine.backward(loss_fn())
        own = sum(piece.weight.numel() for piece in wrapped(engine.optimizer).pieces()) * 4
        found[stage] = peak_bytes(measure) - peak_bytes(plain), own, size
    return found


def told(job: Any) -> str:
    try:
        job()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def misused(rank: int) -> dict[str, str]:
    """What is said of calls that would give another number."""
    started()
    engine, other = engine_of(gpt(), 1, accumulate=2), engine_of(gpt(), 1)
    parts = closures(engine, 0, 2)
    loss_fn = partial(mean_of, parts)
    monitor = sharpkern.Monitor(engine, engine.optimizer)
    engine.backward(parts[0]())
    said = {"between boundaries": told(lambda: monitor(loss_fn))}
    engine.step()
    engine.backward(parts[1]())
    direction = sharpkern.Direction.from_optimizer(engine.optimizer)
    said["the module inside"] = told(lambda: sharpkern.critical_sharpness(engine.module, loss_fn, direction))
    said["another engine"] = told(lambda: sharpkern.critical_sharpness(other, loss_fn, direction))
    said["a part"] = told(lambda: direction.only(engine.module.head))
    said["a list"] = told(
        lambda: sharpkern.Direction.from_optimizer([engine.optimizer, adamw([nn.Parameter(torch.ones(1))])])
    )
    said["it goes on"] = monitor(loss_fn).status
    sharded = engine_of(gpt(), 3, accumulate=2)
    train(sharded, 1, None, accumulate=2)
    sharded.backward(closures(sharded, 1, 2)[0]())
    said["between boundaries of stage 3"] = told(lambda: sharpkern.Direction.from_optimizer(sharded.optimizer))
    # Small enough to stay gathered.
    of_norm = sharpkern.Direction.from_tensors({"module.norm.weight": torch.ones(20)}, sharded)
    said["parameters that are nowhere whole"] = told(
        lambda: sharpkern.critical_sharpness(sharded, partial(loss_of, sharded, mine(tokens(0))), of_norm)
    )
    return said


def refused(rank: int) -> dict[str, str]:
    """What is said of engines whose weights or steps lie elsewhere."""
    started()
    from deepspeed.moe.layer import MoE
    from deepspeed.pipe import PipelineModule

    cpu = {"device": "cpu"}
    experts = nn.Sequential(nn.Linear(8, 8), MoE(8, nn.Linear(8, 8), num_experts=2))
    pipeline = PipelineModule([nn.Linear(8, 8), nn.Linear(8, 8)], num_stages=1, loss_fn=nn.MSELoss())
    muon = {"type": "Muon", "params": {"lr": 1e-2, "torch_adam": True}}
    matrices = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    for parameter in matrices.parameters():
        parameter.use_muon = True
    makes: dict[str, Callable[[], Any]] = {
        "offloaded optimizer states": lambda: engine_of(gpt(), 2, zero={"offload_optimizer": cpu}),
        "offloaded parameters": lambda: engine_of(gpt(), 3, zero={"offload_param": cpu}),
        "quantised gradients": lambda: engine_of(gpt(), 3, zero={"zero_quantized_gradients": True}),
        "DeepSpeed's MuonWithAuxAdam": lambda: engine_of(matrices, 1, optimizer=muon),
        "float16 at stage 0": lambda: engine_of(gpt(), 0, fp16={"enabled": True}),
        "managed_gradient_accumulation=false": lambda: engine_of(gpt(), 1, managed_gradient_accumulation=False),
        "MoE layers": lambda: engine_of(experts, 0),
        "PipelineEngine": lambda: engine_of(pipeline, 0),
    }
    said = {}
    for name, make in makes.items():
        engine = make()
        monitor = lambda engine=engine: sharpkern.Monitor(engine, engine.optimizer)(lambda: torch.zeros(()))
        hooked = lambda engine=engine: BeforeStep(engine, lambda: None)
        said[name] = [told(monitor), told(hooked)]
    return said


OTHERS: dict[str, Any] = {
    "overflow": overflow,
    "memory": memory,
    "misused": misused,
    "refused": refused,
    **{f"sampled, {stage}": partial(sampled, stage=stage) for stage in (0, 1, 3)},
    **{f"others, {stage}": partial(others, stage=stage) for stage in (0, 1, 3)},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    jobs: dict[str, Any] = {name: partial(failing, **options) for name, options in FAILURES.items()}
    return on_ranks(jobs | OTHERS, 2, tmp_path_factory.mktemp("ranks"), seconds=300)


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_on_one_rank_ends_the_measurement_on_all(ranks: list[dict[str, Any]], name: str) -> None:
    (here, same_here), (there, same_there) = (given(rank, name) for rank in ranks)
    assert same_here
    assert same_there
    assert here == [
        "the measurement failed on 1 of 2 ranks, not on this one; read there what happened",
        "converged",
        "converged",
    ]
    assert there == [f"tripped {FAILURES[name]['where']}", "converged", "converged"]


def test_a_step_that_the_loss_scale_skips_is_none(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        (reason,), skipped, measured = given(rank, "overflow")
        assert reason.startswith("the gradient must be finite, got nan or inf on some rank")
        assert (skipped, measured) == (1, 2)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_sample_knows_how_the_step_clips(ranks: list[dict[str, Any]], stage: int) -> None:
    for rank in ranks:
        for difference, error, size in given(rank, f"sampled, {stage}"):
            # Of 64 micro-batches on both ranks.
            assert size is not None
            assert size <= 32
            assert difference < max(error, 0.01)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_other_quantities_along_the_step(ranks: list[dict[str, Any]], stage: int) -> None:
    for rank in ranks:
        assert given(rank, f"others, {stage}") == pytest.approx({"λ_c": 0, "relative": 0, "along": 0}, abs=1e-5)


def test_memory_is_of_the_shards(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for added, own, size in given(rank, "memory").values():
            assert own == size / 2
            # Gradient, Δθ and what two moments take while it is worked out; no whole parameter beyond a pass's own.
            assert added < 4.5 * own


def test_what_would_give_another_number_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        said = given(rank, "misused")
        assert said.pop("it goes on") == "converged"
        for name in ("between boundaries", "between boundaries of stage 3"):
            assert "where engine.is_gradient_accumulation_boundary()" in said.pop(name)
        for name in ("the module inside", "another engine"):
            assert said.pop(name).startswith("TypeError: model must be the DeepSpeed engine whose optimizer")
        assert said.pop("a part").startswith("TypeError: a part of a direction must be of a model's parameters")
        assert said.pop("a list").startswith("TypeError: optimizer must be that of a DeepSpeed engine alone")
        nowhere = said.pop("parameters that are nowhere whole")
        assert nowhere.startswith("TypeError: direction must be of the engine's optimizer where ZeRO-3 holds no")
        assert not said


def test_what_lies_elsewhere_is_refused_by_name(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name, each in given(rank, "refused").items():
            for said in each:
                assert said.startswith("TypeError: ")
                assert f"got one with {name}; leave that out" in said
