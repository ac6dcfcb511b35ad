"""The scripts of bench/: how passes are counted, that what disagrees is not timed, and what committed records show."""

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import sharpkern
from sharpkern.bench.cases import BlockedError
from sharpkern.engines import timing as pace

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")


def quadratic(step):
    """L(η) = 1 − η + ½cη², which crosses at 2/c; c drifts."""
    c = 2.0 * 1.02**step
    return SimpleNamespace(step=step, lr=0.5, norm_sq=1.0, loss=lambda eta: 1 - eta + 0.5 * c * eta**2), 2 / c


@pytest.mark.parametrize(("num_parallel", "cold", "warm"), [(1, 5, 2), (8, 4, 1)])
def test_the_base_loss_has_a_pass_of_its_own_or_a_place_in_the_first(num_parallel, cold, warm):
    measure_point = importlib.import_module("bench_line_search").measure_point
    evaluated, found, memory = [], [], None
    # The first ones measure the noise.
    for step in range(6):
        point, truth = quadratic(step)
        f = point.loss
        point.loss = lambda eta, f=f: evaluated.append(eta) or f(eta)
        result, passes = measure_point(point, 1.0, 1.0, memory, {"num_parallel": num_parallel})
        assert result.critical_lr == pytest.approx(truth, rel=0.01)
        memory = result.memory
        found.append((result.evaluations, passes))
    assert (found[0][1], found[-1][1]) == (cold, warm)
    assert found[-1][0] == (1 if num_parallel == 1 else 7)
    assert len(evaluated) == sum(evaluations for evaluations, _ in found)


def test_cost_is_of_searches_that_found_the_same():
    cost = importlib.import_module("bench_line_search")
    (row, batched, inplace) = cost.cost_rows(cost.workloads(quick=True)[0])
    assert [row["engine"], batched["engine"], inplace["engine"]] == ["virtual", "batched", "inplace"]
    assert batched["passes"] < row["passes"] == row["forwards"] < batched["forwards"]
    assert batched["pass_over_virtual_pass"] > 0
    assert row["pass_over_virtual_pass"] is None
    assert 0 < row["extra_bytes"] < batched["extra_bytes"]
    assert inplace["extra_bytes"] >= inplace["parameter_bytes"]


def test_engines_that_disagree_are_not_timed():
    cost = importlib.import_module("bench_line_search")

    def found(*lrs, status="converged"):
        return [cost._Search(SimpleNamespace(critical_lr=lr, status=status), 3) for lr in lrs]

    same = {"virtual": found(1.0, 2.0), "batched": found(1.01, 2.01)}
    assert cost._converged(same) == same
    with pytest.raises(RuntimeError, match="engine batched disagrees with virtual, nothing is timed"):
        cost._converged({"virtual": found(1.0), "batched": found(1.1)})
    with pytest.raises(RuntimeError, match="nothing is timed"):
        cost._converged({"virtual": found(1.0), "batched": found(math.nan, status="unresolved")})


def test_no_kernel_is_timed_whose_checks_fail_or_are_absent(monkeypatch):
    kernels, accuracy = (importlib.import_module(name) for name in ("bench_kernels", "sharpkern.bench.accuracy"))
    monkeypatch.setattr(accuracy, "judge", lambda bench, passes: {"passed": passes})
    last_fails = {case.operation: lambda: iter([True, False]) for case in kernels.CASES.values()}
    monkeypatch.setattr(accuracy, "checks", lambda bench: last_fails)
    for name in kernels.CASES:
        with pytest.raises(BlockedError, match="did not pass the check of correctness"):
            kernels.test_speed(name, benchmark=None)
    with pytest.raises(ValueError, match="calls must hold one call at least, got none"):
        list(accuracy.judged(kernels.BENCH, []))


def test_the_workloads_are_of_the_sizes_they_are_named_by():
    cost = importlib.import_module("bench_line_search")
    sizes = []
    for workload in cost.workloads(quick=False):
        with torch.device("meta"):
            training = workload.make()
        sizes.append((workload.name, workload.tokens, round(training.parameters / 1e6, 1)))
    assert sizes == [
        ("MLP", 64, 0.0),
        ("GPT", 32, 0.1),
        ("GPT", 32, 13.8),
        ("GPT", 32, 28.8),
        ("GPT", 256, 28.8),
        ("GPT", 1024, 5.1),
    ]


def test_what_eight_step_sizes_at_a_time_are_worth_is_what_was_measured():
    readme = importlib.import_module("readme")
    single, several, _ = readme.mean_passes()
    assert pytest.approx(single / several, rel=0.02) == pace._WORTH
    text, numbers = (
        " ".join((ROOT / "docs" / name).read_text("utf-8").split()) for name in ("engines.md", "numbers.md")
    )
    assert f"about {several:.1f} passes of eight step sizes instead of {single:.1f} passes of one" in text
    assert f"less than {pace._WORTH:.1f} times as long as a pass of one" in text
    assert f"Batching pays when it is below {pace._WORTH:.1f}." in numbers


def test_overhead_is_of_windows_that_end_in_the_same_bits_and_of_steps_beside_others():
    bench = importlib.import_module("bench_overhead")
    found = bench.overhead(quick=True)
    (window,) = found["windows"]
    assert window["overhead"] == window["with_seconds"] / window["without_seconds"] - 1
    steps = sorted(row["steps"] for row in found["measured_steps"])
    assert len(steps) == 3
    assert [(row["every"], row["overhead"]) for row in found["by_every"]] == [(n, steps[1] / n) for n in bench.EVERY]
    # A search of a tiny model takes longer than a step of it.
    assert steps[0] > 0
    assert found["first_measurement_steps"] > 0.5


def test_overhead_of_a_monitor_that_changes_the_run_is_not_recorded():
    bench = importlib.import_module("bench_overhead")
    training, twin = (bench.Watched(32, 1, 16, 2) for _ in range(2))
    assert bench.windows(training, twin, num_steps=2, num_windows=1)
    training.monitor = lambda loss_fn, loss: training.model.lm_head.weight.data.mul_(1 + 1e-6)
    with pytest.raises(RuntimeError, match="training with a monitor differs from training without, nothing is"):
        bench.windows(training, twin, num_steps=2, num_windows=1)


def test_small_models_are_measured_to_both_tolerances():
    bench = importlib.import_module("bench_small")
    loose, tight = sorted(bench.measure(quick=True)["small"], key=lambda row: -row["rtol"])
    assert (loose["rtol"], tight["rtol"]) == (0.05, 0.01)
    assert loose["measurements"] == loose["converged"] == 3
    # A pass of a search takes longer than a plain one, and Δθ some time besides.
    assert all(row["in_plain_forwards"] > row["forwards"] >= 1 for row in (loose, tight))


def test_a_monitor_on_every_50th_step_costs_less_than_a_tenth():
    found = importlib.import_module("readme").latest("overhead")["overhead"]
    (row,) = (row for row in found["by_every"] if row["every"] == 50)
    assert 0 < row["overhead"] < 0.1
    # The first window has the checks of a second measurement in it.
    assert all(0 < window["overhead"] < 0.15 and window["steps"] == 50 for window in found["windows"])
    assert found["parameters"] > 30e6


@pytest.fixture(scope="module")
def compared():
    """Rows of bench_peers.py's quick comparison, where PyHessian is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        patch.setitem(sys.modules, "pyhessian", None)
        bench = importlib.import_module("bench_peers")
        return {(row["quantity"], row["method"]): row for row in bench.compare(**bench.comparisons(quick=True)[0])}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_peers_measure_the_same_steps_and_agree(compared):
    searches = {method: row for (quantity, method), row in compared.items() if quantity == "λ_c"}
    assert len(searches) == 6
    for method, row in searches.items():
        assert len(row["errors"]) == row["measurements"] == 2
        # Half of a bracket of 1/16, and what a search of 1 % may be off by.
        assert max(row["errors"]) < (0.02 if "auto" in method else 1 / 32)
        assert row["in_plain_forwards"] > 1
        assert row["first_forwards"] > row["forwards"] or "published" in method
    assert searches["sharpkern, auto, virtual"]["value"] == pytest.approx(
        searches["published method"]["value"], rel=0.05
    )
    along = [row["value"] for (quantity, _), row in compared.items() if quantity == "λ_dir"]
    assert along == pytest.approx([along[-1]] * 4, rel=0.05)
    tops = [row for (quantity, _), row in compared.items() if quantity == "λ_max"]
    values = [row["value"] for row in tops if row["status"] == "measured"]
    assert len(values) >= 3
    assert values == pytest.approx([values[0]] * len(values), rel=0.01)
    assert compared["λ_max", "PyHessian, power iteration"]["status"] == "not installed"


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_memory_of_peers_is_what_they_hold(compared):
    published = compared["λ_c", "published method"]
    theta, plain = published["parameter_bytes"], published["plain_peak_bytes"]
    # The update, the weights' clone, and either θ − ηΔθ or a forward pass.
    assert published["peak_bytes"] >= 2 * theta + max(theta, plain)
    inplace = compared["λ_c", "sharpkern, auto, in place"]["peak_bytes"]
    virtual = compared["λ_c", "sharpkern, auto, virtual"]["peak_bytes"]
    # A model this small is less than the blocks that Δθ is worked out in.
    assert theta < virtual <= inplace
    assert compared["λ_dir", "double backward"]["peak_bytes"] > inplace


def test_a_peer_that_fails_is_told_of(monkeypatch):
    bench, gpts = importlib.import_module("bench_peers"), importlib.import_module("workloads")
    training = gpts.Training.of_text("tiny")

    def broken(loss_fn):
        raise RuntimeError("no second derivative\nof this")

    monkeypatch.setattr(bench, "tops", lambda *_: [("broken", lambda: broken)])
    (row,) = bench._top_rows(training, training.begin(8))
    assert row["status"] == "failed: RuntimeError: no second derivative"
    assert "in_plain_forwards" not in row


def test_the_published_method_is_as_described():
    published, gpts = importlib.import_module("other_methods"), importlib.import_module("workloads")
    training = gpts.Training.of_text("tiny", 10)
    for _ in range(20):
        training.begin(32)
        training.step()
    loss_fn = training.begin(32)
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    direction = sharpkern.Direction.from_optimizer(training.optimizer)
    update = published.adamw_update(training.model, training.optimizer)
    for name, parameter in training.model.named_parameters():
        (ours,) = (t for p, t in zip(direction.parameters, direction.tensors, strict=True) if p is parameter)
        assert torch.allclose(update[name], ours, rtol=1e-5, atol=1e-8)
    exact = sharpkern.critical_sharpness(training.model, loss_fn, direction, rtol=1e-4).critical_lr
    # From just below half of it: doubled twice, then the bracket of a ratio of 2 is halved four times.
    loss_fn.calls = 0
    found = published.published_sharpness(training, loss_fn, 0.45 * exact)
    assert 2 / found.value == pytest.approx(exact, rel=1 / 32)
    assert found.forwards == loss_fn.calls == 1 + 3 + 4
    # From far above it: halved until the loss does not exceed.
    found = published.published_sharpness(training, loss_fn, 4.1 * exact)
    assert 2 / found.value == pytest.approx(exact, rel=1 / 32)
    assert all(map(torch.equal, before, training.model.parameters()))


def test_growth_is_a_power_of_the_parameters():
    growth = importlib.import_module("bench_peers")
    exact = [{"parameters": n, "seconds": 3e-9 * n**1.02} for n in (10**6, 10**7, 10**8)]
    assert growth.exponent(exact, "seconds") == pytest.approx((1.02, 0), abs=1e-9)
    exact[1]["seconds"] *= 1.2
    power, error = growth.exponent(exact, "seconds")
    assert power == pytest.approx(1.02)
    assert 0.03 < error < 0.1


@pytest.mark.long
def test_growth_is_measured_and_drawn(tmp_path):
    growth = importlib.import_module("bench_peers")
    rows = growth.growth_rows(quick=True)
    assert [(row["model"], row["tokens"]) for row in rows] == [
        (model, tokens) for model in ("tiny", "small", "1M") for tokens in (8, 32)
    ]
    for row in rows:
        assert row["engine"] == "virtual"
        assert 3 <= row["forwards"] <= 40
        assert row["parameter_bytes"] == 4 * row["parameters"] < row["peak_bytes"]
        assert row["search_seconds"] > row["seconds_per_loss"] > 0
    growth.draw_growth({"growth": rows}, tmp_path / "growth.png")
    assert Image.open(tmp_path / "growth.png").text["Description"] == growth.growth_source({"growth": rows})


def test_the_ledger_keeps_what_it_has(tmp_path):
    ledger = importlib.import_module("ledger")
    path = tmp_path / "results" / "some.json"
    for quick, value in ((True, 1.5), (False, 2.5)):
        ledger.append(path, ledger.record(quick, lambda quick, value=value: {"some": value}))
    first, second = json.loads(path.read_text(encoding="utf-8"))
    assert (first["quick"], first["some"], second["quick"], second["some"]) == (True, 1.5, False, 2.5)
    conditions = set("date sharpkern python torch machine threads commit dirty load_average numpy transformers".split())
    assert conditions <= set(second["environment"])
    # What is no list of records is not written over.
    path.write_text("[{", encoding="utf-8")
    with pytest.raises(json.JSONDecodeError):
        ledger.append(path, {})
    assert path.read_text(encoding="utf-8") == "[{"


def test_a_table_has_the_columns_that_are_asked_for(capsys):
    rows = [{"a_b": 0.12345678, "c": [2, 1], "d": None, "e": "kept out"}, {"c": []}]
    importlib.import_module("ledger").show("Title", rows, "a_b c d")
    said = capsys.readouterr().out
    assert "a b" in said
    assert "0.1235" in said
    assert "1 to 2" in said
    assert "kept out" not in said


@pytest.mark.parametrize("name", ["line_search", "overhead", "peers"])
def test_every_record_has_its_conditions(name):
    records = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    for record in records:
        assert {"date", "torch", "python", "threads", "commit", "dirty"} <= set(record["environment"])
    assert importlib.import_module("ledger").latest(name) in records


@pytest.fixture
def measured():
    """The last full record of the peers."""
    return importlib.import_module("ledger").latest("peers")


@pytest.mark.parametrize("model", ["4M", "14M"])
def test_a_critical_sharpness_costs_at_most_four_and_a_half_forward_passes(measured, model):
    rows = {row["method"]: row for row in measured["peers"] if row["model"] == model}
    auto = rows["sharpkern, auto, virtual"]
    assert auto["tokens"] == 1024
    assert auto["in_plain_forwards"] <= 4.5
    assert max(auto["errors"]) <= 0.01
    assert auto["peak_bytes"] <= 1.15 * auto["plain_peak_bytes"] + auto["parameter_bytes"]
    others = [row for row in rows.values() if "sharpkern" not in row["method"] and row["quantity"] != "training"]
    assert len(others) == {"4M": 6, "14M": 2}[model]
    assert all(row["status"] == "measured" for row in others)
    assert all(auto["in_plain_forwards"] < row["in_plain_forwards"] / 1.5 for row in others)
    assert all(auto["peak_bytes"] < row["peak_bytes"] for row in others)


@pytest.mark.parametrize("tokens", [32, 256, 1024])
def test_cost_grows_with_the_parameters_as_a_line(measured, tokens):
    growth = importlib.import_module("bench_peers")
    rows = growth.by_tokens(measured["growth"])[tokens]
    assert [row["model"] for row in rows] == ["1M", "4M", "14M", "30M", "100M"]
    for column in ("search_seconds", "seconds_per_loss"):
        power, _ = growth.exponent(rows, column)
        assert power <= 1.05


def test_the_plot_is_of_the_ledger(measured):
    growth = importlib.import_module("bench_peers")
    assert Image.open(ROOT / "bench" / "results" / "growth.png").text["Description"] == growth.growth_source(measured)


def test_samples_are_compared_with_the_whole_batch():
    sample = importlib.import_module("bench_sample")
    (run,) = sample.runs(quick=True)
    rows = sample.measure_run(replace(run, num_steps=4, every=3, first=0))
    of_method = {row["method"]: row for row in rows if row["phase"] == rows[0]["phase"]}
    assert of_method["whole, 0.1 %"]["error_median"] == 0.0
    assert 0 < of_method["auto, 5 %"]["forwards_mean"] < of_method["whole, 0.1 %"]["forwards_mean"]
    assert of_method["auto, 5 %"]["error_p90"] < 0.05 < of_method["plain mean of 1/8"]["error_p90"]


def test_the_block_that_limits_the_step_is_the_one_with_the_largest_value():
    def row(**values):
        blocks = {
            name: {"lambda_c": value, "slope": 1.0, "status": "converged", "forwards": 3}
            for name, value in values.items()
        }
        return {"step": 0, "lambda_c": 10.0, "status": "converged", "blocks": blocks}

    rows = [row(first=8.0, last=2.0), row(first=6.0, last=7.0), row(first=math.inf, last=3.0)]
    rows[2]["blocks"]["first"]["status"] = "ascent"
    found = importlib.import_module("bench_blocks")._summary("all", rows)
    assert found["limiting"] == {"first": 1, "last": 2}
    assert [block["share_of_whole"] for block in found["blocks"]] == pytest.approx([0.7, 0.3])
    assert [block["share_of_slope"] for block in found["blocks"]] == pytest.approx([0.5, 0.5])
    assert found["forwards_of_blocks"] == 6
