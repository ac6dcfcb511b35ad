"""The Monitor in a loop: schedule, warm start, held-out loss, log, CSV."""

import csv
import math
import pickle
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sharpkern
from sharpkern.search import SearchMemory
from tests.helpers.models import MLP


class Loop:
    """Full-batch training of an MLP."""

    def __init__(self, lr: float = 0.1, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = MLP()
        self.x, self.y = torch.randn(64, 16), torch.randint(0, 10, (64,))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.monitor = sharpkern.Monitor(self.model, self.optimizer, **options)

    def loss(self) -> torch.Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def run(self, steps: int, **heldout: Any) -> list[sharpkern.Measurement | None]:
        measured = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            measured.append(self.monitor(self.loss, **heldout))
            self.optimizer.step()
        return measured


def test_every_is_a_number_or_a_function() -> None:
    assert [m is not None for m in Loop(every=3).run(7)] == [True, False, False, True, False, False, True]
    assert [m is not None for m in Loop(every=lambda step: step in (1, 4)).run(5)] == [False, True, False, False, True]


def test_steps_that_are_not_due_touch_nothing() -> None:
    loop = Loop(every=10)
    loop.run(1)

    def never() -> torch.Tensor:
        raise AssertionError("the closure was called on a step that is not due")

    loop.optimizer.zero_grad()
    assert loop.monitor(never, heldout=never) is None
    assert len(loop.monitor.history) == 1


def test_the_warm_start_survives_a_checkpoint() -> None:
    straight, first = Loop(), Loop()
    straight.run(6)
    first.run(3)
    state = pickle.loads(pickle.dumps(first.monitor.state_dict()))
    second = sharpkern.Monitor(first.model, first.optimizer)
    second.load_state_dict(state)
    first.monitor = second
    first.run(3)
    resumed = second.history
    assert [record.step for record in resumed] == [3, 4, 5]
    for a, b in zip(straight.monitor.history[3:], resumed, strict=True):
        assert a.measurement.critical_lr == b.measurement.critical_lr
        assert a.measurement.probes == b.measurement.probes


def test_a_checkpoint_of_the_monitor_loads_without_pickled_classes(tmp_path: Path) -> None:
    loop = Loop()
    loop.run(2, heldout=lambda: loop.loss() * 1.0)
    torch.save(loop.monitor.state_dict(), tmp_path / "monitor.pt")
    loop.monitor.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))


GOOD = SearchMemory(eta=0.5, exponent=1.0, slope=0.1, norm_sq=2.0, half_width=0.7).to_dict()
STATE = {"step": 3, "memory": GOOD, "heldout_memory": GOOD, "is_below": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "x"}, "state\\['step'\\] must be a count of calls, got 'x'"),
        ({"step": -1}, "state\\['step'\\] must be a count of calls, got -1"),
        ({"step": 1.5}, "got 1.5"),
        ({"step": True}, "got True"),
        ({"step": None}, "got None"),
        ({"is_below": 1}, "state\\['is_below'\\] must be True or False, got 1"),
        ({"memory": [0.5]}, "memory of a search must be a dictionary with 'eta', .* got \\[0.5\\]"),
        ({"memory": {**GOOD, "more": 1.0}}, "memory of a search must be a dictionary with 'eta', .*'half_width'"),
        ({"memory": {**GOOD, "eta": "0.5"}}, "'eta' of a search's memory must be a number or None, got '0.5'"),
        ({"heldout_memory": {**GOOD, "slope": [1.0]}}, "'slope' of a search's memory must be a number or None"),
        ({"heldout_memory": {**GOOD, "eta": True}}, "'eta' of a search's memory .* got True"),
        ({"block_memories": [GOOD]}, r"state\['block_memories'\] must map names of blocks to memories, got \["),
        ({"block_memories": {"head": {**GOOD, "eta": "1"}}}, "'eta' of a search's memory must be a number or None"),
    ],
)
def test_a_state_of_something_else_is_refused_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    loop = Loop(warn_below=1e-9)
    loop.run(2, heldout=lambda: loop.loss() * 1.0)
    before = loop.monitor.state_dict()
    with pytest.raises(ValueError, match=message):
        loop.monitor.load_state_dict({**STATE, **change})
    assert loop.monitor.state_dict() == before
    loop.monitor.load_state_dict(STATE)
    assert loop.monitor.state_dict() == STATE


@pytest.mark.parametrize("state", [None, [1], "state", {"step": 1}])
def test_what_is_no_state_at_all_is_refused(state: object) -> None:
    with pytest.raises(ValueError, match="state must be what state_dict"):
        Loop().monitor.load_state_dict(state)


@pytest.mark.parametrize(
    "spoilt",
    [{name: value} for name in GOOD for value in (math.nan, math.inf)]
    + [{"eta": -0.5}, {"eta": 0.0}, {"norm_sq": -1.0}, {"half_width": 1e9}, {"half_width": -1.0}, {"eta": 1e-300}],
)
def test_a_guess_that_is_none_begins_a_search_anew(spoilt: dict[str, float]) -> None:
    loop = Loop()
    loop.monitor.load_state_dict({**STATE, "memory": {**GOOD, **spoilt}})
    (m,) = loop.run(1)
    (cold,) = Loop().run(1)
    assert (m.status, m.critical_lr) == ("converged", cold.critical_lr)
    assert loop.monitor.step == 4


def test_a_state_of_before_there_was_an_alarm_loads() -> None:
    loop = Loop()
    state = {name: value for name, value in STATE.items() if name != "is_below"}
    loop.monitor.load_state_dict(state)
    assert loop.monitor.state_dict() == {**STATE, "is_below": False}


def test_a_warm_start_takes_fewer_forwards_than_a_cold_one() -> None:
    loop = Loop()
    loop.run(12)
    warm = [record.measurement.forwards for record in loop.monitor.history[8:]]
    assert max(warm) < loop.monitor.history[0].measurement.forwards
    assert sum(warm) / len(warm) <= 4.5


def test_the_heldout_loss_is_measured_along_the_same_direction() -> None:
    loop = Loop()
    x, y = torch.randn(64, 16), torch.randint(0, 10, (64,))
    heldout = lambda: F.cross_entropy(loop.model(x), y)
    loop.run(3, heldout=heldout)
    record = loop.monitor.history[-1]
    assert record.heldout is not None
    assert record.heldout.base_loss != record.measurement.base_loss
    assert record.heldout.slope is None
    # The same loss as held-out loss has the same critical learning rate, though its slope was not given.
    same = Loop()
    same.run(2, heldout=lambda: same.loss() * 1.0)
    record = same.monitor.history[-1]
    assert record.heldout.critical_lr == pytest.approx(record.measurement.critical_lr, rel=2e-2)


class Writer:
    """Has the one method of TensorBoard's SummaryWriter that is needed."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        self.scalars.append((tag, value, global_step))


def test_log_fits_wandb_and_summary_writer() -> None:
    calls: list[tuple[dict[str, float], int]] = []
    Loop(every=2, log=lambda values, step: calls.append((values, step))).run(3)
    assert [step for _, step in calls] == [0, 2]
    values, _ = calls[0]
    assert values["sharpness/lambda_c"] == pytest.approx(2 / values["sharpness/critical_lr"])
    assert values["sharpness/headroom"] == pytest.approx(values["sharpness/critical_lr"] / 0.1)
    writer = Writer()
    Loop(every=2, log=writer).run(3)
    assert ("sharpness/lambda_c", values["sharpness/lambda_c"], 0) in writer.scalars


def test_history_becomes_a_table(tmp_path: Path) -> None:
    loop = Loop(every=2)
    loop.run(5)
    loop.monitor.to_csv(tmp_path / "run.csv")
    with open(tmp_path / "run.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 2, 4]
    for row, record in zip(rows, loop.monitor.history, strict=True):
        assert float(row["lambda_c"]) == record.measurement.sharpness
        assert row["status"] == record.measurement.status
    loop.monitor.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_the_progress_line_tells_the_last_measurement() -> None:
    loop = Loop()
    assert "not measured" in str(loop.monitor)
    loop.run(1)
    m = loop.monitor.history[0].measurement
    assert str(loop.monitor) == (
        f"step 0: loss {m.base_loss:.4g}, λ_c {m.sharpness:.4g}, "
        f"η_c {m.critical_lr:.3g} = {m.critical_lr / 0.1:.3g} × lr"
    )
    bad = sharpkern.Monitor(loop.model, loop.optimizer)
    bad(lambda: loop.loss() * math.nan)
    assert str(bad) == "step 0: loss nan, λ_c nonfinite"


def test_a_loop_with_adamw_and_a_schedule() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 10))
    x, y = torch.randn(64, 16), torch.randint(0, 10, (64,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5)
    monitor = sharpkern.Monitor(model, optimizer)
    for _ in range(8):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        measured = monitor(lambda: F.cross_entropy(model(x), y))
        optimizer.step()
        schedule.step()
        assert measured.status == "converged"
    assert [round(record.lr, 5) for record in monitor.history[:3]] == [0.001, 0.0028, 0.0046]


def test_a_schedule_that_starts_at_zero_is_skipped_and_the_run_goes_on() -> None:
    loop = Loop()
    schedule = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda step: step / 3)
    measured = []
    for _ in range(3):
        measured.extend(loop.run(1))
        schedule.step()
    assert [m is not None for m in measured] == [False, True, True]
    ((step, reason),) = loop.monitor.skipped
    assert step == 0
    assert "learning rate" in reason


def test_a_step_that_the_loss_scaler_will_skip_is_skipped() -> None:
    loop = Loop()
    loop.loss().backward()
    next(loop.model.parameters()).grad.fill_(math.inf)
    assert loop.monitor(loop.loss) is None
    assert "finite" in loop.monitor.skipped[0][1]


def test_a_monitor_called_before_backward_is_an_error() -> None:
    loop = Loop()
    with pytest.raises(ValueError, match=r"after loss\.backward\(\)"):
        loop.monitor(loop.loss)


def test_misspelt_options_and_foreign_states_are_named() -> None:
    loop = Loop()
    with pytest.raises(TypeError, match="Monitor has no option 'rtoll'; did you mean 'rtol'"):
        sharpkern.Monitor(loop.model, loop.optimizer, rtoll=0.1)
    for wrong, right in (
        ("warn_bellow", "warn_below"),
        ("evry", "every"),
        ("logs", "log"),
        ("max_forward", "max_forwards"),
    ):
        with pytest.raises(TypeError, match=f"Monitor has no option '{wrong}'; did you mean '{right}'"):
            sharpkern.Monitor(loop.model, loop.optimizer, **{wrong: 1.5})
    with pytest.raises(TypeError, match=r"no option 'xyz'; did you mean 'every' or 'log' or .* or 'rtol' or"):
        sharpkern.Monitor(loop.model, loop.optimizer, xyz=1.5)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        sharpkern.Monitor(None, loop.optimizer)
    with pytest.raises(ValueError, match="state must be what state_dict"):
        loop.monitor.load_state_dict({})


def test_only_finite_values_go_to_the_log() -> None:
    sent: list[dict[str, float]] = []
    loop = Loop(log=lambda values, step: sent.append(values))
    loop.loss().backward()
    loop.monitor(lambda: loop.loss() * math.nan)
    assert sent[0]["sharpness/converged"] == 0.0
    assert "sharpness/lambda_c" not in sent[0]
    assert all(math.isfinite(value) for value in sent[0].values())


def test_a_direction_of_ones_own_is_measured_in_place_of_the_optimizers() -> None:
    loop = Loop()
    loop.loss().backward()
    made: list[sharpkern.Direction] = []

    def direction() -> sharpkern.Direction:
        made.append(sharpkern.Direction.from_gradients(loop.model))
        return made[-1]

    by_function = loop.monitor(loop.loss, direction=direction)
    by_value = loop.monitor(loop.loss, direction=made[0])
    assert by_function.critical_lr == pytest.approx(by_value.critical_lr, rel=2e-2)
    assert [record.lr for record in loop.monitor.history] == [None, None]
    # On a step that is not due nothing is made.
    quiet = Loop(every=2)
    quiet.monitor.step = 1
    assert not quiet.monitor.is_due
    assert quiet.monitor(quiet.loss, direction=direction) is None
    assert len(made) == 1


def headrooms(loop: Loop) -> list[float]:
    return [record.row()["headroom"] for record in loop.monitor.history]


def test_the_alarm_sounds_once_for_each_fall_of_the_median_below_the_ratio() -> None:
    calm = Loop(lr=0.1)
    calm.run(6)
    ratio = 2 * max(headrooms(calm))
    loop = Loop(lr=0.1, warn_below=ratio)
    # Four measurements are none to judge by.
    loop.run(4)
    with pytest.warns(sharpkern.HeadroomWarning) as caught:
        loop.run(2)
    (warning,) = caught
    median = statistics.median(record.measurement.critical_lr for record in loop.monitor.history[:5])
    headroom = statistics.median(headrooms(loop)[:5])
    assert str(warning.message) == (
        f"step 4: the learning rate is 0.1, and of the last 5 measurements the median of η_c is {median:.3g} and that "
        f"of η_c over the learning rate {headroom:.3g}, below {ratio:.3g}; try {median / max(4, ratio):.3g} or less, "
        "lengthen the warm-up, or cap the rate by sharpkern.LRCap"
    )
    # A smaller learning rate ends it when the median is past, and a larger one later sets it off again; the warning is
    # of the user's line.
    loop.optimizer.param_groups[0]["lr"] = 0.01
    loop.run(3)
    loop.optimizer.param_groups[0]["lr"] = 0.1
    loop.run(2)
    with pytest.warns(sharpkern.HeadroomWarning, match="step 11") as caught:
        loop.run(1)
    assert caught[0].filename == __file__
    # A checkpoint knows that it has sounded.
    state = pickle.loads(pickle.dumps(loop.monitor.state_dict()))
    taken_up = sharpkern.Monitor(loop.model, loop.optimizer, warn_below=ratio)
    taken_up.load_state_dict(state)
    loop.monitor = taken_up
    loop.run(5)
    assert statistics.median(headrooms(loop)) < ratio


def test_an_update_that_goes_uphill_sets_off_the_alarm() -> None:
    loop = Loop(warn_below=1.0)
    loop.loss().backward()
    uphill = sharpkern.Direction.from_tensors({p: -p.grad for p in loop.model.parameters()}, loop.model)
    for _ in range(4):
        loop.monitor(loop.loss, direction=replace(uphill, lr=0.1))
    with pytest.warns(sharpkern.HeadroomWarning, match="goes uphill"):
        loop.monitor(loop.loss, direction=replace(uphill, lr=0.1))
    assert loop.monitor.suggest_lr() == 0.0


def test_the_suggested_rate_is_half_of_where_a_quadratic_falls_the_most() -> None:
    weight = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    model = nn.Module()
    model.weight = weight
    curvature = torch.tensor([5.0, 1.0], dtype=torch.float64)
    loss_fn = lambda: 0.5 * (curvature * weight.square()).sum()
    optimizer = torch.optim.SGD([weight], lr=0.01)
    monitor = sharpkern.Monitor(model, optimizer, rtol=1e-4)
    assert monitor.suggest_lr() is None
    loss_fn().backward()
    monitor(loss_fn)
    g = curvature * weight.detach()
    best = float(g @ g / (g @ (curvature * g)))
    assert monitor.suggest_lr() == pytest.approx(0.5 * best, rel=1e-3)
    # The median of the last five counts.
    for _ in range(6):
        optimizer.step()
        optimizer.zero_grad()
        loss_fn().backward()
        monitor(loss_fn)
    etas = [record.measurement.critical_lr for record in monitor.history]
    assert len(set(etas)) == 7
    assert monitor.suggest_lr() == statistics.median(etas[-5:]) / 4


def test_the_alarm_never_suggests_a_rate_above_the_ratio() -> None:
    calm = Loop(lr=0.1)
    calm.run(5)
    ratio = 4 * max(headrooms(calm))
    loop = Loop(lr=0.1, warn_below=ratio)
    with pytest.warns(sharpkern.HeadroomWarning, match="try ") as caught:
        loop.run(5)
    suggested = float(str(caught[0].message).split("try ")[1].split(" or less")[0])
    median = statistics.median(record.measurement.critical_lr for record in loop.monitor.history)
    assert suggested == pytest.approx(median / ratio, rel=1e-2)
    assert suggested < 0.1


def test_the_learning_rate_may_grow_until_nothing_is_finite() -> None:
    """A range test that clips its gradients: weights overflow, and the monitor looks on."""
    loop = Loop()
    loop.monitor = sharpkern.Monitor(loop.model, torch.optim.SGD(loop.model.parameters(), lr=0.1, weight_decay=0.1))
    loop.run(1)
    with torch.no_grad():
        next(loop.model.parameters()).fill_(math.inf)
    for p in loop.model.parameters():
        p.grad.fill_(1.0)
    assert loop.monitor(loop.loss) is None
    assert "must be finite" in loop.monitor.skipped[0][1]


def test_gradients_that_were_zeroed_too_early_are_skipped_with_the_reason() -> None:
    loop = Loop()
    optimizer = torch.optim.AdamW(loop.model.parameters(), lr=1e-3)
    monitor = sharpkern.Monitor(loop.model, optimizer)
    loop.loss().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert monitor(loop.loss) is None
    assert "all gradients are zero: measure between backward() and zero_grad()" in monitor.skipped[0][1]


def two_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    first, *others = model.parameters()
    return [torch.optim.RMSprop([first], lr=1e-3), torch.optim.AdamW(others, lr=1e-2)]


def test_several_optimizers_are_measured_as_the_one_step_they_take() -> None:
    loop = Loop()
    made = two_optimizers(loop.model)
    monitor = sharpkern.Monitor(loop.model, made, rtol=1e-3)
    loop.loss().backward()
    measured = monitor(loop.loss)
    before = {p: p.detach().clone() for p in loop.model.parameters()}
    for optimizer in made:
        optimizer.step()
    step = sharpkern.Direction.between(before, {p: p.detach().clone() for p in before}, lr=1e-3)
    with torch.no_grad():
        for p, value in before.items():
            p.copy_(value)
    expected = sharpkern.critical_sharpness(loop.model, loop.loss, step, rtol=1e-3)
    assert monitor.history[0].lr == 1e-3
    assert measured.critical_lr == pytest.approx(expected.critical_lr, rel=3e-3)


def test_parameters_that_another_optimizer_moves_are_told_of_once() -> None:
    loop = Loop()
    first, _ = two_optimizers(loop.model)
    monitor = sharpkern.Monitor(loop.model, first)
    loop.loss().backward()
    with pytest.warns(
        sharpkern.UnmovedWarning, match=r"^\d parameters of the model hold gradients and stand in no"
    ) as told:
        monitor(loop.loss)
    assert told[0].filename == __file__
    monitor(loop.loss)
    assert len(told) == 1


def test_what_no_optimizer_would_move_anyway_is_not_told_of() -> None:
    """Frozen ones with an old gradient, gradients of zero, none, a rate of 0, and masters in their place."""
    loop = Loop()
    weight, frozen, zero, none, resting, moving = loop.model.parameters()
    loop.loss().backward()
    frozen.requires_grad_(False)
    zero.grad.zero_()
    none.grad = None
    master = weight.detach().clone()
    master.grad = weight.grad
    optimizer = torch.optim.SGD([{"params": [master, moving]}, {"params": [resting], "lr": 0.0}], lr=0.1)
    monitor = sharpkern.Monitor(loop.model, optimizer, masters={weight: master})
    assert monitor(loop.loss) is not None


@pytest.mark.parametrize("engine", ["auto", "inplace"])
def test_a_loss_that_is_constant_by_design_is_skipped_with_the_reason(engine: str) -> None:
    """A policy gradient as trainers write it: the ratio is 1 wherever the weights are, and its gradient is not 0."""
    loop = Loop(engine=engine)

    def surrogate() -> torch.Tensor:
        logp = torch.log_softmax(loop.model(loop.x), -1)[:, 0]
        return -(torch.exp(logp - logp.detach()) * loop.x[:, 0]).mean()

    surrogate().backward()
    # Warnings are errors here: that an engine was given up would be a false one.
    assert loop.monitor(surrogate).status == "unresolved"
    assert not loop.monitor.history
    ((step, reason),) = loop.monitor.skipped
    assert step == 0
    assert "loss_fn must depend on the parameters" in reason
    loop.run(1, heldout=surrogate)
    assert loop.monitor.history[0].heldout.status == "unresolved"
    with pytest.raises(sharpkern.NoUpdateError, match="leave detached copies of it out"):
        sharpkern.critical_sharpness(
            loop.model, surrogate, sharpkern.Direction.from_optimizer(loop.optimizer), engine=engine
        )
    # The run goes on, and so does the monitor.
    assert loop.run(1)[0] is not None
