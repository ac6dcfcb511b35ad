"""How the cost of one λ_c grows with parameters and tokens, and whether it is a line."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from gpts import Training
from rich.table import Table
from timing import Seconds

import sharpkern
from sharpkern.memory.counter import peak_bytes
from sharpkern.plot import COLORS, legend_below, light_grid, new_figure

# What powers of the parameters are worked out of. The number of losses varies from step to step and not with the
# parameters, so that the cost of a search is its number of losses times the last one of these.
FITTED = ("plain_forward_seconds", "search_seconds", "seconds_per_loss")
SIZES = ("1M", "4M", "14M", "30M", "100M")
TOKENS = (32, 256, 1024)
# Searches of each, those that count; more where they take little time.
_SEARCHES = {32: 7, 256: 5, 1024: 3}
# Steps of training before, on the tokens in the middle, and measured ones before those that count.
_TRAINED, _WARM_UP = 60, 2


def rows(quick: bool) -> list[dict[str, Any]]:
    """Measure steps of every model, of every number of tokens.

    Args:
        quick: tiny models, and few searches.

    Returns:
        One row for each.
    """
    sizes, token_counts = (("tiny", "small", "1M"), (8, 32)) if quick else (SIZES, TOKENS)
    found = []
    for size in sizes:
        trained = 20 if quick else _TRAINED
        training = Training(size, trained // 2)
        for _ in range(trained):
            training.begin(token_counts[len(token_counts) // 2])
            training.step()
        found += [_row(training, size, tokens, 3 if quick else _SEARCHES[tokens]) for tokens in token_counts]
    return found


def _row(training: Training, size: str, tokens: int, searches: int) -> dict[str, Any]:
    monitor = sharpkern.Monitor(training.model, training.optimizer)
    plain, taken = [], []
    for step in range(_WARM_UP + searches):
        loss_fn = training.begin(tokens)
        before = Seconds.of(loss_fn.plain)
        seconds = Seconds.of(lambda loss_fn=loss_fn: monitor(loss_fn))
        after = Seconds.of(loss_fn.plain)
        if step >= _WARM_UP:
            plain += [before.wall, after.wall]
            taken.append((seconds.wall, monitor.history[-1].measurement))
        if step < _WARM_UP + searches - 1:
            training.step()
    converged = [(seconds, m.forwards) for seconds, m in taken if m.status == "converged"]
    if not converged:
        raise RuntimeError(f"no search of {size} and {tokens} tokens has converged: {[m.status for _, m in taken]}")
    return {
        "model": size,
        "parameters": training.parameters,
        "tokens": tokens,
        "engine": taken[-1][1].engine,
        "searches": len(converged),
        "not_converged": len(taken) - len(converged),
        "plain_forward_seconds": median(plain),
        "search_seconds": median(seconds for seconds, _ in converged),
        "seconds_per_loss": median(seconds / forwards for seconds, forwards in converged),
        "forwards": median(forwards for _, forwards in converged),
        "forwards_mean": mean(forwards for _, forwards in converged),
        "peak_bytes": peak_bytes(lambda: monitor(loss_fn)),
        "plain_peak_bytes": peak_bytes(loss_fn.plain),
        "parameter_bytes": sum(p.numel() * p.element_size() for p in training.model.parameters()),
    }


def exponent(found: Sequence[dict[str, Any]], column: str) -> tuple[float, float]:
    """Return by which power of the parameters a column grows, and the standard error of that: a line in logarithms.

    Args:
        found: rows of one number of tokens, three or more.
        column: of them.
    """
    x = np.log([row["parameters"] for row in found])
    y = np.log([row[column] for row in found])
    slope, constant = np.polyfit(x, y, 1)
    residual = ((y - slope * x - constant) ** 2).sum() / (len(found) - 2)
    return float(slope), math.sqrt(residual / ((x - x.mean()) ** 2).sum())


def by_tokens(found: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Return the rows of each number of tokens, by the number of parameters.

    Args:
        found: rows of all.
    """
    tokens = sorted({row["tokens"] for row in found})
    ordered = sorted(found, key=lambda row: row["parameters"])
    return {number: [row for row in ordered if row["tokens"] == number] for number in tokens}


def table(found: Sequence[dict[str, Any]]) -> Table:
    """Return the rows as a table for people, with the exponents below each number of tokens."""
    columns = (
        "tokens",
        "parameters",
        "plain ms",
        "search ms",
        "ms per loss",
        "search / plain",
        "forwards",
        "mean",
        "searches",
        "peak / θ",
        "peak / plain",
    )
    shown = Table(*columns, title="One warm λ_c in training, medians, one thread; then the power of the parameters")
    for tokens, of_one in by_tokens(found).items():
        for row in of_one:
            plain, search, one = (1e3 * row[column] for column in FITTED)
            shown.add_row(
                str(tokens),
                f"{row['parameters'] / 1e6:.3g} M",
                *(f"{ms:.2f}" for ms in (plain, search, one)),
                f"{search / plain:.2f}",
                f"{row['forwards']:g}",
                f"{row['forwards_mean']:.1f}",
                str(row["searches"]),
                f"{row['peak_bytes'] / row['parameter_bytes']:.2f}",
                f"{row['peak_bytes'] / row['plain_peak_bytes']:.2f}",
            )
        fits = [exponent(of_one, column) for column in FITTED]
        shown.add_row("", "power", *(f"{power:.3f} ± {error:.3f}" for power, error in fits))
        shown.add_section()
    return shown


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw seconds against parameters, one line for each number of tokens, into an image that names its record.

    Args:
        record: of the ledger.
        path: of the image.
    """
    figure = new_figure(8.0, 4.2)
    panels = figure.subplots(1, 2)
    titles = ("seconds for each loss, and of a plain forward pass", "one λ_c, in plain forward passes")
    for (tokens, of_one), color in zip(by_tokens(record["growth"]).items(), COLORS, strict=False):
        parameters = [row["parameters"] for row in of_one]
        plain, search, loss = ([row[column] for row in of_one] for column in FITTED)
        power, error = exponent(of_one, FITTED[-1])
        label = rf"{tokens} tokens: {power:.2f} $\pm$ {error:.2f}"
        panels[0].plot(parameters, loss, marker="o", color=color, label=label)
        panels[0].plot(parameters, plain, marker=".", color=color, linestyle="--", linewidth=1.0)
        ratios = [a / b for a, b in zip(search, plain, strict=True)]
        panels[1].plot(parameters, ratios, marker="o", color=color)
    panels[0].plot([], [], color="#555555", linestyle="--", linewidth=1.0, label="a plain forward pass")
    panels[0].set_yscale("log")
    panels[1].set_ylim(bottom=0)
    for axes, title in zip(panels, titles, strict=True):
        axes.set_xscale("log")
        axes.set_xlabel("parameters")
        axes.set_title(title, fontsize="medium")
        light_grid(axes)
    legend_below(figure, panels, "tokens of a step, and the power of the parameters that each loss grows with")
    figure.savefig(path, metadata={"Description": source(record)})


def source(record: dict[str, Any]) -> str:
    """Return what an image says it was drawn of.

    Args:
        record: of the ledger.
    """
    figures = json.dumps(record["growth"], sort_keys=True).encode()
    return f"bench/results/peers.json, growth, SHA-256 {hashlib.sha256(figures).hexdigest()}"
