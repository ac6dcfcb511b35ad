"""The line search on recorded losses of real training runs, warm-started from step to step."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
# By tolerance and group: most evaluations, 95th percentile of errors, answers more than 0.25 in log off.
BOUNDS = {
    ("rtol 0.01", "tuned"): (2.5, 0.01, 0),
    ("rtol 0.01", "untuned"): (2.95, 0.01, 0),
    ("rtol 0.01", "held out"): (3.0, 0.01, 0),
    ("rtol 0.05", "tuned"): (2.1, 0.05, 0),
    # Where the loss bends between probes far apart: 26 % off.
    ("rtol 0.05", "untuned"): (2.4, 0.05, 1),
    ("rtol 0.05", "held out"): (2.45, 0.05, 0),
    ("8 at a time", "untuned"): (11.5, 0.01, 0),
    ("8 at a time", "held out"): (11.0, 0.01, 0),
}


@pytest.fixture(scope="module")
def curves() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield importlib.import_module("curves")


@pytest.fixture(scope="module")
def rows(curves: ModuleType) -> list[dict[str, Any]]:
    return curves.rows(curves.load(), seeds=1)


@pytest.mark.parametrize(("search", "group"), BOUNDS)
def test_searches_along_recorded_runs_are_cheap_exact_and_miss_no_first_crossing(
    search: str, group: str, rows: list[dict[str, Any]]
) -> None:
    (row,) = [row for row in rows if (row["search"], row["group"], row["run"]) == (search, group, "all")]
    evaluations, error, missed = BOUNDS[search, group]
    assert row["without_answer"] == 0
    assert row["evaluations_mean"] <= evaluations
    assert row["error_p95"] <= error
    assert row["missed"] <= missed
    assert row["covered"] >= 0.97
    assert search != "rtol 0.01" or row["error_median"] <= 1e-3


def test_the_records_cross_first_where_they_say(curves: ModuleType) -> None:
    for of_run in curves.load().values():
        for curve in of_run:
            assert curve.rise(0.999 * curve.crossing) < 0 < curve.rise(1.001 * curve.crossing)
            assert all(curve.rise(curve.crossing * 0.9**i) < 0 for i in range(1, 50))


def test_a_replay_is_the_same_each_time(curves: ModuleType) -> None:
    of_run = curves.load()["LSTM, Adam"]
    assert curves.replay(of_run, "7") == curves.replay(of_run, "7") != curves.replay(of_run, "8")
