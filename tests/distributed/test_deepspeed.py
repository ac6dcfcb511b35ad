"""DeepSpeed's ZeRO stages: every rank moves its shards, all give the whole batch's answer, and the run is the same."""

import shutil
from functools import partial
from typing import Any

import pytest
import torch
from torch import distributed

import sharpkern
from sharpkern.distributed.deepspeed import wrapped
from tests.helpers.processes import on_ranks
from tests.helpers.zero import (
    adamw,
    engine_of,
    given,
    gpt,
    groups,
    loss_of,
    mean_of,
    started,
    tensors_of,
    tokens,
    train,
)

pytest.importorskip("deepspeed", reason="needs deepspeed")
pytestmark = pytest.mark.long

MEASURED, FURTHER, RTOL = 3, 2, 1e-4
BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "initial_scale_power": 8}}
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
# Little is gathered at a time, and let go of soon.
SMALL_GROUPS = {
    "sub_group_size": 3000,
    "stage3_param_persistence_threshold": 50,
    "stage3_prefetch_bucket_size": 1000,
    "stage3_max_reuse_distance": 0,
}
SETUPS: dict[str, dict[str, Any]] = {
    "ZeRO-0": {"stage": 0},
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": {"stage": 3},
    "ZeRO-3, several groups": {"stage": 3, "zero": SMALL_GROUPS},
    "SGD": {"stage": 1, "optimizer": SGD},
    "no closed form": {"stage": 2, "optimizer": partial(torch.optim.NAdam, lr=1e-2)},
}
WITH = {"groups": {"groups": True}, "clip": {"gradient_clipping": 0.5}, "accumulated": {"accumulate": 2}}
SETUPS |= {f"ZeRO-{stage}, {name}": {"stage": stage, **more} for stage in range(4) for name, more in WITH.items()}
LOW: dict[str, dict[str, Any]] = {f"ZeRO-{stage}, bf16": {"stage": stage, **BF16} for stage in (1, 2, 3)}
# DeepSpeed takes a step of zero gradients there ahead of the first, which counts in Adam's corrections.
LOW["ZeRO-0, bf16"] = {"stage": 0, **BF16, "optimizer": partial(torch.optim.SGD, lr=0.1)}
LOW |= {f"ZeRO-{stage}, fp16": {"stage": stage, **FP16, "gradient_clipping": 0.5} for stage in (1, 2, 3)}
SUMMED = {"data_types": {"grad_accum_dtype": "fp32"}, "accumulate": 2, "gradient_clipping": 0.5}
LOW |= {f"ZeRO-{stage}, bf16, summed in fp32": {"stage": stage, **BF16, **SUMMED} for stage in (1, 2)}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
LOW |= {f"ZeRO-{stage}, autocast": {"stage": stage, **AUTOCAST} for stage in (0, 2, 3)}
# DeepSpeed's own optimizer, the default of its configurations, is compiled by the first run on a machine.
FUSED: dict[str, dict[str, Any]] = {
    name: {**setup, "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-4}}, "gradient_clipping": 0.5}
    for name, setup in {
        "stage 0, bf16": {"stage": 0, **BF16},
        "stage 1": {"stage": 1, "groups": True},
        "stage 3, bf16": {"stage": 3, **BF16, "zero": SMALL_GROUPS},
    }.items()
}
ALONE = ("ZeRO-1", "ZeRO-3", "ZeRO-2, clip", "ZeRO-3, accumulated")
DROPOUT = {f"ZeRO-{stage}, dropout": {"stage": stage, "dropout": 0.1, "accumulate": 2} for stage in (1, 3)}


def engine_for(setup: dict[str, Any]) -> Any:
    setup = dict(setup)
    model = gpt(setup.pop("dropout", 0.0))
    return engine_of(model, parameters=groups(model) if setup.pop("groups", False) else None, **setup)


def run(setup: dict[str, Any], *, measured: bool) -> tuple[list[sharpkern.Measurement], list[torch.Tensor]]:
    """What is measured in some steps, and everything after some more."""
    engine = engine_for(setup)
    torch.manual_seed(distributed.get_rank())
    monitor = sharpkern.Monitor(engine, engine.optimizer, rtol=RTOL) if measured else None
    accumulate = setup.get("accumulate", 1)
    train(engine, MEASURED, monitor and (lambda parts: monitor(partial(mean_of, parts))), accumulate)
    train(engine, FURTHER, None, accumulate, start=MEASURED)
    found = [one.measurement for one in monitor.history] if monitor else []
    return found, [torch.get_rng_state(), *tensors_of(engine)]


def job(rank: int, setup: dict[str, Any]) -> tuple[list[sharpkern.Measurement], bool]:
    """What is measured, and whether the run is the same without."""
    started()
    found, after = run(setup, measured=True)
    _, without = run(setup, measured=False)
    return found, len(after) == len(without) and all(map(torch.equal, after, without))


def alone(setup: dict[str, Any]) -> list[sharpkern.Measurement]:
    """The same in one process, by torch alone in float32."""
    model = gpt()
    optimizer = setup.get("optimizer", adamw)(groups(model) if setup.get("groups") else model.parameters())
    monitor = sharpkern.Monitor(model, optimizer, engine="inplace", rtol=RTOL)
    for step in range(MEASURED):
        optimizer.zero_grad()
        loss_fn = partial(loss_of, model, tokens(step))
        loss_fn().backward()
        if "gradient_clipping" in setup:
            torch.nn.utils.clip_grad_norm_(model.parameters(), setup["gradient_clipping"])
        monitor(loss_fn)
        optimizer.step()
    return [one.measurement for one in monitor.history]


# The very step


def very_step(rank: int, setup: dict[str, Any]) -> tuple[float, float]:
    """How far the masters end from where Δθ says, relative to how far they move; and the largest share of gradients."""
    started()
    engine = engine_for(setup)
    errors, shares = [], []

    def measure(parts: Any) -> None:
        direction = sharpkern.Direction.from_optimizer(engine.optimizer)
        shares.append(direction._clip)
        moves = {
            id(weight): direction.lr * delta
            for weight, delta in zip(direction.parameters, direction.tensors, strict=True)
        }
        now = [(piece, piece.master.detach().clone()) for piece in wrapped(engine.optimizer).pieces()]
        # In its place, to look at what it has done.
        step = engine.optimizer.step

        def stepping() -> None:
            engine.optimizer.step = step
            step()
            for piece, before in now:
                moved = before - piece.master.detach()
                errors.append(float((moved - moves[id(piece.weight)]).norm() / moves[id(piece.weight)].norm()))

        engine.optimizer.step = stepping

    train(engine, 4, measure, setup.get("accumulate", 1))
    assert len(errors) >= 4
    return max(errors), max(shares)


# The loss scale grows in every other step, between the backward pass and the division by it.
GROWING = {"fp16": FP16["fp16"] | {"loss_scale_window": 2}, "gradient_clipping": 0.5}
STEPS = {
    "ZeRO-0": {"stage": 0, **BF16, "gradient_clipping": 0.5},
    "ZeRO-1": {"stage": 1, **GROWING},
    "ZeRO-1, summed in fp32": {"stage": 1, **BF16, **SUMMED, "groups": True},
    "ZeRO-2": {"stage": 2, **GROWING, "accumulate": 2},
    "ZeRO-3": {"stage": 3, **GROWING, "zero": SMALL_GROUPS},
    "ZeRO-3, one memory": {"stage": 3, **AUTOCAST, "groups": True},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    jobs = {name: partial(job, setup=setup) for name, setup in {**SETUPS, **LOW, **DROPOUT}.items()}
    jobs |= {f"step, {name}": partial(very_step, setup=setup) for name, setup in STEPS.items()}
    return on_ranks(jobs, 2, tmp_path_factory.mktemp("ranks"), seconds=300)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    jobs = {name: partial(job, setup=SETUPS[name]) for name in ALONE}
    return on_ranks(jobs, 1, tmp_path_factory.mktemp("one"), seconds=300)


@pytest.mark.parametrize("name", [*SETUPS, *LOW])
def test_as_one_process_and_without_a_trace(ranks: list[dict[str, Any]], name: str) -> None:
    check(ranks, name)


@pytest.mark.parametrize("name", ALONE)
def test_one_rank_is_no_other_case(one_rank: list[dict[str, Any]], name: str) -> None:
    check(one_rank, name)


def check(ranks: list[dict[str, Any]], name: str) -> None:
    """The numbers of one process, the same on all ranks, and a run that is bit for bit the one without."""
    expected = alone({**SETUPS, **LOW}[name])
    first, same = given(ranks[0], name)
    for rank in ranks:
        found, same = given(rank, name)
        assert same
        assert [m.sharpness for m in found] == [m.sharpness for m in first]
    assert len(first) == MEASURED
    if {**SETUPS, **LOW}[name]["stage"] > 0:
        assert {m.engine for m in first} == {"inplace"}
    # Weights in 16 bits, or products of them, say as much as their rounding lets them.
    for m, other in zip(first, expected, strict=True):
        assert m.sharpness == pytest.approx(other.sharpness, rel=1e-5 if name in SETUPS else 0.01)
        assert m.base_loss == pytest.approx(other.base_loss, rel=1e-6 if name in SETUPS else 1e-3)
        assert m.retained == pytest.approx(1, abs=1e-3 if name in SETUPS else 0.02)


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_draws_what_it_would_have(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        found, same = given(rank, name)
        assert same
        assert len(found) == MEASURED


@pytest.mark.parametrize("name", STEPS)
def test_the_direction_is_the_very_step(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        error, share = given(rank, f"step, {name}")
        assert error < 3e-5
        assert share < 0.9 or "gradient_clipping" not in STEPS[name]


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    jobs = {name: partial(job, setup=setup) for name, setup in FUSED.items()}
    jobs |= {f"step, {name}": partial(very_step, setup=setup) for name, setup in FUSED.items()}
    return on_ranks(jobs, 2, tmp_path_factory.mktemp("fused"), seconds=400)


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_optimizer_is_foreseen_by_a_copy(fused: list[dict[str, Any]], name: str) -> None:
    for rank in fused:
        found, same = given(rank, name)
        assert same
        assert [m.status for m in found] == ["converged"] * MEASURED
        error, share = given(rank, f"step, {name}")
        assert error < 1e-5
        assert share < 0.9
