"""The scripts of bench/: how passes are counted, and that engines that disagree are not timed."""

import importlib
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sharpkern.engines import pace

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")


def quadratic(step):
    """L(η) = 1 − η + ½cη², which crosses at 2/c; c drifts."""
    c = 2.0 * 1.02**step
    return SimpleNamespace(step=step, lr=0.5, norm_sq=1.0, loss=lambda eta: 1 - eta + 0.5 * c * eta**2), 2 / c


@pytest.mark.parametrize(("num_parallel", "cold", "warm"), [(1, 3, 3), (8, 3, 1)])
def test_the_base_loss_has_a_pass_of_its_own_or_a_place_in_the_first(num_parallel, cold, warm):
    series = importlib.import_module("bench_line_search").Series()
    evaluated = []
    for step in range(2):
        point, truth = quadratic(step)
        f = point.loss
        point.loss = lambda eta, f=f: evaluated.append(eta) or f(eta)
        series.measure(point, 1.0, truth, 1.0, {"num_parallel": num_parallel})
        assert series.results[-1].critical_lr == pytest.approx(truth, rel=0.01)
    assert series.passes == [cold, warm]
    assert [result.evaluations for result in series.results][-1] == (2 if num_parallel == 1 else 7)
    assert len(evaluated) == sum(result.evaluations for result in series.results)


def test_cost_is_of_searches_that_found_the_same():
    cost = importlib.import_module("cost")
    (row, batched, inplace) = cost.cost_rows(cost.workloads(quick=True)[0])
    assert [row["engine"], batched["engine"], inplace["engine"]] == ["virtual", "batched", "inplace"]
    assert batched["passes"] < row["passes"] == row["forwards"] < batched["forwards"]
    assert batched["pass_over_virtual_pass"] > 0
    assert row["pass_over_virtual_pass"] is None
    assert 0 < row["extra_bytes"] < batched["extra_bytes"]
    assert inplace["extra_bytes"] >= inplace["parameter_bytes"]


def test_engines_that_disagree_are_not_timed():
    cost = importlib.import_module("cost")

    def found(*lrs, status="converged"):
        return [cost._Search(lr, status, 3, 3, 0.1) for lr in lrs]

    same = {"virtual": found(1.0, 2.0), "batched": found(1.01, 2.01)}
    assert cost._converged(same) == same
    with pytest.raises(RuntimeError, match="engine batched disagrees with virtual, nothing is timed"):
        cost._converged({"virtual": found(1.0), "batched": found(1.1)})
    with pytest.raises(RuntimeError, match="nothing is timed"):
        cost._converged({"virtual": found(1.0), "batched": found(math.nan, status="unresolved")})


def test_the_workloads_are_of_the_sizes_they_are_named_by():
    cost = importlib.import_module("cost")
    sizes = []
    for workload in cost.workloads(quick=False):
        with torch.device("meta"):
            model, _ = workload.make()
        assert isinstance(model, nn.Module)
        sizes.append((workload.name, workload.tokens, round(sum(p.numel() for p in model.parameters()) / 1e6, 1)))
    assert sizes == [
        ("MLP", 64, 0.0),
        ("GPT", 32, 0.1),
        ("GPT", 32, 14.1),
        ("GPT", 32, 28.8),
        ("GPT", 256, 28.8),
        ("GPT", 1024, 5.1),
    ]


def test_what_eight_step_sizes_at_a_time_are_worth_is_what_was_measured():
    readme = importlib.import_module("readme")
    single, several, _ = readme.mean_passes(readme.latest("line_search")["line_search"])
    assert pytest.approx(single / several, rel=0.02) == pace._WORTH
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"about {several:.1f} of eight step sizes, the base loss among them, instead of {single:.1f} of one" in text
    assert f"less than {pace._WORTH:.1f} times as long as a pass of one" in text


def test_overhead_is_of_windows_that_end_in_the_same_bits_and_of_steps_beside_others():
    bench = importlib.import_module("bench_overhead")
    found = bench.overhead(num_steps=4, num_windows=1, num_measured=3, quick=True)
    (window,) = found["windows"]
    assert window["overhead"] == window["with_seconds"] / window["without_seconds"] - 1
    steps = sorted(row["steps"] for row in found["measured_steps"])
    assert len(steps) == 3
    assert [(row["every"], row["overhead"]) for row in found["by_every"]] == [(n, steps[1] / n) for n in bench.EVERY]
    # A search of a tiny model takes longer than a step of it.
    assert steps[0] > 0.5
    assert found["first_measurement_steps"] > 0.5


def test_overhead_of_a_monitor_that_changes_the_run_is_not_recorded():
    bench = importlib.import_module("bench_overhead")
    training, twin = (bench.Training(32, 1, 16, 2) for _ in range(2))
    assert bench.windows(training, twin, num_steps=2, num_windows=1)
    training.monitor = lambda loss_fn: training.model.lm_head.weight.data.mul_(1 + 1e-6)
    with pytest.raises(RuntimeError, match="training with a monitor differs from training without, nothing is"):
        bench.windows(training, twin, num_steps=2, num_windows=1)


def test_a_monitor_on_every_50th_step_costs_less_than_a_tenth():
    found = importlib.import_module("readme").latest("overhead")["overhead"]
    (row,) = (row for row in found["by_every"] if row["every"] == 50)
    assert 0 < row["overhead"] < 0.1
    assert all(0 < window["overhead"] < 0.1 and window["steps"] == 50 for window in found["windows"])
    assert found["parameters"] > 30e6
