"""How early an alarm rings before a run fails, and how often in runs that do not: by the loss, its gradient and λ_c.

    python bench/decisions/alarms.py [--tasks "MLP/SGD;GPT/AdamW"] [--seeds N]   # makes what alarms.jsonl lacks
    python bench/readme.py                                                     # the table and the picture

The tasks, optimizers and best peaks are those of trials.py. A run takes a third of the best peak, this peak, 3 or 10
times as much, or a rate that grows from a tenth of it to its hundredfold; λ_c is measured in every fifth step. A run
fails where its smoothed loss rises above its lowest value by a quarter of what it has gained, for five steps. Signals
are looked at from step 15 on, and in failing runs up to the step before that.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

# The checkout, also where the package is not installed, and the runs that the benchmarks share.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from decisions import trials
from ledger import table

import sharpkern
from sharpkern.monitoring.monitor import Record

FILE, PICTURE = Path(__file__).parent / "alarms.jsonl", Path(__file__).parent / "alarms.png"
GOOD, RAMP = (1 / 3, 1), "ramp"
KINDS: tuple[float | str, ...] = (*GOOD, 3, 10, RAMP)
FIRST_SEED = 40
EVERY, FROM, STAYS = 5, 15, 5
FAILED, DECAY = 0.25, 0.8

Row = dict[str, Any]
# Steps, and how bad it looks there: the higher the worse.
Signal = list[tuple[int, float]]


def train(task: str, optimizer: str, peak: float, kind: float | str, seed: int) -> Row:
    """Train a model until it fails, or to the end."""
    own = trials.Task(task, seed)
    optimizers = own.optimizers(optimizer, peak)
    groups = [group for one in optimizers for group in one.param_groups]
    peaks = [group["lr"] for group in groups]
    monitor = sharpkern.Monitor(own.model, optimizers, every=EVERY)
    losses: list[float] = []
    norms: list[float] = []
    for step in range(own.steps):
        share = 10 ** (3 * step / own.steps - 1) if kind == RAMP else kind * trials.share_of_peak(step, own.steps)
        for group, its_peak in zip(groups, peaks, strict=True):
            group["lr"] = its_peak * share
        batch = own.draw()
        own.model.zero_grad()
        loss = own.loss(batch)
        loss.backward()
        norms.append(float(torch.stack([p.grad.norm() for p in own.model.parameters() if p.grad is not None]).norm()))
        losses.append(min(float(loss.detach()), 1e4) if math.isfinite(float(loss.detach())) else 1e4)
        if failed_at(losses) is not None:
            break
        monitor(lambda batch=batch: own.loss(batch), loss=loss)
        for one in optimizers:
            one.step()
    headrooms = {record.step: _headroom(record) for record in monitor.history}
    return {
        "task": task,
        "optimizer": optimizer,
        "kind": kind if kind == RAMP else round(float(kind), 3),
        "seed": seed,
        "failed_at": failed_at(losses),
        "steps": list(headrooms),
        "headroom": [_rounded(headrooms[step]) for step in headrooms],
        "loss over lowest": [_rounded(over_lowest(losses[: step + 1])) for step in headrooms],
        "norm over median": [_rounded(_over_median(norms[: step + 1])) for step in headrooms],
    }


def _headroom(record: Record) -> float:
    """η_c over the learning rate: nothing where the loss rises from the start, much where no rise was found."""
    m, lr = record.measurement, record.lr
    return 0.0 if m.status == "ascent" or not lr else min(m.critical_lr / lr, 1e4) if m.critical_lr else 1e4


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return exponentially weighted means of what was there before and at each step."""
    means, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = DECAY * total + (1 - DECAY) * loss, DECAY * weight + 1 - DECAY
        means.append(total / weight)
    return means


def failed_at(losses: Sequence[float]) -> int | None:
    """Return the step from which the smoothed loss is too high for `STAYS` steps."""
    lowest, since = math.inf, None
    for step, mean in enumerate(smoothed(losses)):
        lowest = min(lowest, mean)
        too_high = mean > lowest + FAILED * max(losses[0] - lowest, 0.1)
        since = (step if since is None else since) if too_high else None
        if since is not None and step - since + 1 == STAYS:
            return since
    return None


def over_lowest(losses: Sequence[float]) -> float:
    """Return the smoothed loss over its lowest value."""
    means = smoothed(losses)
    return means[-1] / min(means)


def _over_median(norms: Sequence[float]) -> float:
    return norms[-1] / (statistics.median(norms[-21:-1] or norms) + 1e-12)


# --- Records and tables --------------------------------------------------------------------------------------------


def load(path: Path = FILE) -> list[Row]:
    """Return the runs of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def run(asked: Iterable[str], num_seeds: int, path: Path = FILE) -> None:
    """Make the runs that are not in the file."""
    best = {(one.task, one.optimizer): one.peak for one in trials.load() if (one.policy, one.multiple) == ("none", 1)}
    known = {(row["task"], row["optimizer"], row["kind"], row["seed"]) for row in load(path)}
    for (task, optimizer), kind in product((tuple(entry.split("/")) for entry in asked), KINDS):
        for seed in range(FIRST_SEED, FIRST_SEED + (1 if task in trials.SLOW else num_seeds)):
            key = (task, optimizer, kind if kind == RAMP else round(float(kind), 3), seed)
            if key not in known:
                row = train(task, optimizer, best[task, optimizer], kind, seed)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(*key, "failed at", row["failed_at"], flush=True)


def _of_headroom(row: Row, over: int) -> Signal:
    found = row["headroom"]
    return [(row["steps"][i], -statistics.median(found[i - over + 1 : i + 1])) for i in range(over - 1, len(found))]


SIGNALS: dict[str, Callable[[Row], Signal]] = {
    "headroom η_c/η": lambda row: _of_headroom(row, 1),
    "headroom, median of 5": lambda row: _of_headroom(row, 5),
    "smoothed loss / its lowest": lambda row: list(zip(row["steps"], row["loss over lowest"], strict=True)),
    "gradient norm / its median of 20 steps": lambda row: list(zip(row["steps"], row["norm over median"], strict=True)),
}
# Alarms that one would set without having seen these runs: a name, the signal, and from where on it rings.
FIXED = {
    "headroom < 1.5": ("headroom η_c/η", -1.5),
    "headroom, median of 5 < 1 (`warn_below=1`)": ("headroom, median of 5", -1.0),
    "smoothed loss > 1.5 × its lowest": ("smoothed loss / its lowest", 1.5),
    "gradient norm > 4 × its median": ("gradient norm / its median of 20 steps", 4.0),
}


def _seen(row: Row, signal: str) -> Signal:
    """Return what an alarm may look at: the steps between the first ones and the failure."""
    end = math.inf if row["failed_at"] is None else row["failed_at"]
    return [(step, value) for step, value in SIGNALS[signal](row) if FROM <= step < end]


def parted(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Return good runs and those that fail after the first steps."""
    rows = list(rows)
    good = [row for row in rows if row["failed_at"] is None and row["kind"] in [round(kind, 3) for kind in GOOD]]
    return good, [row for row in rows if row["failed_at"] is not None and row["failed_at"] > FROM + EVERY]


def roc(rows: Sequence[Row], signal: str) -> list[tuple[float, float]]:
    """Return the share of good runs with an alarm and that of failing runs warned of, for every threshold."""
    good, bad = ([max((v for _, v in _seen(row, signal)), default=-math.inf) for row in own] for own in parted(rows))
    points = [(0.0, 0.0)]
    for threshold in sorted({*good, *bad}, reverse=True):
        points.append(tuple(sum(value >= threshold for value in own) / len(own) for own in (good, bad)))
    return points


def area(points: Sequence[tuple[float, float]]) -> float:
    """Return the area under such a curve: 0.5 by chance, 1 at best."""
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(points))


def alarm_table(found: Sequence[Row] | None = None) -> list[str]:
    """Areas under the curves by optimizer, and false alarms, warnings and leads of fixed alarms."""
    rows = load() if found is None else found
    optimizers = [kind for kind in trials.START if all(parted(row for row in rows if row["optimizer"] == kind))]
    counts = {kind: parted(row for row in rows if row["optimizer"] == kind) for kind in optimizers}
    lines = []
    for signal in SIGNALS:
        areas = [area(roc([row for row in rows if row["optimizer"] == kind], signal)) for kind in optimizers]
        lines.append({"cells": " | ".join([signal, *(f"{one:.2f}" for one in [*areas, area(roc(rows, signal))])])})
    heads = [f"{kind}, {len(good)} good, {len(bad)} failing" for kind, (good, bad) in counts.items()]
    good, bad = parted(rows)
    areas_table = table(" | ".join(["signal: area under its curve", *heads, "all"]), "{cells}", lines)
    lines = []
    for name, (signal, threshold) in FIXED.items():
        false = sum(any(value > threshold for _, value in _seen(row, signal)) for row in good)
        rung = [next((step for step, value in _seen(row, signal) if value > threshold), None) for row in bad]
        leads = [row["failed_at"] - step for row, step in zip(bad, rung, strict=True) if step is not None]
        lead = f"{statistics.median(leads):.0f} steps" if leads else ""
        warned = f"{len(leads)} of {len(bad)}"
        lines.append({"cells": " | ".join([name, f"{false} of {len(good)}", warned, lead])})
    head = "alarm | rings in good runs | in failing ones, before they fail | median lead"
    return [*areas_table, "", *table(head, "{cells}", lines)]


def draw(path: Path = PICTURE) -> None:
    """Draw the curves of all runs together."""
    from sharpkern._support.figures import COLORS, legend_below, light_grid, new_figure, save_figure

    rows = load()
    figure = new_figure(7.0, 4.0)
    axes = figure.subplots()
    for signal, color in zip(SIGNALS, COLORS, strict=False):
        axes.step(*zip(*roc(rows, signal), strict=True), where="post", color=color, label=signal.partition(" /")[0])
    axes.plot((0, 1), (0, 1), color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("good runs in which it rings")
    axes.set_ylabel("failing runs in which it rings before")
    light_grid(axes)
    legend_below(figure, [axes])
    save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs that are missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    # Those whose best peak is known, the ones that take an hour aside.
    kinds = dict.fromkeys(f"{one.task}/{one.optimizer}" for one in trials.load() if one.task != "larger GPT")
    parser.add_argument("--tasks", default=";".join(kinds), help="TASK/OPTIMIZER, with semicolons between them")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each kind, of quick tasks")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    run(asked.tasks.split(";"), asked.seeds)
    print(*alarm_table(), sep="\n")


if __name__ == "__main__":
    main()
