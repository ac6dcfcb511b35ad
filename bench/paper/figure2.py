"""Figure 2 of the paper, small: a fully connected network trained by SGD with the full, a large and a small batch.

    python bench/paper/figure2.py [--quick] [--output FOLDER] [--data FOLDER]

λ_c, λ_dir and λ_max are of the very same batch's loss at the same steps; beside them λ_c of the full training set's
loss along the same update. Without --data the network learns scikit-learn's digits; with CIFAR-10's folder it has the
paper's setting, on the first 5000 images.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from cifar import cifar10
from facts import CLOSE, bound, by_run, close, median, no_value, percent, ratios, sentences, times
from gauge import TOLERANCE, Gauge
from panels import Curve, draw_runs
from scaffold import Figure, Order, Piece, Row, main
from torch import Tensor, nn
from torch.nn import functional as F

from sharpkern.cli.digits import digits


@dataclass(frozen=True)
class Setting:
    """What is trained on what, and how.

    Attributes:
        data: in words, that follow the number of images.
        num_inputs: of the network.
        width: of its hidden layers.
        lr: learning rate.
        num_steps: of SGD.
        every: so many steps a measurement; odd, since at the edge of stability the iterate swings from side to side
            with a period of two, of which an even stride would see one side only.
        num_images: of the training set, which is the full batch.
        large: batch size.
        small: batch size.
    """

    data: str
    num_inputs: int
    width: int
    lr: float
    num_steps: int
    every: int
    num_images: int
    large: int
    small: int


DIGITS = Setting("handwritten digits, a fifth of their labels random", 64, 128, 0.1, 600, 5, 1797, 512, 64)
DIGITS_QUICK = Setting(DIGITS.data, 64, 128, 0.1, 20, 5, 200, 100, 32)
CIFAR = Setting("images of CIFAR-10", 3072, 512, 0.03, 3000, 25, 5000, 512, 64)
CIFAR_QUICK = Setting(CIFAR.data, 3072, 16, 0.03, 6, 3, 200, 100, 32)


def network(num_inputs: int, width: int) -> nn.Sequential:
    """Return four linear layers with GELU between them, 10 outputs."""
    sizes = (num_inputs, width, width, width, 10)
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.GELU())]
    return nn.Sequential(*layers[:-1])


def train(run: str, setting: Setting, data: Callable[[int], tuple[Tensor, Tensor]], batch_size: int) -> list[Row]:
    """Train by SGD without momentum and measure on the way."""
    torch.manual_seed(0)
    model = network(setting.num_inputs, setting.width)
    inputs, labels = data(setting.num_images)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr)
    gauge = Gauge(model, optimizer, due=lambda step: step % setting.every == 0)
    is_full = batch_size == len(inputs)

    def loss_of(images: Tensor | slice) -> Tensor:
        return F.cross_entropy(model(inputs[images]), labels[images])

    everything = slice(None)
    rows = []
    for _ in range(setting.num_steps):
        batch = everything if is_full else torch.randperm(len(inputs), generator=generator)[:batch_size]
        loss_fn = partial(loss_of, batch)
        optimizer.zero_grad()
        loss_fn().backward()
        row = gauge(loss_fn, heldout=None if is_full else partial(loss_of, everything))
        if row is not None:
            rows.append({"run": run, "batch": batch_size, "data": setting.data, "width": setting.width, **row})
        optimizer.step()
    return rows


def setting_of(order: Order) -> Setting:
    """Return the setting that the command line asks for."""
    if order.data is None:
        return DIGITS_QUICK if order.quick else DIGITS
    return CIFAR_QUICK if order.quick else CIFAR


def pieces(order: Order) -> Mapping[str, Piece]:
    """Return the three training runs."""
    setting = setting_of(order)
    data = digits if order.data is None else partial(cifar10, order.data)
    sizes = {"full batch": setting.num_images, "large batch": setting.large, "small batch": setting.small}
    return {run: partial(train, run, setting, data, size) for run, size in sizes.items()}


def draw(rows: list[Row], path: Path) -> None:
    """Draw one panel for each batch size."""
    draw_runs(
        rows,
        path,
        curves=[
            Curve("lambda_max", r"Hessian sharpness $\lambda_{\max}$", "#D55E00"),
            Curve("lambda_dir", r"directional sharpness $\lambda_{\mathrm{dir}}$", "#009E73"),
            Curve("lambda_c", r"critical sharpness $\lambda_c$", "#0072B2", "status"),
            Curve("heldout_lambda_c", r"$\lambda_c$ of the full training set's loss", "#E69F00", "heldout_status"),
        ],
        thresholds=[Curve("threshold", r"$2/\eta$", "black")],
        title=lambda row: f"{row['run']}, {row['batch']:.0f}",
    )


def findings(rows: list[Row]) -> str:
    """Say what the paper found, what these rows show, and where they differ."""
    full, *others = by_run(rows)
    found = [
        "**The paper** trains a fully connected network by SGD. With the full batch, λ_max climbs to 2/η (progressive "
        "sharpening) and stays there (the edge of stability). λ_c stays low at first, then rises abruptly to 2/η. λ_c "
        "is about λ_dir, and λ_dir is at most λ_max.",
        sentences(_setting(full), _climb(full), _edge(full), bound(rows, "lambda_dir", "λ_dir", TOLERANCE)),
        sentences(
            "**Where they differ.**",
            _before(full),
            *(_mini_batch(run) for run in others),
            _stand(others),
            no_value(rows),
        ),
    ]
    return "\n\n".join(found)


def _setting(full: list[Row]) -> str:
    row = full[0]
    return (
        f"**This run.** The network has 4 linear layers of width {row['width']:.0f} and learns {row['batch']:.0f} "
        f"{row['data']}, with η = {row['lr']:g}, so 2/η = {row['threshold']:.3g}."
    )


def _climb(full: list[Row]) -> str:
    """Say how λ_max met 2/η with the full batch, or that it did not."""
    known = [row for row in full if math.isfinite(row["lambda_max"])]
    if not known:
        return "With the full batch λ_max has no value at any step."
    where = "" if known[0] is full[0] else f" (at step {known[0]['step']:.0f}, the first with a value)"
    text = f"With the full batch λ_max starts at {known[0]['lambda_max']:.2g}{where}"
    reached = _reached(full, "lambda_max", 1)
    if reached is None:
        return f"{text} and never reaches 2/η: its largest value is {max(row['lambda_max'] for row in known):.3g}."
    return f"{text} and has reached 2/η by step {full[reached]['step']:.0f}."


def _edge(full: list[Row]) -> str:
    """Say how λ_c rose to 2/η with the full batch, and how close it was to λ_dir from then on."""
    jump = _reached(full, "lambda_c", 0.5)
    if jump is None:
        known = ratios(full, "lambda_c", "threshold")
        if not known:
            return "λ_c has no value at any step."
        return f"λ_c does not reach half of 2/η: it is at most {times(max(known), '2/η')}."
    before, after = ratios(full[:jump], "lambda_c", "threshold"), full[jump:]
    text = f"λ_c is at least half of 2/η for the first time at step {full[jump]['step']:.0f}"
    if before:
        text += (
            f": its median until then is {times(median(before), '2/η')}, and its last value before "
            f"{times(before[-1], '2/η')}"
        )
    return f"{text}. From there on the medians are {_medians(after, _ALL)}, and {close(after)}."


def _before(full: list[Row]) -> str:
    """Say whether λ_c was close to λ_dir before it was at half of 2/η."""
    jump = _reached(full, "lambda_c", 0.5)
    before = full[:jump]
    if not before:
        return ""
    negative = sum(row["lambda_dir"] <= 0 for row in before)
    when = "With the full batch" if jump is None else "With the full batch, before λ_c is at half of 2/η,"
    text = f"{when} {close(before)}"
    if negative:
        text += (
            f", and λ_dir is not positive at {negative}. λ_dir is the curvature at θ, λ_c that of a finite step; they "
            "are equal where the loss along the update is a parabola"
        )
    return f"{text}."


def _mini_batch(run: list[Row]) -> str:
    """Give the medians at the end of a run with mini-batches."""
    return f"With batches of {run[0]['batch']:.0f} the medians over the last 40 % are {_medians(_end(run), _BOTH)}."


def _stand(others: list[list[Row]]) -> str:
    """Count the runs with mini-batches at whose end λ_c stands below 2/η, and those where the full set's is near it."""
    medians = [
        [median(ratios(_end(run), name, "threshold")) for run in others] for name in ("lambda_c", "heldout_lambda_c")
    ]
    own, whole = ([value for value in values if not math.isnan(value)] for values in medians)
    if not own or not whole:
        return ""
    below, near = sum(value < 1 - CLOSE for value in own), sum(abs(value - 1) <= CLOSE for value in whole)
    return (
        f"So the batch's own λ_c ends more than {percent(CLOSE)} below 2/η in {below} of {len(own)} such runs, and "
        f"that of the full training set along the same update within {percent(CLOSE)} of it in {near} of {len(whole)}; "
        "the paper's statement is on the full batch."
    )


_BOTH = {"lambda_c": "λ_c", "lambda_max": "λ_max", "heldout_lambda_c": "λ_c of the full training set"}
_ALL = {"lambda_c": "λ_c", "lambda_dir": "λ_dir", "lambda_max": "λ_max"}


def _medians(rows: list[Row], names: Mapping[str, str]) -> str:
    """List the medians of some columns in units of 2/η."""
    values = {name: median(ratios(rows, column, "threshold")) for column, name in names.items()}
    return ", ".join(f"{times(value, '2/η')} ({name})" for name, value in values.items())


def _reached(rows: list[Row], column: str, share: float) -> int | None:
    """Return the index of the first row in which a column is at least a share of 2/η."""
    return next((i for i, row in enumerate(rows) if row[column] >= share * row["threshold"]), None)


def _end(run: list[Row]) -> list[Row]:
    """Return the last 40 % of a run."""
    return [row for row in run if row["step"] >= 0.6 * run[-1]["step"]]


FIGURE = Figure(
    "figure2",
    "sharpness of a network trained by SGD with three batch sizes",
    setting_of,
    pieces,
    draw,
    findings,
    takes_data=True,
)

if __name__ == "__main__":
    # The same bits on every machine of a kind, and no slower at this size.
    torch.set_num_threads(1)
    main(FIGURE)
