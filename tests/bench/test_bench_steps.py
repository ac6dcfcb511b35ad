"""The bench of several step sizes at once: what is checked before it is timed, and how results are summed up."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from sharpkern import ops
from sharpkern.bench import linear, whole_model
from sharpkern.bench.accuracy import judge
from sharpkern.bench.cases import Bench, BlockedError, checks, fused_linear
from sharpkern.bench.models import SMALL, TINY
from sharpkern.bench.report import summaries
from sharpkern.bench.timing import Machine
from sharpkern.errors import EngineUnsupportedError

GATE = frozenset({"form", "embedding", "linear_cross_entropy"})
CPU = Bench(Machine(torch.device("cpu")), quick=True, passed=GATE)


def rows_of(cases, name, bench=CPU):
    with torch.no_grad():
        return list(cases(bench)[name]())


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """No figure is looked at: as few rounds as there can be."""
    real = Machine.time
    monkeypatch.setattr(Machine, "time", lambda machine, variants, seconds: real(machine, variants, 0.0))
    monkeypatch.setattr(whole_model, "_PASS_REPEATS", 2)


# -- the linear layer -------------------------------------------------------------------------------------------------


def test_every_way_is_right_and_every_row_says_what_it_is_of():
    rows = rows_of(linear.cases, "384x384 M=8")
    checked = [row for row in rows if "error" in row]
    assert all(row["passed"] and row["error"] < 1e-6 for row in checked)
    timed = [row for row in rows if "variant" in row]
    assert len(timed) == len(checked) + 2
    for row in timed:
        assert row["step_sizes"] == 8
        assert (row["tokens"], row["shape"], row["dtype"]) == (8, (384, 384), "float32")
        assert row["share"] > 0
        assert ("share_of_floor" in row) == (not row["way"].startswith("product") or row["way"] == "products")


@pytest.mark.parametrize("mistake", ["of the wrong step", "off by a thousandth", "nothing moves"])
def test_a_way_that_is_wrong_is_not_timed(mistake, monkeypatch):
    right = linear.moving_linear

    def wrong(x, weight, move, alpha, *, dtype, way):
        if way == "products" and mistake == "of the wrong step":
            alpha = alpha.flip(0) if len(alpha) > 1 else 2 * alpha
        y = right(x, weight, move, 0 * alpha if mistake == "nothing moves" else alpha, dtype=dtype, way=way)
        return y * 1.001 if mistake == "off by a thousandth" else y

    monkeypatch.setattr(linear, "moving_linear", wrong)
    rows = rows_of(linear.cases, "384x384 M=8")
    refused = {row["way"] for row in rows if row.get("passed") is False}
    assert refused == ({"products"} if mistake == "of the wrong step" else {"products", "formed"})
    assert not refused & {row["way"] for row in rows if "variant" in row}


def test_the_fused_kernel_is_timed_on_a_gpu_and_only_where_it_passed():
    gpu = SimpleNamespace(backend="triton", passed={fused_linear(1), fused_linear(8)})
    layer = linear._Layer(CPU, (16, 16), 8)
    fused = [variant.at_once for variant in layer.ways(gpu) if variant.way == "fused"]
    assert fused == [1, 8]
    cpu = SimpleNamespace(backend="torch", passed={fused_linear(1), fused_linear(8)})
    assert not [variant for variant in layer.ways(cpu) if variant.way == "fused"]


def test_every_pass_takes_weights_that_the_last_one_did_not(monkeypatch):
    layer = linear._Layer(CPU, (384, 384), 8)
    seen = []
    real = linear.F.linear
    monkeypatch.setattr(linear.F, "linear", lambda x, weight: seen.append(weight.data_ptr()) or real(x, weight))
    layer.product()
    assert len(set(seen)) == 8


@pytest.mark.parametrize("num_steps", [1, 4, 8])
def test_the_check_of_the_fused_layer_finds_one_wrong_step(num_steps, monkeypatch):
    right = ops.linear

    def wrong(x, W, D, alpha, **options):
        y = right(x, W, D, alpha, **options).clone()
        y[-1] = right(x, W, D, alpha + 0.05, **options)[-1]
        return y

    calls = list(checks(CPU)[fused_linear(num_steps)]())
    assert all(judge(CPU, call)["passed"] for call in calls)
    assert {len(call.operands[0]) for call in calls} == {1, num_steps}
    assert any(call.repeated for call in calls)
    monkeypatch.setattr(ops, "linear", wrong)
    assert not any(judge(CPU, call)["passed"] for call in calls)


# -- summaries --------------------------------------------------------------------------------------------------------


def test_a_summary_is_the_median_over_shapes():
    def row(way, share, at_once=8, **more):
        return {"way": way, "share": share, "at_once": at_once, "tokens": 16, "dtype": "float32", **more}

    (one, eight) = summaries(
        {
            "a": [row("fused", 1.0), row("fused", 9.0, at_once=1), row("clone and add", 0.5, at_once=1)],
            "b": [row("fused", 3.0), row("formed", 1.5), {"way": "fused", "at_once": 8, "error": 0.0}],
            "c": [row("fused", 2.0, least_times_naive=3.0)],
        }
    )
    assert (one.at_once, one.shares) == (1, {"fused": 9.0})
    assert (eight.at_once, eight.shares, eight.best) == (8, {"fused": 2.0, "formed": 1.5}, "fused")
    assert eight.times_naive == 4.0
    assert eight.asked == {"least_times_naive": 3.0}


# -- passes -----------------------------------------------------------------------------------------------------------


def test_the_two_largest_models_that_fit_are_taken():
    def names(gigabytes):
        machine = SimpleNamespace(is_gpu=True, memory=gigabytes * 10**9)
        return [preset.name for preset in whole_model._sizes(SimpleNamespace(machine=machine))[0]]

    assert [names(140), names(24), names(2)] == [["7B", "1.5B"], ["1.5B", "0.2B"], ["0.2B"]]


def test_a_pass_of_both_engines_is_timed_once_their_losses_agree():
    rows = rows_of(whole_model.passes, "tiny, 16 tokens")
    assert rows[1]["passed"]
    assert 0 <= rows[1]["difference"] < 1e-6
    virtual, batched = rows[2:]
    assert (virtual["variant"], virtual["at_once"]) == ("virtual", 1)
    assert (batched["variant"], batched["at_once"], batched["tokens"]) == ("batched", 8, 16)
    assert batched["ms_per_step_size"] == batched["pass_ms"] / 8
    assert virtual["pass_over_virtual"] == 1
    assert batched["direction_bytes"] == batched["weight_bytes"] > 0


class _Dummy:
    def __init__(self, machine, preset):
        self.name = preset.name


def test_one_model_exists_at_a_time(monkeypatch):
    made = []

    def make(machine, preset):
        assert all(scene() is None for scene in made)
        scene = _Dummy(machine, preset)
        made.append(weakref.ref(scene))
        return scene

    monkeypatch.setattr(whole_model, "Moving", make)
    monkeypatch.setattr(whole_model, "_sizes", lambda bench: ([TINY, SMALL], (1, 2)))
    monkeypatch.setattr(whole_model, "_passes", lambda scene, num_tokens: [scene.name, num_tokens])
    found = [case() for case in whole_model.passes(CPU).values()]
    assert found == [["tiny", 1], ["tiny", 2], ["small", 1], ["small", 2]]
    assert len(made) == 2


def test_a_model_waits_for_the_checks_of_its_operations():
    unchecked = Bench(CPU.machine, quick=True, passed=frozenset())
    with pytest.raises(BlockedError, match="form, embedding, linear_cross_entropy did not pass"):
        whole_model.passes(unchecked)["tiny, 16 tokens"]()


def test_losses_that_differ_or_do_not_move_are_no_agreement():
    assert whole_model._agreement([1.0, 2.0], [1.0, 2.0], 1e-5, least_move=2e-5)["passed"]
    assert not whole_model._agreement([1.0, 2.001], [1.0, 2.0], 1e-5, least_move=2e-5)["passed"]
    assert not whole_model._agreement([1.0, 1.0], [1.0, 1.0], 1e-5, least_move=2e-5)["passed"]
    assert not whole_model._agreement([1.0, 1.0], [1.0, 1.0], 1e-5, least_move=0.0)["passed"]


def test_passes_of_other_losses_are_not_timed(monkeypatch):
    right = whole_model.BatchedEngine.losses
    wrong = lambda engine, step_sizes: [1.001 * loss for loss in right(engine, step_sizes)]
    monkeypatch.setattr(whole_model.BatchedEngine, "losses", wrong)
    *_, last = rows_of(whole_model.passes, "tiny, 16 tokens")
    assert last["passed"] is False
    assert last["difference"] == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(torch.OutOfMemoryError("full"), "out of memory"), (EngineUnsupportedError("no"), "cannot be batched")],
)
def test_what_cannot_be_timed_is_said(error, outcome, monkeypatch):
    def fail(engine, step_sizes):
        raise error

    monkeypatch.setattr(whole_model.BatchedEngine, "losses", fail)
    *_, last = rows_of(whole_model.passes, "tiny, 16 tokens")
    assert (last["variant"], last["outcome"]) == ("batched", outcome)
    assert "pass_ms" not in last


# -- whole models -----------------------------------------------------------------------------------------------------

ALL = frozenset(whole_model._NEEDED)


@pytest.mark.parametrize("name", ["in place", "deep copy", "plain forward"])
def test_no_way_of_other_losses_is_timed(name, monkeypatch):
    monkeypatch.setitem(whole_model.SAME_LOSS, torch.float32, -1.0)
    rows = rows_of(whole_model.measurements, name, Bench(CPU.machine, quick=True, passed=ALL))
    assert rows[-1]["passed"] is False
    assert not [row for row in rows if "variant" in row]
