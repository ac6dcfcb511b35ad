"""Figure 3 of the paper, small: a language model trained by AdamW with warm-up, a stable phase and decay.

    python bench/paper/figure3.py [--quick] [--output FOLDER]

λ_c, λ_dir and the preconditioned λ_max are of the very same batch's loss at the same steps. λ_dir is there twice: of
the update that AdamW makes, and of P⁻¹g, the update without momentum, which λ_max bounds. Beside them stands λ_c of
another batch's loss along AdamW's update.
"""

import math
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from facts import bound, by_run, close, median, no_value, number, ratios, sentences, times
from gauge import TOLERANCE, Gauge
from panels import Curve, draw_runs
from scaffold import Figure, Order, Piece, Row, main
from torch import Tensor

# Beside the folder of this script; scaffold has put it on the path.
from workloads import GPT, Run, text, token_loss

LEARNING_RATES = (1e-3, 3e-3, 1e-2)
FULL = {"num_steps": 600, "warmup": 100, "decay": 150, "batch_size": 16}
QUICK = {"num_steps": 24, "warmup": 6, "decay": 6, "batch_size": 2}
CONTEXT = 64
# Odd, so that a swing with a period of two steps is seen on both sides.
EVERY = 11


def train(schedule: Run) -> list[Row]:
    """Train by AdamW and measure on the way."""
    torch.manual_seed(schedule.seed)
    model, data = GPT(context=CONTEXT), text()
    generator = torch.Generator().manual_seed(schedule.seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), schedule.lr, betas=(0.9, 0.95), weight_decay=0.1)
    gauge = Gauge(model, optimizer, due=lambda step: step % EVERY == 1)
    last_seen = torch.full((256,), -torch.inf)

    def loss_of(windows: Tensor) -> Tensor:
        return token_loss(model(windows[:, :-1]), windows[:, 1:])

    rows = []
    for step in range(schedule.num_steps):
        optimizer.param_groups[0]["lr"] = schedule.lr_at(step)
        batch, other = (_windows(data, schedule.batch_size, generator) for _ in range(2))
        loss_fn = partial(loss_of, batch)
        optimizer.zero_grad()
        loss_fn().backward()
        row = gauge(loss_fn, heldout=partial(loss_of, other))
        held = batch[:, :-1].flatten()
        if row is not None:
            rows.append({
                "run": schedule.name,
                "phase": _phase(schedule, step),
                **row,
                "two_over_lr": 2 / row["lr"],
                # For how many steps the rarest byte of this batch had not been seen; inf if it is new.
                "absence": step - float(last_seen[held].min()),
            })  # fmt: skip
        last_seen[held] = step
        optimizer.step()
    return rows


def _windows(data: Tensor, num_rows: int, generator: torch.Generator) -> Tensor:
    """Draw stretches of text, [num_rows, CONTEXT + 1]."""
    starts = torch.randint(len(data) - CONTEXT, (num_rows, 1), generator=generator)
    return data[starts + torch.arange(CONTEXT + 1)]


def _phase(schedule: Run, step: int) -> str:
    if step < schedule.warmup:
        return "warm-up"
    return "stable" if step < schedule.num_steps - schedule.decay else "decay"


def setting_of(order: Order) -> object:
    """Return what the runs depend on."""
    return {**(QUICK if order.quick else FULL), "lr": LEARNING_RATES, "context": CONTEXT, "every": EVERY}


def pieces(order: Order) -> Mapping[str, Piece]:
    """Return the training runs, one for each learning rate."""
    size = QUICK if order.quick else FULL
    schedules = [Run(f"η = {lr:g}", "text", lr=lr, measured=(), **size) for lr in LEARNING_RATES]
    return {schedule.name: partial(train, schedule) for schedule in schedules}


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


def findings(rows: list[Row]) -> str:
    """Say what the paper found, what these rows show, and where they differ."""
    runs = by_run(rows)
    found = [
        "**The paper** trains language models by AdamW with warm-up, a stable phase and decay. λ_c falls in the "
        "warm-up, stays below 2/η, and rises in the decay.",
        sentences(
            "**This run.** A model of 2 layers and width 64 learns Python's help texts byte by byte.",
            *(_course(run) for run in runs),
            "(From and to are medians: of the first and the last quarter of the warm-up, of the last thirds of stable "
            "phase and decay.)",
            f"After the warm-up {close(_after_warmup(rows))}; λ_dir is that of AdamW's own update.",
            bound(rows, "lambda_dir_plain", "λ_dir of P⁻¹g", TOLERANCE),
        ),
        sentences(
            "**Where they differ.**", _against_paper(runs), _preconditioned(rows), _heldout(runs), no_value(rows)
        ),
    ]
    return "\n\n".join(found)


def _course(run: list[Row]) -> str:
    """Say how λ_c went in one run: warm-up, stable phase, decay."""
    known = ratios(run, "lambda_c", "two_over_lr")
    if not known:
        return f"At {run[0]['run']} λ_c has no value."
    below = sum(ratio < 1 for ratio in known)
    share = median(ratios(_stable(run), "lambda_c", "two_over_lr"))
    has = "no value" if math.isnan(share) else f"a median of {times(share, '2/η')}"
    return (
        f"At {run[0]['run']} λ_c {_goes(*_warmup(run))} in the warm-up, has {has} in the stable phase, "
        f"and {_goes(*_decay(run))} in the decay; it is below 2/η at "
        f"{'all' if below == len(known) else f'{below} of'} {len(known)} points."
    )


def _goes(start: float, end: float) -> str:
    word = _change(start, end)
    if word == "rises" or word == "falls":
        return f"{word} from {number(start)} to {number(end)}"
    return f"stays at {number(start)}" if word == "stays the same" else word


def _change(start: float, end: float) -> str:
    """Say how λ_c goes, to the digits that are printed."""
    if math.isnan(start) or math.isnan(end):
        return "is not known at both ends"
    if number(start) == number(end):
        return "stays the same"
    return "rises" if end > start else "falls"


def _stable(run: list[Row]) -> list[Row]:
    return [row for row in run if row["phase"] == "stable"]


def _warmup(run: list[Row]) -> tuple[float, float]:
    """Return the medians of λ_c in the first and the last quarter of the warm-up."""
    values = [row["lambda_c"] for row in run if row["phase"] == "warm-up"]
    quarter = -(-len(values) // 4)
    return median(values[:quarter]), median(values[-quarter:])


def _decay(run: list[Row]) -> tuple[float, float]:
    """Return the medians of λ_c in the last third of the stable phase and in that of the decay."""
    stable, decay = ([row["lambda_c"] for row in run if row["phase"] == phase] for phase in ("stable", "decay"))
    last, end = (median(values[-max(1, len(values) // 3) :]) for values in (stable, decay))
    return last, end


def _after_warmup(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["phase"] != "warm-up"]


def _against_paper(runs: list[list[Row]]) -> str:
    """Say in which phases λ_c goes as in the paper."""
    phases = (("warm-up", "falls", _warmup), ("decay", "rises", _decay))
    found = []
    for phase, paper, ends in phases:
        words = Counter(_change(*ends(run)) for run in runs)
        if words[paper] == len(runs):
            found.append(f"In the {phase} λ_c {paper} in all runs, as in the paper.")
        found += [
            f"In {num} of {len(runs)} runs λ_c {word} in the {phase}, where the paper has it {paper[:-1]}."
            for word, num in words.items()
            if word != paper
        ]
    return " ".join(found)


def _preconditioned(rows: list[Row]) -> str:
    """Say where the preconditioned λ_max exceeds its threshold, and how often a byte that is new is the reason."""
    over = [row for row in rows if row["lambda_max"] > row["threshold"]]
    rest = [row for row in rows if row["lambda_max"] <= row["threshold"]]
    if not over and not rest:
        return "The preconditioned λ_max has no value."
    usual = median(ratios(rest, "lambda_max", "threshold"))
    text = f"The preconditioned λ_max is above its own threshold at {len(over)} of {len(over) + len(rest)} points"
    if not over:
        return f"{text}; its median is {usual:.2f} of it."
    text += f", {sum(row['phase'] == 'warm-up' for row in over)} of them in the warm-up"
    new_over, new_rest = (sum(math.isinf(row["absence"]) for row in some) for some in (over, rest))
    elsewhere = ""
    if rest:
        text += f", and has a median of {usual:.2f} of it at the others"
        elsewhere = f", which is so at {new_rest} of the other {len(rest)}"
    text += f". At {new_over} of the {len(over)} the batch holds a byte that no batch held before{elsewhere}"
    if new_over:
        text += ": P is that of the step before, and for the embedding of a new byte it is no more than AdamW's ε"
    return f"{text}."


def _heldout(runs: list[list[Row]]) -> str:
    """Set λ_c of the other batch against that of the gradient's own."""
    medians = {run[0]["run"]: median(ratios(_stable(run), "heldout_lambda_c", "two_over_lr")) for run in runs}
    found = ", ".join(f"{times(value, '2/η')} ({run})" for run, value in medians.items() if not math.isnan(value))
    if not found:
        return ""
    return f"λ_c of another batch's loss along the same update has, in the stable phase, a median of {found}."


FIGURE = Figure("figure3", "sharpness of a language model trained by AdamW", setting_of, pieces, draw, findings)

if __name__ == "__main__":
    # The same bits on every machine of a kind.
    torch.set_num_threads(1)
    main(FIGURE)
