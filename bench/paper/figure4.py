"""Figure 4 of the paper, small: critical sharpness of a language model's checkpoints, over both stages of training.

    python bench/paper/figure4.py [--quick] [--output FOLDER]

A small Olmo 2 is pre-trained on English and mid-trained on English and code; its revisions are saved as they go and
measured afterwards by ``sharpkern measure``, which knows nothing of the run. With the network and a GPU the same
command takes the paper's own model:

    sharpkern measure --model allenai/OLMo-2-1124-7B --revisions R1,R2,… --text FILE --direction adamw --batches 8
"""

import contextlib
import io
import math
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from corpora import english
from olmo import BATCH, LENGTH, LR, WARMUP, Stages, train
from runs import Curve, draw_runs
from scaffold import Figure, Piece, Row, main, median, not_converged, number, read_rows, span

from sharpkern._support.figures import BLUE, COLORS, ORANGE
from sharpkern.cli import app

# Stages, of how many batches a direction is made, and what else the rows depend on.
_RUN = {"batch": BATCH, "length": LENGTH, "lr": LR, "warmup": WARMUP}
FULL = Stages(pretraining=1000, every=100, midtraining=300, every_then=50), 8, _RUN
QUICK = Stages(pretraining=20, every=10, midtraining=10, every_then=5), 2, _RUN
_DIRECTIONS = ("adamw", "sgd")
_CURVES = (
    Curve("lambda_c", r"checkpoints, $\lambda_c$", BLUE, "status"),
    Curve("in_training_lambda_c", r"in training, $\lambda_c$ of the batch", ORANGE, "in_training_status"),
    Curve("heldout_lambda_c", r"in training, $\lambda_c$ of another batch", COLORS[2], "heldout_status"),
)


def pieces(setting: tuple[Stages, int, Any], work: Path, data: None) -> Mapping[str, Piece]:
    """Return the pieces of work: training, and measuring the revisions along each direction."""
    stages, batches, _ = setting
    revisions = work / "revisions"
    measuring = {f"measuring, {name}": partial(_measure, name, batches, revisions, work) for name in _DIRECTIONS}
    return {"training": partial(_trained, stages, revisions), **measuring}


def _trained(stages: Stages, folder: Path) -> list[Row]:
    # Of a run that was stopped, perhaps one with other stages.
    shutil.rmtree(folder, ignore_errors=True)
    return [{"direction": "in training", **row} for row in train(stages, folder)]


def _measure(direction: str, batches: int, revisions: Path, work: Path) -> list[Row]:
    """Run the command on all revisions and read what it wrote."""
    text = work / "english.txt"
    text.write_text(english(), encoding="utf-8")
    saved = sorted((path.name for path in revisions.iterdir()), key=lambda name: int(name.split("step")[1]))
    folder = work / direction
    words = f"measure --direction {direction} --batches {batches} --batch-size 16 --tokens 64 --revisions".split()
    places = ["--model", str(revisions), "--text", str(text), "--output", str(folder)]
    with contextlib.redirect_stdout(io.StringIO()):
        app([*words, ",".join(saved), *places], standalone_mode=False)
    names = ("revision", "step", "status", "forwards", "loss", "lambda_c", "critical_lr", "error")
    return [{"direction": direction, **{name: row[name] for name in names}} for row in read_rows("measure", folder)]


def of_direction(rows: list[Row], direction: str) -> list[Row]:
    """Return the rows of one direction, each with the learning rate and λ_c of the run at its revision."""
    run = {row["revision"]: row for row in rows if row["direction"] == "in training"}
    return [{**run[row["revision"]], **row} for row in rows if row["direction"] == direction]


def draw(rows: list[Row], path: Path) -> None:
    """Draw λ_c of the revisions along both directions, and the loss."""
    adamw, sgd = (of_direction(rows, direction) for direction in _DIRECTIONS)
    panels = [{**row, "run": "along AdamW's update", "two_over_lr": 2 / row["lr"]} for row in adamw]
    # What the run saw is of its own update.
    own = ("in_training", "heldout")
    panels += [
        {**{key: row[key] for key in row if not key.startswith(own)}, "run": "along the gradient"} for row in sgd
    ]
    draw_runs(
        panels,
        path,
        curves=_CURVES,
        thresholds=[Curve("two_over_lr", r"$2/\eta$ of the run", "black")],
        title=lambda row: row["run"],
        window=1,
        shaded=("mid-training", lambda row: row["revision"].startswith("stage2")),
    )


def numbers(rows: list[Row]) -> dict[str, str]:
    """Return what the README has in its table; from and to leave the initialization out."""
    adamw, sgd = (of_direction(rows, direction) for direction in _DIRECTIONS)
    # Along one and the same update, the optimizer's own.
    pairs = [(row["in_training_lambda_c"], row["heldout_lambda_c"]) for row in adamw[1:]]
    pairs = [pair for pair in pairs if not any(map(math.isnan, pair))]
    return {
        "checkpoints": str(len(adamw)),
        "AdamW's update: λ_c in pre-training": _course(adamw[1:], "stage1"),
        "AdamW's update: λ_c in mid-training": _course(adamw, "stage2"),
        "AdamW's update: λ_c below the run's 2/η": str(sum(row["lambda_c"] < 2 / row["lr"] for row in adamw)),
        "gradient: λ_c in pre-training": _course(sgd[1:], "stage1"),
        "gradient: λ_c in mid-training": _course(sgd, "stage2"),
        "λ_c over the run's own, of another batch": _over(adamw, "heldout_lambda_c"),
        "λ_c over the run's own, of the training batch": _over(adamw, "in_training_lambda_c"),
        "training batch's λ_c below the other's": f"{sum(own < other for own, other in pairs)} of {len(pairs)}",
        "searches that did not converge": not_converged(rows),
    }


def _course(found: list[Row], stage: str) -> str:
    """Return λ_c at both ends of a stage."""
    values = [row["lambda_c"] for row in found if row["revision"].startswith(stage)]
    return f"{number(values[0])} to {number(values[-1])}" if values else "no value"


def _over(adamw: list[Row], column: str) -> str:
    """Return the median and the extremes of λ_c over that of the run, after the initialization."""
    ratios = [row["lambda_c"] / row[column] for row in adamw[1:] if math.isfinite(row["lambda_c"] + row[column])]
    return f"{median(ratios):.2f} ({span(ratios, '{:.2f}'.format)}, {len(ratios)} checkpoints)"


FIGURE = Figure("figure4", "critical sharpness of a language model's checkpoints", (FULL, QUICK), pieces, draw, numbers)

if __name__ == "__main__":
    main(FIGURE)
