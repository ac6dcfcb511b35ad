"""bench/decisions: what counts as a failure, that runs are made once, and that the committed counts come out again."""

import importlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("decisions.trials")


def test_two_runs_that_are_made_anew_fail_as_the_committed_ones(trials: Any) -> None:
    made, kept = trials.quick()
    at_best = {("MLP", "AdamW", policy, 1): 0 for policy in ("none", "cap")}
    assert made == kept == {**at_best, ("MLP", "AdamW", "none", 10): 1, ("MLP", "AdamW", "cap", 10): 0}


def test_regret_is_of_the_best_peak_and_a_quarter_of_its_gain_is_a_failure(trials: Any) -> None:
    best = trials.Trial("MLP", "SGD", "none", 1, 0.1, 20, 2.0, 1.0, 0, 1.0)
    others = [
        replace(best, multiple=0, final=0.5),
        replace(best, multiple=10, final=1.3),
        replace(best, multiple=10, seed=21, final=math.inf),
        replace(best, policy="cap", multiple=10, final=1.2),
        replace(best, policy="find_lr", multiple=0, peak=0.2, final=math.nan),
        replace(best, policy="range test", multiple=0, peak=0.05, final=math.nan),
    ]
    found = [best, *others]
    assert [regret for _, regret in trials.regrets(found)] == pytest.approx([0.0, 0.3, 2.0, 0.2])
    key = ("MLP", "SGD")
    assert trials.failures(found) == {(*key, "none", 1): 0, (*key, "none", 10): 2, (*key, "cap", 10): 0}
    rows = trials.cap_table(found)[2:]
    assert rows == [
        "| known | SGD | no cap | 0.0% | 0 of 1 | 115.0% | 2 of 2 |  |  |",
        "| known | SGD | **cap** |  |  | 20.0% | 0 of 1 |  |  |",
    ]
    assert trials.task_table(found)[2:] == ["| MLP | SGD | 0.1 | 0% |  | 115% | 20% |  |  |"]
    assert trials.find_table(found)[2:] == [
        "| known | SGD | find_lr | 1 | ×2.0 | ×2.0 |",
        "| known | SGD | range test, lowest loss × 2 | 1 | ×1.0 | ×1.0 |",
    ]


def test_a_run_is_made_once(trials: Any, tmp_path: Path) -> None:
    made = []

    def make() -> Any:
        made.append(1)
        return trials.Trial("GPT, Muon", "Muon", "cap", 10, 0.215443469, 20, 5.5, math.inf, 7, 1.5)

    path = tmp_path / "runs.csv"
    key = make().key
    for _ in range(2):
        log = trials.Log(path)
        assert log.get(key, make).key == log.get(key, make).key == key
    assert len(made) == 2
    assert trials.load(path) == [replace(make(), peak=0.215443)]


def test_the_committed_runs_are_whole(trials: Any) -> None:
    rows = trials.load()
    assert len({row.key for row in rows if row.policy not in ("find_lr", "range test")}) == sum(
        row.policy not in ("find_lr", "range test") for row in rows
    )
    kinds = {(row.task, row.optimizer) for row in rows}
    assert kinds <= {(task, kind) for task, (_, of_task) in trials.MODELS.items() for kind in of_task}
    # Each kind has every multiple, with and without the cap.
    for kind in kinds:
        found = {(row.multiple, row.policy) for row in rows if (row.task, row.optimizer) == kind}
        assert {(multiple, policy) for multiple in trials.MULTIPLES for policy in ("none", "cap")} <= found


@pytest.fixture
def alarms(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("decisions.alarms")


def test_a_run_fails_where_its_loss_stays_up(alarms: Any) -> None:
    falling = [1.0 - 0.01 * step for step in range(50)]
    assert alarms.failed_at(falling) is None
    assert alarms.failed_at([*falling, 1.2, *[0.5] * 25]) is None, "a spike does not stay"
    assert alarms.failed_at([*falling, *[3.0] * 5]) == 50
    assert alarms.failed_at([*falling, *[3.0] * 4]) is None


def test_curves_and_fixed_alarms_on_runs_made_up(alarms: Any) -> None:
    def run(kind: float, failed: int | None, headroom: list[float]) -> dict[str, Any]:
        steps = list(range(10, 10 + 5 * len(headroom), 5))
        ratios = {"loss over lowest": [1.0] * len(steps), "norm over median": [5.0] * len(steps)}
        return {
            "task": "MLP", "optimizer": "SGD", "kind": kind, "seed": 40, "failed_at": failed, "steps": steps,
            "headroom": headroom, **ratios,
        }  # fmt: skip

    # A low headroom before step 15, or from the failure on, is not looked at.
    good = [run(1, None, [0.1, 4, 4]), run(0.333, None, [9, 9, 2])]
    bad = [run(10, 40, [9, 3, 1, 5, 5, 5, 0.1]), run("ramp", 25, [9, 8, 8, 0.1])]
    early, between = run(10, 20, [9, 0.1]), run(3, None, [0.1, 0.1])
    rows = [*good, *bad, early, between]
    assert alarms.parted(rows) == (good, bad)
    # Least headrooms: 4 and 2 in good runs, 1 and 8 in bad ones.
    assert alarms.roc(rows, "headroom η_c/η") == [(0, 0), (0, 0.5), (0.5, 0.5), (1, 0.5), (1, 1)]
    assert alarms.area(alarms.roc(rows, "headroom η_c/η")) == 0.5
    table = alarms.alarm_table(rows)
    assert "| headroom < 1.5 | 0 of 2 | 1 of 2 | 20 steps |" in table
    assert "| gradient norm > 4 × its median | 2 of 2 | 2 of 2 | 18 steps |" in table


def test_an_alarm_run_is_made_anew_as_it_was(alarms: Any) -> None:
    kept = next(row for row in alarms.load() if row["task"] == "MLP" and row["failed_at"] and row["failed_at"] > 30)
    best = {
        (one.task, one.optimizer): one.peak for one in alarms.trials.load() if (one.policy, one.multiple) == ("none", 1)
    }
    key = kept["task"], kept["optimizer"]
    made = alarms.train(*key, best[key], kept["kind"], kept["seed"])
    assert abs(made["failed_at"] - kept["failed_at"]) <= 10
    num = min(len(made["steps"]), len(kept["steps"]), 4)
    assert made["headroom"][:num] == pytest.approx(kept["headroom"][:num], rel=0.1)
