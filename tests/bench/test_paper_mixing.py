"""The scripts of figures 4 and 5: they run, go on where they were stopped, and the page has their numbers."""

import importlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from sharpkern.errors import SharpkernWarning

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


@pytest.mark.parametrize(
    ("name", "last"),
    [
        pytest.param("figure4", "_measure", marks=pytest.mark.long),
        pytest.param("figure5", "_train", marks=pytest.mark.long),
    ],
)
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
    assert "| searches that did not converge | " in capsys.readouterr().out
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    first = (tmp_path / f"{name}.csv").read_bytes()
    scaffold.main(figure.FIGURE, arguments)
    assert (tmp_path / f"{name}.csv").read_bytes() == first


def test_the_committed_curves_cross_in_every_repeat() -> None:
    figure, rows = module("figure5"), module("scaffold").read_rows("figure5")
    sweep = figure.sweep_of(rows)
    repeats = {point.repeat for point in sweep.points}
    assert len(repeats) >= 5
    alone = [figure.crossing(sweep, [p for p in sweep.points if p.repeat == repeat]) for repeat in repeats]
    assert min(alone) <= figure.crossing(sweep, sweep.points) <= max(alone)
    # What a task's own data do for it: at the ends the curves stand the other way round.
    for share, near, far in ((0.0, "code", "English"), (1.0, "English", "code")):
        shares = (share, 1 - share)
        assert sweep.summary(shares, near).sharpness < sweep.summary(shares, far).sharpness


def test_what_the_page_says_of_the_mixes_and_the_checkpoints_is_so() -> None:
    scaffold, figure4, figure5 = (module(name) for name in ("scaffold", "figure4", "figure5"))
    rows = scaffold.read_rows("figure5")
    english, code = figure5.changes(rows).values()
    assert all(min(runs) > 0 for runs in english.values())
    assert min(english, key=lambda share: sum(english[share])) == 1
    assert all(max(runs) < 0 for share, runs in code.items() if share < 1)
    assert figure5.sweep_of(rows).sweet_spot.shares["English"] > 0.7
    adamw, sgd = (figure4.of_direction(scaffold.read_rows("figure4"), name) for name in ("adamw", "sgd"))
    changes = {"falls": adamw, "rises": sgd}
    for word, found in changes.items():
        first = [row["lambda_c"] for row in found if row["revision"].startswith("stage1")][1:]
        assert (first[-1] > 1.1 * first[0], first[-1] < first[0] / 1.1) == (word == "rises", word == "falls")
        then = [row["lambda_c"] for row in found if row["revision"].startswith("stage2")]
        assert 1 / 1.1 < then[-1] / then[0] < 1.1


def test_the_committed_revisions_all_have_a_value() -> None:
    figure, rows = module("figure4"), module("scaffold").read_rows("figure4")
    for direction in ("adamw", "sgd"):
        found = figure.of_direction(rows, direction)
        assert len(found) >= 12
        assert {row["status"] for row in found} == {"converged"}
        assert {row["revision"][:6] for row in found} == {"stage1", "stage2"}
        steps = [row["step"] for row in found]
        assert steps == sorted(steps)


@pytest.mark.parametrize("name", ["figure2", "figure3", "warm_up", "figure4", "figure5"])
def test_the_page_has_the_numbers_of_the_results(name: str) -> None:
    scaffold = module("scaffold")
    text = (PAPER / "README.md").read_text(encoding="utf-8")
    (section,) = [part for part in text.split("\n## ") if f"results/{name}.png" in part]
    numbers = module(name).FIGURE.numbers(scaffold.read_rows(name))
    lines = section.split("|---|---|\n")[1].strip().split("\n")
    assert lines == scaffold.table(numbers)
    conditions = json.loads((scaffold.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    minutes, threads = round(conditions["seconds"] / 60), conditions["threads"]
    assert f"`python bench/paper/{name}.py`: {minutes} minutes on {threads} thread of a CPU" in section
    # What the text repeats.
    repeated = {
        "figure2": [
            "by step {full batch: first step with λ_max at 2/η}.",
            "at step {full batch: first step with λ_c at half of 2/η}.",
        ],
        "figure3": [],
        "warm_up": [],
        "figure4": ["measures {checkpoints} checkpoints of"],
        "figure5": ["is at {sweet spot} English", "lowest at {lowest sum of both losses} English"],
    }
    prose = " ".join(section.split())
    for phrase in repeated[name]:
        assert re.sub(r"{(.*?)}", lambda key: numbers[key[1]], phrase) in prose


def test_files_are_of_modest_size() -> None:
    sizes = {path.name: path.stat().st_size for path in (PAPER / "results").glob("*.*")}
    assert len(sizes) == 15
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


def test_crossing_sweet_spot_and_training_in_numbers() -> None:
    rows = sweep_rows({0.0: 0.0, 0.6: 1.0, 1.0: 3.0}, {0.0: 5.0, 0.6: 3.0, 1.0: 1.0})
    rows += training_rows({0.0: 0.2, 0.6: 0.005, 1.0: -0.01}, {0.0: -0.5, 0.6: -0.45, 1.0: 0.0})
    assert module("figure5").numbers(rows) == {
        "λ_c of English": "2 at 60 %, 0.667 at 100 %",
        "no finite median of English at": "0 %",
        "searches of English there that did not converge": "3 ascent of 3",
        "λ_c of code": "0.4 at 0 %, 0.667 at 60 %, 2 at 100 %",
        "no finite median of code at": "no share",
        "searches of code there that did not converge": "none of 0",
        "crossing": "80 %",
        "crossing of single repeats": "80 % to 80 %, 3 of 3 repeats",
        "sweet spot": "60 %",
        "sweet spot of single repeats": "60 % to 60 %",
        "step that it allows": "1, then the loss on English rises",
        "loss on English after training": "+0.200 at 0 %, +0.005 at 60 %, -0.010 at 100 %",
        "loss on code after training": "-0.500 at 0 %, -0.450 at 60 %, +0.000 at 100 %",
        "lowest sum of both losses": "60 %",
        "searches that did not converge": "3 ascent of 18",
    }


def with_status(row: dict, status: str, low: float, high: float) -> dict:
    """A sweep's row that did not converge."""
    values = {"unresolved": (math.nan, math.nan), "unbounded": (high, 2 / high), "ascent": (0.0, math.inf)}
    critical_lr, sharpness = values[status]
    return {**row, "status": status, "critical_lr": critical_lr, "lambda_c": sharpness, "bracket_low": low,
            "bracket_high": math.inf if status == "unbounded" else high}  # fmt: skip


def test_a_rise_whose_place_noise_hides_is_told_apart_from_one_at_once() -> None:
    rows = sweep_rows({0.0: 0.0, 1.0: 3.0}, {0.0: 5.0, 1.0: 1.0})
    # English, three repeats at 0: one ascent and two unresolved.
    rows[1:3] = [with_status(rows[1], "unresolved", 0.0, 0.2), with_status(rows[2], "unresolved", 0.0, 0.25)]
    found = module("figure5").numbers(rows + training_rows({0.0: 0.2, 1.0: 0.0}, {0.0: -0.5, 1.0: 0.0}))
    assert found["no finite median of English at"] == "0 %"
    assert found["searches of English there that did not converge"] == "1 ascent, 2 unresolved of 3"
    assert found["searches that did not converge"] == "1 ascent, 2 unresolved of 12"


def test_sweeps_without_values_have_no_numbers() -> None:
    rows = sweep_rows({0.0: 1.0, 1.0: 1.0}, {0.0: 2.0, 1.0: 3.0}) + training_rows({0.0: 0.2}, {0.0: -0.5})
    for i, row in enumerate(rows):
        if row["task"] == "code" and row["kind"] == "sweep":
            rows[i] = with_status(row, "unresolved", 0.0, math.inf)
    found = module("figure5").numbers(rows)
    assert found["λ_c of code"] == found["crossing"] == "no value"
    assert found["no finite median of code at"] == "0 %, 100 %"
    assert found["crossing of single repeats"] == "no value, 0 of 3 repeats"
    assert "sweet spot" not in found


def test_curves_that_are_the_other_way_round_cross_too() -> None:
    figure = module("figure5")
    sweep = figure.sweep_of(sweep_rows({0.0: 5.0, 0.6: 3.0, 1.0: 1.0}, {0.0: 1.0, 0.6: 1.0, 1.0: 3.0}))
    assert figure.crossing(sweep, sweep.points) == pytest.approx(0.8)
    sweep = figure.sweep_of(sweep_rows({0.0: 1.0, 1.0: 1.0}, {0.0: 1.0, 1.0: 1.0}))
    assert figure.crossing(sweep, sweep.points) == 1
    sweep = figure.sweep_of(sweep_rows({0.0: 3.0, 1.0: 2.0}, {0.0: 1.0, 1.0: 1.5}))
    assert math.isnan(figure.crossing(sweep, sweep.points))


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


def test_the_course_of_revisions_in_numbers() -> None:
    assert module("figure4").numbers(revision_rows([1, 50, 100, 100, 300], [1, 2, 4, 4, 8])) == {
        "checkpoints": "5",
        "AdamW's update: λ_c in pre-training": "50 to 100",
        "AdamW's update: λ_c in mid-training": "100 to 300",
        "AdamW's update: λ_c below the run's 2/η": "4",
        "gradient: λ_c in pre-training": "2 to 4",
        "gradient: λ_c in mid-training": "4 to 8",
        "λ_c over the run's own, of another batch": "2.00 (1.00 to 6.00, 4 checkpoints)",
        "λ_c over the run's own, of the training batch": "10.00 (5.00 to 30.00, 4 checkpoints)",
        "training batch's λ_c below the other's": "4 of 4",
        "searches that did not converge": "none of 20",
    }


def planted(adamw: list[float], **run) -> list[dict]:
    return [{**row, **run} if row["direction"] == "in training" else row for row in revision_rows(adamw, adamw)]


@pytest.mark.parametrize(
    ("rows", "name", "value"),
    [
        (planted([1, 4, 2, 2, 1], in_training_lambda_c=60.0), "training batch's λ_c below the other's", "0 of 4"),
        (planted([math.inf] * 5), "AdamW's update: λ_c in pre-training", "∞ to ∞"),
        (planted([math.nan] * 5), "gradient: λ_c in mid-training", "no value to no value"),
        (planted([1] * 5, heldout_lambda_c=math.nan, heldout_status="unresolved"),
         "λ_c over the run's own, of another batch", "nan (no value, 0 checkpoints)"),
        (planted([1] * 5, heldout_status="unresolved"), "searches that did not converge", "5 unresolved of 20"),
        ([r for r in planted([1] * 5) if "2-" not in r["revision"]], "AdamW's update: λ_c in mid-training", "no value"),
    ],
)  # fmt: skip
def test_odd_revisions_are_told_truly_and_drawn(rows, name, value, tmp_path) -> None:
    figure = module("figure4")
    assert figure.numbers(rows)[name] == value
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


def test_an_edit_of_a_setting_takes_no_old_rows_and_empties_the_revisions(tmp_path, monkeypatch) -> None:
    figure, scaffold = module("figure4"), module("scaffold")
    stale = tmp_path / "work" / "figure4" / "revisions" / "stage1-step7"
    stale.mkdir(parents=True)
    monkeypatch.setattr(figure, "train", lambda stages, folder: [{"there": stale.exists()}])
    assert figure.pieces(figure.QUICK, tmp_path / "work" / "figure4", None)["training"]() == [
        {"direction": "in training", "there": False}
    ]
    for name in ("figure2", "figure3", "figure4", "figure5"):
        made = replace(
            module(name).FIGURE, name=name, pieces=lambda *given: {"one": lambda: [{"a": 1.0}]},
            draw=lambda rows, path: None, numbers=lambda rows: {},
        )  # fmt: skip
        scaffold.main(made, ["--quick", "--output", str(tmp_path / "made")])
        full = replace(made, settings=made.settings[:1] * 2)
        with pytest.warns(SharpkernWarning, match="holds results of other settings: setting was"):
            scaffold.main(full, ["--quick", "--output", str(tmp_path / "made")])
