"""Figure 4 of the paper, small: critical sharpness of a language model's checkpoints, over both stages of training.

    python bench/paper/figure4.py [--quick] [--output FOLDER]

A small Olmo 2 is pre-trained on English and mid-trained on English and code; its revisions are saved as they go and
measured afterwards by ``sharpkern measure``, which knows nothing of the run. With the network and a GPU the same
command takes the paper's own model:

    sharpkern measure --model allenai/OLMo-2-1124-7B --revisions R1,R2,… --text FILE --direction adamw --batches 8
"""

import contextlib
import csv
import io
import math
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from corpora import english
from facts import median, no_value, number, sentences
from olmo import BATCH, LENGTH, LR, WARMUP, Stages, train
from scaffold import Figure, Order, Piece, Row, main

from sharpkern._support.figures import BLUE, COLORS, ORANGE, columns, legend_below, light_grid
from sharpkern.cli import app
from sharpkern.monitoring.plot import draw_measurements

FULL = Stages(pretraining=1000, every=100, midtraining=300, every_then=50)
QUICK = Stages(pretraining=20, every=10, midtraining=10, every_then=5)
_DIRECTIONS = ("adamw", "sgd")
_GREEN = COLORS[2]


def setting_of(order: Order) -> tuple[Stages, int, dict[str, float]]:
    """Return the stages, how many batches a direction is made of, and what else the rows depend on."""
    run = {"batch": BATCH, "length": LENGTH, "lr": LR, "warmup": WARMUP}
    return (QUICK, 2, run) if order.quick else (FULL, 8, run)


def pieces(order: Order) -> Mapping[str, Piece]:
    """Return the pieces of work: training, and measuring the revisions along each direction."""
    stages, batches, _ = setting_of(order)
    revisions = order.work / "revisions"
    measuring = {f"measuring, {name}": partial(_measure, name, batches, revisions, order.work) for name in _DIRECTIONS}
    return {"training": partial(_trained, stages, revisions), **measuring}


def _trained(stages: Stages, folder: Path) -> list[Row]:
    # Of a run that was stopped, perhaps one with other stages.
    shutil.rmtree(folder, ignore_errors=True)
    return [{"direction": "in training", **row} for row in train(stages, folder)]


def _measure(direction: str, batches: int, revisions: Path, work: Path) -> list[Row]:
    """Run the command on all revisions and read what it wrote."""
    text = work / "english.txt"
    text.write_text(english(), encoding="utf-8")
    names = sorted((path.name for path in revisions.iterdir()), key=lambda name: int(name.split("step")[1]))
    folder = work / direction
    arguments = {
        "--model": revisions,
        "--revisions": ",".join(names),
        "--text": text,
        "--direction": direction,
        "--batches": batches,
        "--batch-size": 16,
        "--tokens": 64,
        "--output": folder,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        app(["measure", *(str(word) for pair in arguments.items() for word in pair)], standalone_mode=False)
    with (folder / "measure.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    numbers = ("loss", "lambda_c", "critical_lr", "error")
    return [
        {
            "direction": direction,
            "revision": row["revision"],
            "step": int(row["step"]),
            "status": row["status"],
            "forwards": int(row["forwards"]),
            **{name: float(row[name]) for name in numbers},
        }
        for row in rows
    ]


def of_direction(rows: list[Row], direction: str) -> list[Row]:
    """Return the rows of one direction, each with the learning rate and λ_c of the run at its revision."""
    run = {row["revision"]: row for row in rows if row["direction"] == "in training"}
    return [{**run[row["revision"]], **row} for row in rows if row["direction"] == direction]


def draw(rows: list[Row], path: Path) -> None:
    """Draw λ_c of the revisions along both directions, and the loss."""
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(10, 5), dpi=120, layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, height_ratios=(3, 1))
    for column, (direction, title) in enumerate(zip(_DIRECTIONS, ("AdamW's update", "the gradient"), strict=True)):
        found = of_direction(rows, direction)
        upper, lower = grid[:, column]
        steps = [row["step"] for row in found]
        _draw_series(upper, found, _measured, r"checkpoints, $\lambda_c$", BLUE)
        if direction == "adamw":
            _draw_series(upper, found, _of_batch, r"in training, $\lambda_c$ of the batch", ORANGE)
            _draw_series(upper, found, _of_other, r"in training, $\lambda_c$ of another batch", _GREEN)
            thresholds = [2 / row["lr"] for row in found]
            upper.plot(steps, thresholds, "k--", linewidth=1.2, label=r"$2/\eta$ of the run", zorder=1)
        lower.plot(steps, [row["loss"] for row in found], color="#555555", linewidth=1.2)
        upper.set_yscale("log")
        upper.set_title(f"along {title}", fontsize="medium")
        lower.set_xlabel("step")
        border = [row["step"] for row in found if row["revision"].startswith("stage2")]
        for axes in (upper, lower):
            if border:
                axes.axvspan(border[0], steps[-1], color="#eeeeee", zorder=0, label="mid-training")
            light_grid(axes)
    grid[0][0].set_ylabel("sharpness (1/learning rate)")
    grid[1][0].set_ylabel("loss on English")
    legend_below(figure, grid[0])
    figure.savefig(path)


def _draw_series(axes: Any, found: list[Row], pick: Callable[[Any], Any], label: str, color: str) -> None:
    """Draw one series as plots of training runs do, and a dot for each value: a line has none between two gaps."""
    records = [SimpleNamespace(step=row["step"], row=row) for row in found]
    draw_measurements(axes, records, pick, label, color)
    dots = [(record.step, pick(record).sharpness) for record in records if pick(record).status == "converged"]
    axes.plot(*columns(dots), ".", color=color, markersize=5)


def _measured(record: Any) -> Any:
    return SimpleNamespace(sharpness=record.row["lambda_c"], status=record.row["status"])


def _of_batch(record: Any) -> Any:
    return SimpleNamespace(sharpness=record.row["in_training_lambda_c"], status=record.row["in_training_status"])


def _of_other(record: Any) -> Any:
    return SimpleNamespace(sharpness=record.row["heldout_lambda_c"], status=record.row["heldout_status"])


def findings(rows: list[Row]) -> str:
    """Say what the rows show."""
    adamw, sgd = (of_direction(rows, direction) for direction in _DIRECTIONS)
    paper = (
        "**The paper** measures the checkpoints of OLMo-2 7B with forward passes alone and finds progressive "
        "sharpening at that scale, in pre-training and in mid-training."
    )
    below = sum(row["lambda_c"] < 2 / row["lr"] for row in adamw)
    run = (
        f"**This run.** {len(adamw)} checkpoints, or revisions, of a small Olmo 2, the first of which is the "
        f"initialization. From the next on λ_c along AdamW's update {_courses(adamw)}; over all of them it is below "
        f"the run's own 2/η at {below}. Along the gradient it {_courses(sgd)}."
    )
    return "\n\n".join([paper, run, sentences(_same(adamw), no_value(rows)), _difference(adamw, sgd)])


def _stages(found: list[Row]) -> dict[str, list[float]]:
    """Return λ_c over each stage, the initialization left out."""
    first = [row["lambda_c"] for row in found if row["revision"].startswith("stage1")][1:]
    return {
        "pre-training": first,
        "mid-training": [row["lambda_c"] for row in found if row["revision"].startswith("stage2")],
    }


def _courses(found: list[Row]) -> str:
    """Say how λ_c changed over each stage."""
    return ", and ".join(f"{_course(values)} in {stage}" for stage, values in _stages(found).items())


def _course(values: list[float]) -> str:
    if not _known(values):
        return "has no two ends to compare"
    before, after = values[0], values[-1]
    if math.isinf(before) and math.isinf(after):
        return "is ∞ at both ends"
    word = "rises" if _rises(values) else "falls" if after < before / 1.1 else "stays about the same,"
    return f"{word} from {number(before)} to {number(after)}"


def _known(values: list[float]) -> bool:
    """Say whether there is a value at both ends."""
    return len(values) > 1 and not math.isnan(values[0]) and not math.isnan(values[-1])


def _rises(values: list[float]) -> bool:
    return _known(values) and values[-1] > 1.1 * values[0]


def _same(adamw: list[Row]) -> str:
    """Compare the update that batches give with the optimizer's own."""
    own, other = (
        [row["lambda_c"] / row[name] for row in adamw[1:] if math.isfinite(row["lambda_c"] + row[name])]
        for name in ("in_training_lambda_c", "heldout_lambda_c")
    )
    text = "`sharpkern measure` sees weights only, and accumulates AdamW's moments over batches while they stand still."
    # Along one and the same update, the optimizer's own.
    pairs = [(row["in_training_lambda_c"], row["heldout_lambda_c"]) for row in adamw[1:]]
    pairs = [pair for pair in pairs if not any(map(math.isnan, pair))]
    if not own or not other or not pairs:
        return f"{text} There is nothing to compare its λ_c with."
    further = sum(batch < another for batch, another in pairs)
    text += (
        " After the initialization the ratio of its λ_c to what a `Monitor` in the run saw at the same step along the "
        f"optimizer's own update has a median of {_spread(other)} for another batch's loss, of as much other "
        f"English of the training text, and {_spread(own)} for the training batch's. Along that update the training "
        f"batch's λ_c is below the other batch's at {further} of {len(pairs)} revisions"
    )
    if 2 * further > len(pairs):
        text += ", so its loss falls further: its own gradient is in the update"
    return f"{text}."


def _spread(ratios: list[float]) -> str:
    """Return the median and the extremes."""
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} revisions)"


def _difference(adamw: list[Row], sgd: list[Row]) -> str:
    """Say where the revisions sharpen as in the paper."""
    along = {"AdamW's update": _stages(adamw), "the gradient": _stages(sgd)}
    seen = [f"{stage} along {name}" for name, stages in along.items() for stage, v in stages.items() if _rises(v)]
    text = f"λ_c rises in {' and in '.join(seen)} alone" if seen else "λ_c rises in neither stage"
    text = "λ_c rises in both stages along both directions" if len(seen) == 4 else text
    all_known = all(_known(values) for stages in along.values() for values in stages.values())
    here = "Here" if all_known else "Here, as far as there are values,"
    return (
        f"**Where they differ.** {here} {text}. The model is some 40 000 times smaller, and trained for minutes on "
        f"half a megabyte of English, at a learning rate that falls after a warm-up of {WARMUP} steps."
    )


FIGURE = Figure("figure4", "critical sharpness of a language model's checkpoints", setting_of, pieces, draw, findings)

if __name__ == "__main__":
    # The same bits on every machine of a kind, and no slower at this size.
    torch.set_num_threads(1)
    main(FIGURE)
