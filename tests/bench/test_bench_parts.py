"""The parts of `sharpkern bench`: what is judged right, how a machine is timed, and what the table says."""

import os
import re
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from sharpkern import ops
from sharpkern.bench import environment, report, timing
from sharpkern.bench.accuracy import judge, poisoned
from sharpkern.bench.calls import Call
from sharpkern.bench.cases import Bench
from sharpkern.bench.environment import child_environment
from sharpkern.bench.models import fitting
from sharpkern.bench.sitting import SECTIONS, Record
from sharpkern.bench.timing import Machine, Timing
from tests.bench.test_bench import GPU

CPU = Bench(Machine(torch.device("cpu")), quick=True)


# -- accuracy ---------------------------------------------------------------------------------------------------------


def form_call(repeated=True):
    W, D = (CPU.machine.randn(100, seed=seed) for seed in range(2))
    return Call("form", (W, D, torch.tensor([-0.5])), {"size": 100}, nbytes=1200, repeated=repeated)


def replace_form(monkeypatch, change):
    right = ops.form
    monkeypatch.setattr(ops, "form", lambda *operands, **options: change(right(*operands, **options)))


def test_a_right_operation_passes():
    row = judge(CPU, form_call())
    assert row["passed"]
    assert row["repeats"] == 3
    assert row["error_of_budget"] <= 1


def unwritten(formed):
    # As from a kernel that leaves one element of its output alone.
    partly = torch.empty_like(formed)
    partly[:, :-1] = formed[:, :-1]
    return partly


@pytest.mark.parametrize(
    "change",
    [
        lambda formed: formed * (1 + 1e-6),
        unwritten,
        lambda formed: formed[:, :-1],
        lambda formed: formed.double(),
    ],
    ids=["off by a millionth", "an element unwritten", "an element short", "another dtype"],
)
def test_a_wrong_result_is_found(change, monkeypatch):
    replace_form(monkeypatch, change)
    row = judge(CPU, form_call(repeated=False))
    assert not row["passed"]
    assert row["error_of_budget"] > 1


def test_uninitialised_memory_is_poisoned_and_the_switches_put_back():
    with poisoned():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_bits_that_change_between_runs_are_found(monkeypatch):
    calls = []

    def racing(formed):
        calls.append(formed)
        # As far off as rounding may be, but not always.
        return formed if len(calls) % 2 else torch.nextafter(formed, torch.zeros(()))

    replace_form(monkeypatch, racing)
    row = judge(CPU, form_call())
    assert row["repeats_with_other_bits"] > 0
    assert not row["passed"]


# -- the machine and the table ----------------------------------------------------------------------------------------


def test_timing_is_of_the_rounds():
    assert Timing.of([3.0]) == Timing(3.0, 3.0, 3.0, 1)
    assert Timing.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == Timing(3.5, 2.0, 5.0, 6)


def test_variants_take_turns_and_rotate_their_buffers():
    calls = []
    variants = {name: lambda round_, name=name: calls.append((name, round_)) for name in "abc"}
    timings = CPU.machine.time(variants, seconds=0.0)
    assert {timing.rounds for timing in timings.values()} == {3}
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert all(len({name for name, _ in one}) == 3 for one in rounds)
    assert [one[0][0] for one in rounds[-3:]] == ["a", "b", "c"]
    # No variant finds in the cache what the one before it has used.
    assert [number for _, number in calls[-9:]] == list(range(9))


class Event:
    """An event of a GPU that is not there; 2 ms lie between any two."""

    log: ClassVar[list[str]] = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.log.append("event")

    def elapsed_time(self, end):
        assert isinstance(end, Event)
        return 2.0


def test_a_gpu_is_timed_by_events_around_each_call(monkeypatch):
    log = Event.log = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    timings = Machine(torch.device("cuda")).time({"call": lambda round_: log.append("call")}, seconds=0.0)
    assert timings["call"].median == 0.002
    assert timings["call"].host > 0
    assert log[:6] == ["wait", "sleep", "event", "call", "event", "wait"]
    assert log == log[:6] * (len(log) // 6)


@pytest.mark.parametrize(("host_seconds", "cycles"), [(0.0, 4e5), (0.01, 3e7), (0.5, 4e7)])
def test_the_host_gets_ahead_of_the_gpu(host_seconds, cycles, monkeypatch):
    slept = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(timing, "_seconds", lambda variant, call: host_seconds)
    monkeypatch.setattr(timing, "_WARM_UP_SECONDS", 0.0)
    Machine(torch.device("cuda")).time({"call": lambda call: None}, seconds=0.0)
    assert slept[0] == 4e5
    assert set(slept[1:]) == {cycles}


def test_a_peak_is_what_a_call_takes_on_top_of_what_was_there(monkeypatch):
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    for name, value in {"memory_allocated": 10, "memory_reserved": 20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
        monkeypatch.setattr(torch.cuda, f"max_{name}", lambda device, value=value: 3 * value)
    assert Machine(torch.device("cuda")).peak(lambda: None) == {"allocated": 20, "reserved": 40}
    assert CPU.machine.peak(lambda: None) == {}


@pytest.mark.parametrize(("hip", "architecture"), [(None, "sm_90"), ("7.0", "gfx942")])
def test_a_gpu_is_named_with_its_architecture(hip, architecture, monkeypatch):
    seen = SimpleNamespace(
        name="GPU", major=9, minor=0, gcnArchName="gfx942:sramecc+:xnack-", total_memory=1, multi_processor_count=2
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: seen)
    monkeypatch.setattr(torch.version, "hip", hip)
    found = environment._gpu()
    assert (found["gpu"], found["architecture"], found["l2_bytes"]) == ("GPU", architecture, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment._gpu() == dict.fromkeys(found)


@pytest.mark.parametrize(
    ("gigabytes", "name", "moments"),
    [
        (150, "7B", "float32"),
        (110, "7B", "bfloat16"),
        (48, "1.5B", "float32"),
        (16, "0.2B", "float32"),
        (1, "0.2B", "bfloat16"),
    ],
)
def test_the_model_is_the_largest_that_fits(gigabytes, name, moments):
    preset = fitting(SimpleNamespace(is_gpu=True, memory=gigabytes * 10**9), quick=False)
    assert (preset.name, str(preset.moments)) == (name, f"torch.{moments}")


def test_without_a_gpu_only_a_quick_sitting_has_a_model_too_small_to_judge_by():
    small, tiny = (fitting(CPU.machine, quick=quick) for quick in (False, True))
    assert (small.name, tiny.name) == ("small", "tiny")
    assert tiny.num_parameters < 1e6 < 5e6 < small.num_parameters < 1e7
    assert small.tokens >= 256


def test_shares_are_held_against_their_targets():
    row = {"target": 0.92, "accept": 0.85}
    assert [report.verdict({**row, "share": share}) for share in (0.93, 0.9, 0.8)] == ["reached", "accepted", "MISSED"]
    assert report.verdict({"beyond_plain": 3, "most_beyond_plain": 2}) == "MISSED"
    assert report.verdict({"total_bytes": 2, "most_total_bytes": 2}) == "reached"
    assert report.verdict({"total_bytes": 3, "most_total_bytes": 2}) == "MISSED"
    assert report.verdict({"share": 0.5}) == ""


def way(name, share, tokens=16, **more):
    row = {"way": name, "at_once": 1, "tokens": tokens, "dtype": "bfloat16", "shape": [4096, 4096], "share": share}
    return {**row, **more}


def done(*rows):
    return {"status": "done", "seconds": 1.0, "rows": list(rows)}


def test_the_table_of_a_gpu(tmp_path, capsys):
    seconds = {"median": 2e-3, "p20": 1e-3, "p80": 3e-3, "rounds": 5, "host": 1e-4}
    judged = {"target": 0.92, "accept": 0.85}
    size = {"model": "7B", "parameters": 7_298_000_000, "tokens": 4096, "moments": "float32"}
    cases = {
        "correctness": {
            "axpy_": done({"operation": "axpy_", "error_of_budget": 0.25, "repeats": 100, "passed": True}),
            "form": {
                **done({"operation": "form", "error_of_budget": "inf", "repeats_with_other_bits": 3, "passed": False}),
                "status": "wrong",
            },
            "linear_cross_entropy": done({"error": 2e-6, "tolerance": 1e-5, "passed": True}),
        },
        "streaming": {
            "axpy": done(
                {"variant": "triton", "share": 0.95, **judged, **seconds},
                {"variant": "triton again", "share": 0.94, **seconds},
                {"variant": "torch", "share": 0.31, **seconds},
            ),
            "reduce": {"status": "blocked", "error": "not timed", "rows": []},
        },
        "head": {
            "T=4096": done(
                {
                    "variant": "chunked",
                    "share": 0.7,
                    "target": 0.74,
                    "accept": 0.68,
                    "allocated": 10**8,
                    "vocabulary": 100352,
                    "width": 4096,
                    **seconds,
                }
            )
        },
        "model": {
            "plain forward": done({"variant": "plain", "plain_ms": 94.0, **size, **seconds, "median": 0.094}),
            "in place": done(
                {"engine": "inplace", "sharpness": 12.5, "passed": True},
                {
                    "variant": "inplace",
                    **size,
                    "ms_per_forward": 98.7,
                    "plain_ms": 94.0,
                    "allocated": 15 * 10**9,
                    "reserved": 16 * 10**9,
                },
            ),
            "deep copy": done({"variant": "deep copy", **size, "outcome": "out of memory"}),
        },
        "passes": {
            "7B, 4096 tokens": done(
                {
                    "variant": "batched",
                    "at_once": 8,
                    "ms_per_step_size": 100.0,
                    "plain_ms": 95.0,
                    "pass_over_virtual": 7.5,
                    "allocated": 4 * 10**9,
                    "total_bytes": 33 * 10**9,
                    "most_total_bytes": 31 << 30,
                }
            ),
            "7B, 64 tokens": done({"variant": "batched", "outcome": "out of memory"}),
        },
        "linear": {
            "4096x4096 M=16": done(
                {"way": "fused", "at_once": 8, "error": 1e-3, "passed": True},
                way("product again", 0.98),
                way("clone and add", 0.3),
                way("fused", 3.1, at_once=8, least_times_naive=3.0, share_of_floor=0.7),
                way("formed", 0.4, at_once=8, least_times_naive=3.0, share_of_floor=0.1),
            ),
            "11008x4096 M=16": done(
                way("product again", 0.98),
                way("clone and add", 0.4),
                way("fused", 2.9, at_once=8, least_times_naive=3.0, share_of_floor=0.8),
            ),
            "4096x4096 M=4096": done(
                way("product again", 1.0, tokens=4096),
                way("clone and add", 0.5, tokens=4096),
                way("formed", 0.8, tokens=4096, at_once=8, target=0.85, accept=0.85),
            ),
        },
        "compiled": {"axpy": done({"kernel": "_axpy_kernel", "registers": 34, "spills": 0, "shared": 0, "warps": 8})},
        "ceilings": {
            "copy": done({"variant": "copy", "bytes_per_second": 4.3e12}),
            "product": done({"variant": "product", "flop_per_second": 7.9e14}),
        },
    }
    record = Record(tmp_path / "bench.json", GPU, quick=False)
    for name, found in cases.items():
        record.sections[name] = {"status": "done", "cases": found}
    report.show(record, SECTIONS)
    said = capsys.readouterr().out
    assert "NVIDIA H200: driver 580, torch 2, triton 3.6.0, sharpkern 0 (c0ffee)" in said
    for words in (
        r"axpy +triton +2\.00 +0\.100 +0\.950 +0\.010 +0\.310 +0\.92 \(0\.85\) +reached",
        r"T=4096 +chunked +2\.00 +0\.100 +0\.700 +0\.10 +0\.74 \(0\.68\) +accepted",
        r"LM head and cross-entropy: vocabulary 100352, width 4096",
        r"Whole model: 7B of 7\.30 billion parameters, 4096 tokens, AdamW moments in float32\n",
        r"plain forward +plain +94\.0 +0\.100 +1\.00",
        r"in place +inplace +98\.7 +1\.05 +15\.00 +16\.00 +12\.5",
        r"deep copy +deep copy +out of memory",
        r"7B, 4096 tokens +batched +8 +100 +1\.05 +7\.50 +4\.00 +33\.00 +reached",
        r"7B, 64 tokens +batched +out of memory",
        r"16 +8 +0\.35 +0\.40 +3\.00 +8\.57 +0\.75 +0\.02 +3 × naive +reached",
        r"4096 +8 +0\.50 +0\.80 +1\.60 +0\.00 +formed 0\.85 +MISSED",
        r"axpy: _axpy_kernel +34 +0 +0 +8",
        r"\(c0ffee\)\nCeilings: copy 4300 GB/s, product 790 TFLOP/s\n",
        r"  ± run: how far",
        r"  reduce: BLOCKED: not timed",
        r"linear: done, 3 of 3 cases",
    ):
        assert re.search(words, said), (words, said)
    judged = "3 calls of axpy_, form, linear_cross_entropy; largest error inf of its budget, by form; 100 repeats, 3 of"
    assert judged in " ".join(said.split())
    # No row has such a figure.
    assert "beyond plain" not in said
    assert max(map(len, said.splitlines())) <= report.WIDTH


def test_columns_that_nothing_fills_are_left_out():
    columns = {name: lambda row, name=name: row.get(name, "") for name in ("kernel", "host ms", "ms")}
    lines = [{"kernel": "axpy", "ms": "1"}, {"kernel": "form"}]
    assert report.filled(columns, lines) == {"kernel": ["axpy", "form"], "ms": ["1", ""]}


@pytest.mark.parametrize(
    ("value", "said"), [(0.07123, "0.0712"), (1.0, "1.00"), (34.56, "34.6"), (4300.4, "4300"), (0.0, "0")]
)
def test_numbers_have_three_digits(value, said):
    assert report.significant(value) == said


def test_a_model_too_small_for_its_calls_is_said_to_be():
    size = {"variant": "plain", "model": "tiny", "tokens": 64, "moments": "float32", "median": 1e-3}
    about = [report.table("model", {"plain forward": [{**size, "parameters": 10**n}]})[0] for n in (5, 7)]
    assert [text.endswith("fixed costs per call dominate") for text in about] == [True, False]


def test_workers_import_what_this_process_can(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    assert str(tmp_path) in child_environment()["PYTHONPATH"].split(os.pathsep)
