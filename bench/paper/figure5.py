"""Figure 5 of the paper, small: which share of old data keeps a language model from losing what it knows.

    python bench/paper/figure5.py [--quick] [--output FOLDER]

A byte-level GPT is trained on English until its learning rate has decayed. Then λ_c of its loss on English and on code
is measured along the gradient of mixed batches, against the share of English in the mix; and beside it the model is
really trained on the mixes, 100 steps each, to see what becomes of both losses.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from corpora import code, english
from scaffold import Figure, Piece, Row, main, median, not_converged, number, percent, span
from torch import Tensor, nn
from workloads import GPT, Loss, gpt_adamw, next_tokens, ramps, text, trained

import sharpkern
from sharpkern._support.figures import COLORS, legend_below, light_grid, new_figure
from sharpkern.mixtures.plot import draw_mixture
from sharpkern.mixtures.results import MixturePoint, MixtureSweep

TASKS = ("English", "code")
_OF_POINT = ("repeat", "task", "loss", "critical_lr", "status", "error", "forwards")


@dataclass(frozen=True)
class Setting:
    """How much of everything."""

    pretraining: int  # steps on English
    warmup: int  # of them, at the beginning
    decay: int  # of them, at the end
    shares: tuple[float, ...]  # of English in the mix
    batch: int  # rows in a mixed batch whose gradient is taken
    rows: int  # of each task that its loss is of, held out
    repeats: int  # gradients of other rows for each share
    training: int  # steps on a mix
    seeds: int  # runs of these for each share
    training_batch: int = 16
    lr: float = 3e-3  # the peak in pre-training
    mix_lr: float = 1e-3
    context: int = 64


SETTING = Setting(1500, 100, 300, (*(i / 10 for i in range(10)), 0.95, 1.0), 1024, 256, 6, 100, 3)
QUICK = Setting(30, 5, 10, (0.0, 0.5, 1.0), 16, 16, 2, 5, 1)


def pieces(setting: Setting, work: Path, data: None) -> Mapping[str, Piece]:
    """Return the pieces of work: pre-training, the sweep, and training on each mix."""
    weights = work / "pretrained.pt"
    return {
        "pre-training": partial(_pretrain, setting, weights),
        "sweep": partial(_sweep, setting, weights, work / "sweep.jsonl"),
        **{f"training, {share:.0%} English": partial(_train, setting, weights, share) for share in setting.shares},
    }


def _data(context: int) -> list[dict[str, Tensor]]:
    """Return rows to train on, and every tenth to measure on, of each task."""
    rows = {}
    for name, words in zip(TASKS, (english(), code()), strict=True):
        data = text(words)
        rows[name] = data[: len(data) // (context + 1) * (context + 1)].view(-1, context + 1)
    held = {name: torch.arange(len(of_one)) % 10 == 9 for name, of_one in rows.items()}
    return [{name: of_one[held[name] == which] for name, of_one in rows.items()} for which in (False, True)]


def _losses(model: nn.Module, heldout: Mapping[str, Tensor], rows: int) -> dict[str, float]:
    with torch.no_grad():
        return {name: next_tokens(data[:rows])(model).item() for name, data in heldout.items()}


def _pretrain(setting: Setting, path: Path) -> list[Row]:
    """Train on English and keep the weights."""
    data, heldout = _data(setting.context)
    torch.manual_seed(0)
    model, generator, rows = GPT(context=setting.context), torch.Generator().manual_seed(1), data["English"]

    def draw_rows() -> Loss:
        return next_tokens(rows[torch.randint(len(rows), (setting.training_batch,), generator=generator)])

    schedule = ramps(setting.pretraining, setting.warmup, setting.decay)
    trained(model, gpt_adamw, draw_rows, schedule, lr=setting.lr).run(setting.pretraining)
    torch.save(model.state_dict(), path)
    return [
        {"kind": "pre-training", "task": name, "loss": loss, "steps": setting.pretraining}
        for name, loss in _losses(model, heldout, setting.rows).items()
    ]


def _sweep(setting: Setting, weights: Path, path: Path) -> list[Row]:
    """Measure λ_c of both tasks along the gradient of every mix."""
    data, heldout = _data(setting.context)
    model = _pretrained(setting, weights)
    sweep = sharpkern.mixture_sweep(
        model,
        {name: rows[: setting.rows] for name, rows in heldout.items()},
        data,
        setting.shares,
        batch_loss=lambda rows: next_tokens(rows)(model),
        batch_size=setting.batch,
        repeats=setting.repeats,
        path=path,
        progress=False,
    )
    return [
        {
            "kind": "sweep",
            "share": point.shares[0],
            "lambda_c": point.sharpness,
            "bracket_low": point.bracket[0],
            "bracket_high": point.bracket[1],
            **{name: getattr(point, name) for name in _OF_POINT},
        }
        for point in sweep.points
    ]


def _train(setting: Setting, path: Path, share: float) -> list[Row]:
    """Train on one mix, some runs of it, and say how both losses changed."""
    data, heldout = _data(setting.context)
    size, found = setting.training_batch, []
    for seed in range(setting.seeds):
        model, generator = _pretrained(setting, path), torch.Generator().manual_seed(100 + seed)
        before = _losses(model, heldout, setting.rows)

        def draw_rows(generator: torch.Generator = generator) -> Loss:
            # Of each row by itself whether it is English, so that any share can be had of a small batch.
            is_english = torch.rand(size, generator=generator) < share
            picked = [data[name][torch.randint(len(data[name]), (size,), generator=generator)] for name in TASKS]
            return next_tokens(torch.where(is_english[:, None], *picked))

        trained(model, gpt_adamw, draw_rows, lr=setting.mix_lr).run(setting.training)
        about = {"kind": "training", "share": share, "repeat": seed, "steps": setting.training}
        for name, loss in _losses(model, heldout, setting.rows).items():
            found.append({**about, "task": name, "loss": loss, "change": loss - before[name]})
    return found


def _pretrained(setting: Setting, path: Path) -> GPT:
    model = GPT(context=setting.context)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def draw(rows: list[Row], path: Path) -> None:
    """Draw λ_c against the share of English, and what training on the mixes did to both losses."""
    figure = new_figure(10.5, 5)
    left, right = figure.subplots(1, 2)
    draw_mixture(left, sweep_of(rows))
    legend_below(figure, [left])
    for color, (task, by_share) in zip(COLORS, changes(rows).items(), strict=False):
        shares, runs = list(by_share), list(by_share.values())
        right.plot(shares, list(map(statistics.mean, runs)), "-o", color=color, markersize=3, label=task)
        right.fill_between(shares, list(map(min, runs)), list(map(max, runs)), color=color, alpha=0.18, linewidth=0)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xlabel("share of English in the mix (the rest is code)")
    right.set_ylabel("change of the held-out loss by training on the mix")
    right.legend(fontsize="small")
    light_grid(right)
    figure.savefig(path)


def sweep_of(rows: Sequence[Row]) -> MixtureSweep:
    """Return the sweep that a figure's rows hold."""
    points = tuple(
        MixturePoint(
            (row["share"], round(1 - row["share"], 12)), int(row["repeat"]), row["task"], row["critical_lr"],
            row["lambda_c"], row["status"], row["error"], (row["bracket_low"], row["bracket_high"]), row["loss"],
            int(row["forwards"]), "virtual",
        )
        for row in rows if row["kind"] == "sweep"
    )  # fmt: skip
    return MixtureSweep(TASKS, TASKS, tuple(dict.fromkeys(point.shares for point in points)), points)


def changes(rows: Sequence[Row]) -> dict[str, dict[float, list[float]]]:
    """Return how training on each mix changed the loss of each task, {task: {share: one number per run}}."""
    found: dict[str, dict[float, list[float]]] = {task: {} for task in TASKS}
    for row in sorted((row for row in rows if row["kind"] == "training"), key=lambda row: row["share"]):
        found[row["task"]].setdefault(row["share"], []).append(row["change"])
    return found


def crossing(sweep: MixtureSweep, points: Sequence[MixturePoint]) -> float:
    """Return the share of English at which λ_c of the two tasks is the same, the largest of several; nan for none.

    Critical learning rates are compared, medians of the points given, since those are finite where λ_c is not; between
    two shares (a − b)/(a + b) is taken to change linearly.
    """
    differences = []
    for shares in sweep.mixes:
        own, other = (
            median(p.safe_step for p in points if p.shares == shares and p.task == task and p.safe_step >= 0)
            for task in TASKS
        )
        if own + other > 0:
            differences.append((shares[0], (own - other) / (own + other)))
    # From the right, where English is all of the mix.
    for (left, before), (right, after) in reversed(list(pairwise(differences))):
        if before * after <= 0:
            return right if before == after else left + (right - left) * before / (before - after)
    return math.nan


def numbers(rows: list[Row]) -> dict[str, str]:
    """Return what the README has in its table; values at shares of English are medians of the repeats."""
    sweep, found = sweep_of(rows), {}
    repeats = sorted({point.repeat for point in sweep.points})
    for task in TASKS:
        medians = {shares[0]: sweep.summary(shares, task).sharpness for shares in sweep.mixes}
        without = [share for share, value in medians.items() if not math.isfinite(value)]
        there = [row for row in rows if row["kind"] == "sweep" and row["task"] == task and row["share"] in without]
        found[f"λ_c of {task}"] = _at_shares(medians, number)
        found[f"no finite median of {task} at"] = ", ".join(map(percent, without)) or "no share"
        found[f"searches of {task} there that did not converge"] = not_converged(there)
    alone = [crossing(sweep, [p for p in sweep.points if p.repeat == repeat]) for repeat in repeats]
    found["crossing"] = percent(crossing(sweep, sweep.points))
    crossed = sum(share >= 0 for share in alone)
    found["crossing of single repeats"] = f"{span(alone, percent)}, {crossed} of {len(repeats)} repeats"
    spot = sweep.sweet_spot
    if spot is not None:
        found["sweet spot"] = percent(spot.shares["English"])
        found["sweet spot of single repeats"] = span((shares[0] for shares in spot.of_repeats), percent)
        found["step that it allows"] = f"{spot.critical_lr:.2g}, then the loss on {spot.task} rises"
    means = {task: {share: statistics.mean(runs) for share, runs in one.items()} for task, one in changes(rows).items()}
    for task, by_share in means.items():
        found[f"loss on {task} after training"] = _at_shares(by_share, "{:+.3f}".format)
    old, new = means.values()
    found["lowest sum of both losses"] = percent(min(old, key=lambda share: old[share] + new[share]))
    found["searches that did not converge"] = not_converged(rows)
    return found


def _at_shares(values: Mapping[float, float], text: Callable[[float], str]) -> str:
    """Return a value at some shares of English where it is finite, the smallest and the largest among them."""
    finite = [share for share, value in values.items() if math.isfinite(value)]
    some = dict.fromkeys(finite[:: max(1, len(finite) // 4)] + finite[-1:])
    return ", ".join(f"{text(values[share])} at {percent(share)}" for share in some) or "no value"


FIGURE = Figure(
    "figure5", "critical sharpness of two tasks against the share of old data in a mix", (SETTING, QUICK), pieces, draw,
    numbers,
)  # fmt: skip

if __name__ == "__main__":
    main(FIGURE)
