"""The command line: what the demo writes and says, and what the report for bugs holds."""

import csv
import platform
import re
import sys
from dataclasses import replace

import matplotlib.image
import pytest
import torch
from typer.testing import CliRunner

import sharpkern
from sharpkern.cli import app, demo
from sharpkern.cli.demo_summary import summary
from sharpkern.cli.digits import DemoRun, HessianPoint, digits, network, train
from sharpkern.measures.result import Measurement
from sharpkern.monitoring.monitor import Record

COLUMNS = ["step", "loss", "lambda_c", "status", "error", "forwards", "lambda_max", "lambda_dir", "two_over_lr"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def words(result):
    """What was printed, without the line breaks of the terminal's width."""
    return re.sub(r"\s+", " ", result.output)


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "made" / "anew"
    result = invoke("demo", "--samples", 300, "--steps", 60, "--lr", 0.05, "--output", folder)
    return folder, result


def test_demo_writes_the_table(short_demo):
    folder, result = short_demo
    assert result.exit_code == 0, result.output
    with (folder / "demo.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert [int(row["step"]) for row in rows] == list(range(0, 60, 3))
    assert [int(row["step"]) for row in rows if row["lambda_max"]] == [0, 15, 30, 45]
    assert all(float(row["lambda_c"]) > 0 for row in rows if row["status"] == "converged")
    assert {float(row["two_over_lr"]) for row in rows} == {40.0}
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


def test_demo_writes_the_picture(short_demo):
    folder, _ = short_demo
    assert matplotlib.image.imread(folder / "demo.png").ndim == 3
    assert (folder / "demo.png").stat().st_size < 150_000


def test_a_short_demo_says_that_the_edge_was_not_seen(short_demo):
    _, result = short_demo
    said = words(result)
    assert "60 steps of full-batch gradient descent at η = 0.05 on 300 digits" in said
    assert "the stability threshold 2/η is 40" in said
    assert "λ_max never reached it: its largest value was" in said
    assert "λ_c did not jump" in said
    assert "the edge of stability was NOT seen" in said


def test_demo_puts_the_number_of_threads_back(short_demo):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sharpkern.cli.demo.train", lambda *arguments: seen.append(torch.get_num_threads()))
            seen = []
            invoke("demo", "--output", short_demo[0])
        assert seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_demo_is_deterministic_and_the_seed_matters():
    def losses(seed):
        return [record.measurement for record in train(7, 0.1, 60, seed).history]

    first, second, other = losses(0), losses(0), losses(1)
    strip = [replace(m, seconds=0.0) for m in first]
    assert strip == [replace(m, seconds=0.0) for m in second]
    assert strip != [replace(m, seconds=0.0) for m in other]


def test_a_run_that_diverges_is_told_and_not_a_crash(tmp_path):
    result = invoke("demo", "--samples", 60, "--steps", 40, "--lr", 1e9, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert "Then the loss was no longer finite: the run diverged." in words(result)
    assert (tmp_path / "demo.png").exists()


@pytest.mark.parametrize("package", ["sklearn", "matplotlib"])
def test_demo_without_an_extra_is_one_line_and_exit_code_1(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    result = invoke("demo", "--output", tmp_path / "never")
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert "pip install 'sharpkern[demo]'" in result.output
    assert not (tmp_path / "never").exists()


def test_digits_name_the_extra_where_scikit_learn_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"digits data set needs scikit-learn.*pip install 'sharpkern\[demo\]'"):
        digits()


def test_digits_have_a_fifth_of_their_labels_drawn_anew():
    inputs, labels = digits()
    _, clean = digits(noisy_share=0.0)
    assert inputs.shape == (1797, 64)
    assert (inputs.min().item(), inputs.max().item()) == (0.0, 2.0)
    # A random label is the old one in one of ten cases.
    assert (labels != clean).float().mean().item() == pytest.approx(0.18, abs=0.03)


def test_the_network_leaves_the_random_stream_alone():
    stream = torch.get_rng_state()
    weights = [p.clone() for p in network(3).parameters()]
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(a, b) for a, b in zip(weights, network(3).parameters(), strict=True))


@pytest.mark.parametrize("arguments", [("--steps", 1), ("--samples", 3000), ("--lr", -1)])
def test_demo_refuses_settings_out_of_range(arguments):
    result = invoke("demo", *arguments)
    assert result.exit_code == 2
    assert f"'{arguments[0]}'" in words(result)


def test_demo_trains_only_what_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "train", lambda *_: pytest.fail("trained"))
    (tmp_path / "demo.png").mkdir()
    (tmp_path / "file").touch()
    for output, reason in ((tmp_path, "demo.png is a folder"), (tmp_path / "file" / "out", "file is no folder")):
        result = CliRunner(env={"COLUMNS": "1000"}).invoke(app, ["demo", "--output", str(output)])
        assert result.exit_code == 2, result.exception
        assert re.search(rf"--output must be a folder that can be written, got .*{reason}", words(result))


def made_run(critical, hessian, statuses=None, **changes):
    """A run with chosen curves, measured at every step; the threshold is 20."""
    statuses = statuses or ["converged"] * len(critical)
    history = [
        Record(
            step,
            0.1,
            Measurement(
                2 / value, value, (0, 1), 1.0, 1.0, None, 0.01, 1.0, (), 3 + step % 2, status, "virtual", 1.0, 0.0
            ),
        )
        for step, (value, status) in enumerate(zip(critical, statuses, strict=True))
    ]
    points = [HessianPoint(step, value, value - 1, 5) for step, value in enumerate(hessian)]
    return DemoRun(0.1, 20.0, 100, len(critical), history, points, **changes)


def test_summary_of_a_run_at_the_edge():
    said = summary(made_run([0.5] * 4 + [25.0] + [19.5] * 5, [1.0, 5.0, 21.0] + [22.0] * 7))
    assert "λ_max reached it by step 2." in said
    assert "λ_c jumped at step 4: its median before was 0.5." in said
    assert "last 40 %: λ_c 19.5 (0.97 × 2/η), λ_max 22 (1.10 × 2/η), λ_dir 21 (1.05 × 2/η)" in said
    assert "λ_c stands at 2/η to within 5 %, the edge of stability" in said
    assert "One λ_c took 3.5 forward passes on average, one λ_max 5.0 Hessian-vector products." in said
    assert "no value" not in said


def test_summary_changes_with_the_numbers():
    said = summary(made_run([0.5] * 6 + [12.0] + [16.0] * 3, [1.0] * 10))
    assert "λ_max never reached it: its largest value was 1." in said
    assert "λ_c jumped at step 6" in said
    assert "λ_c stands near 2/η, but not within 5 % of it" in said


def test_summary_says_when_the_expected_did_not_happen():
    said = summary(made_run([0.5] * 10, [1.0] * 10))
    assert "λ_c did not jump: it stayed below half of 2/η." in said
    assert "λ_c does not stand at 2/η: the edge of stability was NOT seen; try more steps" in said


def test_summary_of_a_run_that_starts_sharp():
    assert "λ_c was above half of 2/η from the first step on." in summary(made_run([30.0] * 10, [50.0] * 10))


def test_summary_counts_the_measurements_without_a_value():
    statuses = ["converged"] * 5 + ["ascent"] * 3 + ["unresolved"] * 2
    said = summary(made_run([0.5] * 10, [1.0] * 10, statuses))
    assert "Of 10 measurements of λ_c some have no value: 3 ascent, 2 unresolved." in said
    assert "the end of the run has no λ_c to judge by" in said


def test_env_is_markdown_without_host_or_paths():
    result = invoke("env")
    assert result.exit_code == 0
    sections, facts = result.output.split("### Where\n\n")
    assert re.findall("^### (.*)$", sections, re.MULTILINE) == ["What I did", "What I saw, and what I expected"]
    report = dict(re.fullmatch(r"- ([^:]+): (.+)", line).groups() for line in facts.splitlines())
    assert report["sharpkern"] == sharpkern.__version__
    assert report["torch"] == torch.__version__
    assert report["Python"].startswith(platform.python_version())
    assert platform.system() in report["system"]
    assert report["torch built for"]
    assert not platform.node() or platform.node() not in result.output
    assert "/" not in result.output


def test_env_lists_devices(monkeypatch):
    class Properties:
        name, total_memory = "Accelerator 9000", 80 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    lines = invoke("env").output.splitlines()
    assert "- device 1: Accelerator 9000, 80.0 GiB" in lines
    assert "- torch built for: CUDA 13.0" in lines


def test_env_says_whether_triton_can_build_what_launches_its_kernels(monkeypatch):
    monkeypatch.setenv("CC", "sh")
    assert "- C compiler: sh\n" in invoke("env").output
    monkeypatch.delenv("CC")
    monkeypatch.setattr("sharpkern.cli.env.shutil.which", lambda name: None)
    monkeypatch.setattr("sharpkern.cli.env.sysconfig.get_paths", lambda: {"include": "/nowhere"})
    said = invoke("env").output
    assert "- C compiler: not found, without which Triton launches nothing; set CC" in said
    assert "- Python.h: not found" in said


def test_env_says_what_is_not_installed(monkeypatch):
    monkeypatch.setattr("sharpkern.cli.env._PACKAGES", ("no-such-package",))
    assert "- no-such-package: not installed" in invoke("env").output


def test_help_and_version():
    said = words(invoke("--help"))
    assert "how far the optimizer could step along its own update before the loss rises" in said
    assert "demo" in said
    assert "env" in said
    assert invoke("--version").output == f"sharpkern {sharpkern.__version__}\n"


@pytest.mark.long
def test_the_demo_reaches_the_edge_of_stability():
    """The science, at the demo's own settings save for the length: λ_c is far below 2/η at first, then stands at it."""
    run = train(450, 0.1, 1797, 0)
    critical = {record.step: record.measurement.sharpness for record in run.history}
    assert all(record.measurement.status == "converged" for record in run.history)
    assert max(value for step, value in critical.items() if step < 100) < 1
    late = sorted(value for step, value in critical.items() if step >= 270)
    assert late[len(late) // 2] == pytest.approx(run.threshold, rel=0.05)
    assert any(point.hessian_sharpness >= run.threshold for point in run.hessian)
    # λ_dir is a Rayleigh quotient of H, which its largest eigenvalue bounds.
    assert all(point.directional_sharpness <= 1.01 * point.hessian_sharpness for point in run.hessian)
