"""SharpnessCallback in Hugging Face's Trainer: the loss that is trained, the run untouched, resumed, on two ranks."""

import argparse
import gc
import inspect
import json
import math
import os
import pickle
import random
import runpy
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import sharpkern
from sharpkern.integrations.transformers import SharpnessCallback
from tests.helpers.processes import on_ranks

NUM_TOKENS = 16
NUM_RANKS = 2
# Text of the standard library, as bytes.
TEXT = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> Iterator[None]:
    """Every Trainer begins by collecting garbage, and would look through all that transformers has imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _settings_forgotten() -> Iterator[None]:
    """The Trainer leaves its settings behind, for all of the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def rows(num: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in TEXT[: num * NUM_TOKENS].view(num, NUM_TOKENS)]


def gpt2(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_positions": NUM_TOKENS, "n_embd": 16, "n_layer": 1, "n_head": 2}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(**sizes, **drops, bos_token_id=None, eos_token_id=None))


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": NUM_TOKENS}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).double()


def arguments(folder: Path, kind: type[TrainingArguments] = TrainingArguments, **settings: Any) -> TrainingArguments:
    usual = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
    }
    return kind(str(folder), **(usual | settings))


def train(folder: Path, *callbacks: Any, model: nn.Module | None = None, kind: Any = Trainer, **settings: Any) -> Any:
    """Train a small model on text."""
    trainer = kind(
        gpt2() if model is None else model,
        arguments(folder, **settings),
        train_dataset=rows(40),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def reported(trainer: Trainer) -> list[float]:
    """The Trainer's own loss of each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def measured(callback: SharpnessCallback) -> dict[int, sharpkern.Measurement]:
    return {record.step: record.measurement for record in callback.monitor.history}


class Trace(TrainerCallback):
    """Everything that a run is made of, after each of its steps."""

    def __init__(self) -> None:
        self.steps: list[list[Any]] = []

    def on_step_end(self, args, state, control, model, optimizer, lr_scheduler, **kwargs) -> None:
        streams = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        counts = {name: value for name, value in vars(state).items() if isinstance(value, (int, float))}
        run = model.state_dict(), optimizer.state_dict(), lr_scheduler.state_dict(), streams, counts, vars(control)
        leaves = tree_leaves(run)
        self.steps.append([leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves])


def own(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The Trainer's own entries of the log, but for what depends on the clock."""
    return [
        {name: value for name, value in entry.items() if not name.endswith(("_runtime", "_per_second"))}
        for entry in entries
        if not any(name.startswith("sharpness/") for name in entry)
    ]


def assert_same(a: Any, b: Any, where: str = "run") -> None:
    """Bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for name in a:
            assert_same(a[name], b[name], f"{where}, {name}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{where}, {index}")
    else:
        assert a == b, where


class Batches(Trainer):
    """Notes the batches that it is given, and has a training step of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[torch.Tensor] = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.append(inputs["input_ids"].clone())
        return super().training_step(model, inputs, num_items_in_batch)


def run(folder: Path, *callbacks: Any, **settings: Any) -> dict[str, Any]:
    trace = Trace()
    trainer = train(folder, trace, *callbacks, kind=Batches, **settings)
    return {"steps": trace.steps, "batches": trainer.seen, "log": own(trainer.state.log_history)}


WARM_UP = {"lr_scheduler_type": "cosine", "warmup_steps": 5, "max_steps": 50}
# 20 batches in an epoch: the last of seven steps has two.
ACCUMULATED = {"gradient_accumulation_steps": 3, "logging_steps": 4, "include_num_input_tokens_seen": "all"}
RUNS = {
    "dropout, clipped": {**WARM_UP, "max_grad_norm": 0.5},
    "accumulated, checkpointed": {**WARM_UP, **ACCUMULATED, "max_grad_norm": 0.0, "activation_checkpointing": True},
    "bfloat16, smoothed labels": {"bf16": True, "label_smoothing_factor": 0.1, "max_steps": 15},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_run_is_bit_for_bit_what_it_would_have_been(tmp_path: Path, name: str) -> None:
    settings = RUNS[name]
    callback = SharpnessCallback(every=7)
    with_it, without = run(tmp_path, callback, **settings), run(tmp_path, **settings)
    assert len(with_it["steps"]) == settings["max_steps"]
    assert_same(with_it, without)
    # At learning rate 0 nothing moves.
    assert [step for step, _ in callback.monitor.skipped] == ([0] if "warmup_steps" in settings else [])
    assert len(measured(callback)) + len(callback.monitor.skipped) == -(-settings["max_steps"] // 7)
    assert all(measurement.status == "converged" for measurement in measured(callback).values())
    if settings.get("logging_steps", 1) == 1:
        losses = [entry["loss"] for entry in with_it["log"] if "loss" in entry]
        assert all(measurement.base_loss == losses[step] for step, measurement in measured(callback).items())


CASES = {
    # The epoch of 20 batches ends in a step of two.
    "an incomplete accumulation": {"gradient_accumulation_steps": 3, "max_steps": 8},
    "smoothed labels, accumulated": {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2},
    "bfloat16, accumulated": {"bf16": True, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0},
}


@pytest.mark.parametrize("name", CASES)
def test_the_base_loss_is_the_one_that_the_trainer_reports(tmp_path: Path, name: str) -> None:
    callback = SharpnessCallback()
    trainer = train(tmp_path, callback, **CASES[name])
    losses = [measurement.base_loss for measurement in measured(callback).values()]
    assert losses == reported(trainer)
    assert all(measurement.status == "converged" for measurement in measured(callback).values())


def test_the_loss_that_was_trained_saves_an_evaluation_with_its_dropout_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 7, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    given, evaluated = SharpnessCallback(), SharpnessCallback()
    train(tmp_path, given, **settings)
    call = sharpkern.Monitor.__call__
    monkeypatch.setattr(sharpkern.Monitor, "__call__", lambda self, loss_fn, loss: call(self, loss_fn))
    train(tmp_path, evaluated, **settings)
    pairs = list(zip(measured(given).values(), measured(evaluated).values(), strict=True))
    # The first three are compared, the 1st, 2nd and 4th check that the closure is repeatable.
    assert [other.forwards - one.forwards for one, other in pairs] == [1, 1, 0, 2, 1, 1, 1]
    assert all(one.base_loss == other.base_loss for one, other in pairs)


def plain_loop(batches: list[torch.Tensor], accumulation: int, num_steps: int) -> sharpkern.Monitor:
    """What the Trainer does, written out."""
    model = llama()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-2
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / 2 if step < 2 else (num_steps - step) / (num_steps - 2)
    )
    monitor = sharpkern.Monitor(model, optimizer)
    for step in range(num_steps):
        several = batches[step * accumulation : (step + 1) * accumulation]

        def loss_fn(several: list[torch.Tensor] = several) -> torch.Tensor:
            num_items = sum(ids[:, 1:].numel() for ids in several)
            # These models compute their loss in float32.
            logits = [model(input_ids=ids).logits[:, :-1].float() for ids in several]
            pairs = zip(logits, several, strict=True)
            return sum(F.cross_entropy(x.mT, ids[:, 1:], reduction="sum") / num_items for x, ids in pairs)

        optimizer.zero_grad()
        loss_fn().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        monitor(loss_fn)
        optimizer.step()
        schedule.step()
    return monitor


@pytest.mark.parametrize("accumulation", [1, 3])
def test_values_are_those_of_a_plain_loop(tmp_path: Path, accumulation: int) -> None:
    callback = SharpnessCallback()
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5, "warmup_steps": 2, "max_steps": 6}
    trainer = train(
        tmp_path, callback, model=llama(), kind=Batches, gradient_accumulation_steps=accumulation, **settings
    )
    plain = plain_loop(trainer.seen, accumulation, 6)
    assert [record.step for record in callback.monitor.history] == [1, 2, 3, 4, 5]
    for record, expected in zip(callback.monitor.history, plain.history, strict=True):
        assert record.step == expected.step
        assert record.lr == pytest.approx(expected.lr, rel=1e-12)
        assert record.measurement.critical_lr == pytest.approx(expected.measurement.critical_lr, rel=1e-6)
    # At learning rate 0 nothing moves.
    assert [step for step, _ in callback.monitor.skipped] == [step for step, _ in plain.skipped] == [0]


class Listener(TrainerCallback):
    """What trackers are told."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, dict[str, float]]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        # Asks for an entry after the step, whatever the settings.
        control.should_log = state.global_step == 2

    def on_log(self, args, state, control, logs, **kwargs):
        self.entries.append((state.global_step, dict(logs)))


def test_values_go_where_the_trainer_logs_to(tmp_path: Path) -> None:
    listener, callback = Listener(), SharpnessCallback(every=2)
    trainer = train(tmp_path, listener, callback, logging_steps=100)
    told = {step: logs for step, logs in listener.entries if "sharpness/lambda_c" in logs}
    assert list(told) == [0, 2]
    for step, logs in told.items():
        measurement = measured(callback)[step]
        assert logs["sharpness/lambda_c"] == measurement.sharpness
        assert logs["sharpness/critical_lr"] == measurement.critical_lr
        assert logs["sharpness/headroom"] == callback.monitor.history[step // 2].row()["headroom"]
        assert logs["sharpness/forwards"] == measurement.forwards
    kept = [entry for entry in trainer.state.log_history if "sharpness/lambda_c" in entry]
    assert kept == [logs | {"step": step} for step, logs in told.items()]
    # What another callback has asked for is not taken for done.
    assert [step for step, logs in listener.entries if "loss" in logs] == [3]


class Halved(Trainer):
    """A step and a loss of one's own, which take what they need out of the inputs, and log."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.factor = inputs.pop("factor").mean()
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 1:]
        logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
        loss = self.factor * F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        self.log({"half": loss.item()})
        return loss


def test_a_step_and_a_loss_of_ones_own_are_measured_and_log_once(tmp_path: Path) -> None:
    listener, callback = Listener(), SharpnessCallback()
    model = gpt2()
    # As of a model that takes no number of items.
    model.accepts_loss_kwargs = False
    trainer = Halved(
        model,
        arguments(tmp_path, gradient_accumulation_steps=2, remove_unused_columns=False),
        train_dataset=[row | {"factor": torch.tensor(0.5)} for row in rows(40)],
        callbacks=[listener, callback],
    )
    trainer.train()
    losses = [measurement.base_loss for measurement in measured(callback).values()]
    assert losses == reported(trainer)
    assert 2 < losses[0] < 3
    assert len([logs for _, logs in listener.entries if "half" in logs]) == 8


def test_the_alarm_is_the_monitors(tmp_path: Path) -> None:
    with pytest.warns(sharpkern.HeadroomWarning, match=r"step 4: .* below 1e\+06; try"):
        train(tmp_path, SharpnessCallback(warn_below=1e6), max_steps=5)


class Collecting(Trainer):
    """Gathers metrics in attributes while it computes losses, and adds them to the entries of its log."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metrics = {"train": defaultdict(list)}
        self.total = torch.zeros(())
        self.num_losses = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.metrics["train"]["perplexity"].append(loss.detach().exp().item())
        self.total += loss.detach()
        self.num_losses += 1
        self.state.num_input_tokens_seen += inputs["input_ids"].numel()
        self.last_loss = loss.detach()
        return loss

    def log(self, logs, start_time=None):
        metrics = self.metrics["train"]
        logs = logs | {name: sum(values) / len(values) for name, values in metrics.items() if values}
        super().log(logs, start_time)
        metrics.clear()


def test_a_trainers_own_metrics_are_of_the_training_alone(tmp_path: Path) -> None:
    callback = SharpnessCallback()
    settings = {"kind": Collecting, "max_steps": 6, "logging_steps": 3, "gradient_accumulation_steps": 2}
    with_it, without = train(tmp_path, callback, **settings), train(tmp_path, **settings)
    assert len(measured(callback)) == 6
    assert with_it.num_losses == 12
    assert_same(own(with_it.state.log_history), own(without.state.log_history))
    for name in ("num_losses", "metrics", "total", "last_loss", "current_flos"):
        assert_same(vars(with_it)[name], vars(without)[name], name)
    for name in ("num_input_tokens_seen", "total_flos", "global_step", "epoch"):
        assert vars(with_it.state)[name] == vars(without.state)[name], name
    entries = [entry for entry in with_it.state.log_history if "sharpness/lambda_c" in entry]
    assert not any("perplexity" in entry for entry in entries)


class Breaks(TrainerCallback):
    """Ends the training, or fails, between two micro-batches."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_substep_end(self, args, state, control, **kwargs):
        if self.how == "stops":
            control.should_training_stop = True
        elif self.how == "fails":
            raise KeyboardInterrupt


class Fails(Batches):
    def training_step(self, *args):
        super().training_step(*args)
        raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["stops", "fails", "fails in the step"])
def test_nothing_is_left_of_a_step_that_is_broken_off(tmp_path: Path, how: str) -> None:
    callback, breaks = SharpnessCallback(), Breaks(how)
    trainer = (Fails if how == "fails in the step" else Batches)(
        gpt2(),
        arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=rows(40),
        callbacks=[callback, breaks],
    )
    if how == "stops":
        trainer.train()
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    if how == "fails":
        # Between two events nobody can tell: the next call goes through, is not measured, and puts it back.
        inputs = {name: value[None] for name, value in rows(1)[0].items()}
        assert trainer.training_step(trainer.model, inputs, 15).item() > 0
    assert "training_step" not in vars(trainer)
    assert callback.monitor.history == []
    assert len(trainer.seen) == (2 if how == "fails" else 1)


def test_a_measurement_that_fails_leaves_the_trainer_as_it_was(tmp_path: Path) -> None:
    calls = []

    class Interrupted(Batches):
        def compute_loss(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    trainer = Interrupted(gpt2(), arguments(tmp_path), train_dataset=rows(40), callbacks=[SharpnessCallback()])
    before = set(vars(trainer))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not {"training_step", "log"} & set(vars(trainer)) - before
    assert "backward" not in vars(trainer.accelerator)
    assert len(trainer.seen) == 1
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())


def test_a_training_step_that_was_put_on_the_trainer_stays_there(tmp_path: Path) -> None:
    callback = SharpnessCallback()
    trainer = Trainer(gpt2(), arguments(tmp_path), train_dataset=rows(40), callbacks=[callback])
    stock, calls = trainer.training_step, []

    def doubled(model, inputs, num_items_in_batch=None):
        calls.append(len(calls))
        return 2 * stock(model, inputs, num_items_in_batch)

    trainer.training_step = doubled
    trainer.train()
    assert trainer.training_step is doubled
    losses = [measurement.base_loss for measurement in measured(callback).values()]
    assert losses == reported(trainer)
    assert 10 < losses[0] < 12


def test_a_resumed_run_measures_as_one_that_was_never_left(tmp_path: Path) -> None:
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "warmup_steps": 1}
    straight = SharpnessCallback()
    train(tmp_path, straight, **settings)
    checkpoint = tmp_path / "checkpoint-4"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["SharpnessCallback"]
    assert saved["args"] == {"every": 1, "warn_below": None}
    expected = {step: m for step, m in measured(straight).items() if step >= 4}
    for restored in (False, True):
        callback = SharpnessCallback()
        trainer = Trainer(
            gpt2(),
            arguments(tmp_path, restore_callback_states_from_checkpoint=restored, **settings),
            train_dataset=rows(40),
            callbacks=[callback],
        )
        trainer.train(resume_from_checkpoint=str(checkpoint))
        if restored:
            # The Trainer has made a new one.
            with pytest.raises(AttributeError, match=r"is in trainer\.callback_handler\.callbacks"):
                _ = callback.monitor
            callback = trainer.pop_callback(SharpnessCallback)
        found = measured(callback)
        assert list(found) == [4, 5, 6, 7]
        for step, measurement in found.items():
            assert measurement.critical_lr == expected[step].critical_lr
            assert measurement.probes == expected[step].probes


def test_a_cold_start_would_have_been_seen(tmp_path: Path) -> None:
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    straight = SharpnessCallback()
    train(tmp_path, straight, **settings)
    # A checkpoint of a run that did not measure: a cold start, and its next checkpoint can be written.
    file = tmp_path / "checkpoint-4" / "trainer_state.json"
    state = json.loads(file.read_text())
    del state["stateful_callbacks"]["SharpnessCallback"]
    file.write_text(json.dumps(state))
    callback = SharpnessCallback(every=lambda step: step in {4, 6})
    trainer = Trainer(gpt2(), arguments(tmp_path, **settings), train_dataset=rows(40), callbacks=[callback])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert list(measured(callback)) == [4, 6]
    assert measured(callback)[4].probes != measured(straight)[4].probes
    # Its function cannot be made anew from what a checkpoint holds.
    stored = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    with pytest.raises(TypeError, match=r"every must be given anew, .* leave restore_callback_states_from_checkpoint"):
        SharpnessCallback(**stored["stateful_callbacks"]["SharpnessCallback"]["args"])


def test_the_cap_holds_the_rate_and_is_taken_up(tmp_path: Path) -> None:
    # Far beyond what this model bears.
    options = {"cap": {"peak": 3.0, "warm_steps": 3}}
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "learning_rate": 3.0, "optim": "sgd"}
    plain = train(tmp_path / "plain", SharpnessCallback(), **settings)
    straight = SharpnessCallback(**options)
    capped = train(tmp_path, straight, **settings)
    history = straight.cap.history
    assert straight.cap.num_steps == len(history) == 8
    for one, (step, measurement) in zip(history[:3], measured(straight).items(), strict=False):
        recent = [m.critical_lr for m in list(measured(straight).values())[: step + 1]]
        assert one.lr == min(one.scheduled, statistics.median(recent) / 4)
        assert measurement.critical_lr == recent[-1]
    assert all(one.lr < one.scheduled for one in history[1:])
    # The scheduled rates are what they were, and the run is not.
    rates = [[entry["learning_rate"] for entry in run.state.log_history if "loss" in entry] for run in (plain, capped)]
    assert rates[0] == rates[1]
    assert reported(plain)[2:] != reported(capped)[2:]
    told = [entry["sharpness/capped_lr"] for entry in capped.state.log_history if "sharpness/capped_lr" in entry]
    assert told == [one.lr for one in history]
    for restored in (False, True):
        callback = SharpnessCallback(**options)
        again = {"restore_callback_states_from_checkpoint": restored, **settings}
        trainer = Trainer(gpt2(), arguments(tmp_path, **again), train_dataset=rows(40), callbacks=[callback])
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        if restored:
            callback = trainer.pop_callback(SharpnessCallback)
        assert callback.cap.history == history[4:]
        assert all(map(torch.equal, trainer.model.parameters(), capped.model.parameters()))
    # A second training with the same callback has a cap of its own.
    trainer.add_callback(callback)
    trainer.train()
    assert callback.cap.num_steps == 8


@pytest.mark.parametrize("cap", [1.0, {"share": 0.25}, {"peak": 1.0, "shares": 0.1}])
def test_options_of_a_cap_are_told_at_once(cap: Any) -> None:
    with pytest.raises(TypeError, match="cap must"):
        SharpnessCallback(cap=cap)


def test_the_monitor_is_at_hand(tmp_path: Path) -> None:
    callback = SharpnessCallback(every=2, rtol=0.05)
    with pytest.raises(AttributeError, match="monitor is there once"):
        _ = callback.monitor
    trainer = Trainer(
        gpt2(),
        arguments(tmp_path, eval_strategy="steps", eval_steps=1),
        train_dataset=rows(40),
        eval_dataset=rows(4),
        callbacks=[callback],
    )
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 4
    losses = reported(trainer)
    assert {step: m.base_loss for step, m in measured(callback).items()} == {0: losses[0], 2: losses[2]}
    callback.monitor.to_csv(tmp_path / "run.csv")
    callback.monitor.plot(tmp_path / "run.png")
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 3
    recent = [m.critical_lr for m in measured(callback).values()][-5:]
    assert callback.monitor.suggest_lr() == statistics.median(recent) / 4


def test_trained_twice_it_begins_anew(tmp_path: Path) -> None:
    callback = SharpnessCallback(every=3)
    trainer = Trainer(model_init=lambda: gpt2(), args=arguments(tmp_path), train_dataset=rows(40), callbacks=[callback])
    trainer.train()
    first = callback.monitor
    trainer.train()
    assert callback.monitor is not first
    # As cold as the first time.
    for step in (0, 3):
        assert measured(callback)[step].probes == first.history[step // 3].measurement.probes


def test_as_a_class_and_added_later(tmp_path: Path) -> None:
    # A search for hyperparameters may send it to another process.
    assert pickle.loads(pickle.dumps(SharpnessCallback(every=3))).state()["args"]["every"] == 3
    trainer = train(tmp_path, SharpnessCallback, max_steps=2)
    assert list(measured(trainer.pop_callback(SharpnessCallback))) == [0, 1]
    trainer = Trainer(gpt2(), arguments(tmp_path), train_dataset=rows(40))
    trainer.add_callback(SharpnessCallback(every=2))
    trainer.train()
    assert list(measured(trainer.pop_callback(SharpnessCallback))) == [0, 2]

    class Adds(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.add_callback(SharpnessCallback())

    trainer = Trainer(gpt2(), arguments(tmp_path), train_dataset=rows(40), callbacks=[Adds()])
    with pytest.raises(RuntimeError, match=r"must be there when training begins, .* before trainer\.train"):
        trainer.train()


def test_a_batch_size_that_is_found_begins_anew(tmp_path: Path) -> None:
    class Small(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if len(inputs["input_ids"]) > 4 and self.state.global_step == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(model, inputs, num_items_in_batch)

    callback = SharpnessCallback()
    trainer = train(tmp_path, callback, kind=Small, auto_find_batch_size=True, per_device_train_batch_size=5)
    assert trainer._train_batch_size == 4
    assert list(measured(callback)) == [0, 1, 2, 3]
    assert [m.base_loss for m in measured(callback).values()] == reported(trainer)[-4:]


# PEFT asks for it.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_other_trainers_models_and_optimizers(tmp_path: Path) -> None:
    # Sequence to sequence.
    sizes = {"vocab_size": 256, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    callback = SharpnessCallback(every=2)
    trainer = Seq2SeqTrainer(
        model, arguments(tmp_path, Seq2SeqTrainingArguments), train_dataset=rows(40), callbacks=[callback]
    )
    trainer.train()
    assert [m.base_loss for m in measured(callback).values()] == reported(trainer)[::2]
    # Adapters.
    from peft import LoraConfig, get_peft_model

    callback = SharpnessCallback(every=2)
    adapted = get_peft_model(gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    trainer = train(tmp_path, callback, model=adapted)
    assert [m.base_loss for m in measured(callback).values()] == reported(trainer)[::2]
    assert {m.status for m in measured(callback).values()} == {"converged"}
    # An optimizer of one's own, and the engine that evaluates several step sizes in one pass.
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    callback = SharpnessCallback(every=2, engine="batched")
    trainer = Trainer(
        model,
        arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=rows(40),
        callbacks=[callback],
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    assert {m.engine for m in measured(callback).values()} == {"batched"}
    assert [record.lr for record in callback.monitor.history] == [0.1, 0.1]
    assert [m.base_loss for m in measured(callback).values()] == pytest.approx(reported(trainer)[::2], rel=1e-6)


class Scaled(Trainer):
    """float16 as on a GPU: gradients of a scaled loss."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_scaled_gradients_are_unscaled(tmp_path: Path, max_grad_norm: float) -> None:
    callback, plain = SharpnessCallback(), SharpnessCallback()
    norm = {"max_grad_norm": max_grad_norm, "model": gpt2(0.0)}
    scaled = train(tmp_path, callback, kind=Scaled, **norm)
    assert scaled.accelerator.scaler.get_scale() == 4096.0
    assert scaled.optimizer.scaler is scaled.accelerator.scaler
    trainer = train(tmp_path, plain, **norm | {"model": gpt2(0.0)})
    assert [m.base_loss for m in measured(callback).values()] == pytest.approx(reported(trainer), rel=2e-3)
    for m, expected in zip(measured(callback).values(), measured(plain).values(), strict=True):
        assert m.slope == pytest.approx(expected.slope, rel=2e-2)
        assert m.critical_lr == pytest.approx(expected.critical_lr, rel=5e-2)


def test_misuse_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="SharpnessCallback has no option 'rtoll'; did you mean 'rtol'"):
        SharpnessCallback(rtoll=0.1)
    with pytest.raises(TypeError, match="SharpnessCallback has no option 'warn_bellow'; did you mean 'warn_below'"):
        SharpnessCallback(warn_bellow=1.5)
    with pytest.raises(TypeError, match="SharpnessCallback has no option 'log'"):
        SharpnessCallback(log=print)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        SharpnessCallback(every=0)
    with pytest.raises(ValueError, match="Trainer must have one SharpnessCallback, got 2, which would log"):
        train(tmp_path, SharpnessCallback(every=2), SharpnessCallback(every=3))
    with pytest.raises(RuntimeError, match=r"must be called by a transformers\.Trainer, .* sharpkern\.Monitor in"):
        SharpnessCallback().on_train_begin(None, None, None)

    class Loop(Trainer):
        def _run_epoch(self, model, **kwargs):
            model(**{name: value[None] for name, value in rows(1)[0].items()}).loss.backward()
            for event in ("on_step_begin", "on_pre_optimizer_step"):
                getattr(self.callback_handler, event)(self.args, self.state, self.control)

    with pytest.raises(RuntimeError, match=r"Loop must call self\.training_step for every micro-batch"):
        train(tmp_path, SharpnessCallback(), kind=Loop)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    file = inspect.getfile(SharpnessCallback)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match=r"SharpnessCallback needs transformers with accelerate, .* 'sharpkern\[transformers\]'"
    ):
        runpy.run_path(file)


REFUSED = {
    **{name: ("distributed_type", DistributedType[name]) for name in ("FSDP", "MEGATRON_LM", "XLA")},
    "a model or sequences split over ranks": ("parallelism_config", ParallelismConfig(tp_size=2)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_runs_that_cannot_be_measured_are_refused(tmp_path: Path, kind: str) -> None:
    class Prepared(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            setattr(trainer.accelerator.state, *REFUSED[kind])

    callbacks = [Prepared(), SharpnessCallback()]
    trainer = Trainer(gpt2(), arguments(tmp_path), train_dataset=rows(4), callbacks=callbacks)
    with pytest.raises(
        ValueError, match=rf"by DistributedDataParallel, FSDP2 or DeepSpeed, got {kind}; start it by torchrun"
    ):
        trainer.train()


def ranks_job(rank: int, folder: Path) -> dict[int, tuple[float, ...]]:
    """What one of the ranks measures, in a run that is the same without."""
    gc.freeze()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS), "OMP_NUM_THREADS": "1"}
    # The group is there already: nothing listens at the address.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    settings = {"max_steps": 6, "gradient_accumulation_steps": 2}
    callback = SharpnessCallback()
    assert_same(run(folder, callback, model=llama(), **settings), run(folder, model=llama(), **settings))
    assert type(callback.monitor._model) is nn.parallel.DistributedDataParallel
    return {step: (m.critical_lr, m.base_loss, m.forwards) for step, m in measured(callback).items()}


def test_both_ranks_have_the_whole_batchs_answer(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    results = on_ranks({"run": partial(ranks_job, folder=tmp_path)}, NUM_RANKS, tmp_path / "ranks")
    here, there = (result["run"] for result in results)
    assert isinstance(here, dict), here
    assert here == there
    # One process, on batches of both.
    callback = SharpnessCallback()
    settings = {"per_device_train_batch_size": 2 * NUM_RANKS, "gradient_accumulation_steps": 2, "max_steps": 6}
    train(tmp_path, callback, model=llama(), **settings)
    assert list(here) == list(measured(callback)) == list(range(6))
    for step, expected in measured(callback).items():
        assert here[step][0] == pytest.approx(expected.critical_lr, rel=1e-5)
        assert here[step][1] == pytest.approx(expected.base_loss, rel=1e-6)


def test_making_the_callback_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    SharpnessCallback(every=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sample_of_accumulated_batches_tells_of_all(tmp_path: Path) -> None:
    # Dropout with the masks of training, and gradients that are clipped by far.
    usual = {"gradient_accumulation_steps": 16, "max_grad_norm": 0.05, "max_steps": 1}
    exact, sampled = SharpnessCallback(rtol=1e-3), SharpnessCallback(sample="auto")
    trainers = [train(tmp_path, callback, **usual) for callback in (exact, sampled)]
    for whole, found in zip(exact.monitor.history, sampled.monitor.history, strict=True):
        m = found.measurement
        assert abs(math.log(m.critical_lr / whole.measurement.critical_lr)) <= m.error
        assert (m.sample_size is not None, m.num_micro_batches) == (True, 16)
        assert m.base_loss == pytest.approx(whole.measurement.base_loss, rel=1e-5)
    assert all(map(torch.equal, *(trainer.model.parameters() for trainer in trainers)))
    assert "clip_grad_norm_" not in vars(trainers[1].accelerator)


def test_blocks_are_measured_and_taken_up(tmp_path: Path) -> None:
    blocks = {"layer": "transformer.h.*", "head": ["transformer.ln_f.*", "lm_head.*"]}
    through = SharpnessCallback(blocks=blocks)
    trainer = train(tmp_path / "through", through)
    logged = [entry for entry in trainer.state.log_history if "sharpness/by_block/layer" in entry]
    assert [record.blocks["layer"].sharpness for record in through.monitor.history] == [
        entry["sharpness/by_block/layer"] for entry in logged
    ]
    train(tmp_path / "left", SharpnessCallback(blocks=blocks), save_strategy="steps", save_steps=2, max_steps=4)
    callback = SharpnessCallback(blocks=blocks)
    again = Trainer(gpt2(), arguments(tmp_path / "left"), train_dataset=rows(40), callbacks=[callback])
    again.train(resume_from_checkpoint=str(tmp_path / "left" / "checkpoint-2"))
    late = [{name: m.critical_lr for name, m in record.blocks.items()} for record in through.monitor.history[2:]]
    assert [{name: m.critical_lr for name, m in r.blocks.items()} for r in callback.monitor.history] == late


def test_blocks_of_modules_go_into_a_checkpoint_by_name(tmp_path: Path) -> None:
    model = gpt2()
    callback = SharpnessCallback(blocks={"layer": model.transformer.h[0]})
    trainer = train(tmp_path, callback, model=model, save_strategy="steps", save_steps=4)
    assert [*callback.monitor.history[0].blocks] == ["layer"]
    stored = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert stored["SharpnessCallback"]["args"]["blocks"].startswith("function {'layer'")
    with pytest.raises(ValueError, match=r"blocks|match"):
        train(tmp_path, SharpnessCallback(blocks={"layer": "nowhere.*"}))
    assert trainer.state.global_step == 4
