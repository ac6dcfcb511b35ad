"""DeepSpeed's ZeRO stages: every rank moves its shards, all give the whole batch's answer, and the run is the same."""

from functools import partial
from typing import Any

import pytest
import torch

import sharpkern
from tests.helpers.processes import on_ranks
from tests.helpers.zero import (
    adamw,
    engine_of,
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

MEASURED, FURTHER, RTOL = 3, 2, 1e-4
BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "initial_scale_power": 8}}
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
SMALL_GROUPS = {"sub_group_size": 3000, "stage3_param_persistence_threshold": 50}
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
LOW = {f"ZeRO-{stage}, bf16": {"stage": stage, **BF16} for stage in (1, 2, 3)}
LOW |= {f"ZeRO-{stage}, fp16": {"stage": stage, **FP16, "gradient_clipping": 0.5} for stage in (1, 2, 3)}
LOW["ZeRO-2, bf16, summed in fp32"] = {"stage": 2, **BF16, "data_types": {"grad_accum_dtype": "fp32"}, "accumulate": 2}


def run(measured: bool, groups_: bool = False, **setup: Any) -> tuple[list[Any], list[torch.Tensor]]:
    """What is measured in some steps, and everything after some more."""
    model = gpt()
    engine = engine_of(model, parameters=groups(model) if groups_ else None, **setup)
    monitor = sharpkern.Monitor(engine, engine.optimizer, rtol=RTOL) if measured else None
    accumulate = setup.get("accumulate", 1)
    train(engine, MEASURED, monitor and (lambda parts: monitor(partial(mean_of, parts))), accumulate)
    train(engine, FURTHER, None, accumulate, start=MEASURED)
    found = [(one.measurement, one.lr) for one in monitor.history] if monitor else []
    return found, list(tensors_of(engine))


def job(rank: int, setup: dict[str, Any]) -> tuple[list[Any], bool]:
    started()
    setup = dict(setup)
    grouped = setup.pop("groups", False)
    found, after = run(True, groups_=grouped, **setup)
    _, without = run(False, groups_=grouped, **setup)
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


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    jobs = {name: partial(job, setup=setup) for name, setup in {**SETUPS, **LOW}.items()}
    return on_ranks(jobs, request.param, tmp_path_factory.mktemp("ranks"), seconds=300)


@pytest.mark.long
@pytest.mark.parametrize("name", [*SETUPS, *LOW])
def test_as_one_process_and_without_a_trace(ranks: list[dict[str, Any]], name: str) -> None:
    setup = SETUPS.get(name) or LOW[name]
    want = alone(setup)
    for rank in ranks:
        assert not isinstance(rank[name], str), rank[name]
        found, is_same = rank[name]
        assert is_same
        assert len(found) == len(want) == MEASURED
        for (measurement, _), other in zip(found, want, strict=True):
            assert measurement.engine == "inplace"
            near = 1e-5 if name in SETUPS else 0.1
            assert measurement.sharpness == pytest.approx(other.sharpness, rel=near)
            assert measurement.base_loss == pytest.approx(other.base_loss, rel=1e-6 if name in SETUPS else 0.01)
    first, *others = ([m.sharpness for m, _ in rank[name][0]] for rank in ranks)
    assert all(other == first for other in others)
