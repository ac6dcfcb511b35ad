"""The Monitor in loops on Accelerate: accumulated steps, precisions, checkpoints, trackers, two processes."""

import os
import pickle
import random
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, GradientState
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sharpkern
from sharpkern.integrations.accelerate import SharpnessMonitor
from tests.helpers.processes import on_ranks
from tests.monitoring.test_logs import Run

NUM_STEPS = 4
NUM_RANKS = 2


def forget() -> None:
    """Accelerate keeps one state for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _own_state() -> Iterator[None]:
    forget()
    yield
    forget()


def data(num: int, dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(num, 6, generator=generator, dtype=dtype)
    return TensorDataset(inputs, torch.randint(0, 3, (num,), generator=generator))


def plain_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)).to(dtype)


def noisy_model() -> nn.Module:
    """With everything that a careless evaluation would disturb."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.GELU(), nn.Dropout(0.2), nn.Linear(24, 3))


class Loop:
    """Training by Accelerate; the last accumulation of each epoch of ten micro-batches is not full.

    Args:
        model: not prepared yet.
        num: samples, 8 to a micro-batch.
        scaled: as fp16 training on a GPU; on a CPU Accelerate leaves both autocast and scaler out.
        shuffle: of the loader.
        monitored: whether there is a monitor.
        plugin: how Accelerate accumulates.
        options: of the monitor.
        accelerator: options of the Accelerator.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num: int = 80,
        scaled: bool = False,
        shuffle: bool = False,
        monitored: bool = True,
        plugin: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        **accelerator: Any,
    ) -> None:
        forget()
        self.accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_plugin=GradientAccumulationPlugin(**({"num_steps": NUM_STEPS} | (plugin or {}))),
            mixed_precision=accelerator.pop("mixed_precision", "fp16" if scaled else "no"),
            **accelerator,
        )
        if scaled:
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
            self.accelerator.native_amp = True
        dtype = next(model.parameters()).dtype
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        loader = DataLoader(data(num, dtype), batch_size=8, shuffle=shuffle)
        self.model, self.optimizer, self.schedule, self.loader = self.accelerator.prepare(
            model, optimizer, schedule, loader
        )
        self.monitor = SharpnessMonitor(self.accelerator, self.model, self.optimizer, **(options or {}))
        self.monitored = monitored
        self.order: list[tuple[Tensor, float, float]] = []
        self.scales: list[float] = []

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self.model(inputs), labels)

    def measure(self, batch: tuple[Tensor, Tensor]) -> None:
        if self.monitored:
            self.monitor(self.loss, batch)

    def run(self, num_steps: int, skip: int = 0) -> None:
        """Train for some optimizer steps; ``skip`` micro-batches of the first epoch are left out."""
        taken = 0
        loader = self.accelerator.skip_first_batches(self.loader, skip) if skip else self.loader
        while taken < num_steps:
            for batch in loader:
                # As a data pipeline draws from these streams.
                self.order.append((batch[0].clone(), random.random(), np.random.rand()))
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.loss(batch))
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.measure(batch)
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
                if self.accelerator.sync_gradients:
                    taken += 1
                    if self.accelerator.scaler is not None:
                        self.scales.append(self.accelerator.scaler.get_scale())
                    if taken == num_steps:
                        break
            loader = self.loader

    def state(self) -> bytes:
        """Everything that a run consists of."""
        states = {
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scales": self.scales,
            "scaler": self.accelerator.scaler and self.accelerator.scaler.state_dict(),
            "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
            "order": self.order,
            "gradients": [p.grad for p in self.model.parameters()],
            "training": [module.training for module in self.model.modules()],
        }
        return pickle.dumps(plain(states))


def plain(value: Any) -> Any:
    """The same with tensors as bytes."""
    if isinstance(value, Tensor):
        return value.dtype, list(value.shape), value.detach().numpy().tobytes()
    if isinstance(value, dict):
        return {str(key): plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(member) for member in value]
    return value.tobytes() if isinstance(value, np.ndarray) else value


def sharpnesses(loop: Loop) -> list[float]:
    assert all(record.measurement.status == "converged" for record in loop.monitor.history)
    return [record.measurement.sharpness for record in loop.monitor.history]


@pytest.mark.parametrize("scaled", [False, True])
def test_the_cap_holds_the_rate_of_accumulated_steps(scaled: bool, tmp_path: Path) -> None:
    options = {"cap": {"peak": 1.0, "warm_steps": 4}}

    def made() -> Loop:
        loop = Loop(plain_model(torch.float32 if scaled else torch.float64), scaled=scaled, options=options)
        for group in loop.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = 1.0
        loop.schedule.scheduler.base_lrs = [1.0]
        loop.accelerator.register_for_checkpointing(loop.monitor)
        return loop

    loop = made()
    loop.run(6)
    loop.accelerator.save_state(str(tmp_path))
    loop.run(3)
    cap = loop.monitor.cap
    assert cap.num_steps == 9 - len(loop.monitor.skipped)
    assert [one.step for one in cap.history] == [record.step for record in loop.monitor.history]
    assert [one.scheduled for one in cap.history] == [record.lr for record in loop.monitor.history]
    assert all(one.lr <= 0.25 * max(m.measurement.critical_lr for m in loop.monitor.history) for one in cap.history)
    assert any(one.lr < 0.5 * one.scheduled for one in cap.history)
    again = made()
    again.accelerator.load_state(str(tmp_path))
    # Where the data were: after two epochs of three steps.
    again.run(3)
    assert again.monitor.cap.history == cap.history[-len(again.monitor.cap.history) :] != []
    assert all(map(torch.equal, again.model.parameters(), loop.model.parameters()))


PRECISIONS = {
    "no": {},
    "bf16": {"mixed_precision": "bf16"},
    "fp16 with a scaler": {"scaled": True},
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_fifty_steps_are_bit_for_bit_the_same_with_a_monitor_and_without(name: str) -> None:
    states = []
    for monitored in (True, False):
        random.seed(0)
        np.random.seed(0)
        loop = Loop(
            noisy_model(), shuffle=True, monitored=monitored, options={"every": 7, "rtol": 0.1}, **PRECISIONS[name]
        )
        loop.run(50)
        assert len(loop.monitor.history) + len(loop.monitor.skipped) == (8 if monitored else 0)
        states.append(loop.state())
    assert len(loop.order) == 50 // 3 * 10 + 2 * NUM_STEPS
    assert states[0] == states[1]
    if name == "fp16 with a scaler":
        # Steps were skipped among them, and the scale grew again.
        assert {after / before for before, after in pairwise(loop.scales)} == {0.5, 1.0, 2.0}


def by_hand(
    sizes: list[int], dtype: torch.dtype, whole: bool, autocast: bool = False, num_ranks: int = 1, **options: Any
) -> list[sharpkern.Measurement]:
    """Each step's measurement in a loop without Accelerate; micro-batches one by one, or all ranks' at once."""
    model = plain_model(dtype)
    inputs, labels = data(80, dtype).tensors
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
    monitor = sharpkern.Monitor(model, optimizer, **options)

    def loss_of(rows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(inputs[rows])
        return F.cross_entropy(logits.to(dtype), labels[rows])

    done = 0
    for size in sizes:
        rows = torch.arange(8 * num_ranks * done, 8 * num_ranks * (done + size)) % 80
        done += size
        parts = [rows] if whole else rows.split(8)
        share = size / NUM_STEPS / len(parts)
        loss_fn = lambda parts=parts, share=share: sum(loss_of(part) * share for part in parts)
        for part in parts:
            (loss_of(part) * share).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        monitor(loss_fn)
        optimizer.step()
        # As Accelerate does, which takes schedules to be written for one process.
        for _ in range(num_ranks):
            schedule.step()
        optimizer.zero_grad()
    return [record.measurement for record in monitor.history]


PLUGINS = {
    "a partial step at the end of the data": ({}, [4, 4, 2] * 2),
    "steps across the end of the data": ({"sync_with_dataloader": False}, [4] * 5),
    "other options": ({"adjust_scheduler": False, "sync_each_batch": True}, [4, 4, 2] * 2),
}


@pytest.mark.parametrize("name", PLUGINS)
def test_the_loss_is_that_of_all_micro_batches_of_the_step(name: str) -> None:
    plugin, sizes = PLUGINS[name]
    loop = Loop(plain_model(torch.float64), plugin=plugin, options={"rtol": 1e-4})
    loop.run(len(sizes))
    expected = [m.sharpness for m in by_hand(sizes, torch.float64, whole=True, rtol=1e-4)]
    assert sharpnesses(loop) == pytest.approx(expected, rel=1e-6)
    assert len(set(expected)) == len(sizes)


def assert_within_their_errors(loop: Loop, expected: list[sharpkern.Measurement]) -> None:
    """In 16 bits some crossings are too near to the noise to be resolved, and say so."""
    pairs = [(record.measurement, expected[record.step]) for record in loop.monitor.history]
    resolved = [(a, b) for a, b in pairs if a.status == "converged"]
    assert len(resolved) >= 2 / 3 * len(pairs)
    assert {a.status for a, _ in pairs} <= {"converged", "unresolved"}
    assert all(abs(a.sharpness / b.sharpness - 1) <= a.error + b.error + 1e-3 for a, b in resolved)


def test_what_backward_was_called_on_saves_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    given, evaluated = Loop(plain_model()), Loop(plain_model())
    given.run(7)
    call = sharpkern.Monitor.__call__
    monkeypatch.setattr(
        sharpkern.Monitor, "__call__", lambda self, loss_fn, heldout, loss, direction: call(self, loss_fn)
    )
    evaluated.run(7)
    pairs = [
        (one.measurement, other.measurement)
        for one, other in zip(given.monitor.history, evaluated.monitor.history, strict=True)
    ]
    # The first three are compared, the 1st, 2nd and 4th check that the closure is repeatable.
    assert [other.forwards - one.forwards for one, other in pairs] == [1, 1, 0, 2, 1, 1, 1]
    assert all(one.base_loss == pytest.approx(other.base_loss, rel=1e-6) for one, other in pairs)


def test_a_loss_is_handed_over_where_backward_was_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[Any] = []
    monkeypatch.setattr(
        sharpkern.Monitor, "__call__", lambda self, loss_fn, heldout, loss, direction: handed.append(loss)
    )
    accelerator = Accelerator(cpu=True)
    model = plain_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    monitor = SharpnessMonitor(accelerator, model, optimizer)
    batch = data(8).tensors
    loss_fn = lambda inputs, labels: F.cross_entropy(model(inputs), labels)
    for num_calls in (1, 2, 0):
        with accelerator.accumulate(model):
            for _ in range(num_calls):
                accelerator.backward(loss_fn(*batch))
            monitor(loss_fn, *batch)
            monitor(loss_fn, *batch, loss=0.5)
    assert handed[0].item() == loss_fn(*batch).item()
    assert not handed[0].requires_grad
    assert handed[1:] == [0.5, None, 0.5, None, 0.5]


def test_mixed_precision_is_that_of_the_training_step() -> None:
    sizes = [4, 4, 2] * 2
    loop = Loop(plain_model(), mixed_precision="bf16")
    loop.run(6)
    same, exact = (by_hand(sizes, torch.float32, whole=False, autocast=autocast) for autocast in (True, False))
    assert [record.measurement.probes for record in loop.monitor.history] == [m.probes for m in same]
    assert_within_their_errors(loop, exact)
    # On a CPU Accelerate leaves fp16 out.
    loop = Loop(plain_model(), mixed_precision="fp16")
    loop.run(6)
    assert [record.measurement.probes for record in loop.monitor.history] == [m.probes for m in exact]


def test_scaled_gradients_are_unscaled_and_steps_that_will_be_skipped_are_left_out() -> None:
    loop = Loop(plain_model(), scaled=True)
    loop.run(14)
    # The scale grows until it overflows. Up to then the loop trains like one in float32.
    assert [step for step, reason in loop.monitor.skipped if "must be finite" in reason] == [12]
    assert loop.scales[12] == loop.scales[11] / 2
    del loop.monitor.history[12:]
    assert_within_their_errors(loop, by_hand([4, 4, 2] * 4, torch.float32, whole=False))


def test_a_compiled_model() -> None:
    compiled = Loop(plain_model(), dynamo_backend="eager")
    compiled.run(2)
    eager = Loop(plain_model())
    eager.run(2)
    assert sharpnesses(compiled) == pytest.approx(sharpnesses(eager), rel=1e-3)
    assert {record.measurement.engine for record in compiled.monitor.history} == {"inplace"}


def test_a_compiled_loss_is_seen_to_be_one() -> None:
    loop = Loop(plain_model())
    loop.loss = torch.compile(loop.loss, backend="eager")
    loop.run(2)
    assert {record.measurement.engine for record in loop.monitor.history} == {"inplace"}


class Recorder(GeneralTracker):
    """A tracker as Accelerate lets one write them."""

    name = "recorder"
    requires_logging_directory = False

    @on_main_process
    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict[str, float]]] = []

    @property
    def tracker(self) -> list[tuple[int, dict[str, float]]]:
        return self.logged

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    @on_main_process
    def log(self, values: dict[str, float], step: int, **_: Any) -> None:
        self.logged.append((step, values))


class WandB(Recorder):
    """A tracker with a run of wandb."""

    name = "wandb"

    @on_main_process
    def __init__(self) -> None:
        super().__init__()
        self.run = Run()

    @property
    def tracker(self) -> Run:
        return self.run

    @on_main_process
    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.run.log(values, step=step)


def test_a_run_of_wandb_that_counts_otherwise_loses_nothing() -> None:
    tracker, recorder = WandB(), Recorder()
    loop = Loop(plain_model(), log_with=[tracker, recorder], options={"every": 2})
    loop.accelerator.init_trackers("run")
    for i in range(4):
        # Micro-batches are counted here.
        loop.accelerator.log({"loss": i}, step=100 * i)
        loop.run(1)
    tracker.run.finish()
    assert tracker.run.curve("sharpness/lambda_c") == sharpnesses(loop)
    assert tracker.run.curve("sharpness/step") == [0, 2]
    assert tracker.run.curve("loss") == [0, 1, 2, 3]
    assert [step for step, values in recorder.logged if "sharpness/lambda_c" in values] == [0, 2]


def test_trackers_are_told_the_optimizers_step() -> None:
    recorder = Recorder()
    loop = Loop(plain_model(), log_with=recorder, options={"every": 3})
    loop.run(3)
    assert recorder.logged == []
    loop.accelerator.init_trackers("run")
    loop.run(4)
    assert [step for step, _ in recorder.logged] == [3, 6]
    assert [values["sharpness/lambda_c"] for _, values in recorder.logged] == sharpnesses(loop)[1:]
    silent = Loop(plain_model(), log_with=recorder, options={"log": None})
    silent.accelerator.init_trackers("run")
    silent.run(1)
    assert len(silent.monitor.history) == 1
    assert len(recorder.logged) == 2


def test_a_checkpoint_goes_on_where_it_was(tmp_path: Path) -> None:
    straight = Loop(plain_model())
    straight.run(5)
    first = Loop(plain_model())
    first.accelerator.register_for_checkpointing(first.monitor)
    first.run(2)
    first.accelerator.save_state(str(tmp_path))
    other = plain_model()
    nn.init.zeros_(other[0].weight)
    second = Loop(other)
    second.accelerator.register_for_checkpointing(second.monitor)
    second.accelerator.load_state(str(tmp_path))
    assert second.monitor.step == 2
    second.run(3, skip=8)
    taken_up = second.monitor.history
    assert [record.step for record in taken_up] == [2, 3, 4]
    for a, b in zip(straight.monitor.history[2:], taken_up, strict=True):
        assert a.measurement.probes == b.measurement.probes
        assert a.measurement.critical_lr == b.measurement.critical_lr


def test_micro_batches_are_kept_on_steps_that_are_due_alone() -> None:
    loop = Loop(plain_model(), options={"every": 2})
    kept = []
    measure = loop.measure
    loop.measure = lambda batch: (measure(batch), kept.append(len(loop.monitor._batches)))
    loop.run(3)
    assert kept == [1, 2, 3, 0, 0, 0, 0, 0, 1, 0]


def test_a_heldout_loss_is_measured_along_the_same_direction() -> None:
    loop = Loop(plain_model())
    batch = next(iter(loop.loader))
    heldout = lambda: loop.loss(batch)
    loop.measure = lambda batch: loop.monitor(loop.loss, batch, heldout=heldout)
    loop.run(1)
    (record,) = loop.monitor.history
    assert record.heldout.base_loss == pytest.approx(F.cross_entropy(plain_model()(batch[0]), batch[1]).item())
    assert record.heldout.sharpness != record.measurement.sharpness


def test_what_a_step_that_was_broken_off_has_left_is_dropped() -> None:
    loop = Loop(plain_model())
    batches = list(loop.loader)
    with loop.accelerator.accumulate(loop.model):
        loop.monitor(loop.loss, batches[7])
    # The loop gives this step up without its last micro-batches and begins anew.
    loop.accelerator.step = 0
    loop.run(1)
    whole = Loop(plain_model())
    whole.run(1)
    assert sharpnesses(loop) == sharpnesses(whole)


def test_a_monitor_that_sees_the_last_micro_batch_alone_is_noticed() -> None:
    loop = Loop(plain_model())
    measure = loop.measure
    loop.measure = lambda batch: measure(batch) if loop.accelerator.sync_gradients else None
    with pytest.warns(sharpkern.SlopeMismatchWarning, match="the batch that the gradient is of"):
        loop.run(1)


def test_arguments_of_the_wrong_kind_are_named() -> None:
    loop = Loop(plain_model())
    with pytest.raises(
        TypeError, match=r"must be called with the micro-batch, .* pass it as monitor\(compute_loss, batch\)"
    ):
        loop.monitor(lambda: loop.loss(next(iter(loop.loader))))
    with pytest.raises(TypeError, match=r"accelerator must be an accelerate\.Accelerator, got Sequential"):
        SharpnessMonitor(loop.model, loop.model, loop.optimizer)
    with pytest.raises(TypeError, match="Monitor has no option 'rtoll'; did you mean 'rtol'"):
        SharpnessMonitor(loop.accelerator, loop.model, loop.optimizer, rtoll=0.1)
    with pytest.raises(TypeError, match="Monitor has no option 'warn_bellow'; did you mean 'warn_below'"):
        SharpnessMonitor(loop.accelerator, loop.model, loop.optimizer, warn_bellow=1.5)


@pytest.mark.parametrize("kind", ["MEGATRON_LM", "XLA"])
def test_runs_that_keep_gradients_elsewhere_are_refused(kind: str) -> None:
    loop = Loop(plain_model())
    # What a run of that kind has there.
    loop.accelerator.state.distributed_type = DistributedType(kind)
    with pytest.raises(ValueError, match=f"must leave the gradients in the parameters' .grad, .* got {kind}; measure"):
        SharpnessMonitor(loop.accelerator, loop.model, loop.optimizer)


def test_prepared_optimizers_are_seen_through_by_thresholds_and_preconditioners() -> None:
    loop = Loop(plain_model())
    loop.run(3)
    inner = loop.optimizer.optimizer
    assert type(inner) is torch.optim.AdamW
    assert type(loop.optimizer) is not torch.optim.AdamW
    assert sharpkern.stability_threshold(loop.optimizer) == sharpkern.stability_threshold(inner)
    batch = next(iter(loop.loader))
    loop.loss(batch).backward()
    wrapped, bare = (
        (
            sharpkern.hessian_sharpness(loop.model, lambda: loop.loss(batch), preconditioner=optimizer).value,
            sharpkern.Direction.from_gradients(loop.model, optimizer).norm_sq,
        )
        for optimizer in (loop.optimizer, inner)
    )
    assert wrapped == bare


def set_environment(rank: int) -> None:
    """As `accelerate launch` does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(NUM_RANKS))


def values(rank: int, **options: Any) -> list[tuple[float, float]]:
    """λ_c of each step, and that of the same step in one process on all ranks' data."""
    set_environment(rank)
    loop = Loop(plain_model(torch.float64), options={"rtol": 1e-4}, **options)
    assert loop.accelerator.distributed_type == DistributedType.MULTI_CPU
    loop.run(4)
    expected = by_hand([4, 1] * 2, torch.float64, whole=True, num_ranks=NUM_RANKS, rtol=1e-4)
    return list(zip(sharpnesses(loop), [m.sharpness for m in expected], strict=True))


def untouched(rank: int, **options: Any) -> bool:
    set_environment(rank)
    states = []
    for monitored in (True, False):
        random.seed(0)
        np.random.seed(0)
        loop = Loop(noisy_model(), shuffle=True, monitored=monitored, options={"every": 3, "rtol": 0.1}, **options)
        loop.run(6)
        assert len(loop.monitor.history) == (2 if monitored else 0)
        states.append(loop.state())
    return states[0] == states[1]


JOBS = {
    "values": values,
    "values, synchronised in each micro-batch": partial(values, plugin={"sync_each_batch": True}),
    "values, compiled": partial(values, dynamo_backend="eager"),
    "untouched": untouched,
    "untouched in bf16": partial(untouched, mixed_precision="bf16"),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    return on_ranks(JOBS, NUM_RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [name for name in JOBS if name.startswith("values")])
def test_all_ranks_agree_with_one_process_on_the_whole_batch(ranks: list[dict[str, Any]], name: str) -> None:
    here, other = (rank[name] for rank in ranks)
    assert isinstance(here, list), here
    assert here == other
    assert [value for value, _ in here] == pytest.approx([whole for _, whole in here], rel=1e-5)


@pytest.mark.parametrize("name", [name for name in JOBS if name.startswith("untouched")])
def test_training_on_ranks_is_bit_for_bit_the_same(ranks: list[dict[str, Any]], name: str) -> None:
    assert [rank[name] for rank in ranks] == [True] * NUM_RANKS, ranks[0][name]


def test_a_sample_of_accumulated_batches_tells_of_all() -> None:
    found = {}
    for name, options in {"whole": {"rtol": 1e-3}, "sample": {"sample": "auto"}}.items():
        # Ten micro-batches an epoch, so that every step of sixteen is cut short, and its gradient is a share.
        for plugin in ({"num_steps": 16}, {"num_steps": 16, "sync_with_dataloader": False}):
            loop = Loop(plain_model(torch.float64), num=160, plugin=plugin, options=options)
            loop.run(3)
            found[name, "sync_with_dataloader" in plugin] = [record.measurement for record in loop.monitor.history]
    for short in (True, False):
        for whole, m in zip(found["whole", short], found["sample", short], strict=True):
            assert abs(np.log(m.critical_lr / whole.critical_lr)) <= max(m.error, 0.05)
            assert m.num_micro_batches in (None, 16)
        assert any(m.sample_size is not None for m in found["sample", short])
