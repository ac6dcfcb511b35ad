"""Accelerate's and Transformers' monitors under DeepSpeed, which steps inside of the backward pass."""

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, distributed, nn
from torch.utils.data import SequentialSampler
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import sharpkern
from sharpkern.integrations.accelerate import SharpnessMonitor
from sharpkern.integrations.transformers import SharpnessCallback
from tests.helpers.processes import on_ranks
from tests.helpers.zero import ROWS, adamw, gpt, loss_of, mine, started, tensors_of, tokens

pytest.importorskip("deepspeed", reason="needs deepspeed")

pytestmark = pytest.mark.long
NUM_RANKS, STEPS, ACCUMULATE, CLIP = 2, 4, 2, 0.5
# Peaks that are far too large, so that a cap has something to do.
CAP = {"peak": 0.3}

Found = list[tuple[int, float | None, float, float]]


def prepare(rank: int) -> None:
    """As a launcher leaves a process, and without what a run before has left."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(distributed.get_world_size()))
    os.environ["OMP_NUM_THREADS"] = "1"
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.manual_seed(0)


def numbers(monitor: sharpkern.Monitor) -> Found:
    return [(one.step, one.lr, one.measurement.sharpness, one.measurement.base_loss) for one in monitor.history]


def state_of(model: nn.Module) -> list[Tensor]:
    return list(tensors_of(model)) if hasattr(model, "zero_optimization_stage") else list(model.parameters())


# Transformers


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def train(rank: int, stage: int | None, folder: Path, callbacks: list[SharpnessCallback], lr: float) -> InOrder:
    prepare(rank)
    adam = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "optimizer": adam | {"params": adam["params"] | {"torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=ROWS // distributed.get_world_size() // ACCUMULATE,
        gradient_accumulation_steps=ACCUMULATE,
        max_steps=STEPS,
        learning_rate=lr,
        adam_epsilon=1e-4,
        max_grad_norm=CLIP,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        deepspeed=None if stage is None else config,
    )
    sizes = {"vocab_size": 128, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **sizes))
    rows = [{"input_ids": row, "labels": row} for step in range(STEPS) for row in tokens(step)]
    trainer = InOrder(model, args, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return trainer


def by_trainer(
    rank: int, stage: int | None, folder: Path, lr: float = 3e-3, **options: Any
) -> tuple[Found, bool, list[float]]:
    """What is measured, whether the run is the same without, and the rates that a cap let through."""
    if stage is not None:
        started()
    callback = SharpnessCallback(rtol=1e-4, **options)
    runs = [train(rank, stage, folder, callbacks, lr) for callbacks in ([callback], [])]
    names = ("loss", "grad_norm", "learning_rate")
    logs = [[[one.get(name) for name in names] for one in run.state.log_history if "loss" in one] for run in runs]
    states = [state_of(run.model_wrapped) for run in runs]
    same = logs[0] == logs[1] and all(map(torch.equal, *states))
    return numbers(callback.monitor), same, [one.lr for one in callback.cap.history] if callback.cap else []


# Accelerate


class Loop:
    """A loop of Accelerate that calls the monitor where DeepSpeed's has to, or where all others do."""

    def __init__(self, rank: int, stage: int | None, accumulate: int = ACCUMULATE, rows: int = ROWS) -> None:
        prepare(rank)
        self.ahead = stage is not None
        kind: dict[str, Any] = {"cpu": True}
        if stage is not None:
            from accelerate.utils import DeepSpeedPlugin

            config = {
                "train_micro_batch_size_per_gpu": rows // NUM_RANKS // accumulate,
                "gradient_accumulation_steps": accumulate,
                "gradient_clipping": CLIP,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            }
            # Accelerate takes cpu=True for a run without DeepSpeed.
            kind = {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config)}
        self.accelerator = Accelerator(gradient_accumulation_steps=accumulate, **kind)
        model = gpt()
        optimizer = adamw(model.parameters())
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        # Without a GPU Accelerate takes each process of DeepSpeed's for a run of its own, and spreads no data.
        each = (tokens(step, rows) if stage is None else mine(tokens(step, rows)) for step in range(STEPS))
        self.batches = [batch for of_step in each for batch in of_step.chunk(accumulate)]

    def loss(self, rows: Tensor) -> Tensor:
        return loss_of(self.model, rows)

    def run(self, monitor: Callable[..., object] | None) -> None:
        for rows in self.batches:
            with self.accelerator.accumulate(self.model):
                if monitor and self.ahead:
                    monitor(self.loss, rows)
                self.accelerator.backward(self.loss(rows))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
                if monitor and not self.ahead:
                    monitor(self.loss, rows)
                self.optimizer.step()
                self.optimizer.zero_grad()


def by_accelerate(rank: int, stage: int | None, **options: Any) -> tuple[Found, bool, list[float]]:
    if stage is not None:
        started()
    loop, without = Loop(rank, stage), None
    monitor = SharpnessMonitor(loop.accelerator, loop.model, loop.optimizer, rtol=1e-4, **options)
    loop.run(monitor)
    state = state_of(loop.model)
    without = Loop(rank, stage)
    without.run(None)
    same = all(map(torch.equal, state, state_of(without.model)))
    return numbers(monitor), same, [one.lr for one in monitor.cap.history] if monitor.cap else []


def sampled(rank: int, stage: int) -> list[tuple[float, float, int | None]]:
    """How far η_c of a sample is from that of all micro-batches, its error, and the size of the sample."""
    started()
    found = []
    for sample in (None, 0.375):
        loop = Loop(rank, stage, accumulate=32, rows=64)
        monitor = SharpnessMonitor(loop.accelerator, loop.model, loop.optimizer, sample=sample)
        loop.run(monitor)
        found.append([one.measurement for one in monitor.history])
    pairs = zip(*found, strict=True)
    return [(abs(m.critical_lr / w.critical_lr - 1), m.error / w.critical_lr, m.sample_size) for w, m in pairs]


def in_the_wrong_order(rank: int) -> str:
    """What is said where the monitor is called when the step has been taken."""
    started()
    loop = Loop(rank, 1)
    loop.ahead = False
    monitor = SharpnessMonitor(loop.accelerator, loop.model, loop.optimizer)
    try:
        loop.run(monitor)
    except RuntimeError as error:
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    jobs: dict[str, Any] = {"order": in_the_wrong_order}
    for stage in range(4):
        jobs[f"Trainer, {stage}"] = partial(by_trainer, stage=stage, folder=folder)
        jobs[f"Accelerate, {stage}"] = partial(by_accelerate, stage=stage)
    jobs |= {f"sampled, {stage}": partial(sampled, stage=stage) for stage in (0, 2)}
    jobs["Trainer, capped"] = partial(by_trainer, stage=2, folder=folder, lr=CAP["peak"], cap=CAP)
    return on_ranks(jobs, NUM_RANKS, tmp_path_factory.mktemp("ranks"), seconds=300)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same in one process, by Accelerate and Transformers alone."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = {
        "Trainer": partial(by_trainer, stage=None, folder=folder),
        "Accelerate": partial(by_accelerate, stage=None),
        "Trainer, capped": partial(by_trainer, stage=None, folder=folder, lr=CAP["peak"], cap=CAP),
    }
    return on_ranks(jobs, 1, tmp_path_factory.mktemp("alone"))[0]


def assert_near(found: Found, expected: Found) -> None:
    assert [one[:2] for one in found] == [(step, pytest.approx(lr)) for step, lr, *_ in expected]
    assert [one[2] for one in found] == pytest.approx([one[2] for one in expected], rel=1e-5)
    assert [one[3] for one in found] == pytest.approx([one[3] for one in expected], rel=1e-6)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("framework", ["Trainer", "Accelerate"])
def test_as_one_process_and_without_a_trace(
    ranks: list[dict[str, Any]], alone: dict[str, Any], framework: str, stage: int
) -> None:
    assert not isinstance(alone[framework], str), alone[framework]
    expected, *_ = alone[framework]
    assert len(expected) == STEPS
    for rank in ranks:
        assert not isinstance(rank[f"{framework}, {stage}"], str), rank[f"{framework}, {stage}"]
        found, same, _ = rank[f"{framework}, {stage}"]
        assert same
        assert_near(found, expected)


def test_a_cap_holds_the_rate_inside_of_the_engines_step(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    expected, _, rates = alone["Trainer, capped"]
    found, same, capped = ranks[0]["Trainer, capped"]
    assert not same
    assert capped == pytest.approx(rates, rel=1e-3)
    assert min(capped) < CAP["peak"] / 2
    assert [one[2] for one in found] == pytest.approx([one[2] for one in expected], rel=1e-2)
    assert not any(math.isnan(one[3]) for one in found)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_sample_knows_how_the_step_clips(ranks: list[dict[str, Any]], stage: int) -> None:
    for rank in ranks:
        found = rank[f"sampled, {stage}"]
        assert len(found) == STEPS
        for difference, error, size in found:
            assert size is not None
            assert difference < max(error, 0.01)
        # Of 64 on both ranks.
        assert min(size for *_, size in found) < 32


def test_a_call_after_the_step_is_told_of(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "must be called ahead of accelerator.backward in every micro-batch under DeepSpeed" in rank["order"]
