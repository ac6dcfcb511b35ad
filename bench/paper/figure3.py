"""Figure 3 of the paper, small: a language model trained by AdamW with warm-up, a stable phase and decay.

    python bench/paper/figure3.py [--quick] [--output FOLDER]

λ_c, λ_dir and the preconditioned λ_max are of the very same batch's loss at the same steps. λ_dir is there twice: of
the update that AdamW makes, and of P⁻¹g, the update without momentum, which λ_max bounds. Beside them stands λ_c of
another batch's loss along AdamW's update.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from runs import Curve, Gauge, by_run, close, draw_runs, largest_share, ratios, times
from scaffold import Figure, Piece, Row, main, median, not_converged, number

# Beside the folder of this script; scaffold has put it on the path.
from workloads import GPT, Loss, gpt_adamw, next_tokens, ramps, text, trained


@dataclass(frozen=True)
class Setting:
    """How long to train, and how the learning rate goes up and down; so many rows of text make a batch."""

    num_steps: int
    warmup: int
    decay: int
    batch_size: int
    # The peaks of the runs.
    lr: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    context: int = 64
    # Odd, so that a swing with a period of two steps is seen on both sides.
    every: int = 11


PHASES = ("warm-up", "stable", "decay")


def train(setting: Setting, lr: float) -> list[Row]:
    """Train by AdamW and measure on the way."""
    torch.manual_seed(0)
    model, data, generator = GPT(context=setting.context), text(), torch.Generator().manual_seed(1)

    def draw_windows() -> Loss:
        starts = torch.randint(len(data) - setting.context, (setting.batch_size, 1), generator=generator)
        return next_tokens(data[starts + torch.arange(setting.context + 1)])

    schedule = ramps(setting.num_steps, setting.warmup, setting.decay)
    training = trained(model, gpt_adamw, draw_windows, schedule, lr=lr)
    gauge = Gauge(model, training.optimizer, due=lambda step: step % setting.every == 1)
    last_seen = torch.full((256,), -torch.inf)
    rows = []
    for step in range(setting.num_steps):
        loss_fn = training.begin()
        row = gauge(loss_fn, heldout=partial(draw_windows(), model))
        held = loss_fn.loss.batch[0].flatten()
        if row is not None:
            rows.append({
                "run": f"η = {lr:g}",
                "phase": PHASES[(step >= setting.warmup) + (step >= setting.num_steps - setting.decay)],
                **row,
                "two_over_lr": 2 / row["lr"],
                # For how many steps the rarest byte of this batch had not been seen; inf if it is new.
                "absence": step - float(last_seen[held].min()),
            })  # fmt: skip
        last_seen[held] = step
        training.step()
    return rows


def pieces(setting: Setting, work: Path, data: None) -> Mapping[str, Piece]:
    """Return the training runs, one for each learning rate."""
    return {f"η = {lr:g}": partial(train, setting, lr) for lr in setting.lr}


def draw(rows: list[Row], path: Path) -> None:
    """Draw one panel for each learning rate."""
    draw_runs(
        rows,
        path,
        curves=[
            Curve("lambda_max", r"preconditioned $\lambda_{\max}$", "#D55E00"),
            Curve("lambda_dir_plain", r"$\lambda_{\mathrm{dir}}$ along $P^{-1}g$", "#CC79A7"),
            Curve("lambda_dir", r"$\lambda_{\mathrm{dir}}$ along AdamW's update", "#009E73"),
            Curve("lambda_c", r"critical sharpness $\lambda_c$", "#0072B2", "status"),
            Curve("heldout_lambda_c", r"$\lambda_c$ of another batch's loss", "#E69F00", "heldout_status"),
        ],
        thresholds=[
            Curve("threshold", r"threshold of $\lambda_{\max}$", "#D55E00"),
            Curve("two_over_lr", r"$2/\eta$", "black"),
        ],
        title=lambda row: f"peak learning rate {row['run'].removeprefix('η = ')}",
    )


def numbers(rows: list[Row]) -> dict[str, str]:
    """Return what the README has in its table; from and to are medians of the ends of a phase."""
    found = {}
    for run in by_run(rows):
        warmup, stable, decay = ([row for row in run if row["phase"] == name] for name in PHASES)
        below, quarter = ratios(run, "lambda_c", "two_over_lr"), -(-len(warmup) // 4)
        of_run = {
            "λ_c in the warm-up": _course(warmup[:quarter], warmup[-quarter:]),
            "median λ_c in the stable phase": _median(stable, "lambda_c"),
            "λ_c in the decay": _course(stable[-max(1, len(stable) // 3) :], decay[-max(1, len(decay) // 3) :]),
            "λ_c below 2/η": f"{sum(ratio < 1 for ratio in below)} of {len(below)} points",
            "median λ_c of another batch's loss in the stable phase": _median(stable, "heldout_lambda_c"),
        }
        found |= {f"{run[0]['run']}: {name}": value for name, value in of_run.items()}
    over = [row for row in rows if row["lambda_max"] > row["threshold"]]
    rest = [row for row in rows if row["lambda_max"] <= row["threshold"]]
    return {
        **found,
        "after the warm-up: λ_c within 25 % of λ_dir": close(row for row in rows if row["phase"] != "warm-up"),
        "all runs: largest λ_dir of P⁻¹g over λ_max": largest_share(rows, "lambda_dir_plain"),
        "all runs: λ_max above its threshold": f"{len(over)} of {len(over) + len(rest)} points",
        "of these in the warm-up": f"{sum(row['phase'] == 'warm-up' for row in over)}",
        "of these with a byte that no batch held before": _new_bytes(over),
        "of the others with such a byte": _new_bytes(rest),
        "of the others: median λ_max over its threshold": f"{median(ratios(rest, 'lambda_max', 'threshold')):.2f}",
        "all runs: searches that did not converge": not_converged(rows),
    }


def _course(start: list[Row], end: list[Row]) -> str:
    return " to ".join(number(median(row["lambda_c"] for row in part)) for part in (start, end))


def _median(rows: list[Row], column: str) -> str:
    return times(median(ratios(rows, column, "two_over_lr")))


def _new_bytes(rows: list[Row]) -> str:
    return f"{sum(math.isinf(row['absence']) for row in rows)} of {len(rows)}"


SETTINGS = (Setting(600, 100, 150, 16), Setting(24, 6, 6, 2))
FIGURE = Figure("figure3", "sharpness of a language model trained by AdamW", SETTINGS, pieces, draw, numbers)

if __name__ == "__main__":
    main(FIGURE)
