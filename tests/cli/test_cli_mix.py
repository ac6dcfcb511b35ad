"""``sharpkern mix`` on a small Olmo 2: what it writes and says, and what it refuses."""

import csv
import math
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sharpkern.cli import app, checkpoint, mix
from sharpkern.errors import SharpkernWarning
from sharpkern.mixtures import sweep as mixture
from sharpkern.mixtures.results import MixturePoint, MixtureSweep, Summary
from tests.helpers import checkpoints
from tests.helpers.checkpoints import ENGLISH, REVISIONS


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    old, new = tmp_path / "old.txt", tmp_path / "new"
    old.write_text(ENGLISH, encoding="utf-8")
    new.mkdir()
    for i in range(4):
        lines = (f"def f{j}(x):\n    return x + {j}\n" for j in range(60 * i, 60 * (i + 1)))
        (new / f"module{i}.py").write_text("\n".join(lines), encoding="utf-8")
    return old, new


def invoke(files: tuple[Path, Path], output: Path, *more: object, **changes: object):
    options = {
        "old": files[0], "new": files[1], "model": checkpoints.olmo() / REVISIONS[2], "ratios": "0,0.5,1", "batches": 2,
        "batch-size": 4, "heldout": 4, "tokens": 32, "repeats": 2, "output": output, **changes,
    }  # fmt: skip
    arguments = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    # As wide as the paths of temporary folders may be.
    return CliRunner(env={"COLUMNS": "1000"}).invoke(app, ["mix", *arguments, *map(str, more)])


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "mix.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("direction", ["adamw", "sgd"])
def test_writes_a_table_and_a_picture_and_says_where_the_sweet_spot_is(direction, files, tmp_path) -> None:
    result = invoke(files, tmp_path / "out", direction=direction)
    assert result.exit_code == 0, result.output
    rows = table(tmp_path / "out")
    assert [(row["share_old"], row["task"]) for row in rows] == [
        (share, task) for share in ("0.0", "0.5", "1.0") for task in ("old", "new")
    ]
    assert {row["repeats"] for row in rows} == {"2"}
    assert (tmp_path / "out" / "mix.png").stat().st_size > 1000
    said = checkpoints.words(result.output)
    assert re.search(r"Sweet spot: \d+% old text|No sweet spot", said)
    finite = [float(row["lambda_c"]) for row in rows if math.isfinite(float(row["lambda_c"]))]
    assert all(f"{value:.4g}" in said for value in finite)


def test_stopped_and_called_again_it_gives_the_numbers_of_one_run_through(files, tmp_path, monkeypatch) -> None:
    assert invoke(files, tmp_path / "through", direction="sgd").exit_code == 0
    relative, calls = mixture.relative_critical_sharpness, []

    def stopping(*arguments, **options):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return relative(*arguments, **options)

    monkeypatch.setattr(mixture, "relative_critical_sharpness", stopping)
    stopped = invoke(files, tmp_path / "again", direction="sgd")
    assert (stopped.exit_code, "Stopped at 3 of 6: the same command goes on." in stopped.output) == (130, True)
    assert invoke(files, tmp_path / "again", direction="sgd").exit_code == 0
    assert len(calls) == 7
    assert table(tmp_path / "again") == table(tmp_path / "through")


def test_other_text_of_the_same_size_is_not_answered_with_the_old_results(files, tmp_path) -> None:
    assert invoke(files, tmp_path / "out", ratios="1").exit_code == 0
    files[0].write_text(ENGLISH.replace("cat", "dog"), encoding="utf-8")
    before = table(tmp_path / "out")
    with pytest.warns(SharpkernWarning, match="other settings: tasks was"):
        assert invoke(files, tmp_path / "out", ratios="1").exit_code == 0
    assert table(tmp_path / "out") != before


def test_outcomes_without_a_step_are_told() -> None:
    found = Summary(0.0, 0.0, 1.0, repeats=9, ascent=4, unbounded=1, unresolved=2, failed=1)
    assert list(mix._not_converged(found)) == [
        "4 of 9 uphill at once",
        "1 of 9 no rise found",
        "2 of 9 rise too early to resolve",
        "1 of 9 not measured",
    ]


def test_what_is_measured_is_not_in_the_mix() -> None:
    rows = torch.arange(20).view(10, 2)
    measured, mixed = mix._apart(rows, 3)
    assert sorted([*measured[:, 0].tolist(), *mixed[:, 0].tolist()]) == rows[:, 0].tolist()
    assert measured[:, 0].tolist() == [0, 6, 12]


def test_a_revision_is_a_folder_in_the_models_folder(files, tmp_path) -> None:
    model = checkpoints.olmo()
    assert invoke(files, tmp_path / "a", model=model, revision=REVISIONS[2], ratios="1").exit_code == 0
    assert invoke(files, tmp_path / "b", ratios="1").exit_code == 0
    assert table(tmp_path / "a") == table(tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": "0,1.5"}, r"--ratios must be within \[0, 1\], got 0,1.5; they are shares of old text"),
        ({"ratios": "half"}, "--ratios must be numbers with commas between, got 'half'; pass 0,0.5,1"),
        ({"ratios": "0.5,0.5"}, r"ratios must hold a mix, and each of them once, got \[0.5, 0.5\]"),
        ({"ratios": "0.01"}, "0.01 of 'old' must be at least one sample of a batch, got a batch_size of 4"),
        (
            {"heldout": 5000},
            r"--old must hold at least 5004 rows of 32 tokens, got \d+ tokens, which are \d+;",
        ),
        ({"revision": "stage3"}, "revision 'stage3' must be a folder with a saved model in"),
        ({"tokens": 100}, "--tokens must be at most the model's context of 64, got 100; lower it"),
        ({"model": "./nowhere"}, r"got '\./nowhere', where there is no folder; check the path"),
    ],
)
def test_bad_input_is_one_message_before_any_long_work(changes, message, files, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(mixture, "relative_critical_sharpness", lambda *_: pytest.fail("measured"))
    result = invoke(files, tmp_path / "out", **changes)
    assert result.exit_code == 2
    assert re.search(message, checkpoints.words(result.output)), result.output
    assert not (tmp_path / "out" / "mix.csv").exists()


@pytest.mark.parametrize("name", ["mix.jsonl", "mix.csv", "mix.png"])
def test_an_output_that_cannot_be_written_is_told_before_any_work(name, files, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint.Checkpoint, "config", lambda *_: pytest.fail("read"))
    (tmp_path / "out" / name).mkdir(parents=True)
    result = invoke(files, tmp_path / "out")
    assert result.exit_code == 2, result.exception
    assert re.search(
        rf"--output must be a folder that can be written, got .*out \(.*{name} is a folder\); choose another",
        checkpoints.words(result.output),
    )


def test_text_that_is_too_short_is_told_before_the_model_is_loaded(files, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint.Checkpoint, "load", lambda *_: pytest.fail("loaded"))
    files[0].write_text("too short", encoding="utf-8")
    result = invoke(files, tmp_path / "out")
    assert result.exit_code == 2
    assert "--old must hold at least 8 rows of 32 tokens" in checkpoints.words(result.output)


def point(share: float, task: str, critical_lr: float, repeat: int) -> MixturePoint:
    sharpness, status = (2 / critical_lr, "converged") if critical_lr else (math.inf, "ascent")
    return MixturePoint(
        (share, 1 - share), repeat, task, critical_lr, sharpness, status, 0.01, (0.0, math.inf), 1.0, 4, "virtual"
    )


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (
            {"old": (2.0, 2.0), "new": (4.0, 1.0)},
            "Sweet spot: 50% old text, which allows steps of η = 2 (λ_c 1) before the loss on old text rises. By "
            "single repeats: 50% to 50%.",
        ),
        (
            {"old": (0.0, 0.0), "new": (4.0, 1.0)},
            "No sweet spot: at every share the loss on one of the texts rises from the first step on, as far as can be "
            "told (inf), or could not be measured (nan).",
        ),
    ],
)
def test_the_sweet_spot_in_words(steps, said) -> None:
    mixes = ((0.5, 0.5), (1.0, 0.0))
    points = tuple(
        point(shares[0], task, step, repeat)
        for task, values in steps.items()
        for shares, step in zip(mixes, values, strict=True)
        for repeat in range(2)
    )
    assert mix._sweet_spot(MixtureSweep(("old", "new"), ("old", "new"), mixes, points)) == said
