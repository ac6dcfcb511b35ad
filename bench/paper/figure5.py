"""Figure 5 of the paper, small: which share of old data keeps a language model from losing what it knows.

    python bench/paper/figure5.py [--quick] [--output FOLDER]

A byte-level GPT is trained on English until its learning rate has decayed. Then λ_c of its loss on English and on code
is measured along the gradient of mixed batches, against the share of English in the mix; and beside it the model is
really trained on the mixes, 100 steps each, to see what becomes of both losses.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from corpora import apart, byte_rows, code, english
from mix_words import TASKS, changes, findings, sweep_of
from scaffold import Figure, Order, Piece, Row, main
from torch import Tensor, nn
from workloads import GPT, token_loss

import sharpkern
from sharpkern._support.figures import COLORS, legend_below
from sharpkern.mixtures.plot import draw_mixture

_CONTEXT = 64


@dataclass(frozen=True)
class Setting:
    """How much of everything.

    Attributes:
        pretraining: steps on English.
        warmup: of them, at the beginning.
        decay: of them, at the end.
        shares: of English in the mix.
        batch: rows in a mixed batch whose gradient is taken.
        rows: of each task that its loss is of, held out.
        repeats: gradients of other rows for each share.
        training: steps on a mix.
        seeds: runs of these for each share.
    """

    pretraining: int
    warmup: int
    decay: int
    shares: tuple[float, ...]
    batch: int
    rows: int
    repeats: int
    training: int
    seeds: int


SETTING = Setting(1500, 100, 300, (*(i / 10 for i in range(10)), 0.95, 1.0), 1024, 256, 6, 100, 3)
QUICK = Setting(30, 5, 10, (0.0, 0.5, 1.0), 16, 16, 2, 5, 1)

_TRAINING_BATCH = 16
_LR = 3e-3
_MIX_LR = 1e-3


def setting_of(order: Order) -> object:
    """Return what the rows depend on."""
    return QUICK if order.quick else SETTING, _CONTEXT, _TRAINING_BATCH, _LR, _MIX_LR


def pieces(order: Order) -> Mapping[str, Piece]:
    """Return the pieces of work: pre-training, the sweep, and training on each mix."""
    setting = QUICK if order.quick else SETTING
    trained = order.work / "pretrained.pt"
    return {
        "pre-training": partial(_pretrain, setting, trained),
        "sweep": partial(_sweep, setting, trained, order.work / "sweep.jsonl"),
        **{f"training, {share:.0%} English": partial(_train, setting, trained, share) for share in setting.shares},
    }


def _data() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return rows to train on and rows to measure on of each task."""
    halves = {name: apart(byte_rows(words, _CONTEXT + 1)) for name, words in (("English", english()), ("code", code()))}
    return {name: half[0] for name, half in halves.items()}, {name: half[1] for name, half in halves.items()}


def _loss(model: nn.Module, rows: Tensor) -> Tensor:
    return token_loss(model(rows[:, :-1]), rows[:, 1:])


def _losses(model: nn.Module, heldout: Mapping[str, Tensor], rows: int) -> dict[str, float]:
    with torch.no_grad():
        return {name: _loss(model, data[:rows]).item() for name, data in heldout.items()}


def _pretrain(setting: Setting, path: Path) -> list[Row]:
    """Train on English and keep the weights."""
    data, heldout = _data()
    torch.manual_seed(0)
    model = GPT(context=_CONTEXT)
    optimizer = _optimizer(model, _LR)
    draw = torch.Generator().manual_seed(1)
    for step in range(setting.pretraining):
        lr = _LR * min(1, (step + 1) / setting.warmup) * min(1, (setting.pretraining - step) / setting.decay)
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = data["English"]
        _step(model, optimizer, rows[torch.randint(len(rows), (_TRAINING_BATCH,), generator=draw)])
    torch.save(model.state_dict(), path)
    return [
        {"kind": "pre-training", "task": name, "loss": loss, "steps": setting.pretraining}
        for name, loss in _losses(model, heldout, setting.rows).items()
    ]


def _sweep(setting: Setting, trained: Path, path: Path) -> list[Row]:
    """Measure λ_c of both tasks along the gradient of every mix."""
    data, heldout = _data()
    model = _pretrained(trained)
    sweep = sharpkern.mixture_sweep(
        model,
        {name: rows[: setting.rows] for name, rows in heldout.items()},
        data,
        setting.shares,
        batch_loss=partial(_loss, model),
        batch_size=setting.batch,
        repeats=setting.repeats,
        path=path,
        progress=False,
    )
    return [
        {
            "kind": "sweep",
            "share": point.shares[0],
            "repeat": point.repeat,
            "task": point.task,
            "loss": point.loss,
            "lambda_c": point.sharpness,
            "critical_lr": point.critical_lr,
            "status": point.status,
            "error": point.error,
            "bracket_low": point.bracket[0],
            "bracket_high": point.bracket[1],
            "forwards": point.forwards,
        }
        for point in sweep.points
    ]


def _train(setting: Setting, trained: Path, share: float) -> list[Row]:
    """Train on one mix, some runs of it, and say how both losses changed."""
    data, heldout = _data()
    rows = []
    for seed in range(setting.seeds):
        model = _pretrained(trained)
        before = _losses(model, heldout, setting.rows)
        optimizer = _optimizer(model, _MIX_LR)
        draw = torch.Generator().manual_seed(100 + seed)
        for _ in range(setting.training):
            # Of each row by itself whether it is English, so that any share can be had of a small batch.
            is_english = torch.rand(_TRAINING_BATCH, generator=draw) < share
            picked = {name: torch.randint(len(one), (_TRAINING_BATCH,), generator=draw) for name, one in data.items()}
            batch = torch.where(is_english[:, None], *(data[name][picked[name]] for name in TASKS))
            _step(model, optimizer, batch)
        rows += [
            {"kind": "training", "share": share, "repeat": seed, "task": name, "loss": loss,
             "change": loss - before[name], "steps": setting.training}
            for name, loss in _losses(model, heldout, setting.rows).items()
        ]  # fmt: skip
    return rows


def _pretrained(path: Path) -> GPT:
    model = GPT(context=_CONTEXT)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def _optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor) -> None:
    optimizer.zero_grad()
    _loss(model, rows).backward()
    optimizer.step()


def draw(rows: list[Row], path: Path) -> None:
    """Draw λ_c against the share of English, and what training on the mixes did to both losses."""
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(10.5, 5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_mixture(left, sweep_of(rows))
    legend_below(figure, [left])
    for color, (task, by_share) in zip(COLORS, changes(rows).items(), strict=False):
        _draw_change(right, task, by_share, color)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xlabel("share of English in the mix (the rest is code)")
    right.set_ylabel("change of the held-out loss by training on the mix")
    right.legend(fontsize="small")
    right.grid(visible=True, color="#dddddd", linewidth=0.6)
    right.set_axisbelow(True)
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _draw_change(axes: Any, task: str, by_share: Mapping[float, Sequence[float]], color: str) -> None:
    """Draw the mean of the runs, and all that lies between them."""
    shares = sorted(by_share)
    axes.plot(shares, [statistics.mean(by_share[s]) for s in shares], "-o", color=color, markersize=3, label=task)
    edges = [min(by_share[s]) for s in shares], [max(by_share[s]) for s in shares]
    axes.fill_between(shares, *edges, color=color, alpha=0.18, linewidth=0)


FIGURE = Figure(
    "figure5",
    "critical sharpness of two tasks against the share of old data in a mix",
    setting_of,
    pieces,
    draw,
    findings,
)

if __name__ == "__main__":
    # The same bits on every machine of a kind, and no slower at this size.
    torch.set_num_threads(1)
    main(FIGURE)
