"""LRCap: the rule, schedulers that never see it, steps that fail or are skipped, checkpoints, logs."""

import copy
import math
import pickle
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Optimizer, lr_scheduler

import sharpkern
from sharpkern import LRCap

PEAK = 8.0


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def groups(model: nn.Module, lr: Any = PEAK) -> list[dict[str, Any]]:
    """Two groups, of which the second has a tenth of the rate."""
    biases = [p for p in model.parameters() if p.ndim == 1]
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "lr": lr},
        {"params": biases, "lr": 0.1 * lr},
    ]


class Loop:
    """SGD whose rate is far too large."""

    def __init__(
        self, *, capped: bool = True, lr: Any = PEAK, momentum: float = 0.0, then: int = 3, **cap: Any
    ) -> None:
        self.model = network()
        self.optimizer: Optimizer = SGD(groups(self.model, lr), momentum=momentum)
        self.data = torch.Generator().manual_seed(1)
        self.monitor = sharpkern.Monitor(self.model, self.optimizer, every=LRCap.every(then, warm_steps=8))
        self.cap = LRCap(self.monitor, self.optimizer, peak=PEAK, warm_steps=8, **cap) if capped else None
        self.scheduler: Any = None
        self.scheduled: list[float] = []
        self.taken: list[float] = []
        self.watch()

    def watch(self) -> None:
        """Note the rates of steps, after what caps them."""
        self.optimizer.register_step_pre_hook(
            lambda optimizer, *_: self.taken.append([float(group["lr"]) for group in optimizer.param_groups])
        )

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(32, 6, generator=self.data), torch.randint(0, 3, (32,), generator=self.data)

    def backward(self) -> None:
        x, y = self.batch()
        self.optimizer.zero_grad()
        self.loss_fn = lambda: F.cross_entropy(self.model(x), y)
        self.loss = self.loss_fn()
        self.loss.backward()

    def run(self, steps: int) -> "Loop":
        for _ in range(steps):
            self.backward()
            self.monitor(self.loss_fn, loss=self.loss)
            if self.cap is not None:
                self.cap.step()
            self.optimizer.step()
            self.scheduled.append([float(group["lr"]) for group in self.optimizer.param_groups])
            if self.scheduler is not None:
                # The value is one that a plateau is found in.
                metric = (1.0,) if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau) else ()
                self.scheduler.step(*metric)
        return self


def test_the_rate_follows_the_rule() -> None:
    loop = Loop()
    loop.scheduler = lr_scheduler.CosineAnnealingLR(loop.optimizer, 24, 0.1 * PEAK)
    loop.run(20)
    measured = {record.step: record.measurement for record in loop.monitor.history}
    assert list(measured) == [0, 1, 2, 3, 4, 5, 6, 9, 12, 15, 18]
    found: list[float] = []
    rows = zip(loop.scheduled, loop.taken, strict=True)
    for step, ((scheduled, other), (taken, second)) in enumerate(rows):
        if step in measured:
            found.append(measured[step].critical_lr)
        limit = 0.25 * statistics.median(found[-5:])
        expected = min(scheduled, limit) if step < 8 else scheduled / PEAK * min(PEAK, limit)
        assert taken == pytest.approx(expected, rel=1e-12)
        assert second / other == pytest.approx(taken / scheduled, rel=1e-12)
    assert all(taken < scheduled for (scheduled, _), (taken, _) in zip(loop.scheduled, loop.taken, strict=True))
    # What was done is on record.
    history = loop.cap.history
    assert [one.step for one in history] == list(measured)
    assert [one.lr for one in history] == pytest.approx([loop.taken[step][0] for step in measured], rel=1e-12)
    assert [one.scheduled for one in history] == [loop.scheduled[step][0] for step in measured]
    assert {one.why for one in history} == {"capped"}
    assert history[-1].limit == limit == loop.cap.limit
    assert loop.cap.num_steps == 20


def test_a_schedule_below_the_limit_is_left_to_the_last_bit() -> None:
    loop = Loop(lr=0.01).run(8)
    assert {rate for rate, _ in loop.taken} == {0.01}
    assert {one.why for one in loop.cap.history} == {"schedule"}
    plain = Loop(lr=0.01, capped=False).run(8)
    assert all(map(torch.equal, loop.model.parameters(), plain.model.parameters()))


def test_the_capped_run_is_the_one_that_takes_these_rates() -> None:
    loop = Loop(momentum=0.9).run(8)
    other = Loop(capped=False, momentum=0.9)
    for rates in loop.taken:
        for group, rate in zip(other.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        other.backward()
        other.optimizer.step()
    assert all(map(torch.equal, loop.model.parameters(), other.model.parameters()))


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.93),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.4, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, 1.0, 6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 12, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1 * PEAK, PEAK, 3, mode="exp_range", gamma=0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, PEAK, 16),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.CosineAnnealingLR(o, 8)], [4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def test_every_scheduler_of_torch_is_tried() -> None:
    base = lr_scheduler.LRScheduler
    known = {name for name, kind in vars(lr_scheduler).items() if isinstance(kind, type) and issubclass(kind, base)}
    assert set(SCHEDULERS) == known - {"LRScheduler", "_LRScheduler"}


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_never_see_the_cap(name: str, tensor: bool) -> None:
    def run(capped: bool) -> Loop:
        loop = Loop(capped=capped, lr=torch.tensor(PEAK) if tensor else PEAK, momentum=0.5)
        rates = [group["lr"] for group in loop.optimizer.param_groups]
        loop.scheduler = SCHEDULERS[name](loop.optimizer)
        loop.run(12)
        if tensor:
            assert all(group["lr"] is rate for group, rate in zip(loop.optimizer.param_groups, rates, strict=True))
        return loop

    capped, plain = run(True), run(False)
    assert capped.scheduled == plain.scheduled == plain.taken
    assert any(taken < scheduled for (taken, _), (scheduled, _) in zip(capped.taken, capped.scheduled, strict=True))
    assert capped.optimizer.state_dict()["param_groups"] == plain.optimizer.state_dict()["param_groups"]


def test_a_rate_that_groups_share_as_one_tensor_is_scaled_once() -> None:
    loop = Loop()
    rate = torch.tensor(PEAK)
    for group in loop.optimizer.param_groups:
        group["lr"] = rate
    loop.run(2)
    eta = loop.monitor.history[0].measurement.critical_lr
    assert loop.taken[0] == [pytest.approx(eta / 4, rel=1e-6)] * 2
    assert rate.item() == PEAK


def test_a_median_of_zero_halves_the_limit() -> None:
    loop = Loop(lr=4.0)
    for step in range(3):
        loop.backward()
        uphill = {p: -p.grad for p in loop.model.parameters()}
        direction = sharpkern.Direction.from_tensors(uphill, loop.model)
        assert loop.monitor(loop.loss_fn, direction=direction).status == "ascent"
        loop.cap.step()
        loop.optimizer.step()
        assert loop.taken[step][0] == 4.0 / 2 ** (step + 1)
    assert {one.why for one in loop.cap.history} == {"halved"}


def test_what_the_monitor_skips_or_leaves_out_changes_no_limit() -> None:
    loop = Loop().run(7)
    limit = loop.cap.limit
    loop.run(1)
    assert len(loop.monitor.history) == 7
    assert loop.cap.limit == limit
    # Due, and skipped: nothing has a learning rate.
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.0
    loop.run(2)
    assert loop.monitor.skipped[-1][0] == 9
    assert (loop.taken[-1], loop.cap.limit) == ([0.0, 0.0], limit)


def test_before_anything_is_known_the_schedule_goes_on() -> None:
    loop = Loop()
    loop.monitor.step = 7
    loop.run(2)
    assert loop.monitor.history == []
    assert loop.taken == loop.scheduled
    assert loop.cap.state_dict() == {"num_steps": 2, "critical_lrs": [], "limit": None}


def test_frozen_means_that_later_measurements_do_not_count() -> None:
    loop = Loop(freeze_after=4).run(12)
    first = [record.measurement.critical_lr for record in loop.monitor.history[:4]]
    assert loop.cap.limit == 0.25 * statistics.median(first)
    assert loop.cap.history[-1].step == 9
    is_due = LRCap.every(5, warm_steps=10, freeze_after=17)
    assert [step for step in range(40) if is_due(step)] == [0, 1, 2, 3, 4, 5, 6, 8, 10, 15]
    assert [step for step in range(61) if LRCap.every(20)(step)] == [*range(6), *range(6, 40, 2), 40, 60]


def test_called_twice_it_does_the_same() -> None:
    once, twice = Loop().run(6), Loop()
    step = twice.cap.step
    twice.cap.step = lambda: (step(), step())
    twice.run(6)
    assert once.taken == twice.taken
    assert once.cap.state_dict() == twice.cap.state_dict()
    assert len(twice.cap.history) == 6


def test_a_step_without_it_is_an_error_before_anything_moves() -> None:
    loop = Loop().run(1)
    loop.backward()
    before = copy.deepcopy(loop.model.state_dict())
    with pytest.raises(RuntimeError, match=r"cap\.step\(\) must be called before every optimizer\.step\(\)"):
        loop.optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in loop.model.state_dict().items())
    with pytest.raises(RuntimeError, match=r"cap\.step\(\) must be called"):
        loop.optimizer.step(lambda: 1.0)
    loop.cap.remove()
    loop.optimizer.step()
    assert loop.taken[-1] == loop.scheduled[-1]


def test_a_step_that_the_scaler_skips_leaves_the_scheduled_rate() -> None:
    loop = Loop(capped=False)
    loop.optimizer = SGD(groups(loop.model))
    loop.scheduler = lr_scheduler.ExponentialLR(loop.optimizer, 0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loop.monitor = sharpkern.Monitor(loop.model, loop.optimizer, scaler=scaler)
    loop.cap = LRCap(loop.monitor, loop.optimizer, peak=PEAK)
    loop.watch()
    seen = []
    for step in range(4):
        x, y = loop.batch()
        loop.optimizer.zero_grad()
        loss_fn = lambda x=x, y=y: F.cross_entropy(loop.model(x), y)
        loss = loss_fn()
        scaler.scale(loss).backward()
        if step == 2:
            next(loop.model.parameters()).grad[0, 0] = math.inf
        loop.monitor(loss_fn, loss=loss)
        loop.cap.step()
        scaler.step(loop.optimizer)
        scaler.update()
        seen.append(loop.optimizer.param_groups[0]["lr"])
        loop.scheduler.step()
    assert seen == [pytest.approx(PEAK * 0.9**step) for step in range(4)]
    assert [record.step for record in loop.monitor.history] == [0, 1, 3]
    assert len(loop.taken) == loop.cap.num_steps == 3
    assert all(taken[0] < 0.8 * PEAK for taken in loop.taken)


class Failing(SGD):
    """Raises in the midst of a step, when told to."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        if self.fails:
            raise KeyboardInterrupt
        return result


def failed() -> Loop:
    loop = Loop(capped=False)
    loop.optimizer = Failing(groups(loop.model), lr=PEAK)
    loop.monitor = sharpkern.Monitor(loop.model, loop.optimizer)
    loop.cap = LRCap(loop.monitor, loop.optimizer, peak=PEAK)
    loop.run(2)
    loop.backward()
    loop.monitor(loop.loss_fn)
    loop.cap.step()
    loop.optimizer.fails = True
    with pytest.raises(KeyboardInterrupt):
        loop.optimizer.step()
    loop.optimizer.fails = False
    return loop


@pytest.mark.parametrize("then", ["put_back", "state_dict", "step", "remove"])
def test_after_a_step_that_raises_the_scheduled_rate_is_back(then: str) -> None:
    loop = failed()
    assert loop.optimizer.param_groups[0]["lr"] < PEAK
    if then == "state_dict":
        assert [group["lr"] for group in loop.optimizer.state_dict()["param_groups"]] == [PEAK, 0.1 * PEAK]
    else:
        getattr(loop.cap, then)()
    assert [group["lr"] for group in loop.optimizer.param_groups] == [PEAK, 0.1 * PEAK]
    if then != "remove":
        loop.run(2)
        assert loop.cap.num_steps == 4
        assert loop.scheduled[-1] == [PEAK, 0.1 * PEAK]


def test_a_scheduler_that_has_read_the_capped_rate_is_found_out() -> None:
    loop = failed()
    # As a chained scheduler does.
    loop.optimizer.param_groups[0]["lr"] *= 0.5
    with pytest.raises(RuntimeError, match=r"cap\.put_back\(\) before it where the step has raised"):
        loop.cap.step()


def test_in_a_closure_it_is_called_after_the_backward_pass() -> None:
    loop, closed = Loop().run(6), Loop()

    def closure() -> torch.Tensor:
        closed.backward()
        closed.monitor(closed.loss_fn, loss=closed.loss)
        closed.cap.step()
        return closed.loss

    for _ in range(6):
        closed.optimizer.step(closure)
        assert closed.optimizer.param_groups[0]["lr"] == PEAK
    assert loop.cap.history == closed.cap.history
    assert all(map(torch.equal, loop.model.parameters(), closed.model.parameters()))


def test_several_optimizers_are_scaled_alike() -> None:
    loop, split = Loop().run(6), Loop(capped=False)
    weights, biases = (group["params"] for group in groups(split.model))
    optimizers = [SGD(weights, lr=PEAK), SGD(biases, lr=0.1 * PEAK)]
    split.monitor = sharpkern.Monitor(split.model, optimizers)
    split.cap = LRCap(split.monitor, optimizers, peak=PEAK, warm_steps=8)
    for _ in range(6):
        split.backward()
        split.monitor(split.loss_fn, loss=split.loss)
        split.cap.step()
        for one in optimizers:
            one.step()
    assert split.cap.num_steps == 6
    assert [one.lr for one in split.cap.history] == [one.lr for one in loop.cap.history]
    assert all(map(torch.equal, loop.model.parameters(), split.model.parameters()))


@pytest.mark.parametrize("steps", [3, 7, 13])
def test_a_resumed_run_is_the_one_run_through(steps: int) -> None:
    def made() -> Loop:
        loop = Loop(momentum=0.9)
        loop.scheduler = lr_scheduler.CosineAnnealingLR(loop.optimizer, 20)
        return loop

    straight = made().run(20)
    first, second = made().run(steps), made()
    things = ("model", "optimizer", "scheduler", "monitor", "cap")
    saved = pickle.loads(pickle.dumps({name: getattr(first, name).state_dict() for name in things}))
    for name, state in saved.items():
        getattr(second, name).load_state_dict(state)
    second.data.set_state(first.data.get_state())
    second.run(20 - steps)
    assert second.taken == straight.taken[steps:]
    assert second.cap.state_dict() == straight.cap.state_dict()
    assert all(map(torch.equal, second.model.parameters(), straight.model.parameters()))


def test_what_it_did_goes_to_the_monitors_log() -> None:
    loop = Loop(capped=False)
    rows: list[tuple[int, dict[str, float]]] = []
    loop.monitor = sharpkern.Monitor(
        loop.model, loop.optimizer, every=2, log=lambda values, step: rows.append((step, values))
    )
    loop.cap = LRCap(loop.monitor, loop.optimizer, peak=PEAK)
    loop.run(4)
    told = [(step, values) for step, values in rows if "sharpness/capped_lr" in values]
    assert told == [(one.step, {"sharpness/capped_lr": one.lr, "sharpness/cap": one.limit}) for one in loop.cap.history]
    assert [step for step, _ in told] == [0, 2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"monitor": 1}, TypeError, "monitor must be a sharpkern.Monitor, got int"),
        ({"optimizer": 1}, TypeError, "optimizer must be a torch.optim.Optimizer or a list of them, got int"),
        ({"peak": "high"}, TypeError, "peak must be a positive number, got 'high'; pass the highest"),
        ({"peak": 0.0}, ValueError, "peak must be positive and below inf, got 0.0"),
        ({"share": 1.0}, ValueError, "share must be positive and below 1, got 1.0"),
        ({"warm_steps": 1.5}, TypeError, "warm_steps must be an int, got 1.5; leave it out for 40"),
        ({"warm_steps": -1}, ValueError, "warm_steps must be at least 0, got -1"),
        ({"freeze_after": 0}, ValueError, "freeze_after must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_told(change: dict[str, Any], error: type[Exception], message: str) -> None:
    loop = Loop(capped=False)
    arguments = {"monitor": loop.monitor, "optimizer": loop.optimizer, "peak": PEAK} | change
    with pytest.raises(error, match=message):
        LRCap(arguments.pop("monitor"), arguments.pop("optimizer"), **arguments)
    with pytest.raises(ValueError, match="then must be at least 1, got 0"):
        LRCap.every(0)


def test_a_schedule_beyond_its_peak_is_an_error() -> None:
    loop = Loop(lr=1.01 * PEAK)
    with pytest.raises(ValueError, match=r"peak must be the highest learning rate of the schedule, 8, got 8\.08"):
        loop.run(1)


@pytest.mark.parametrize(
    "state",
    [
        None,
        {"num_steps": 1},
        {"num_steps": -1, "critical_lrs": [], "limit": None},
        {"num_steps": 1, "critical_lrs": ["x"], "limit": None},
        {"num_steps": 1, "critical_lrs": [], "limit": math.nan},
        {"num_steps": 1, "critical_lrs": 0.5, "limit": None},
    ],
)
def test_a_state_of_something_else_is_refused_and_changes_nothing(state: Any) -> None:
    loop = Loop().run(3)
    before = loop.cap.state_dict()
    with pytest.raises(ValueError, match="state"):
        loop.cap.load_state_dict(state)
    assert loop.cap.state_dict() == before


def test_gradients_that_are_yet_to_come_are_capped_too() -> None:
    loop = Loop()
    loop.backward()
    loop.monitor(loop.loss_fn, loss=loop.loss)
    loop.optimizer.zero_grad()
    loop.cap.step()

    def closure() -> torch.Tensor:
        loss = loop.loss_fn()
        loss.backward()
        return loss

    loop.optimizer.step(closure)
    assert loop.taken == [[pytest.approx(loop.cap.limit), pytest.approx(0.1 * loop.cap.limit)]]
    assert loop.cap.limit < PEAK


def test_a_schedule_that_moves_on_before_the_step_is_an_error_before_anything_moves() -> None:
    loop = Loop()
    scheduler = lr_scheduler.LinearLR(loop.optimizer, 0.5, 1.0, 5)
    loop.backward()
    loop.monitor(loop.loss_fn, loss=loop.loss)
    loop.cap.step()
    with pytest.warns(UserWarning, match="before"):
        scheduler.step()
    before = copy.deepcopy(loop.model.state_dict())
    with pytest.raises(RuntimeError, match=r"got others in optimizer\.step\(\); call the scheduler after"):
        loop.optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in loop.model.state_dict().items())


def test_a_group_that_is_unfrozen_does_not_change_the_units() -> None:
    model = network()
    head, body = model[2], model[0]
    optimizer = SGD([{"params": body.parameters(), "lr": 1e-5}, {"params": head.parameters(), "lr": 1e-3}])
    monitor = sharpkern.Monitor(model, optimizer)
    cap = LRCap(monitor, optimizer, peak=1e-3, warm_steps=2)
    x, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
    loss_fn = lambda: F.cross_entropy(model(x), y)
    for step in range(10):
        body.requires_grad_(step >= 4)
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        monitor(loss_fn, loss=loss)
        cap.step()
        optimizer.step()
    assert {record.lr for record in monitor.history} == {1e-3, 1e-5}
    assert {(record.why, record.scheduled) for record in cap.history} == {("schedule", 1e-3)}


def test_rates_that_nobody_changed_are_put_back_beside_one_that_somebody_did() -> None:
    loop = Loop().run(1)
    loop.backward()
    loop.cap.step()
    loop.cap._scale(loop.optimizer)
    loop.optimizer.param_groups[0]["lr"] = 90.0
    with pytest.raises(RuntimeError, match="must stay"):
        loop.cap.put_back()
    assert [group["lr"] for group in loop.optimizer.param_groups] == [90.0, 0.1 * PEAK]


@pytest.mark.parametrize(
    "change", [{"warm_steps": "a"}, {"warm_steps": -4}, {"freeze_after": "a"}, {"freeze_after": 0}]
)
def test_measured_steps_that_are_none_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"{next(iter(change))} must be"):
        LRCap.every(10, **change)


def test_a_second_cap_is_refused_until_the_first_is_taken_off() -> None:
    loop = Loop()
    with pytest.raises(ValueError, match="optimizer must have one cap, got one that is capped already"):
        LRCap(loop.monitor, loop.optimizer, peak=PEAK)
    loop.cap.remove()
    LRCap(loop.monitor, loop.optimizer, peak=PEAK)
