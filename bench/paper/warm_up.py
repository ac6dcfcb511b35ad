"""Why λ_c rises in the warm-up of figure 3 here and falls in the paper: one thing of the run changed at a time.

    python bench/paper/warm_up.py [--quick] [--output FOLDER]

The run is that of figure 3: a byte-wise GPT, AdamW, a linear warm-up, nothing after it. Changed are the size of the
initial weights, width and depth, batch size, β₂, length and peak of the warm-up, and the definition of Δθ: without bias
correction λ_c is what it is times (1 − β₁ᵗ)/√(1 − β₂ᵗ), step t counted from 1. Two seeds each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from runs import by_run
from scaffold import Figure, Piece, Row, main, median, number
from torch import nn

# Beside the folder of this script; scaffold has put it on the path.
from workloads import GPT, gpt_adamw, ramps, sentences, trained

import sharpkern
from sharpkern._support.figures import COLORS, GREY, columns, light_grid, new_figure


@dataclass(frozen=True)
class Variant:
    """A run: standard deviation of the initial matrices, sizes, optimizer and warm-up."""

    std: float = 0.02
    width: int = 64
    layers: int = 2
    rows: int = 16
    beta2: float = 0.95
    peak: float = 3e-3
    warm_up: int = 100


BASE = Variant()
# λ_c has fallen where the last quarter of a warm-up is lower than this share of the highest one.
_FALLEN = 0.8
FACTORS: dict[str, tuple[str, tuple[float, ...]]] = {
    "standard deviation of the initial weights": ("std", (0.02, 0.1, 0.2)),
    "width": ("width", (32, 64, 128)),
    "layers": ("layers", (2, 6)),
    "rows of 64 bytes in a batch": ("rows", (4, 16, 64)),
    "β₂": ("beta2", (0.95, 0.999)),
    "peak learning rate": ("peak", (1e-3, 3e-3, 1e-2)),
    "steps of warm-up": ("warm_up", (30, 100, 300)),
}


@dataclass(frozen=True)
class Setting:
    """How many measurements a warm-up has, which variants there are, and the seeds of each."""

    measurements: int
    seeds: int
    variants: Mapping[str, Variant]


def variants() -> dict[str, Variant]:
    """Return all runs by their names, the one that all have in common among them once."""
    found = {"as in figure 3": BASE}
    for words, (field, values) in FACTORS.items():
        found |= {f"{words} {value:g}": replace(BASE, **{field: value}) for value in values}
    return {name: one for name, one in found.items() if one != BASE or name == "as in figure 3"}


def train(name: str, variant: Variant, seed: int, measurements: int) -> list[Row]:
    """Train through the warm-up, and measure on the way."""
    torch.manual_seed(seed)
    model = GPT(variant.width, variant.layers)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=variant.std)
    schedule = ramps(warmup=variant.warm_up)
    optimizer = partial(gpt_adamw, betas=(0.9, variant.beta2))
    training = trained(model, optimizer, sentences(seed + 1, variant.rows), schedule, lr=variant.peak)
    monitor = sharpkern.Monitor(model, training.optimizer, every=max(1, variant.warm_up // measurements))
    for _ in range(variant.warm_up):
        loss_fn = training.begin()
        monitor(loss_fn, loss=loss_fn.trained)
        training.step()
    return [
        {
            "run": name,
            "seed": seed,
            "step": record.step,
            "share": record.step / variant.warm_up,
            "lr": record.lr,
            "loss": record.measurement.base_loss,
            "lambda_c": record.measurement.sharpness,
            "status": record.measurement.status,
            "uncorrected": record.measurement.sharpness
            * (1 - 0.9 ** (record.step + 1))
            / (1 - variant.beta2 ** (record.step + 1)) ** 0.5,
        }
        for record in monitor.history
    ]


def pieces(setting: Setting, work: Path, data: None) -> Mapping[str, Piece]:
    """Return the training runs."""
    return {
        f"{name}, seed {seed}": partial(train, name, variant, seed, setting.measurements)
        for name, variant in setting.variants.items()
        for seed in range(setting.seeds)
    }


def draw(rows: list[Row], path: Path) -> None:
    """Draw one panel for each thing that was changed: the seeds' median λ_c by the share of the warm-up."""
    runs = {run[0]["run"]: run for run in by_run(rows)}
    figure = new_figure(11, 5.6)
    panels = figure.subplots(2, 4, sharey=True).flatten()
    for axes, (words, (field, values)) in zip(panels, FACTORS.items(), strict=False):
        for value, color in zip(values, COLORS, strict=False):
            run = runs.get("as in figure 3" if getattr(BASE, field) == value else f"{words} {value:g}", ())
            shares = sorted({row["share"] for row in run})
            middles = [(share, median(row["lambda_c"] for row in run if row["share"] == share)) for share in shares]
            axes.plot(*columns(middles), color=color, linewidth=1.3, label=f"{value:g}")
        own = sorted({(row["share"], 2 / row["lr"]) for row in runs["as in figure 3"]})
        axes.plot(*columns(own), "--", color=GREY, linewidth=1)
        axes.set_yscale("log")
        axes.set_title(words, fontsize="small")
        axes.legend(fontsize="x-small", frameon=False, loc="lower right")
        light_grid(axes)
    panels[-1].axis("off")
    panels[-1].text(0, 0.5, "medians of the seeds\ndashed: 2/η of the run\nas in figure 3", fontsize="small")
    for axes in panels[3:7]:
        axes.set_xlabel("share of the warm-up")
    for axes in panels[::4]:
        axes.set_ylabel(r"$\lambda_c$ (1/learning rate)")
    figure.savefig(path)


def numbers(rows: list[Row]) -> dict[str, str]:
    """Return what the README has in its table: medians of the four quarters of the warm-up."""
    found = {}
    for run in by_run(rows):
        seeds = [_quarters(run, "lambda_c", seed) for seed in sorted({row["seed"] for row in run})]
        fell = sum(quarters[3] < _FALLEN * max(quarters) for quarters in seeds)
        middles = " / ".join(number(median(column)) for column in zip(*seeds, strict=True))
        found[run[0]["run"]] = f"{middles}, has fallen at the end with {fell} of {len(seeds)} seeds"
    base = next(run for run in by_run(rows) if run[0]["run"] == "as in figure 3")
    seeds = [_quarters(base, "uncorrected", seed) for seed in sorted({row["seed"] for row in base})]
    return {
        **found,
        "as in figure 3, Δθ without bias correction": " / ".join(
            number(median(column)) for column in zip(*seeds, strict=True)
        ),
    }


def _quarters(run: list[Row], column: str, seed: int) -> list[float]:
    """Return the medians of a column in the four quarters of a run."""
    own = [row for row in run if row["seed"] == seed and row["status"] == "converged"]
    return [median(row[column] for row in own if k <= 4 * row["share"] < k + 1) for k in range(4)]


SETTINGS = (Setting(20, 3, variants()), Setting(4, 1, {"as in figure 3": replace(BASE, warm_up=8, rows=2)}))
FIGURE = Figure("warm_up", "λ_c in warm-ups, one thing changed at a time", SETTINGS, pieces, draw, numbers)

if __name__ == "__main__":
    main(FIGURE)
