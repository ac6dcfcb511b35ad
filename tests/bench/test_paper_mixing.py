"""The scripts of figures 4 and 5: they run, go on where they were stopped, and say what their numbers say."""

import importlib
import math
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
         "bracket_low": 0.0, "bracket_high": math.inf, "loss": 1.0, "forwards": 4.0}
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
    assert "At 0 % English the loss on English rises from the first step on (λ_c = ∞)." in said
    assert "They cross at 80 % English; by single repeats at 3 of 3 (80 % to 80 %)." in said
    assert "is 60 % English (60 % to 60 % by single repeats): it allows steps of η = 1 before" in said
    assert "it does not rise by more than 0.01 from 60 % English on" in said
    assert "The sum of both is lowest at 60 % English." in said
    assert "The curves cross here too, and the sweet spot of 60 % is within the paper's range." in said
    assert "the sweet spot is among the mixes that do not raise the loss on English by more than" in said


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
    assert "The paper has a sweet spot, and this run found none." in words.findings(uphill)


def with_status(row: dict, status: str, low: float, high: float) -> dict:
    """A sweep's row that did not converge."""
    values = {"unresolved": (math.nan, math.nan), "unbounded": (high, 2 / high), "ascent": (0.0, math.inf)}
    critical_lr, sharpness = values[status]
    return {**row, "status": status, "critical_lr": critical_lr, "lambda_c": sharpness, "bracket_low": low,
            "bracket_high": math.inf if status == "unbounded" else high}  # fmt: skip


def test_a_rise_whose_place_noise_hides_is_told_apart_from_one_at_once() -> None:
    words = module("mix_words")
    rows = sweep_rows({0.0: 0.0, 0.5: 0.0, 0.6: 2.0, 1.0: 3.0}, {0.0: 5.0, 0.5: 4.0, 0.6: 3.0, 1.0: 1.0})
    # English, three repeats each: one ascent and two unresolved at 0; unresolved with a step known to be safe at 0.6.
    rows[1:3] = [with_status(rows[1], "unresolved", 0.0, 0.2), with_status(rows[2], "unresolved", 0.0, 0.25)]
    rows[6:9] = [with_status(row, "unresolved", 1.0, 2.0) for row in rows[6:9]]
    said = words.findings(rows + training_rows({0.0: 0.2, 1.0: 0.0}, {0.0: -0.5, 1.0: 0.0}))
    assert "λ_c^{English→mix} is at most 2 at 60 %, 0.667 at 100 %." in said
    assert "At 50 % English the loss on English rises from the first step on (λ_c = ∞)." in said
    assert (
        "At 0 % English the loss on English rises by a step of η = 0.25 at the latest, and noise hides how early"
        in (said)
    )
    assert "(λ_c is at least 8 there); in 1 it rises from the first step on." in said
    assert "Of 24 measurements of λ_c some did not converge: 4 ascent (uphill at once, λ_c = ∞), 5 unresolved" in said
    assert "up to η = 1 no rise is known of the loss on English, and noise hides where it begins." in said
    # Of an even number the median of steps is 0 as well, and is not of ascents alone.
    assert "At 0 % English the loss on English rises by a step" in words.findings(
        [row for row in rows if row["repeat"] != 1]
    )


def test_sweeps_without_values_are_told_truly() -> None:
    words = module("mix_words")
    rows = sweep_rows({0.0: 1.0, 1.0: 1.0}, {0.0: 2.0, 1.0: 3.0})
    unknown = [with_status(row, "unresolved", 0.0, math.inf) if row["task"] == "code" else row for row in rows]
    said = words.findings(unknown)
    assert "λ_c^{code→mix} has no finite median. At 0 %, 100 % English no repeat has a value." in said
    assert "There is no sweet spot: at no share is a step known to raise neither loss." in said
    assert "There are no runs of training on the mixes." in said
    unbounded = [with_status(row, "unbounded", 7.0, 7.0) for row in rows]
    said = words.findings(unbounded)
    assert "λ_c^{code→mix} is at most 0.286 at 0 %, at most 0.286 at 100 %." in said
    assert "no rise of the loss on English was found up to η = 7." in said
    # Each mix has medians above 0, and no repeat has a step for both tasks.
    odd = {("English", 0): ("ascent", 9.0), ("code", 1): ("ascent", 9.0), ("code", 2): ("unresolved", math.inf)}
    split = [
        with_status(row, odd[key][0], 0.0, odd[key][1]) if (key := (row["task"], row["repeat"])) in odd else row
        for row in rows
    ]
    assert "is 0 % English (no repeat has one): it allows steps of η = 1 before" in words.findings(split)


def test_curves_that_are_the_other_way_round_cross_too() -> None:
    words = module("mix_words")
    sweep = words.sweep_of(sweep_rows({0.0: 5.0, 0.6: 3.0, 1.0: 1.0}, {0.0: 1.0, 0.6: 1.0, 1.0: 3.0}))
    assert words.crossing(sweep, sweep.points) == pytest.approx(0.8)
    sweep = words.sweep_of(sweep_rows({0.0: 1.0, 1.0: 1.0}, {0.0: 1.0, 1.0: 1.0}))
    assert words.crossing(sweep, sweep.points) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ((0.2, 0.1, 0.05), "it rises by more than 0.01 on every mix. It"),
        ((0.2, 0.005, 0.05), "it does not rise by more than 0.01 at 50 % alone. It"),
        ((0.2, -0.3, -0.2), "it does not rise by more than 0.01 from 50 % English on. It"),
        ((0.2, 0.05, math.nan), "+inf at 100 % English; it rises by more than 0.01 on every mix. It"),
    ],
)
def test_harm_by_training_in_words(changes, words) -> None:
    shares = (0.0, 0.5, 1.0)
    rows = sweep_rows(dict.fromkeys(shares, 1.0), dict.fromkeys(shares, 1.0))
    rows += training_rows(dict(zip(shares, changes, strict=True)), dict.fromkeys(shares, -0.1))
    assert words in module("mix_words").findings(rows)


def revision_rows(adamw: list[float], sgd: list[float]) -> list[dict]:
    """λ_c of three revisions of each stage, the initialization first."""
    names = ["stage1-step0", "stage1-step1", "stage1-step2", "stage2-step3", "stage2-step4"]
    run = [
        {
            "direction": "in training",
            "revision": name,
            "lr": 0.01,
            "in_training_lambda_c": 10.0,
            "in_training_status": "converged",
            "heldout_lambda_c": 50.0,
            "heldout_status": "converged",
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
    assert "update rises from 50 to 100 in pre-training, and rises from 100 to 300 in mid-training" in said
    assert "over all of them it is below the run's own 2/η at 4." in said
    assert "own update has a median of 2.00 (1.00 to 6.00, 4 revisions) for another batch's loss" in said
    assert "is below the other batch's at 4 of 4 revisions, so its loss falls further: its own" in said
    assert "λ_c rises in both stages along both directions" in said
    said = figure.findings(revision_rows([1, 100, 50, 40, 41], [1, 4, 2, 2, 1]))
    assert (
        "update falls from 100 to 50 in pre-training, and stays about the same, from 40 to 41 in mid-training" in said
    )
    assert "Here λ_c rises in neither stage." in said
    said = figure.findings(revision_rows([1, 100, 50, 40, 41], [1, 2, 4, 2, 1]))
    assert "Here λ_c rises in pre-training along the gradient alone." in said


def planted(adamw: list[float], **run) -> list[dict]:
    return [{**row, **run} if row["direction"] == "in training" else row for row in revision_rows(adamw, adamw)]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (planted([1, 4, 2, 2, 1], in_training_lambda_c=60.0), "is below the other batch's at 0 of 4 revisions.\n"),
        (planted([math.inf] * 5), "λ_c along AdamW's update is ∞ at both ends in pre-training"),
        (planted([1.0, 2.0, math.inf, math.inf, 3.0]), "rises from 2 to ∞ in pre-training, and falls from ∞ to 3 in"),
        (planted([math.nan] * 5), "Here, as far as there are values, λ_c rises in neither stage."),
        (planted([1, 2, 3, 4, math.nan]), "and has no two ends to compare in mid-training; over"),
        (planted([1] * 5, heldout_lambda_c=math.nan, heldout_status="unresolved"), "is nothing to compare its λ_c"),
        (planted([1] * 5, heldout_status="unresolved"), "5 unresolved (noise hides where the loss rises)."),
        ([r for r in planted([1] * 5) if "2-" not in r["revision"]], "and has no two ends to compare in mid-training"),
        (planted([1] * 5), "at a learning rate that falls after a warm-up of 50 steps."),
    ],
)  # fmt: skip
def test_odd_revisions_are_told_truly_and_drawn(rows, words, tmp_path) -> None:
    figure = module("figure4")
    assert words in figure.findings(rows)
    assert "held-out" not in figure.findings(rows)
    figure.draw([{"loss": 1.0, **row} for row in rows], tmp_path / "x.png")


def test_a_value_between_two_gaps_is_drawn_and_no_legend_covers_it(tmp_path, monkeypatch) -> None:
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: figures.append(figure))
    rows = [{"loss": 1.0, **row} for row in planted([1, 2, 3, 4, 5])]
    for i in (1, 3):
        rows[5 + i] |= {"lambda_c": math.nan, "status": "unresolved"}
    module("figure4").draw(rows, tmp_path / "x.png")
    sweep = sweep_rows({0.0: 1.0, 1.0: 3.0}, {0.0: 3.0, 1.0: 1.0})
    module("figure5").draw(sweep + training_rows({0.0: 1.0}, {0.0: 1.0}), tmp_path / "x.png")
    dots = [list(line.get_xdata()) for line in figures[0].axes[0].lines if line.get_marker() == "."]
    assert dots[0] == [0, 2, 4]
    assert [len(figure.legends) for figure in figures] == [1, 1]
    assert all(figure.axes[0].get_legend() is None for figure in figures)


def test_an_edit_of_a_setting_refuses_old_rows_and_empties_the_revisions(tmp_path, monkeypatch) -> None:
    figure, scaffold = module("figure4"), module("scaffold")
    stale = tmp_path / "work" / "figure4" / "revisions" / "stage1-step7"
    stale.mkdir(parents=True)
    monkeypatch.setattr(figure, "train", lambda stages, folder: [{"there": stale.exists()}])
    order = scaffold.Order(True, tmp_path / "work" / "figure4")
    assert figure.pieces(order)["training"]() == [{"direction": "in training", "there": False}]
    for name in ("figure2", "figure3", "figure4", "figure5"):
        made = replace(
            module(name).FIGURE, name=name, pieces=lambda order: {"one": lambda: [{"a": 1.0}]},
            draw=lambda rows, path: None, findings=lambda rows: "",
        )  # fmt: skip
        scaffold.main(made, ["--quick", "--output", str(tmp_path / "made")])
        full = replace(made, setting=lambda order, made=made: made.setting(replace(order, quick=False)))
        with pytest.raises(ValueError, match="must be of the same settings"):
            scaffold.main(full, ["--quick", "--output", str(tmp_path / "made")])
