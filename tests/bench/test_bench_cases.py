"""One definition per operation, and the gate before each of the three ways to time it."""

import csv
import importlib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sharpkern import ops
from sharpkern.bench import accuracy, sweep
from sharpkern.bench.cases import Bench, BlockedError, Load, checks, timed, timed_on_model
from sharpkern.bench.formulas import FORMULAS
from sharpkern.bench.timing import Machine
from sharpkern.cli import app

ROOT = Path(__file__).parents[2]
CPU = Bench(Machine(torch.device("cpu")), quick=True)
NUMEL = 1 << 12
BLOCKED = "not timed: form did not pass the check of correctness"


# -- one definition ---------------------------------------------------------------------------------------------------


def test_every_operation_is_checked_and_timed_and_has_a_formula():
    checked = {call.operation for calls in checks(CPU).values() for call in [next(iter(calls()))]}
    assert checked == set(FORMULAS)
    cases = {**timed(CPU, NUMEL), **timed_on_model(CPU)}
    assert {case.operation for case in cases.values()} <= set(checks(CPU))
    assert {call.operation for case in timed(CPU, NUMEL).values() for call in case.make()} == set(FORMULAS)


@pytest.mark.parametrize(
    ("name", "per_element"),
    [
        ("axpy", 6),
        ("form K=1", 6),
        ("form K=8", 20),
        ("form from AdamW state K=1", 14),
        ("form from bf16 AdamW state K=1", 10),
        ("form from SGD state K=8", 22),
        ("sums over an AdamW step", 12),
        ("sums over an SGD step", 6),
        ("form_steps from AdamW state", 14),
        ("sum_steps over an AdamW step", 12),
        ("reduce", 6),
        ("embedding K=8", 20),
        ("rms_norm K=1", 4),
    ],
)
def test_bytes_are_operands_read_once_and_results_written_once(name, per_element):
    load = Load(timed(CPU, 1 << 16)[name].make())
    assert load.nbytes / (1 << 16) == pytest.approx(per_element, rel=0.08)


def test_a_product_has_flops_and_its_bytes():
    load = Load(timed(CPU, 1 << 16)["linear K=8, 16 tokens"].make())
    assert load.flops == 2 * 8 * 16 * 256 * 256
    assert load.nbytes == 4 * (2 * 256 * 256 + 2 * 8 * 16 * 256)


def test_the_formula_that_results_are_held_against_is_not_the_packages_own(monkeypatch):
    for operation in FORMULAS:
        monkeypatch.setattr(ops, operation, None)
    call = timed(CPU, NUMEL)["form K=1"].make()[0]
    assert call.exact()[0].dtype == torch.float64


@pytest.mark.parametrize("mistake", ["left out", "off by a hundredth"])
@pytest.mark.parametrize("operation", ["form_steps_", "sum_steps"])
def test_the_check_of_all_parameters_at_once_finds_one_that_is_wrong(operation, mistake, monkeypatch):
    right = getattr(ops, operation)

    def wrong(*operands, **options):
        found = right(*operands, **options)
        *_, last = operands[1] if found is None else found
        last.mul_(1.01) if mistake == "off by a hundredth" else last.zero_()
        return found

    calls = list(checks(CPU)[operation]())
    assert all(accuracy.judge(CPU, call)["passed"] for call in calls)
    monkeypatch.setattr(ops, operation, wrong)
    assert not any(accuracy.judge(CPU, call)["passed"] for call in calls)


# -- the gate ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def wrong_form(monkeypatch):
    right = ops.form
    monkeypatch.setattr(ops, "form", lambda *operands, **options: right(*operands, **options).mul_(1.01))


@pytest.mark.parametrize("name", [*timed(CPU, NUMEL), *timed_on_model(CPU)])
def test_what_was_not_checked_is_not_handed_out(name):
    case = {**timed(CPU, NUMEL), **timed_on_model(CPU)}[name]
    with pytest.raises(BlockedError, match=f"not timed: {case.operation} did not pass"):
        case.load(CPU)


def test_a_wrong_kernel_is_not_timed_under_pytest_benchmark(wrong_form, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    kernels = importlib.import_module("bench_kernels")
    kernels.after_check.cache_clear()
    with pytest.raises(BlockedError, match=BLOCKED):
        kernels.test_speed("form K=1", benchmark=None)
    timed_calls = []
    kernels.test_speed("axpy", benchmark=timed_calls.append)
    assert len(timed_calls) == 1
    kernels.after_check.cache_clear()


def test_a_check_that_crashes_hands_nothing_out(monkeypatch):
    def crash(*operands, **options):
        raise RuntimeError("planted")

    monkeypatch.setattr(ops, "reduce", crash)
    with pytest.raises(RuntimeError, match="planted"):
        accuracy.checked(CPU, "reduce")
    monkeypatch.setattr(accuracy, "cases", lambda bench: {"reduce": lambda: iter(())})
    assert accuracy.checked(CPU, "reduce").passed == frozenset()


# -- the sweep --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Two sizes, and nothing is compiled."""
    monkeypatch.setattr(sweep, "sizes", lambda bench: [NUMEL, 4 * NUMEL])
    monkeypatch.setattr(torch, "compile", lambda function: function)


def invoke(folder, *arguments):
    output = folder / "made" / "bench.json"
    return CliRunner().invoke(app, ["bench", "--quick", "--output", str(output), "--sweep", *arguments])


@pytest.mark.usefixtures("small")
def test_a_sweep_writes_a_table_and_a_picture_of_every_case(tmp_path):
    result = invoke(tmp_path, "form")
    assert result.exit_code == 0, result.output
    names = [f"bench-form-k-{k}.{ending}" for k in (1, 8) for ending in ("csv", "png")]
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == names
    with (tmp_path / "made" / "bench-form-k-8.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["elements"]) for row in rows] == [NUMEL, 4 * NUMEL]
    for line in ("sharpkern", "torch", "torch.compile"):
        assert all(
            0 < float(row[f"{line}-min (GB/s)"]) <= float(row[f"{line} (GB/s)"]) <= float(row[f"{line}-max (GB/s)"])
            for row in rows
        )
    assert (tmp_path / "made" / "bench-form-k-8.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small")
def test_products_are_swept_in_flops(tmp_path):
    assert invoke(tmp_path, "linear K=1").exit_code == 0
    (path,) = (tmp_path / "made").glob("*.csv")
    assert "sharpkern (TFLOP/s)" in path.read_text()


@pytest.mark.usefixtures("small", "wrong_form")
def test_a_wrong_kernel_is_not_swept(tmp_path):
    result = invoke(tmp_path, "form")
    assert result.exit_code == 1
    assert BLOCKED in result.output
    assert not (tmp_path / "made").exists()


@pytest.mark.usefixtures("small")
def test_a_line_that_is_wrong_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: lambda *operands, **options: 1.01 * function(*operands))
    result = invoke(tmp_path, "form")
    assert result.exit_code == 1
    assert "form K=1, 4096 elements, torch.compile: not timed: error" in result.output
    with (tmp_path / "made" / "bench-form-k-1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["torch.compile (GB/s)"] for row in rows] == ["", ""]
    assert all(row["sharpkern (GB/s)"] and row["torch (GB/s)"] for row in rows)


@pytest.mark.usefixtures("small")
def test_a_line_that_cannot_run_says_why(tmp_path, monkeypatch):
    def no_compiler(*operands, **options):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda function: no_compiler)
    result = invoke(tmp_path, "reduce")
    assert result.exit_code == 1
    assert "torch.compile: not timed: RuntimeError: no compiler\n" in result.output


def test_an_unknown_operation_is_refused(tmp_path):
    result = invoke(tmp_path, "fourier")
    assert result.exit_code == 2
    assert "sweep must be one of axpy_, form," in " ".join(result.output.replace("│", " ").split())
