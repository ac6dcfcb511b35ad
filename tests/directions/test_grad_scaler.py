"""Training in fp16 with torch's GradScaler: scaled and unscaled gradients, steps that are skipped, an untouched run.

A scaler leaves no mark on the gradients that it scaled: whoever measures before ``unscale_`` has to name it. Without it
the direction is wrong, by the scale for SGD and by less for Adam, and a warning tells of the slope, which is too large
by the scale for both.
"""

import pickle
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern
from tests.helpers.models import GPT

SCALE = 2.0**12
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
}


def batch(step: int) -> Tensor:
    starts = torch.randint(0, 64, (8, 1), generator=torch.Generator().manual_seed(step))
    return (starts + 3 * torch.arange(9)) % 64


class Loop:
    """A small language model in fp16 autocast, in float32 without a scaler.

    Args:
        kind: of optimizer.
        init_scale: None for float32.
        unscale: whether gradients are unscaled before the measurement.
        known: whether the monitor is told the scaler.
        monitored: whether there is a monitor.
        dropout: of the model.
        options: of the monitor.
    """

    def __init__(
        self,
        kind: str,
        init_scale: float | None = SCALE,
        *,
        unscale: bool = False,
        known: bool = True,
        monitored: bool = True,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = GPT(vocabulary=64, layers=1, dropout=dropout)
        self.optimizer = OPTIMIZERS[kind](self.model.parameters())
        self.fp16 = init_scale is not None
        self.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale or 1.0, growth_interval=8, enabled=self.fp16)
        self.monitor = sharpkern.Monitor(self.model, self.optimizer, scaler=self.scaler if known else None, **options)
        self.unscale, self.monitored = unscale, monitored
        self.scales: list[float] = []

    def loss(self, tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=self.fp16):
            logits = self.model(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def steps(self, num: int) -> Iterator[sharpkern.Measurement | None]:
        for step in range(num):
            tokens = batch(step)
            self.optimizer.zero_grad()
            self.scaler.scale(self.loss(tokens)).backward()
            if self.unscale:
                self.scaler.unscale_(self.optimizer)
            if self.monitored:
                yield self.monitor(lambda tokens=tokens: self.loss(tokens))
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scales.append(self.scaler.get_scale())

    def run(self, num: int) -> "Loop":
        for _ in self.steps(num):
            pass
        return self

    def measurements(self) -> list[sharpkern.Measurement]:
        assert {record.measurement.status for record in self.monitor.history} == {"converged"}
        return [record.measurement for record in self.monitor.history]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_scaled_gradients_measure_what_unscaled_ones_do_and_what_float32_does(kind: str) -> None:
    scaled = Loop(kind).run(5).measurements()
    for unscaled in (Loop(kind, unscale=True, known=known).run(5) for known in (True, False)):
        for a, b in zip(scaled, unscaled.measurements(), strict=True):
            assert a.sharpness == pytest.approx(b.sharpness, rel=1e-6)
            assert a.slope == pytest.approx(b.slope, rel=1e-6)
    exact = Loop(kind, init_scale=None).run(5).measurements()
    # In fp16 the loss is another function, and its gradients are rounded.
    assert [m.sharpness for m in scaled] == pytest.approx([m.sharpness for m in exact], rel=2e-2)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_scaled_gradients_are_told_of_with_dropout_too_and_others_are_not(kind: str) -> None:
    with pytest.warns(sharpkern.SlopeMismatchWarning, match="the gradient must be unscaled") as caught:
        Loop(kind, known=False, dropout=0.2).run(3)
    assert len(caught) == 2
    # Warnings are errors.
    Loop(kind, dropout=0.5).run(8)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_scaled_gradients_without_the_scaler_are_wrong_and_told_of(kind: str) -> None:
    with pytest.warns(sharpkern.SlopeMismatchWarning, match="the gradient must be unscaled") as caught:
        loop = Loop(kind, known=False).run(3)
    # Slopes are checked on the measurements 1, 2, 4, 8, ...
    assert len(caught) == 2
    exact = Loop(kind, init_scale=None).run(3)
    ratios = [a.sharpness / b.sharpness for a, b in zip(loop.measurements(), exact.measurements(), strict=True)]
    if kind == "SGD":
        assert ratios[0] == pytest.approx(SCALE, rel=2e-2)
    else:
        # Adam's first step has no scale; later ones mix the scaled gradient with moments of unscaled ones.
        assert ratios[0] == pytest.approx(1, rel=2e-2)
        assert abs(ratios[2] - 1) > 0.1


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled"])
def test_steps_that_the_scaler_skips_are_noted_and_the_others_measured(unscale: bool) -> None:
    loop = Loop("AdamW", 2.0**22, unscale=unscale)
    weights = [[p.detach().clone() for p in loop.model.parameters()]]
    for _ in range(30):
        loop.run(1)
        weights.append([p.detach().clone() for p in loop.model.parameters()])
    skipped = [step for step, _ in loop.monitor.skipped]
    stayed = [step for step, (a, b) in enumerate(pairwise(weights)) if all(map(torch.equal, a, b))]
    halved = [step for step, (a, b) in enumerate(pairwise([2.0**22, *loop.scales])) if b == a / 2]
    assert skipped == stayed == halved
    assert len(skipped) > 2
    assert skipped[-1] > 8
    assert sorted([*skipped, *(record.step for record in loop.monitor.history)]) == list(range(30))
    assert all("must be finite, got nan or inf" in reason for _, reason in loop.monitor.skipped)
    assert {record.measurement.status for record in loop.monitor.history} <= {"converged", "unresolved"}


def state(loop: Loop) -> bytes:
    """Everything that a run consists of."""
    tensors = [
        *loop.model.state_dict().values(),
        *(p.grad for p in loop.model.parameters()),
        *(value for slot in loop.optimizer.state.values() for value in slot.values() if isinstance(value, Tensor)),
        torch.get_rng_state(),
    ]
    stages = [(each["stage"], each["found_inf_per_device"]) for each in loop.scaler._per_optimizer_states.values()]
    numbers = [loop.optimizer.state_dict()["param_groups"], loop.scaler.state_dict(), loop.scales, stages]
    return pickle.dumps([numbers, [tensor.numpy().tobytes() for tensor in tensors]])


@pytest.mark.parametrize(("kind", "unscale"), [("SGD", False), ("AdamW", True)])
def test_fifty_steps_are_bit_for_bit_the_same_with_a_monitor_and_without(kind: str, unscale: bool) -> None:
    measured, alone = (
        Loop(kind, 2.0**20, unscale=unscale, monitored=monitored, dropout=0.1, every=3, rtol=0.1).run(50)
        for monitored in (True, False)
    )
    assert len(measured.monitor.history) + len(measured.monitor.skipped) == 17
    assert measured.monitor.skipped
    assert alone.monitor.history == []
    assert state(measured) == state(alone)


def test_weights_in_fp16_with_masters_in_float32() -> None:
    """The scaler unscales the gradients of the masters: torch refuses to unscale those in fp16."""
    torch.manual_seed(0)
    exact = Loop("SGD", init_scale=None)
    model = GPT(vocabulary=64, layers=1, dropout=0.0)
    model.load_state_dict(exact.model.state_dict())
    model.half()
    masters = {p: nn.Parameter(p.detach().float()) for p in model.parameters()}
    optimizer = OPTIMIZERS["SGD"](masters.values())
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    monitor = sharpkern.Monitor(model, optimizer, masters=masters, scaler=scaler)
    for step, expected in enumerate(exact.steps(4)):
        tokens = batch(step)
        loss_fn = lambda tokens=tokens: F.cross_entropy(
            model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten()
        )
        model.zero_grad()
        scaler.scale(loss_fn()).backward()
        for parameter, master in masters.items():
            master.grad = parameter.grad.float()
        measured = monitor(loss_fn)
        assert measured.status == "converged"
        assert abs(measured.sharpness / expected.sharpness - 1) <= measured.error + expected.error + 1e-2
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for parameter, master in masters.items():
                parameter.copy_(master)
