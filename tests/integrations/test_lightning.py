"""The callback in Lightning's Trainer, and around the steps of any optimizer: the values, and the run untouched."""

import copy
import csv
import gc
import importlib
import os
import random
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import sharpkern
from sharpkern.integrations import around_step
from sharpkern.integrations.around_step import AroundStep
from sharpkern.integrations.lightning import _REFUSED, SharpnessCallback
from sharpkern.memory.counter import bytes_of, peak_bytes
from tests.helpers.processes import on_ranks

NUM_RANKS = 2

pytestmark = [
    # Lightning with this torch.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    # What it recommends for larger data, and for batches of unknown size.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches .* is smaller than the logging interval"),
]


@cache
def digits() -> TensorDataset:
    pixels, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(pixels[:352] / 8, dtype=torch.float32), torch.tensor(labels[:352]))


def network(dropout: float = 0.0, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    first, last = nn.Linear(64, 32, bias=bias), nn.Linear(32, 10, bias=bias)
    return nn.Sequential(first, nn.GELU(), nn.Dropout(dropout), last)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups of unlike learning rates."""
    biases = [p for p in model.parameters() if p.ndim == 1]
    weights = [p for p in model.parameters() if p.ndim > 1]
    return torch.optim.AdamW([{"params": weights}, {"params": biases, "lr": 3e-3}], lr=1e-2)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": adamw,
    "AdamW, fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2),
    "Nesterov": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "Adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-2),
    "Muon": lambda model: torch.optim.Muon(model.parameters(), lr=1e-2),
}


# Around the steps of an optimizer, in a plain loop.


def train(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    how: str,
    dtype: torch.dtype = torch.float64,
    steps: int = 5,
) -> tuple[list[sharpkern.Record], list[Tensor]]:
    """Measured "before" the step from the optimizer's formula, "around" it, or "around" it with a closure."""
    inputs, labels = (tensor[:128] for tensor in digits().tensors)
    # Muon takes matrices only.
    model = network(bias=make is not OPTIMIZERS["Muon"]).to(dtype)
    optimizer = make(model)
    monitor = sharpkern.Monitor(model, optimizer)
    loss_fn = lambda: F.cross_entropy(model(inputs.to(dtype)), labels)
    if how != "before":
        AroundStep(optimizer, lambda: True, lambda direction: monitor(loss_fn, direction=direction))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        return loss

    for _ in range(steps):
        if how == "around a closure":
            optimizer.step(closure)
            continue
        closure()
        if how == "before":
            monitor(loss_fn)
        optimizer.step()
    return monitor.history, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("how", ["around", "around a closure"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_was_taken_measures_as_the_formula_of_the_next_one(name: str, how: str) -> None:
    (before, weights), (around, same) = train(OPTIMIZERS[name], "before"), train(OPTIMIZERS[name], how)
    assert all(map(torch.equal, weights, same))
    assert [record.lr for record in around] == [record.lr for record in before]
    for one, other in zip(before, around, strict=True):
        assert one.measurement.status == "converged"
        assert other.measurement.base_loss == one.measurement.base_loss
        assert other.measurement.sharpness == pytest.approx(one.measurement.sharpness, rel=1e-6)
        assert other.measurement.slope == pytest.approx(one.measurement.slope, rel=1e-6)
        assert other.measurement.forwards == one.measurement.forwards


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor"])
def test_float32_weights_carry_their_rounding(name: str) -> None:
    (before, _), (around, _) = (train(OPTIMIZERS[name], how, torch.float32) for how in ("before", "around"))
    for one, other in zip(before, around, strict=True):
        assert other.measurement.sharpness == pytest.approx(one.measurement.sharpness, rel=1e-4)


class Decaying(torch.optim.SGD):
    """Makes parameters smaller that have no gradient, too."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        super().step()
        for p in self.param_groups[0]["params"]:
            p.mul_(0.99)


class Tolerant(torch.optim.SGD):
    """Takes what is not a number for 0."""

    def step(self, closure: None = None) -> None:
        (weight, *_) = self.param_groups[0]["params"]
        gradient, weight.grad = weight.grad, weight.grad.nan_to_num()
        super().step()
        weight.grad = gradient


@pytest.mark.parametrize("why", ["written", "sparse", "missing", "not a number", "scaled"])
def test_without_the_gradient_of_before_there_is_no_slope(why: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8, sparse=why == "sparse"), nn.Linear(8, 4))
    if why == "missing":
        model.append(nn.Module())
        model[2].unused = nn.Parameter(torch.ones(3))
    numbers = torch.arange(40) % 10
    loss_fn = lambda: F.cross_entropy(model[1](model[0](numbers)), numbers % 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=why == "scaled")
    kind = {"missing": Decaying, "not a number": Tolerant}.get(why, torch.optim.SGD)
    # With foreach, Nesterov's step is written into the gradients.
    how = {"written": {"momentum": 0.9, "nesterov": True, "foreach": True}, "scaled": {"fused": True}}.get(why, {})
    optimizer = kind(model.parameters(), lr=0.1, **how)
    monitor = sharpkern.Monitor(model, optimizer, rtol=1e-3)
    AroundStep(optimizer, lambda: True, lambda direction: monitor(loss_fn, direction=direction))
    scaler.scale(loss_fn()).backward()
    gradients = {p: p.grad.to_dense().clone() / scaler.get_scale() for p in model.parameters() if p.grad is not None}
    if why == "not a number":
        model[0].weight.grad[0, 0] = gradients[model[0].weight][0, 0] = torch.nan
    before = {p: p.detach().clone() for p in model.parameters()}
    scaler.step(optimizer)
    (record,) = monitor.history
    assert record.measurement.slope is None
    assert record.measurement.status == "converged"
    # At θ, along what the step has moved, and with the gradient of then.
    direction = sharpkern.Direction.between(before, {p: p.detach().clone() for p in before}, 0.1)
    with torch.no_grad():
        for p, value in before.items():
            p.copy_(value)
    slope = None if why in {"missing", "not a number"} else direction.slope_of(gradients)
    expected = sharpkern.critical_sharpness(model, loss_fn, replace(direction, slope=slope), rtol=1e-3)
    assert record.measurement.sharpness == pytest.approx(expected.sharpness, rel=5e-3)
    assert record.measurement.base_loss == expected.base_loss


class Twice(torch.optim.SGD):
    """Takes its gradient a little way uphill; a step within the step, with the hooks of both."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:
        with torch.enable_grad():
            closure()
        here = [p.detach().clone() for p in self.param_groups[0]["params"]]
        for p in self.param_groups[0]["params"]:
            p.add_(p.grad, alpha=0.1)
        with torch.enable_grad():
            closure()
        for p, theta in zip(self.param_groups[0]["params"], here, strict=True):
            p.copy_(theta)
        super().step()


class Once(torch.optim.SGD):
    """Hands its closure on, as most classes that are made of another optimizer."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        super().step(closure)


def test_a_step_within_a_step_is_measured_once() -> None:
    (plain, _), (once, _) = (
        train(lambda model, kind=kind: kind(model.parameters(), lr=0.05), "around a closure")
        for kind in (torch.optim.SGD, Once)
    )
    assert [r.measurement.probes for r in once] == [r.measurement.probes for r in plain]
    assert once[0].measurement.slope is not None


def test_the_gradient_that_counts_is_the_first_one_in_the_step() -> None:
    twice, _ = train(lambda model: Twice(model.parameters(), lr=0.05), "around a closure", steps=1)
    plain, _ = train(lambda model: torch.optim.SGD(model.parameters(), lr=0.05), "around a closure", steps=1)
    inputs, labels = (tensor[:128] for tensor in digits().tensors)
    model = network().double()
    parameters = list(model.parameters())
    gradient = lambda: torch.autograd.grad(F.cross_entropy(model(inputs.double()), labels), parameters)
    here = gradient()
    with torch.no_grad():
        for p, g in zip(parameters, here, strict=True):
            p.add_(g, alpha=0.1)
    slope = sum(float((a * b).sum()) for a, b in zip(here, gradient(), strict=True))
    assert twice[0].measurement.base_loss == plain[0].measurement.base_loss
    assert twice[0].measurement.slope == pytest.approx(slope, rel=1e-9)
    assert plain[0].measurement.slope != pytest.approx(slope, rel=1e-3)


def test_a_step_that_raised_is_not_taken_for_one_that_goes_on() -> None:
    with stepped() as (_, optimizer):
        measured = []

        def broken() -> Tensor:
            raise RuntimeError("broken")

        AroundStep(optimizer, lambda: True, measured.append)
        with pytest.raises(RuntimeError, match="broken"):
            optimizer.step(broken)
        optimizer.step()
        assert len(measured) == 1


def test_rounding_that_outweighs_the_step_is_told_once() -> None:
    slow = lambda model: torch.optim.AdamW(model.parameters(), lr=1e-5)
    with pytest.warns(sharpkern.RetainedWarning, match="times what the step has moved them by") as caught:
        train(slow, "around", torch.bfloat16, steps=3)
    assert len([one for one in caught if "the step has moved" in str(one.message)]) == 1


@contextmanager
def stepped() -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    """A model with its gradient, whose weights have to be at the end what one step makes of them."""
    inputs, labels = (tensor[:64] for tensor in digits().tensors)
    model, expected = network(), network()
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.05) for one in (model, expected)]
    for one in (model, expected):
        F.cross_entropy(one(inputs), labels).backward()
    yield model, optimizers[0]
    optimizers[1].step()
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


def test_a_measurement_that_raises_leaves_the_weights_after_the_step() -> None:
    with stepped() as (model, optimizer):
        before = [p.detach().clone() for p in model.parameters()]
        objects = [(p.data_ptr(), p.grad, p._version) for p in model.parameters()]

        def measure(direction: Callable[[], sharpkern.Direction]) -> None:
            direction()
            assert all(map(torch.equal, model.parameters(), before))
            raise RuntimeError("broken")

        around = AroundStep(optimizer, lambda: True, measure)
        with pytest.raises(RuntimeError, match="broken"):
            optimizer.step()
        for p, (address, gradient, version) in zip(model.parameters(), objects, strict=True):
            assert p.data_ptr() == address
            assert p.grad is gradient
            # The step's own write, and no other.
            assert p._version == version + 1
        around.remove()
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


class Interrupting(TorchDispatchMode):
    """Raises a KeyboardInterrupt in place of some of the copies that are made while it is active."""

    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in {torch.ops.aten.copy_.default, torch.ops.aten.clone.default}:
            self.count += 1
            if self.count in self.numbers:
                raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


def interrupted(*numbers: int) -> tuple[int, int]:
    """Copies that the way to θ takes, and all until the weights are back."""
    with stepped() as (_, optimizer), pytest.MonkeyPatch.context() as patch:
        mode = Interrupting(*numbers)
        counts = []

        def measure(direction: Callable[[], sharpkern.Direction]) -> None:
            with mode:
                direction()
            counts.append(mode.count)

        AroundStep(optimizer, lambda: True, measure)
        # On the way back no mode looks on.
        write = around_step._write
        patch.setattr(
            around_step,
            "_write",
            lambda *pair: write(*pair) if torch._C._len_torch_dispatch_stack() else interrupting(write, mode, *pair),
        )
        try:
            optimizer.step()
        except KeyboardInterrupt:
            assert numbers
        else:
            assert not numbers
    return counts[0] if counts else 0, mode.count


def interrupting(write: Callable[..., None], mode: Interrupting, *pair: torch.Tensor) -> None:
    with mode:
        write(*pair)


def test_an_interrupt_at_any_copy_and_another_one_on_the_way_back_lose_nothing() -> None:
    there, all_of_them = interrupted()
    # Three for each of the four tensors, and those of Direction.between; one for each back.
    assert (there >= 4 * 3, all_of_them - there) == (True, 4)
    for first in range(1, all_of_them + 1):
        interrupted(first)
    for first in range(1, there + 1):
        interrupted(first, first + 1)
        interrupted(first, first + 2)


def test_the_weights_are_copied_once_beside_the_direction() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(16)))
    weights = bytes_of(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    AroundStep(optimizer, lambda: True, lambda direction: direction())
    # Sums over a tensor are taken in float64.
    largest = bytes_of([model[0].weight])
    assert 2 * weights <= peak_bytes(optimizer.step) <= 2 * weights + 5 * largest


def test_a_step_that_is_none_is_skipped_with_its_reason() -> None:
    model = network()
    model(torch.ones(1, 64)).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    monitor = sharpkern.Monitor(model, optimizer)
    never = lambda: pytest.fail("there is nothing to measure")
    AroundStep(optimizer, lambda: True, lambda direction: monitor(never, direction=direction))
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    model[0].weight.grad.fill_(torch.inf)
    optimizer.step()
    assert not model[0].weight.isfinite().any()
    optimizer.zero_grad()
    optimizer.step()
    reasons = ["positive learning rate", "the step must move some parameter", "must be finite", "must have a gradient"]
    assert [step for step, _ in monitor.skipped] == [0, 1, 2, 3]
    for (_, reason), expected in zip(monitor.skipped, reasons, strict=True):
        assert expected in reason


class Several(torch.optim.Optimizer):
    """A container, whose own group keeps the learning rate it was made with."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([p for o in optimizers for group in o.param_groups for p in group["params"]], {"lr": 7.0})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()


def test_the_steps_of_a_container_are_one_step_at_the_rate_in_use() -> None:
    several = lambda model: Several([torch.optim.SGD(model[0].parameters(), lr=0.05), adamw(model[1:])])
    before, around = train(several, "before")[0], train(several, "around")[0]
    assert [record.lr for record in around] == [0.05] * 5
    for one, other in zip(before, around, strict=True):
        assert other.measurement.slope == pytest.approx(one.measurement.slope, rel=1e-6)
        assert other.measurement.sharpness == pytest.approx(one.measurement.sharpness, rel=2e-2)


def test_the_slope_of_a_step_that_climbs_is_that_of_what_falls() -> None:
    def climb(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.01, maximize=True)

    with pytest.warns(sharpkern.SlopeMismatchWarning):
        (record, *_), _ = train(climb, "around", steps=1)
    assert record.measurement.slope > 0


class Climbing(torch.optim.SGD):
    """Moves before it evaluates, and tells by no name that it does."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        here = [p.detach().clone() for p in self.param_groups[0]["params"]]
        for p in self.param_groups[0]["params"]:
            p.add_(0.1)
        with torch.enable_grad():
            closure()
        for p, value in zip(self.param_groups[0]["params"], here, strict=True):
            p.copy_(value)
        super().step()


def test_an_optimizer_that_evaluates_elsewhere_is_refused_once_its_step_is_done() -> None:
    model = network()
    optimizer = Climbing(model.parameters(), lr=0.1)
    AroundStep(optimizer, lambda: True, lambda direction: pytest.fail("the weights of before are not known"))
    with pytest.raises(TypeError, match="must call its closure at the weights that its step starts from, got Climbing"):
        optimizer.step(lambda: model(torch.ones(1, 64)).sum().backward())


class Hookless(torch.optim.Optimizer):
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.optimizer.step()


class Perturbed(torch.optim.SGD):
    def first_step(self) -> None: ...

    def second_step(self) -> None: ...


def test_steps_that_cannot_be_stood_around_are_refused() -> None:
    sgd = lambda: torch.optim.SGD(network().parameters(), lr=0.1)
    for optimizer, words in {
        "an empty list": ([], "must hold at least one optimizer, got an empty list"),
        "no hooks": (Hookless(sgd()), "whose step runs its hooks, got Hookless; take the direction by hand"),
        "two gradients": (Perturbed(network().parameters(), lr=0.1), "got Perturbed, which is sharpness-aware"),
        "no hooks, in a list": (
            [sgd(), Hookless(sgd())],
            "whose step runs its hooks, got Hookless; take the direction",
        ),
    }.values():
        with pytest.raises((TypeError, ValueError), match=words):
            AroundStep(optimizer, lambda: True, lambda direction: None)


# In the Trainer.


class Digits(pl.LightningModule):
    """Logs in every way, and counts what a careless replay would count twice."""

    def __init__(self, make: Callable[[nn.Module], torch.optim.Optimizer] = adamw, dropout: float = 0.0) -> None:
        super().__init__()
        self.make = make
        self.net = network(dropout)
        self.net.insert(1, nn.BatchNorm1d(32))
        self.accuracy = MulticlassAccuracy(10)
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, labels = batch
        logits = self.net(inputs)
        loss = F.cross_entropy(logits, labels)
        self.seen.append(float(inputs.sum()))
        self.accuracy(logits, labels)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"accuracy": self.accuracy}, on_step=False, on_epoch=True)
        if self.logger is not None:
            self.logger.log_metrics({"direct": loss.item()}, step=self.trainer.global_step)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Validated(Digits):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validation", F.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)


def loader(batch_size: int = 32, **options: Any) -> DataLoader:
    """Eleven batches."""
    return DataLoader(digits(), batch_size=batch_size, **options)


def trainer(*callbacks: Any, package: Any = pl, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return package.Trainer(accelerator="cpu", callbacks=list(callbacks), **{"logger": False, **quiet, **options})


def fitted(callback: SharpnessCallback, model: pl.LightningModule | None = None, **options: Any) -> Any:
    run = trainer(callback, **options)
    run.fit(Digits() if model is None else model, loader())
    return run


def plain_loop(
    make: Callable[[nn.Module], torch.optim.Optimizer], num_epochs: int, accumulate: int, **options: Any
) -> tuple[sharpkern.Monitor, nn.Module]:
    """What Lightning does, in a loop of one's own, measured before the step."""
    model = Digits(make).double()
    configured = model.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    cap = options.pop("cap", None)
    monitor = sharpkern.Monitor(model, optimizer, **options)
    monitor.cap = None if cap is None else sharpkern.LRCap(monitor, optimizer, **cap)
    loss_of = lambda batch: F.cross_entropy(model.net(batch[0].double()), batch[1]) / accumulate
    for _ in range(num_epochs):
        batches = list(loader())
        for start in range(0, len(batches), accumulate):
            step = batches[start : start + accumulate]
            optimizer.zero_grad()
            for batch in step:
                loss_of(batch).backward()
            # In the order of the groups, to the last bit.
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
            monitor(lambda step=step: sum(map(loss_of, step)))
            if monitor.cap is not None:
                monitor.cap.step()
            optimizer.step()
            schedule.step()
    return monitor, model


@pytest.mark.parametrize(("accumulate", "every"), [(1, 5), (3, 3)])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor"])
def test_the_trainer_measures_what_a_plain_loop_does(name: str, accumulate: int, every: int) -> None:
    make = OPTIMIZERS[name]
    monitor, model = plain_loop(make, 2, accumulate, every=every, rtol=0.005)
    callback = SharpnessCallback(every=every, rtol=0.005)
    lightning = Digits(make)
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    fitted(callback, lightning, precision="64-true", **options)
    assert all(map(torch.equal, model.parameters(), lightning.parameters()))
    # Eleven batches in steps of three: the fourth, which is measured, has two, and two thirds of the loss.
    steps = [record.step for record in monitor.history]
    assert steps == ([0, 5, 10, 15, 20] if accumulate == 1 else [0, 3, 6])
    for one, other in zip(monitor.history, callback.monitor.history, strict=True):
        assert (other.step, other.lr) == (one.step, one.lr)
        assert other.measurement.status == one.measurement.status == "converged"
        assert other.measurement.base_loss == pytest.approx(one.measurement.base_loss, rel=1e-12)
        assert other.measurement.slope == pytest.approx(one.measurement.slope, rel=1e-6)
        assert other.measurement.sharpness == pytest.approx(one.measurement.sharpness, rel=1e-6)


class Recorded:
    """Everything that a run leaves behind."""

    def __init__(self, folder: Path, accumulate: int, *callbacks: Any) -> None:
        pl.seed_everything(1, verbose=False)
        self.model = Validated(dropout=0.2)
        callbacks = tuple(make() for make in callbacks)
        options = {"num_sanity_val_steps": 2, "val_check_interval": 8, "log_every_n_steps": 2}
        run = trainer(
            *callbacks,
            accumulate_grad_batches=accumulate,
            max_steps=50,
            gradient_clip_val=0.5,
            logger=CSVLogger(folder, name="", version=f"{len(callbacks)}"),
            **options,
        )
        run.fit(self.model, loader(shuffle=True), loader(batch_size=176))
        assert run.global_step == 50
        self.callbacks = callbacks
        self.streams = [torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64))]
        self.python = random.getstate()
        (self.optimizer,) = (optimizer.state_dict() for optimizer in run.optimizers)
        self.schedule = run.lr_scheduler_configs[0].scheduler.state_dict()
        self.metrics = {k: v for k, v in run.callback_metrics.items() if not k.startswith("sharpness/")}
        with open(Path(run.logger.log_dir) / "metrics.csv", newline="", encoding="utf-8") as file:
            rows = [{k: v for k, v in row.items() if not k.startswith("sharpness/")} for row in csv.DictReader(file)]
        # A row that has nothing but the step was of sharpness.
        self.rows = [row for row in rows if any(v for k, v in row.items() if k != "step")]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_run_is_bit_for_bit_what_it_would_have_been(accumulate: int, tmp_path: Path) -> None:
    with_it = Recorded(tmp_path, accumulate, lambda: SharpnessCallback(every=8))
    without = Recorded(tmp_path, accumulate)
    assert len(with_it.callbacks[0].monitor.history) == 7
    states = (with_it.model.state_dict(), without.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
    torch.testing.assert_close(with_it.optimizer, without.optimizer, rtol=0, atol=0)
    assert with_it.schedule == without.schedule
    assert all(map(torch.equal, with_it.streams, without.streams))
    assert with_it.python == without.python
    # The batches in their order, each once, though it was evaluated again and again.
    assert with_it.model.seen == without.model.seen
    assert len(without.model.seen) >= 50 * accumulate * 0.9
    assert with_it.metrics == without.metrics
    assert {"loss_epoch", "accuracy", "validation"} <= set(without.metrics)
    assert with_it.rows == without.rows
    assert any(row["direct"] for row in without.rows)


def test_loggers_get_each_measurement_with_its_step(tmp_path: Path) -> None:
    callback = SharpnessCallback(every=3)
    loggers = [CSVLogger(tmp_path, name=name, version="") for name in ("one", "two")]
    run = fitted(callback, max_epochs=1, logger=loggers, log_every_n_steps=5)
    names = ("lambda_c", "critical_lr", "headroom", "forwards")
    for name in ("one", "two"):
        with open(tmp_path / name / "metrics.csv", newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["sharpness/lambda_c"]]
        assert [int(row["step"]) for row in rows] == [0, 3, 6, 9]
        for row, record in zip(rows, callback.monitor.history, strict=True):
            assert [float(row[f"sharpness/{n}"]) for n in names] == [record.row()[n] for n in names]
    last = callback.monitor.history[-1].row()
    assert [float(run.callback_metrics[f"sharpness/{n}"]) for n in names] == pytest.approx([last[n] for n in names])


def test_the_callbacks_monitor_has_it_all(tmp_path: Path) -> None:
    callback = SharpnessCallback(every=lambda step: step in (1, 4))
    with pytest.raises(AttributeError, match=r"once Trainer\.fit\(\) has begun to train"):
        _ = callback.monitor
    fitted(callback, max_steps=6)
    monitor = callback.monitor
    assert [record.step for record in monitor.history] == [1, 4]
    monitor.to_csv(tmp_path / "run.csv")
    assert len((tmp_path / "run.csv").read_text(encoding="utf-8").splitlines()) == 3
    monitor.plot(tmp_path / "run.png")
    assert monitor.suggest_lr() == statistics.median([r.measurement.critical_lr for r in monitor.history][-5:]) / 4


def test_options_are_the_monitors(recwarn: pytest.WarningsRecorder) -> None:
    before = torch.get_rng_state()
    with pytest.raises(TypeError, match="has no option 'rtoll'; did you mean 'rtol'"):
        SharpnessCallback(rtoll=0.1)
    with pytest.raises(TypeError, match="SharpnessCallback has no option 'warn_bellow'; did you mean 'warn_below'"):
        SharpnessCallback(warn_bellow=1.5)
    with pytest.raises(TypeError, match="SharpnessCallback has no option 'log'"):
        SharpnessCallback(log=print)
    with pytest.raises(ValueError, match="every must be at least 1"):
        SharpnessCallback(every=0)
    callback = SharpnessCallback(every=2, warn_below=1e6, rtol=0.1, engine="inplace")
    assert torch.equal(torch.get_rng_state(), before)
    fitted(callback, max_steps=9)
    assert [record.measurement.engine for record in callback.monitor.history] == ["inplace"] * 5
    assert any(isinstance(warning.message, sharpkern.HeadroomWarning) for warning in recwarn)


@pytest.mark.parametrize("kind", ["dict", "takes its labels out", "no index"])
def test_training_steps_of_all_shapes(kind: str) -> None:
    class Shaped(Digits):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if kind == "dict":
                return {"loss": super().training_step(batch, batch_idx), "more": batch_idx}
            labels = batch.pop() if kind == "takes its labels out" else batch[1]
            return super().training_step([batch[0], labels], batch_idx)

    class WithoutIndex(Digits):
        def training_step(self, batch: Any) -> Any:
            return super().training_step(batch, 0)

    expected, callback = SharpnessCallback(), SharpnessCallback()
    options = {"max_steps": 3, "accumulate_grad_batches": 2, "precision": "64-true"}
    fitted(expected, **options)
    fitted(callback, WithoutIndex() if kind == "no index" else Shaped(), **options)
    sharpness = lambda it: [record.measurement.sharpness for record in it.monitor.history]
    assert len(sharpness(callback)) == 3
    assert sharpness(callback) == sharpness(expected)


def test_the_loss_before_backward_saves_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    given, evaluated = SharpnessCallback(), SharpnessCallback()
    fitted(given, max_steps=7, accumulate_grad_batches=2)
    call = sharpkern.Monitor.__call__
    monkeypatch.setattr(
        sharpkern.Monitor,
        "__call__",
        lambda self, loss_fn, *, loss, direction: call(self, loss_fn, direction=direction),
    )
    fitted(evaluated, max_steps=7, accumulate_grad_batches=2)
    pairs = list(zip(*([r.measurement for r in one.monitor.history] for one in (given, evaluated)), strict=True))
    # The first three are compared, the 1st, 2nd and 4th check that the closure is repeatable.
    assert [other.forwards - one.forwards for one, other in pairs] == [1, 1, 0, 2, 1, 1, 1]
    assert all(one.base_loss == pytest.approx(other.base_loss, rel=1e-6) for one, other in pairs)


def test_the_loss_before_backward_is_handed_over_without_its_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[Any] = []
    monkeypatch.setattr(sharpkern.Monitor, "__call__", lambda self, loss_fn, *, loss, direction: losses.append(loss))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model = Digits()
    fitted(SharpnessCallback(), model, max_steps=1, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    inputs, labels = next(iter(loader()))
    expected = F.cross_entropy(Digits().net(inputs), labels).item()
    assert losses[0].item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batches_that_training_step_skips_are_not_measured() -> None:
    class Choosy(Digits):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            # Of steps 0, 1, 2: both batches, the second one, none.
            return None if batch_idx in (2, 4, 5) else super().training_step(batch, batch_idx)

    callback, model = SharpnessCallback(), Choosy()
    fitted(callback, model, max_steps=3, accumulate_grad_batches=2)
    first, second = callback.monitor.history
    assert (first.step, second.step) == (0, 1)
    assert second.measurement.base_loss == pytest.approx(first.measurement.base_loss / 2, rel=0.2)
    ((step, reason),) = callback.monitor.skipped
    assert step == 2
    assert "training_step skipped all of its batches" in reason
    assert len(model.seen) == 3


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step\\(\\)` before")
def test_batches_of_a_step_that_is_broken_off_do_not_count() -> None:
    class BreakingOff(Digits):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.current_epoch == 0 and batch_idx == 1 else None

    expected, callback = SharpnessCallback(), SharpnessCallback()
    fitted(expected, max_steps=1, accumulate_grad_batches=2)
    fitted(callback, BreakingOff(), max_steps=1, accumulate_grad_batches=2)
    (one,), (other,) = expected.monitor.history, callback.monitor.history
    assert other.measurement.base_loss == one.measurement.base_loss


@cache
def in_float64() -> list[sharpkern.Record]:
    monitor, _ = plain_loop(adamw, 1, 1, every=lambda step: step < 4)
    return monitor.history


@pytest.mark.filterwarnings("ignore:rounding to the weights' dtype is about 0.*:sharpkern.RetainedWarning")
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_every_precision_gives_its_own_value(precision: str) -> None:
    callback = SharpnessCallback()
    fitted(callback, max_steps=4, gradient_clip_val=0.5, precision=precision)
    assert len(callback.monitor.history) == 4
    # Rounding leads the run itself elsewhere by and by.
    for one, other in zip(in_float64(), callback.monitor.history, strict=True):
        assert other.measurement.status == "converged"
        within = {"32-true": 1e-3, "64-true": 1e-6, "bf16-mixed": 0.1, "bf16-true": 0.2}[precision]
        assert other.measurement.sharpness == pytest.approx(one.measurement.sharpness, rel=within)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step\\(\\)` before")
def test_steps_that_the_loss_scaler_skips_are_noted() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    callback = SharpnessCallback()
    run = fitted(callback, max_steps=6, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    skipped = [step for step, _ in callback.monitor.skipped]
    assert 0 < len(skipped) < 6
    assert skipped == list(range(len(skipped)))
    assert [record.step for record in callback.monitor.history] == list(range(len(skipped), run.global_step))
    assert "loss scaler" in callback.monitor.skipped[0][1]
    assert {record.measurement.status for record in callback.monitor.history} == {"converged"}


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_a_run_that_is_taken_up_measures_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    straight, resumed = SharpnessCallback(every=4), SharpnessCallback(every=4)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    # Six steps an epoch.
    first, second, batches = Digits(), Digits(), loader(64)
    trainer(straight, keep, max_epochs=3, enable_checkpointing=True).fit(first, batches)
    trainer(resumed, max_epochs=3).fit(second, batches, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    rest = [record for record in straight.monitor.history if record.step >= 6]
    assert [record.step for record in rest] == [8, 12, 16]
    for one, other in zip(rest, resumed.monitor.history, strict=True):
        assert (other.step, other.lr) == (one.step, one.lr)
        assert other.measurement.probes == one.measurement.probes
        assert other.measurement.critical_lr == one.measurement.critical_lr
    # A cold start would have to look for the scale anew.
    cold = SharpnessCallback(every=4)
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert checkpoint["callbacks"].pop("SharpnessCallback")["step"] == 5
    torch.save(checkpoint, tmp_path / "cold.ckpt")
    trainer(cold, max_epochs=3).fit(Digits(), batches, ckpt_path=tmp_path / "cold.ckpt")
    assert [record.step for record in cold.monitor.history] == [8, 12, 16]
    assert cold.monitor.history[0].measurement.probes != rest[0].measurement.probes


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor"])
def test_the_cap_does_what_it_does_in_a_plain_loop(name: str) -> None:
    make = lambda model: with_lr(OPTIMIZERS[name](model), 30.0)
    options: dict[str, Any] = {"every": sharpkern.LRCap.every(3), "cap": {"peak": 90.0, "warm_steps": 8}}
    monitor, model = plain_loop(make, 2, 1, **options)
    callback, lightning = SharpnessCallback(**options), Digits(make)
    run = fitted(callback, lightning, precision="64-true", max_epochs=2, gradient_clip_val=0.5)
    assert callback.cap.history == monitor.cap.history
    assert callback.cap.num_steps == run.global_step == 22
    assert any(one.lr < 0.5 * one.scheduled for one in callback.cap.history)
    assert all(map(torch.equal, model.parameters(), lightning.parameters()))
    assert float(run.callback_metrics["sharpness/capped_lr"]) == pytest.approx(callback.cap.history[-1].lr, rel=1e-6)
    assert "sharpness/lambda_c" in run.callback_metrics


def with_lr(optimizer: torch.optim.Optimizer, factor: float) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        group["lr"] *= factor
    return optimizer


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step\\(\\)` before")
def test_a_capped_run_of_mixed_precision_is_taken_up(tmp_path: Path) -> None:
    make = lambda model: with_lr(OPTIMIZERS["SGD"](model), 100.0)
    options = {"cap": {"peak": 5.0, "warm_steps": 6}}

    def run(callback: SharpnessCallback, *others: Any, **settings: Any) -> Digits:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        model = Digits(make)
        trainer(callback, *others, max_epochs=3, plugins=[plugin], **settings.pop("trainer", {})).fit(
            model, loader(64), **settings
        )
        return model

    straight, resumed = SharpnessCallback(**options), SharpnessCallback(**options)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    first = run(straight, keep, trainer={"enable_checkpointing": True})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint need to be provided")
        second = run(resumed, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert straight.monitor.skipped
    assert straight.cap.num_steps == 18 - len(straight.monitor.skipped)
    assert resumed.cap.history == straight.cap.history[-len(resumed.cap.history) :] != []
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_only_training_is_measured() -> None:
    callback = SharpnessCallback()
    run = trainer(callback)
    model = Validated()
    run.validate(model, loader(), verbose=False)
    # Nor refused where nothing is trained.
    model.automatic_optimization = False
    run.test(model, loader(), verbose=False)
    model.automatic_optimization = True
    with pytest.raises(AttributeError):
        _ = callback.monitor
    run = trainer(callback, max_steps=2, num_sanity_val_steps=3, val_check_interval=1)
    run.fit(model, loader(), loader(batch_size=176))
    assert [record.step for record in callback.monitor.history] == [0, 1]
    optimizer = run.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_replay_that_raises_leaves_model_and_trainer_as_after_the_step(tmp_path: Path) -> None:
    class Broken(Digits):
        num_replays = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not torch.is_grad_enabled():
                Broken.num_replays += 1
                if Broken.num_replays == 4:
                    raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    expected, model = Digits(), Broken()
    trainer(max_steps=1).fit(expected, loader())
    logger = CSVLogger(tmp_path)
    run = trainer(SharpnessCallback(), max_steps=3, logger=logger)
    with pytest.raises(RuntimeError, match="broken"):
        run.fit(model, loader())
    states = (expected.state_dict(), model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
    assert not run.optimizers[0]._optimizer_step_pre_hooks
    assert not run.optimizers[0]._optimizer_step_post_hooks
    assert run.loggers == [logger]
    assert not {"log", "log_dict"} & set(vars(model))


def test_runs_that_cannot_be_measured_are_refused() -> None:
    class Manual(Digits):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    class Fetching(Digits):
        def training_step(self, dataloader_iter: Any) -> Any:
            raise AssertionError

    class Sharded(FSDPStrategy):
        """Which Lightning lets nobody have on a CPU."""

    with pytest.raises(ValueError, match=r"automatic_optimization=False; call sharpkern\.Monitor in training_step"):
        fitted(SharpnessCallback(), Manual(), max_steps=1)
    with (
        pytest.warns(UserWarning, match="dataloader_iter"),
        pytest.raises(ValueError, match="got one that takes dataloader_iter; let the Trainer fetch"),
    ):
        fitted(SharpnessCallback(), Fetching(), max_steps=1)
    with pytest.raises(ValueError, match="got LBFGS, which searches by itself"):
        fitted(SharpnessCallback(), Digits(lambda model: torch.optim.LBFGS(model.parameters())), max_steps=1)
    run = trainer(strategy=Sharded(), devices=1)
    with pytest.raises(ValueError, match="got Sharded; use strategy='ddp' or ModelParallelStrategy"):
        SharpnessCallback().setup(run, Digits(), "fit")
    # DeepSpeed's own is there with deepspeed only.
    assert {DeepSpeedStrategy.__name__, FSDPStrategy.__name__} == _REFUSED
    # Lightning itself refuses several optimizers that it would have to step.
    several = Digits()
    several.configure_optimizers = lambda: [adamw(several), adamw(several)]
    with pytest.raises(RuntimeError, match="multiple optimizers"):
        fitted(SharpnessCallback(), several, max_steps=1)


@pytest.mark.parametrize("own", [True, False], ids=["its own callback", "the other package's callback"])
def test_the_package_of_the_other_name(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    other = importlib.import_module("pytorch_lightning")
    kind = SharpnessCallback
    if own:
        # As where only this one is installed.
        monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
        monkeypatch.delitem(sys.modules, "sharpkern.integrations.lightning")
        kind = importlib.import_module("sharpkern.integrations.lightning").SharpnessCallback
    assert issubclass(kind, other.Callback) == own

    class Plain(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return adamw(self)

    callback = kind(every=2)
    run = trainer(callback, package=other, max_steps=3)
    run.fit(Plain(), loader())
    assert [record.step for record in callback.monitor.history] == [0, 2]
    assert "sharpness/lambda_c" in run.callback_metrics


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "sharpkern.integrations.lightning")
    with pytest.raises(
        ImportError, match=r"SharpnessCallback needs lightning, .* pip install 'sharpkern\[lightning\]'"
    ):
        importlib.import_module("sharpkern.integrations.lightning")


# On two ranks.


class Shard(Digits):
    """Without BatchNorm, whose statistics would be of each rank's part alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()


def spread(batches: DataLoader, *callbacks: Any, **options: Any) -> tuple[Any, Shard]:
    model = Shard()
    run = trainer(
        *callbacks, max_steps=4, accumulate_grad_batches=2, gradient_clip_val=0.5, precision="64-true", **options
    )
    run.fit(model, batches)
    return run, model


def job(rank: int) -> dict[str, Any]:
    """What one of the ranks measures, in a run that is the same without."""
    # What Lightning imports would be looked through several times on the way out.
    gc.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", sharpkern.SharpkernWarning)
        # As a launcher of processes sets it for Lightning.
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(NUM_RANKS)}
        # Lightning's own sampler would shuffle.
        batches = loader(16, sampler=DistributedSampler(digits(), NUM_RANKS, rank, shuffle=False))
        callback = SharpnessCallback()
        ddp = {"strategy": "ddp", "devices": NUM_RANKS, "use_distributed_sampler": False}
        run, with_it = spread(batches, callback, **ddp)
        assert run.world_size == NUM_RANKS
        assert isinstance(callback.monitor._model, nn.parallel.DistributedDataParallel)
        state = copy.deepcopy(run.optimizers[0].state_dict())
        run, without = spread(batches, **ddp)
        torch.testing.assert_close(state, run.optimizers[0].state_dict(), rtol=0, atol=0)
        assert all(map(torch.equal, with_it.parameters(), without.parameters()))
        assert with_it.seen == without.seen
        return {"rows": [record.row() | {"seconds": 0} for record in callback.monitor.history]}


def test_two_ranks_measure_the_whole_batch(tmp_path: Path) -> None:
    here, other = (results["job"] for results in on_ranks({"job": job}, NUM_RANKS, tmp_path))
    assert isinstance(here, dict), here
    assert here == other
    single = SharpnessCallback()
    spread(loader(32), single)
    assert len(here["rows"]) == 4
    for row, record in zip(here["rows"], single.monitor.history, strict=True):
        expected = record.row()
        assert (row["step"], row["lr"], row["status"]) == (expected["step"], expected["lr"], "converged")
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-9)
        assert row["lambda_c"] == pytest.approx(expected["lambda_c"], rel=1e-5)


def test_a_sample_of_accumulated_batches_tells_of_all() -> None:
    found, weights = [], []
    for callback in (SharpnessCallback(rtol=1e-3), SharpnessCallback(sample="auto")):
        run, model = trainer(callback, accumulate_grad_batches=16, gradient_clip_val=0.05, max_epochs=1), Digits()
        run.fit(model, loader(16))
        found.append([record.measurement for record in callback.monitor.history])
        weights.append(list(model.parameters()))
    for whole, m in zip(*found, strict=True):
        assert abs(np.log(m.critical_lr / whole.critical_lr)) <= max(m.error, 0.05)
        assert m.base_loss == pytest.approx(whole.base_loss, rel=1e-4)
    # Of 22 batches the second step has 6, which are too few.
    assert [m.num_micro_batches for m in found[1]] == [16, None]
    assert all(map(torch.equal, *weights))


def test_a_sample_needs_to_know_how_gradients_are_clipped() -> None:
    with pytest.raises(ValueError, match="gradients that keep their direction, got gradient_clip_algorithm='value'"):
        fitted(SharpnessCallback(sample="auto"), gradient_clip_val=0.1, gradient_clip_algorithm="value", max_epochs=1)


def test_blocks_are_measured_and_logged() -> None:
    callback = SharpnessCallback(blocks=True)
    running = fitted(callback, max_steps=2, max_epochs=1)
    (record,) = callback.monitor.history[-1:]
    assert len(record.blocks) > 1
    # A bound is no value.
    found = {name: one.sharpness for name, one in record.blocks.items() if one.status == "converged"}
    assert found
    logged = [float(running.callback_metrics[f"sharpness/by_block/{name}"]) for name in found]
    assert logged == pytest.approx([*found.values()])
