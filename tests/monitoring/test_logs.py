"""Logs: every value arrives, whatever the logger's rule about steps and however often the loop logs itself."""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import sharpkern
from tests.monitoring.test_monitor import Loop, Writer
from tests.monitoring.test_plot import record


class Run:
    """As a run of wandb keeps its history: steps never go back, and what comes for an earlier one is dropped."""

    __module__ = "wandb.sdk.wandb_run"

    def __init__(self) -> None:
        self.step = 0
        self.rows: list[dict[str, float]] = []
        self.metrics: list[tuple[str, str]] = []
        self._open: dict[str, float] = {}

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, data: dict[str, float], step: int | None = None, commit: bool | None = None) -> None:
        if step is not None and step < self.step:
            return
        if step is not None and step > self.step:
            self._close(step)
        self._open.update(data)
        if commit or (commit is None and step is None):
            self._close(self.step + 1)

    log.__module__ = __module__

    def finish(self) -> None:
        self._close(self.step + 1)

    def _close(self, step: int) -> None:
        if self._open:
            self.rows.append({**self._open, "_step": self.step})
        self._open, self.step = {}, step

    def curve(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]


def twice_without_a_step(run: Run, i: int, monitor: Callable[[], object]) -> None:
    run.log({"loss": i})
    monitor()
    run.log({"accuracy": i})


def twice_with_a_step(run: Run, i: int, monitor: Callable[[], object]) -> None:
    run.log({"loss": i}, step=i)
    monitor()
    run.log({"accuracy": i}, step=i)


def seldom(run: Run, i: int, monitor: Callable[[], object]) -> None:
    monitor()
    if i % 3 == 0:
        run.log({"loss": i})


def of_a_run_that_was_taken_up(run: Run, i: int, monitor: Callable[[], object]) -> None:
    run.step = max(run.step, 1000)
    twice_without_a_step(run, i, monitor)


@pytest.mark.parametrize("train", [twice_without_a_step, twice_with_a_step, seldom, of_a_run_that_was_taken_up])
def test_nothing_that_goes_to_wandb_is_dropped(train: Callable[[Run, int, Callable[[], object]], None]) -> None:
    run = Run()
    loop = Loop(every=2, log=run.log)
    for i in range(8):
        train(run, i, lambda: loop.run(1))
    run.finish()
    assert run.curve("sharpness/lambda_c") == [r.measurement.sharpness for r in loop.monitor.history]
    assert run.curve("sharpness/step") == [0, 2, 4, 6]
    assert run.curve("loss") == [i for i in range(8) if train is not seldom or i % 3 == 0]
    assert run.curve("accuracy") == ([] if train is seldom else list(range(8)))
    assert run.metrics == [("sharpness/*", "sharpness/step")]


def test_wandb_log_of_before_the_run_began_finds_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()

    def log(*_: object, **__: object) -> None:
        raise RuntimeError("You must call wandb.init() before wandb.log()")

    log.__module__ = "wandb.sdk.lib.preinit"
    monkeypatch.setitem(sys.modules, "wandb", type("wandb", (), {"run": run}))
    Loop(log=log).run(1)
    run.finish()
    assert run.curve("sharpness/step") == [0]
    monkeypatch.setitem(sys.modules, "wandb", type("wandb", (), {"run": None}))
    with pytest.raises(RuntimeError, match=r"call wandb\.init"):
        Loop(log=log).run(1)


def test_a_logger_without_steps_is_told_the_step_among_the_values() -> None:
    kept: list[dict[str, float]] = []
    seen: list[dict[str, float]] = []

    def log(values: dict[str, float]) -> None:
        seen.append(values)

    Loop(every=2, log=kept.append).run(3)
    Loop(every=2, log=log).run(3)
    assert [values["sharpness/step"] for values in kept] == [values["sharpness/step"] for values in seen] == [0, 2]
    named: list[tuple[Any, Any]] = []
    Loop(every=2, log=lambda values, **more: named.append((values, more))).run(3)
    assert [more for _, more in named] == [{"step": 0}, {"step": 2}]
    assert "sharpness/step" not in named[0][0]


def no_rise(lr: float = 0.1) -> sharpkern.Record:
    found = record(3, 2e-9, "unbounded", lr=lr)
    return replace(found, heldout=found.measurement)


def test_a_bound_is_not_logged_as_a_value() -> None:
    sent: list[dict[str, float]] = []
    writer = Writer()
    for log in (lambda values, step: sent.append(values), writer):
        Loop(log=log).monitor._send(no_rise())
    (values,) = sent
    assert {name: value for name, value, _ in writer.scalars} == values
    bound = no_rise().measurement.critical_lr
    assert values == {
        "sharpness/converged": 0.0,
        "sharpness/unbounded": 1.0,
        "sharpness/critical_lr_bound": bound,
        "sharpness/forwards": 3,
        "sharpness/lr": 0.1,
        "sharpness/loss": 2 - 3 / 100,
    }
    assert no_rise().row()["headroom"] is None
    assert (no_rise().row()["critical_lr"], no_rise().row()["status"]) == (bound, "unbounded")


@pytest.mark.parametrize("status", ["converged", "ascent", "unresolved", "nonfinite"])
def test_the_status_is_logged_by_its_name(status: str) -> None:
    sent: list[dict[str, float]] = []
    value = {"converged": 4.0, "ascent": math.inf}.get(status, math.nan)
    Loop(log=lambda values, step: sent.append(values)).monitor._send(record(0, value, status))
    (values,) = sent
    assert values[f"sharpness/{status}"] == 1.0
    assert values["sharpness/converged"] == float(status == "converged")
    assert ("sharpness/headroom" in values) == (status in {"converged", "ascent"})
