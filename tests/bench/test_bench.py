"""`sharpkern bench`: what is recorded, what is done again, and what a fault costs. No figure is looked at."""

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from sharpkern.bench import report, sitting
from sharpkern.bench.environment import child_environment
from sharpkern.bench.sitting import BUDGET, SECTIONS, Record, Section, plain, with_gate, without_paths
from sharpkern.cli import app

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "date": "2026-01-01",
    "gpu": None,
    "driver": None,
    "torch": "2",
    "triton": None,
    "sharpkern": "0",
    "commit": "c0ffee",
    "dirty": False,
    "source": "abc",
    "machine": "x86_64",
}
GPU = {**ENVIRONMENT, "gpu": "NVIDIA H200", "driver": "580", "triton": "3.6.0"}


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", "--quick", *map(str, arguments)])


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_sitting(tmp_path_factory):
    output = tmp_path_factory.mktemp("bench") / "made" / "bench.json"
    result = invoke("--section", "linear", "--section", "compiled", "--output", output)
    return output, result


def test_a_section_runs_behind_the_check_that_it_waits_for(one_sitting):
    output, result = one_sitting
    assert result.exit_code == 0, result.output
    (record,) = json.loads(output.read_text())
    sections = record["sections"]
    assert list(sections) == ["correctness", "linear", "compiled"]
    assert [section["status"] for section in sections.values()] == ["done", "done", "left out"]
    checks = [row for case in sections["correctness"]["cases"].values() for row in case["rows"]]
    assert all(row["passed"] for row in checks)
    assert {"float32", "bfloat16 float32"} <= {row["dtypes"] for row in checks if "dtypes" in row}
    timed = [row for case in sections["linear"]["cases"].values() for row in case["rows"] if "variant" in row]
    one_at_a_time = {("product", 1), ("product again", 1), ("clone and add", 1), ("formed singly", 1)}
    ways = {(way, at_once) for way in ("products", "formed") for at_once in (1, 4, 8)}
    # On a CPU there is no fused kernel to time.
    assert {(row["way"], row["at_once"]) for row in timed} == one_at_a_time | ways
    assert all(0 < row["p20"] <= row["median"] <= row["p80"] for row in timed)
    assert {(row["tokens"], *row["shape"], row["dtype"]) for row in timed} == {
        (tokens, 384, 384, "float32") for tokens in (8, 128)
    }
    floor = {row["tokens"] for row in timed if "share_of_floor" in row}
    assert floor == {8}


def test_what_a_case_falls_back_from_is_written_down(tmp_path, monkeypatch):
    (tmp_path / "falling.py").write_text(
        "import sharpkern\n"
        "from sharpkern.errors import warn\n"
        "def cases(bench):\n"
        "    def fall():\n"
        "        warn('plain torch took over', sharpkern.KernelWarning)\n"
        "        yield {'variant': 'x'}\n"
        "    return {'fall': fall}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cases = {}
    job = {"module": "falling", "quick": True, "passed": [], "share": [0, 1], "skip": []}
    sitting.work(cases, lambda: None, **job)
    assert cases["fall"]["status"] == "done"
    assert cases["fall"]["warnings"] == ["plain torch took over"]
    record = SimpleNamespace(sections={"model": {"status": "done", "cases": cases}})
    (model,) = with_gate(SECTIONS, ["model"])[1:]
    assert "  fall: WARNED: plain torch took over" in list(report._outcomes(record, [model]))


def test_the_output_ends_with_the_table_and_what_was_left_out(one_sitting):
    _, result = one_sitting
    assert re.search(
        r"tokens +at once +clone and add +formed singly +products +formed +× naive +of floor", result.output
    )
    assert re.search(r"\n8 +8 +0\.|\n8 +8 +1\.", result.output)
    assert "compiled: left out: needs a GPU" in result.output
    assert "NO GPU: small sizes by plain torch" in result.output
    said = " ".join(result.output.split())
    names = "linear K=1, linear K=4, linear K=8, axpy_, form"
    assert re.search(rf"Correctness against float64: \d+ calls of {names}, .*; largest error 0\.", said)
    assert ", 0 of them with other bits" in said


def test_the_record_names_versions_and_neither_host_nor_paths(one_sitting):
    output, _ = one_sitting
    environment = json.loads(output.read_text())[0]["environment"]
    assert environment["torch"] == torch.__version__
    assert re.fullmatch("[0-9a-f]{16}", environment["source"])
    assert {"commit", "dirty", "triton", "driver", "gpu", "architecture"} <= set(environment)
    assert not platform.node() or platform.node() not in output.read_text()
    assert not [value for value in environment.values() if "/" in str(value)]


def test_a_second_call_does_only_what_is_missing(one_sitting, tmp_path):
    text = one_sitting[0].read_text()
    record = json.loads(text)
    linear = record[0]["sections"]["linear"]
    kept, failed = linear["cases"]
    linear["status"] = "incomplete"
    linear["cases"][failed] = {"status": "failed", "seconds": 1.0, "error": "as if", "rows": []}
    output = tmp_path / "bench.json"
    output.write_text(json.dumps(record))
    result = invoke("--section", "linear", "--output", output)
    assert result.exit_code == 0, result.output
    assert "correctness: done in an earlier call" in result.output
    (after,) = json.loads(output.read_text())
    cases = after["sections"]["linear"]["cases"]
    assert cases[kept] == json.loads(text)[0]["sections"]["linear"]["cases"][kept]
    assert cases[failed]["status"] == "done"
    assert cases[failed]["rows"]


@pytest.fixture
def known_machine(monkeypatch):
    """No process is started to look at the machine."""
    monkeypatch.setattr(sitting, "look_from_outside", lambda limit: dict(ENVIRONMENT))


@pytest.mark.usefixtures("known_machine")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--section", "lineal"], "section must be one of correctness, model, ceilings, .* got 'lineal'"),
        (["--budget", 0], "should be greater than or equal to 1|is not in the range"),
        (["--output", "."], "output must be a file, got the folder \\.; name one in it: bench.json"),
        (
            ["--output", "file/bench.json"],
            "output must be a file that can be written, .*exists: file.*choose another name",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    result = invoke("--output", "never.json", *arguments)
    assert result.exit_code == 2
    assert re.search(words, re.sub(r"[\s│]+", " ", result.output)), result.output
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("known_machine")
def test_an_interrupted_call_says_how_to_go_on(tmp_path, monkeypatch):
    def follow(lanes, deadline, record):
        (lane,) = lanes
        while not lane.begun:
            lane.look()
        raise KeyboardInterrupt

    monkeypatch.setattr(sitting, "_follow", follow)
    output = tmp_path / "bench.json"
    result = invoke("--section", "ceilings", "--output", output)
    assert result.exit_code == 130
    assert f"Interrupted. What was found so far is in {output}; the same call goes on from there." in result.output
    (record,) = json.loads(output.read_text())
    ceilings = record["sections"]["ceilings"]
    assert ceilings["status"] == "incomplete"
    assert {name: case["status"] for name, case in ceilings["cases"].items()} == {
        "copy": "interrupted",
        "product": "not run",
    }


def test_the_limits_fit_into_ten_minutes():
    assert sum(section.limit for section in SECTIONS) <= BUDGET <= 570


def test_sections_run_in_the_order_of_the_plan_with_the_gate_before_them():
    names = [section.name for section in with_gate(SECTIONS, ["linear", "ceilings"])]
    assert names == ["correctness", "ceilings", "linear"]
    assert [section.name for section in with_gate(SECTIONS, ["ceilings"])] == ["ceilings"]
    assert with_gate(SECTIONS, []) == list(SECTIONS)


# -- the record -------------------------------------------------------------------------------------------------------


def test_a_sitting_is_continued_on_the_same_machine_versions_and_sources(tmp_path):
    path = tmp_path / "bench.json"
    first = Record(path, ENVIRONMENT, quick=True)
    assert not first.resumed
    first.sections["ceilings"] = {
        "status": "done",
        "cases": {"copy": {"status": "done"}, "product": {"status": "wrong"}},
    }
    first.save()
    again = Record(path, {**ENVIRONMENT, "date": "2026-01-02", "commit": None}, quick=True)
    assert again.resumed
    assert again.done("ceilings") == ["copy"]


@pytest.mark.parametrize("change", [{"source": "other"}, {"torch": "3"}, {"gpu": "another"}, {"quick": False}])
def test_anything_else_is_a_new_sitting_behind_the_old_ones(change, tmp_path):
    path = tmp_path / "bench.json"
    Record(path, ENVIRONMENT, quick=True).save()
    before = json.loads(path.read_text())
    quick = change.pop("quick", True)
    record = Record(path, {**ENVIRONMENT, **change}, quick=quick)
    assert not record.resumed
    record.save()
    assert json.loads(path.read_text())[:-1] == before


@pytest.mark.parametrize("text", ["", "{}", '[{"rows": 1}]', "[1]", '{"quick"'])
def test_a_file_of_something_else_is_not_overwritten(text, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"output must be a file of an earlier bench .* choose another name"):
        Record(path, ENVIRONMENT, quick=True)
    assert path.read_text() == text


def test_the_file_is_whole_while_it_is_written(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    record = Record(path, ENVIRONMENT, quick=True)
    record.save()
    before = path.read_text()
    record.sections["ceilings"] = {"status": "done", "cases": {}, "rows": float("nan")}
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.save()
    assert path.read_text() == before


def test_numbers_that_json_lacks_go_by_name():
    assert plain({"a": [math.nan, (math.inf, 1.5)], 3: None}) == {"a": ["nan", ["inf", 1.5]], "3": None}


def test_messages_lose_the_folders_they_come_from():
    said = without_paths("ptxas failed on /home/someone/.triton/cache/x.ptx\n (see ~/log/y.txt): 1/2 of 3")
    assert said == "ptxas failed on x.ptx (see y.txt): 1/2 of 3"


# -- faults -----------------------------------------------------------------------------------------------------------

PLANTED = """
import os, time
from pathlib import Path

def cases(bench):
    def fine():
        yield {"value": 1}

    def raises():
        yield {"value": 2}
        raise ValueError("planted in /some/where/file.py")

    def wrong():
        yield {"value": 3, "passed": False}
        yield {"value": 4, "passed": True}

    def dies():
        yield {"value": 5}
        os.write(2, b"last words\\n")
        os._exit(7)

    def hangs():
        Path("pid").write_text(str(os.getpid()))
        yield {"value": 6}
        time.sleep(600)

    return dict(fine=fine, raises=raises, wrong=wrong, dies=dies, hangs=hangs, last=fine)
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Sections of modules planted in a folder of their own, and how they ended."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(*sections, budget=60.0, **modules):
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)
        record = Record(tmp_path / "bench.json", ENVIRONMENT, quick=True)
        sitting.run(record, sections, quick=True, budget=budget, tell=lambda line: None)
        assert Record(tmp_path / "bench.json", ENVIRONMENT, quick=True).sections == record.sections
        return record

    return run


def alive(pid):
    """Whether a process runs; one that has ended may still be listed, where nobody has asked how."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not (status.exists() and "State:\tZ" in status.read_text())


@pytest.mark.long
def test_a_fault_costs_its_own_case_and_nothing_else(planted, tmp_path, capsys):
    record = planted(Section("planted", "Planted", "faulty", limit=50, patience=1), faulty=PLANTED)
    assert record.sections["planted"]["status"] == "incomplete"
    cases = record.cases("planted")
    assert {name: case["status"] for name, case in cases.items()} == {
        "fine": "done",
        "raises": "failed",
        "wrong": "wrong",
        "dies": "crashed",
        "hangs": "timeout",
        "last": "done",
    }
    assert [row["value"] for case in cases.values() for row in case["rows"]] == [1, 2, 3, 4, 5, 6, 1]
    assert cases["raises"]["error"] == "ValueError: planted in file.py"
    assert cases["dies"]["error"] == "ended with code 7: last words"
    assert cases["hangs"]["error"] == "no sign of life for 1 s"
    assert not alive(int((tmp_path / "pid").read_text()))
    report.show(record, [Section("planted", "Planted", "faulty", limit=50, patience=1)])
    said = capsys.readouterr().out
    assert "planted: incomplete, 2 of 6 cases" in said
    assert "  dies: CRASHED: ended with code 7: last words" in said
    assert "  wrong: WRONG: 1 wrong\n    value 3" in said


KILLED = """
import os
from pathlib import Path
from sharpkern.bench.sitting import Record, Section, run

record = Record(Path("killed.json"), {"gpu": None}, quick=True)
section = Section("planted", "Planted", "faulty", limit=600, patience=600)
run(record, [section], quick=True, budget=600, tell=lambda line: None)
"""


@pytest.mark.long
def test_a_killed_bench_leaves_a_record_and_no_process(tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text(PLANTED)
    environment = {**child_environment(), "PYTHONPATH": f"{child_environment()['PYTHONPATH']}{os.pathsep}{tmp_path}"}
    bench = subprocess.Popen([sys.executable, "-c", KILLED], cwd=tmp_path, env=environment)
    try:
        pid = int(eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
        eventually(lambda: "hangs" in (tmp_path / "killed.json").read_text())
    finally:
        bench.kill()
        bench.wait()
    assert eventually(lambda: not alive(pid))
    cases = json.loads((tmp_path / "killed.json").read_text())[0]["sections"]["planted"]["cases"]
    assert cases["dies"]["status"] == "crashed"
    assert cases["fine"]["rows"] == [{"value": 1}]
    # Started again it goes on.
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    record = Record(tmp_path / "killed.json", {"gpu": None}, quick=True)
    assert record.resumed
    section = Section("planted", "Planted", "faulty", limit=50, patience=1)
    sitting.run(record, [section], quick=True, budget=50, tell=lambda line: None)
    assert record.cases("planted")["fine"] == cases["fine"]
    assert record.done("planted") == ["fine", "last"]


def eventually(condition, seconds=40.0):
    """What a condition gives once it holds; None where it does not in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    return None


def test_a_section_ends_with_its_time(planted):
    hanging = "import time\ndef cases(bench):\n    return dict(first=lambda: time.sleep(600), second=None)"
    started = time.monotonic()
    record = planted(Section("planted", "Planted", "slow", limit=6, patience=300), slow=hanging)
    assert time.monotonic() - started < 30
    assert record.sections["planted"]["status"] == "incomplete"
    statuses = [case["status"] for case in record.cases("planted").values()]
    assert statuses in (["timeout", "not run"], [])


def test_a_section_that_cannot_begin_says_why_once(planted):
    record = planted(
        Section("absent", "Absent", "no_such_module", limit=50, patience=50),
        Section("late", "Late", "faulty", limit=50, patience=50),
        budget=0.5,
        faulty=PLANTED,
    )
    assert record.sections["late"]["status"] == "incomplete"
    assert record.sections["late"]["error"] == "not run: the budget was used up"
    record = planted(Section("absent", "Absent", "no_such_module", limit=50, patience=50))
    assert record.sections["absent"]["status"] == "incomplete"
    assert record.sections["absent"]["error"].endswith("ModuleNotFoundError: No module named 'no_such_module'")


WRONG_FORM = """
from sharpkern import ops
from sharpkern.bench import accuracy

right = ops.form
ops.form = lambda *operands, **options: right(*operands, **options).mul_(1.01)

def cases(bench):
    return {name: case for name, case in accuracy.cases(bench).items() if name in ("axpy_", "form")}
"""
TIMED = """
def cases(bench):
    def timed(operation):
        bench.require(operation)
        yield {"timed": operation}
    return {name: lambda name=name: timed(name) for name in ("axpy_", "form", "form_adam")}
"""


@pytest.mark.long
def test_what_is_wrong_is_not_timed(planted):
    record = planted(
        Section("correctness", "Gate", "wrong_form", limit=50, patience=50),
        Section("timed", "Timed", "timed", limit=50, patience=50, gated=True),
        wrong_form=WRONG_FORM,
        timed=TIMED,
    )
    assert {name: case["status"] for name, case in record.cases("correctness").items()} == {
        "axpy_": "done",
        "form": "wrong",
    }
    timed = record.cases("timed")
    assert {name: case["status"] for name, case in timed.items()} == {
        "axpy_": "done",
        "form": "blocked",
        "form_adam": "blocked",
    }
    assert timed["form"]["error"] == "not timed: form did not pass the check of correctness"
    assert timed["form"]["rows"] == []


# -- pytest-benchmark -------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_kernels_run_under_pytest_benchmark():
    command = (
        sys.executable,
        "-m",
        "pytest",
        "bench/bench_kernels.py",
        "--benchmark-disable",
        "-q",
        "-k",
        "norm or axpy",
    )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "4 passed" in done.stdout, f"{done.stdout}\n{done.stderr}"
