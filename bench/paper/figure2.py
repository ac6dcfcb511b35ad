"""Figure 2 of the paper, small: a fully connected network trained by SGD with the full, a large and a small batch.

    python bench/paper/figure2.py [--quick] [--output FOLDER] [--data FOLDER]

λ_c, λ_dir and λ_max are of the very same batch's loss at the same steps; beside them λ_c of the full training set's
loss along the same update. Without --data the network learns scikit-learn's digits; with CIFAR-10's folder it has the
paper's setting, on the first 5000 images.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from cifar import cifar10
from runs import Curve, Gauge, by_run, close, draw_runs, largest_share, ratios, times
from scaffold import Figure, Piece, Row, main, median, not_converged, number
from torch import Tensor
from torch.nn import functional as F

# Beside the folder of this script; scaffold has put it on the path.
from workloads import Loss, stack, trained

from sharpkern.cli.digits import digits


@dataclass(frozen=True)
class Setting:
    """What is trained on what, and how."""

    data: str  # in words, that follow the number of images
    num_inputs: int
    width: int  # of the hidden layers
    lr: float
    num_steps: int
    # So many steps a measurement; odd, since at the edge of stability the iterate swings from side to side with a
    # period of two, of which an even stride would see one side only.
    every: int
    num_images: int  # of the training set, which is the full batch
    large: int  # batch size
    small: int  # batch size


DIGITS = Setting("handwritten digits, a fifth of their labels random", 64, 128, 0.1, 600, 5, 1797, 512, 64)
DIGITS_QUICK = Setting(DIGITS.data, 64, 128, 0.1, 20, 5, 200, 100, 32)
CIFAR = Setting("images of CIFAR-10", 3072, 512, 0.03, 3000, 25, 5000, 512, 64)
CIFAR_QUICK = Setting(CIFAR.data, 3072, 16, 0.03, 6, 3, 200, 100, 32)


def train(run: str, setting: Setting, data: Callable[[int], tuple[Tensor, Tensor]], batch_size: int) -> list[Row]:
    """Train by SGD without momentum and measure on the way."""
    torch.manual_seed(0)
    model = stack(setting.num_inputs, *[setting.width] * 3, 10)
    inputs, labels = data(setting.num_images)
    generator = torch.Generator().manual_seed(1)
    everything = Loss(F.cross_entropy, (inputs, labels))
    is_full = batch_size == len(inputs)

    def draw_batch() -> Loss:
        rows = torch.randperm(len(inputs), generator=generator)[:batch_size]
        return Loss(F.cross_entropy, (inputs[rows], labels[rows]))

    training = trained(model, torch.optim.SGD, (lambda: everything) if is_full else draw_batch, lr=setting.lr)
    gauge = Gauge(model, training.optimizer, due=lambda step: step % setting.every == 0)
    rows = []
    for _ in range(setting.num_steps):
        row = gauge(training.begin(), heldout=None if is_full else partial(everything, model))
        if row is not None:
            rows.append({"run": run, "batch": batch_size, "data": setting.data, "width": setting.width, **row})
        training.step()
    return rows


def pieces(setting: Setting, work: Path, data: Path | None) -> Mapping[str, Piece]:
    """Return the three training runs."""
    read = digits if data is None else partial(cifar10, data)
    sizes = {"full batch": setting.num_images, "large batch": setting.large, "small batch": setting.small}
    return {run: partial(train, run, setting, read, size) for run, size in sizes.items()}


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


def numbers(rows: list[Row]) -> dict[str, str]:
    """Return what the README has in its table."""
    full, *others = by_run(rows)
    jump = _reached(full, "lambda_c", 0.5)
    climbed = _reached(full, "lambda_max", 1)
    before, after = full[:jump], full[jump:] if jump is not None else []
    low = ratios(before, "lambda_c", "threshold")
    found = {
        "full batch: images": f"{full[0]['batch']:.0f} {full[0]['data']}",
        "full batch: λ_max at the first step": number(full[0]["lambda_max"]),
        "full batch: first step with λ_max at 2/η": _step(full, climbed),
        "full batch: first step with λ_c at half of 2/η": _step(full, jump),
        "before it: median and last λ_c": ", ".join(map(times, (median(low), low[-1]))) if low else "no value",
        "before it: λ_c within 25 % of λ_dir": close(before),
        "before it: λ_dir not positive": f"{sum(row['lambda_dir'] <= 0 for row in before)} of {len(before)} points",
        "from there on: median λ_c": _median(after, "lambda_c"),
        "from there on: median λ_dir": _median(after, "lambda_dir"),
        "from there on: median λ_max": _median(after, "lambda_max"),
        "from there on: λ_c within 25 % of λ_dir": close(after),
    }
    for run in others:
        end = [row for row in run if row["step"] >= 0.6 * run[-1]["step"]]
        batches = f"batches of {run[0]['batch']:.0f}, last 40 %"
        found[f"{batches}: median λ_c"] = _median(end, "lambda_c")
        found[f"{batches}: median λ_max"] = _median(end, "lambda_max")
        found[f"{batches}: median λ_c of the full set"] = _median(end, "heldout_lambda_c")
    found["all runs: largest λ_dir over λ_max"] = largest_share(rows, "lambda_dir")
    found["all runs: searches that did not converge"] = not_converged(rows)
    return found


def _reached(rows: list[Row], column: str, share: float) -> int | None:
    """Return the index of the first row in which a column is at least a share of 2/η."""
    return next((i for i, row in enumerate(rows) if row[column] >= share * row["threshold"]), None)


def _step(rows: list[Row], index: int | None) -> str:
    return "never" if index is None else f"{rows[index]['step']:.0f}"


def _median(rows: list[Row], column: str) -> str:
    return times(median(ratios(rows, column, "threshold")))


FIGURE = Figure(
    "figure2", "sharpness of a network trained by SGD with three batch sizes", (DIGITS, DIGITS_QUICK), pieces, draw,
    numbers, of_data=(CIFAR, CIFAR_QUICK),
)  # fmt: skip

if __name__ == "__main__":
    main(FIGURE)
