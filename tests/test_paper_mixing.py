"""The scripts of figures 4 and 5: they run, go on where they were stopped, and say what their numbers say."""

import importlib
import math
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "bench" / "paper"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.syspath_prepend(PAPER)


def module(name: str):
    return importlib.import_module(name)


class Stopped(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize(("name", "last"), [("figure4", "_measure"), ("figure5", "_train")])
def test_the_quick_version_goes_on_where_it_was_stopped(name, last, tmp_path, monkeypatch, capsys) -> None:
    figure, scaffold = module(name), module("scaffold")
    arguments = ["--quick", "--output", str(tmp_path)]

    def stop(*given):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(figure, last, stop)
        with pytest.raises(Stopped):
            scaffold.main(figure.FIGURE, arguments)
    assert not (tmp_path / f"{name}.csv").exists()
    done = (tmp_path / "work" / name / "pieces.jsonl").read_bytes()
    scaffold.main(figure.FIGURE, arguments)
    assert (tmp_path / "work" / name / "pieces.jsonl").read_bytes().startswith(done)
    assert "**Where they differ.**" in capsys.readouterr().out
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    first = (tmp_path / f"{name}.csv").read_bytes()
    scaffold.main(figure.FIGURE, arguments)
    assert (tmp_path / f"{name}.csv").read_bytes() == first


def test_the_committed_curves_cross_in_every_repeat() -> None:
    words, rows = module("mix_words"), module("scaffold").read_rows("figure5")
    sweep = words.sweep_of(rows)
    repeats = {point.repeat for point in sweep.points}
    assert len(repeats) >= 5
    alone = [words.crossing(sweep, [p for p in sweep.points if p.repeat == repeat]) for repeat in repeats]
    assert all(share is not None for share in alone)
    assert min(alone) <= words.crossing(sweep, sweep.points) <= max(alone)
    # What a task's own data do for it: at the ends the curves stand the other way round.
    for share, near, far in ((0.0, "code", "English"), (1.0, "English", "code")):
        shares = (share, 1 - share)
        assert sweep.summary(shares, near).sharpness < sweep.summary(shares, far).sharpness


def test_the_committed_revisions_all_have_a_value() -> None:
    figure, rows = module("figure4"), module("scaffold").read_rows("figure4")
    for direction in ("adamw", "sgd"):
        found = figure.of_direction(rows, direction)
        assert len(found) >= 12
        assert {row["status"] for row in found} == {"converged"}
        assert {row["revision"][:6] for row in found} == {"stage1", "stage2"}
        steps = [row["step"] for row in found]
        assert steps == sorted(steps)


def test_sections_of_the_readme_are_those_of_the_results() -> None:
    sections, readme = module("sections"), module("readme")
    text = sections.README.read_text(encoding="utf-8")
    assert readme.with_tables(text, sections.SECTIONS) == text
    assert all(f"<!-- {figure.name} -->\n![" in text for figure in sections.FIGURES)


def test_files_are_of_modest_size() -> None:
    sizes = {path.name: path.stat().st_size for path in (PAPER / "results").glob("figure*.*")}
    assert len(sizes) == 12
    assert max(sizes.values()) < 250_000


def sweep_rows(english: dict[float, float], code: dict[float, float]) -> list[dict]:
    """Rows of critical learning rates at shares of English."""
    return [
        {"kind": "sweep", "share": share, "repeat": repeat, "task": task, "critical_lr": eta,
         "lambda_c": 2 / eta if eta else math.inf, "status": "converged" if eta else "ascent", "error": 0.01,
         "bracket_high": math.inf, "loss": 1.0, "forwards": 4.0}
        for task, curve in (("English", english), ("code", code)) for share, eta in curve.items() for repeat in range(3)
    ]  # fmt: skip


def training_rows(english: dict[float, float], code: dict[float, float]) -> list[dict]:
    return [
        {"kind": "training", "share": share, "repeat": 0, "task": task, "change": change, "steps": 100.0}
        for task, curve in (("English", english), ("code", code)) for share, change in curve.items()
    ]  # fmt: skip


def test_crossing_and_sweet_spot_in_words() -> None:
    words = module("mix_words")
    rows = sweep_rows({0.0: 0.0, 0.6: 1.0, 1.0: 3.0}, {0.0: 5.0, 0.6: 3.0, 1.0: 1.0})
    rows += training_rows({0.0: 0.2, 0.6: 0.005, 1.0: -0.01}, {0.0: -0.5, 0.6: -0.45, 1.0: 0.0})
    assert words.crossing(words.sweep_of(rows), words.sweep_of(rows).points) == pytest.approx(0.8)
    said = words.findings(rows)
    assert "At 0 % English the loss rises from the first step on (λ_c = ∞)." in said
    assert "They cross at 80 % English; by single repeats at 3 of 3 (80 % to 80 %)." in said
    assert "is 60 % English (60 % to 60 % by single repeats): it allows steps of η = 1 before" in said
    assert "it stays within 0.01 of what it was from 60 % English on" in said
    assert "The sum of both is lowest at 60 % English." in said
    assert "The curves cross here too, and the sweet spot of 60 % is within the paper's range." in said
    assert "the sweet spot is among the mixes that leave the loss on English alone" in said


def test_the_words_are_the_opposite_where_the_numbers_are() -> None:
    words = module("mix_words")
    rows = sweep_rows({0.0: 3.0, 1.0: 2.0}, {0.0: 1.0, 1.0: 1.5})
    rows += training_rows({0.0: 0.2, 1.0: 0.1}, {0.0: -0.5, 1.0: 0.0})
    said = words.findings(rows)
    assert "They do not cross." in said
    assert "it rises by more than 0.01 on every mix" in said
    assert (
        "Unlike in the paper the curves do not cross, and the sweet spot of 100 % is above the paper's range." in said
    )
    uphill = sweep_rows({0.0: 0.0, 1.0: 2.0}, {0.0: 1.0, 1.0: 0.0}) + rows[12:]
    assert "There is no sweet spot" in words.findings(uphill)
    assert "The paper has a sweet spot and this run has none." in words.findings(uphill)


def revision_rows(adamw: list[float], sgd: list[float]) -> list[dict]:
    """λ_c of three revisions of each stage, the initialization first."""
    names = ["stage1-step0", "stage1-step1", "stage1-step2", "stage2-step3", "stage2-step4"]
    run = [
        {
            "direction": "in training",
            "revision": name,
            "lr": 0.01,
            "in_training_lambda_c": 10.0,
            "heldout_lambda_c": 50.0,
        }
        for name in names
    ]
    return run + [
        {"direction": direction, "revision": name, "step": float(i), "lambda_c": value, "status": "converged"}
        for direction, values in (("adamw", adamw), ("sgd", sgd))
        for i, (name, value) in enumerate(zip(names, values, strict=True))
    ]


def test_the_course_of_revisions_in_words() -> None:
    figure = module("figure4")
    said = figure.findings(revision_rows([1, 50, 100, 100, 300], [1, 2, 4, 4, 8]))
    assert "λ_c rises from 50 to 100 in pre-training, and rises from 100 to 300 in mid-training" in said
    assert "below the run's own 2/η at 4 of them" in said
    assert "is 2.00 (1.00 to 6.00, 4 revisions) times what a Monitor" in said
    assert "λ_c rises in both stages along both directions" in said
    said = figure.findings(revision_rows([1, 100, 50, 40, 41], [1, 4, 2, 2, 1]))
    assert "λ_c falls from 100 to 50 in pre-training, and stays about the same, from 40 to 41 in mid-training" in said
    assert "Here λ_c rises in neither stage." in said
    said = figure.findings(revision_rows([1, 100, 50, 40, 41], [1, 2, 4, 2, 1]))
    assert "Here λ_c rises in pre-training along the gradient alone." in said
