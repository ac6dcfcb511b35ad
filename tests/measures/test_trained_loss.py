"""The loss that was trained, handed to the Monitor: an evaluation saved, and mistakes of the loop told."""

import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern
from sharpkern.engines.virtual.engine import VirtualEngine
from sharpkern.measures import run as _run
from sharpkern.tensors.random_state import stream_states
from tests.helpers.models import MLP
from tests.helpers.oracle import random_direction

Batch = tuple[Tensor, Tensor]
Closure = Callable[[], Tensor]


def network(dropout: float = 0.0, normed: bool = False) -> nn.Module:
    norm = nn.BatchNorm1d(32) if normed else nn.Identity()
    return nn.Sequential(nn.Linear(16, 32), norm, nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 10))


class Loop:
    """A classifier on batches of noise, with a monitor after each ``backward()``.

    Args:
        model: that is trained.
        make: the optimizer of its parameters.
        lr: its learning rate.
        accumulation: micro-batches of a step.
        size: of each.
        max_norm: that gradients are clipped to.
        smoothing: of the labels.
        autocast: in bfloat16.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        *,
        lr: float = 0.1,
        accumulation: int = 1,
        size: int = 16,
        max_norm: float = math.inf,
        smoothing: float = 0.0,
        autocast: bool = False,
        **options: Any,
    ) -> None:
        self.model = network() if model is None else model
        self.optimizer = make(self.model.parameters(), lr=lr)
        self.monitor = sharpkern.Monitor(self.model, self.optimizer, **options)
        self.accumulation, self.size, self.max_norm = accumulation, size, max_norm
        self.smoothing, self.autocast = smoothing, autocast
        self.generator = torch.Generator().manual_seed(5)
        self.following = self.draw()

    def draw(self) -> list[Batch]:
        inputs = torch.randn(self.accumulation, self.size, 16, generator=self.generator)
        # What can be learned, and noise.
        labels = (3 * inputs[..., 0] + torch.randn(inputs.shape[:2], generator=self.generator)).long() % 10
        return list(zip(inputs, labels, strict=True))

    def loss(self, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return F.cross_entropy(self.model(batch[0]), batch[1], label_smoothing=self.smoothing)

    def mean(self, batches: list[Batch]) -> Tensor:
        return sum(map(self.loss, batches)) / len(batches)

    def step(self, mistake: Callable[["Loop", list[Batch], float], tuple[Closure, float | None]]) -> None:
        """One step, in which the loop measures as ``mistake`` says: with a closure, and a loss."""
        batches, self.following = self.following, self.draw()
        self.optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            loss = self.loss(batch) / self.accumulation
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        loss_fn, trained = mistake(self, batches, total)
        self.monitor(loss_fn, loss=trained)
        self.model.train()
        self.optimizer.step()

    def run(self, num: int, mistake: Callable[..., tuple[Closure, float | None]]) -> list[sharpkern.Measurement]:
        for _ in range(num):
            self.step(mistake)
        return [record.measurement for record in self.monitor.history]


def right(loop: Loop, batches: list[Batch], total: float) -> tuple[Closure, float | None]:
    return lambda: loop.mean(batches), total


def silent(loop: Loop, batches: list[Batch], total: float) -> tuple[Closure, float | None]:
    return lambda: loop.mean(batches), None


def next_batch(loop: Loop, batches: list[Batch], total: float) -> tuple[Closure, float | None]:
    return lambda: loop.mean(loop.following), total


def last_micro_batch(loop: Loop, batches: list[Batch], total: float) -> tuple[Closure, float | None]:
    return lambda: loop.loss(batches[-1]), total


def last_micro_batch_alone(loop: Loop, batches: list[Batch], total: float) -> tuple[Closure, float | None]:
    return lambda: loop.loss(batches[-1]), None


def last_and_its_loss(loop: Loop, batches: list[Batch], total: float) -> tuple[Closure, float | None]:
    with torch.no_grad():
        return lambda: loop.loss(batches[-1]), loop.loss(batches[-1]).item()


def last_of_both(loop: Loop, batches: list[Batch], total: float) -> tuple[Closure, float | None]:
    with torch.no_grad():
        return lambda: loop.loss(batches[-1]), loop.loss(batches[-1]).item() / loop.accumulation


def in_eval_mode(loop: Loop, batches: list[Batch], total: float) -> tuple[Closure, float | None]:
    loop.model.eval()
    return right(loop, batches, total)


def evaluating(loop: Loop, batches: list[Batch], total: float) -> tuple[Closure, float | None]:
    def loss_fn() -> Tensor:
        loop.model.eval()
        loss = loop.mean(batches)
        loop.model.train()
        return loss

    return loss_fn, total


def scaled(loop: Loop, batches: list[Batch], total: float) -> tuple[Closure, float | None]:
    return lambda: loop.mean(batches), 2.0**16 * total


def summed(loop: Loop, batches: list[Batch], total: float) -> tuple[Closure, float | None]:
    return lambda: loop.mean(batches) * len(batches), total


ANOTHER = r"another batch .* `batch = x, y` .* `batches.append\(\(x, y\)\)`"
EVAL = r"eval mode.* `model.train\(\)`"
MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "the next batch": (next_batch, {}, ANOTHER),
    "the next batch, with dropout": (next_batch, {"model": lambda: network(0.02)}, ANOTHER),
    "the last micro-batch": (last_micro_batch, {"accumulation": 4}, ANOTHER),
    "the last micro-batch, clipped": (last_micro_batch, {"accumulation": 4, "max_norm": 0.1}, ANOTHER),
    "the last micro-batch of both": (last_of_both, {"accumulation": 4}, r"1/4 of .* `total \+= loss.item\(\)`"),
    "eval mode": (in_eval_mode, {"model": lambda: network(0.2)}, EVAL),
    "eval mode inside": (evaluating, {"model": lambda: network(0.2)}, EVAL),
    "eval mode of BatchNorm": (in_eval_mode, {"model": lambda: network(normed=True)}, EVAL),
    "a scaled loss": (scaled, {}, r"6.554e\+04 times .* before scaler.scale\(loss\)"),
    "a scaled loss, with dropout": (scaled, {"model": lambda: network(0.1)}, r"6\.\d+e\+04 times"),
    "a sum of micro-batches": (summed, {"accumulation": 4}, "1/4 of"),
}


def options_of(options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    return {key: value() if key == "model" else value for key, value in options.items()}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_the_loop_is_told_once_with_the_lines_that_mend_it(name: str) -> None:
    mistake, options, message = MISTAKES[name]
    with pytest.warns(sharpkern.SlopeMismatchWarning) as caught:
        Loop(**options_of(options)).run(12, mistake)
    # Others are of single measurements.
    (told,) = [str(warning.message) for warning in caught if " the last " in str(warning.message)]
    assert re.search(message, told)


@pytest.mark.parametrize("mistake", [last_micro_batch_alone, last_and_its_loss])
def test_the_last_micro_batch_alone_is_told_by_its_slopes(mistake: Any) -> None:
    with pytest.warns(sharpkern.SlopeMismatchWarning) as caught:
        Loop(**options_of({"accumulation": 2})).run(24, mistake)
    (told,) = [str(warning.message) for warning in caught if " the last " in str(warning.message)]
    assert re.search(r"never less than 1: .*" + ANOTHER, told)


RIGHT: dict[str, dict[str, Any]] = {
    "gradient descent": {},
    "dropout": {"model": lambda: network(0.5), "make": partial(torch.optim.SGD, momentum=0.9)},
    "accumulation with dropout": {
        "model": lambda: network(0.1),
        "accumulation": 4,
        "make": torch.optim.AdamW,
        "lr": 1e-3,
    },
    "BatchNorm": {"model": lambda: network(normed=True), "make": torch.optim.Adam, "lr": 1e-3, "smoothing": 0.1},
    "bfloat16": {"autocast": True, "accumulation": 2, "make": torch.optim.AdamW, "lr": 1e-3},
    "clipped": {"max_norm": 0.1, "make": partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-2)},
}


@pytest.mark.parametrize("handed_over", [right, silent])
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_closure_is_no_mistake(name: str, handed_over: Any) -> None:
    # A warning would be an error.
    assert len(Loop(**options_of(RIGHT[name])).run(24, handed_over)) == 24


def test_a_closure_that_seeds_itself_is_no_mistake() -> None:
    def seeded(loop: Loop, batches: list[Batch], total: float) -> tuple[Closure, float | None]:
        def loss_fn() -> Tensor:
            torch.manual_seed(1)
            return loop.mean(batches)

        return loss_fn, total

    assert len(Loop(network(0.5)).run(12, seeded)) == 12


def policy_loss(model: nn.Module, x: Tensor, actions: Tensor, before: Tensor, advantages: Tensor) -> Tensor:
    ratios = (model(x).log_softmax(-1)[range(len(x)), actions] - before).exp()
    return -(ratios * advantages).mean()


def test_a_loss_that_cancels_to_nearly_nothing_is_no_mistake() -> None:
    """As that of a policy gradient, which is 0 but for its rounding."""
    torch.manual_seed(0)
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = sharpkern.Monitor(model, optimizer)
    for _ in range(12):
        x, actions, advantages = torch.randn(64, 16), torch.randint(0, 10, (64,)), torch.randn(64)
        advantages -= advantages.mean()
        before = model(x).log_softmax(-1)[range(64), actions].detach()
        loss_fn = partial(policy_loss, model, x, actions, before, advantages)
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        # Rounded otherwise, as by another kernel.
        monitor(loss_fn, loss=loss.item() + 3e-8 * float(torch.randn(())))
        optimizer.step()
    assert max(abs(record.measurement.base_loss) for record in monitor.history) < 1e-6


def test_the_loss_saves_an_evaluation_but_where_it_is_compared() -> None:
    measured = [Loop(**options_of({})).run(21, how) for how in (right, silent)]
    saved = [silent.forwards - right.forwards for right, silent in zip(*measured, strict=True)]
    # In 1 and 2 the comparison is also the check that the closure is repeatable, and in 4, 8 and 16 there is neither.
    assert saved == [1, 1, 0, 2, 1, 1, 1, 2, *[1] * 7, 2, 1, 1, 1, 0, 1]
    for one, other in zip(*measured, strict=True):
        assert one.base_loss == pytest.approx(other.base_loss, rel=1e-6)
        assert one.critical_lr == pytest.approx(other.critical_lr, rel=1e-4)


@pytest.mark.parametrize("options", [{"model": lambda: network(0.5)}, {"autocast": True}, {"max_norm": 0.1}])
def test_measurements_and_the_run_are_what_they_would_have_been(options: dict[str, Any]) -> None:
    """With dropout the loss is never used; in 16 bits the noise of a base loss that is not evaluated is known."""
    ends, measured = [], []
    for how in (right, silent):
        loop = Loop(**options_of(options))
        measured.append(loop.run(9, how))
        ends.append([*loop.model.parameters(), torch.get_rng_state()])
    assert [m.probes for m in measured[0]] == [m.probes for m in measured[1]]
    assert all(map(torch.equal, *ends))


def test_other_masks_leave_generators_as_they_were() -> None:
    class Noisy(nn.Module):
        """Draws from generators of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 10)
            self.generators = torch.Generator().manual_seed(3), np.random.default_rng(4), random.Random(5)

        def forward(self, x: Tensor) -> Tensor:
            of_torch, of_numpy, of_python = self.generators
            noise = torch.randn(x.shape, generator=of_torch) + of_numpy.standard_normal() * of_python.random()
            return self.linear(x + 0.3 * noise)

    torch.manual_seed(0)
    models = [Noisy(), Noisy()]
    models[1].linear.load_state_dict(models[0].linear.state_dict())
    for model, every in zip(models, (1, 100), strict=True):
        Loop(model, every=every).run(4, right)
    assert stream_states([], models[0].generators) == stream_states([], models[1].generators)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_a_loss_of_any_kind_of_number_is_taken_and_text_is_not() -> None:
    for kind in (float, np.float32, torch.tensor, lambda total: torch.tensor([total], dtype=torch.bfloat16)):
        Loop().step(lambda loop, batches, total, kind=kind: (lambda: loop.mean(batches), kind(total)))
    with pytest.raises(TypeError, match="loss must be a number, got 'low'; leave it out to have it evaluated"):
        Loop().step(lambda loop, batches, total: (lambda: loop.mean(batches), "low"))


def test_a_known_base_loss_is_compared_now_and_then_and_reduced_as_losses_are() -> None:
    model = MLP()
    x = torch.randn(8, 16)
    loss_fn = lambda: model(x).square().mean()
    direction = random_direction(model)
    base = loss_fn().item()
    measure = lambda known: sharpkern.critical_sharpness(
        model, loss_fn, direction, base_loss=known, reduce=lambda loss: 2 * loss
    )
    assert measure(base).base_loss == pytest.approx(2 * base)
    forwards = [measure(base).forwards for _ in range(18)]
    # In the third evaluated, in the sixth not.
    assert forwards[1] == forwards[4] + 1
    with pytest.raises(ValueError, match="base_loss must be what loss_fn returns"):
        measure(1.01 * base)
    # One that is wrong is not used before it has been right three times.
    with pytest.raises(ValueError, match="base_loss must be what loss_fn returns"):
        measure(1.01 * base)


def test_uphill_from_a_known_loss() -> None:
    loop = Loop()
    loop.run(3, right)
    loss_fn, _ = right(loop, loop.following, math.nan)
    loop.optimizer.zero_grad()
    loss = loss_fn()
    loss.backward()
    uphill = sharpkern.Direction.from_tensors({p: -p.grad for p in loop.model.parameters()}, loop.model)
    measured = loop.monitor(loss_fn, loss=loss, direction=replace(uphill, slope=-uphill.norm_sq))
    assert (measured.status, measured.base_loss) == ("ascent", loss.item())


def test_a_closure_that_is_repeatable_no_more_is_refused_at_the_next_check() -> None:
    model = MLP()
    batches = [torch.randn(8, 16) for _ in range(2)]
    direction = random_direction(model)
    number = iter(range(10**6))
    fickle = False
    loss_fn = lambda: model(batches[next(number) % 2 if fickle else 0]).square().mean()
    for _ in range(3):
        sharpkern.critical_sharpness(model, loss_fn, direction)
    fickle = True
    with pytest.raises(ValueError, match="fetch the batch once"):
        sharpkern.critical_sharpness(model, loss_fn, direction)


def test_an_engine_that_goes_wrong_later_is_seen_at_the_next_check(
    monkeypatch: pytest.MonkeyPatch, no_swapping: None
) -> None:
    model = MLP()
    x = torch.randn(8, 16)
    loss_fn = lambda: model(x).square().mean()
    direction = random_direction(model)
    for _ in range(3):
        assert sharpkern.critical_sharpness(model, loss_fn, direction).engine == "virtual"
    monkeypatch.setattr(VirtualEngine, "oracle_loss", lambda self, eta: 0.0)
    with pytest.warns(sharpkern.EngineFallbackWarning, match=r"an independent evaluation gives 0\.0"):
        assert sharpkern.critical_sharpness(model, loss_fn, direction).engine == "inplace"


def test_a_held_out_loss_of_the_same_code_does_not_take_the_slopes_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    check = _run.check_slope
    loop = Loop()
    monkeypatch.setattr(_run, "check_slope", lambda *a, **k: looked.append(loop.monitor.step) or check(*a, **k))
    of = lambda batches: lambda: loop.mean(batches)
    for _ in range(8):
        batches = loop.draw()
        loop.optimizer.zero_grad()
        loop.mean(batches).backward()
        loop.monitor(of(batches), heldout=of(loop.draw()))
        loop.optimizer.step()
    assert looked == [1, 2, 4, 8]
