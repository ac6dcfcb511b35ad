"""Critical sharpness beside what else tells of curvature, on GPTs in training: time, memory, value; and how cost grows.

    python bench/bench_peers.py [--quick] [--json PATH]

All in one run and one thread. At each of several training steps every method measures the same θ, gradient and batch,
in turns, with a plain forward pass before each: times are medians over the steps, over the median plain forward pass
of the same steps. Searches start from their own last result, as in a training loop; what the first one took, cold and
with the checks that are made once, stands beside. The true η_c is found in float64. The largest eigenvalue, which
takes tens or hundreds of forward passes, is computed at the last step only; other_methods.py says how to install what
computes it. Memory is counted in bytes of tensors that are alive at once, in a call of its own; arrays of numpy, which
hold scipy's vectors, are not seen.
"""

import gc
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import ledger
import numpy as np
import torch
from other_methods import MAIN, Found, Method, cheap, search, tops
from workloads import Counted, Point, Training, in_turns, seconds, timed

import sharpkern
from sharpkern._support.figures import COLORS, GREY, legend_below, light_grid, new_figure
from sharpkern.memory.counter import peak_bytes

TOL = 1e-2
# Measured steps before those that count. Measurements 1, 2, 4, 8, 16, ... of a model make checks of their own.
_WARM_UP = 8
# A search that is off by more, in log units, has found something else, and nothing is recorded.
_SAME = 0.05


Taken = tuple[Found, float]  # what a method said, and the seconds that it took


def compare(size: str, tokens: int, trained: int, steps: int, everything: bool) -> list[dict[str, Any]]:
    """Train a model, and measure its steps by every method."""
    training = Training.of_text(size, max(1, trained // 2))
    methods = [method for method in cheap(training) if everything or method.name in MAIN]
    early = _train(training, trained, tokens)
    searches = [method for method in methods if method.quantity == "λ_c"]
    taken: dict[str, list[Taken]] = defaultdict(list)
    truths: list[float | None] = []
    plain: list[float] = []
    first_unit = 0.0
    for step in range(_WARM_UP + steps):
        if step:
            training.step()
        loss_fn = training.begin(tokens)
        counts = step >= _WARM_UP
        now = _turn(methods if counts else searches, loss_fn, step, taken)
        first_unit = first_unit or median(now)
        if counts:
            plain += now
            truths.append(true_sharpness(training, loss_fn, taken[searches[0].name][-1][0]))
    about = {
        "model": size,
        "parameters": training.parameters,
        "tokens": tokens,
        "trained": trained,
        "parameter_bytes": training.parameter_bytes,
        "plain_forward_ms": 1e3 * median(plain),
        "plain_peak_bytes": peak_bytes(loss_fn.plain),
    }
    rows = []
    for method in methods:
        (first, first_seconds), counted = taken[method.name][0], taken[method.name][-steps:]
        row = {**about, **_summary(method.name, method.quantity, counted, plain)}
        row["peak_bytes"] = peak_bytes(partial(method.measure, loss_fn))
        if method in searches:
            row |= {"first_in_plain_forwards": first_seconds / first_unit, "first_forwards": first.forwards}
            row["errors"] = _errors(method.name, counted, truths)
        if method is searches[0]:
            row["early"] = early
        rows.append(row)
    # What the methods before have left behind is not theirs to be slowed by.
    gc.collect()
    return rows + [{**about, **row} for row in (_top_rows(training, loss_fn) if everything else [])]


def _turn(methods: Sequence[Method], loss_fn: Counted, step: int, taken: dict[str, list[Taken]]) -> list[float]:
    """Measure a step by every method, and return what the plain forward passes between them took."""
    before = [parameter.detach().clone() for parameter in loss_fn.model.parameters()]
    plain = []
    for method in in_turns(methods, step):
        plain.append(seconds(loss_fn.plain))
        taken[method.name].append(timed(partial(method.measure, loss_fn)))
    if not all(map(torch.equal, before, loss_fn.model.parameters())):
        raise RuntimeError("a method has changed the weights, nothing is recorded")
    return plain


def _train(training: Training, steps: int, tokens: int) -> list[dict[str, float]]:
    """Train up to the steps that are compared, and return what a search takes on every tenth of these."""
    measure, found = search(training), []
    for step in range(steps):
        loss_fn = training.begin(tokens)
        if step % 10 == 0:
            found.append({"step": step, "lr": training.lr, "forwards": measure(loss_fn).forwards})
        training.step()
    return found


def true_sharpness(training: Training, loss_fn: Counted, near: Found) -> float | None:
    """Return λ_c in float64, by a scan upward from a fifth of an η_c and bisection; None if there is none."""
    if near.value is None:
        return None
    direction = sharpkern.Direction.from_optimizer(training.optimizer)
    by_parameter = dict(zip(direction.parameters, direction.tensors, strict=True))
    weights = [parameter.detach() for parameter in training.model.parameters()]
    deltas = [by_parameter[parameter] for parameter in training.model.parameters()]
    point = Point(0, training.lr, direction.slope, training.model, loss_fn.loss, weights, deltas)
    crossing = point.first_crossing(start=0.4 / near.value, per_decade=10)
    return None if crossing is None else 2 / crossing


def _errors(name: str, taken: Sequence[Taken], truths: Sequence[float | None]) -> list[float]:
    """Return the relative errors of η_c at the steps where there is one."""
    pairs = [(found.value, truth) for (found, _), truth in zip(taken, truths, strict=True)]
    errors = [abs(truth / value - 1) for value, truth in pairs if value is not None and truth is not None]
    if not errors or median(errors) > _SAME:
        raise RuntimeError(f"{name} is off, nothing is recorded: it found {pairs}")
    return errors


def _top_rows(training: Training, loss_fn: Counted) -> list[dict[str, Any]]:
    """Return a row for each way to the largest eigenvalue."""
    rows = []
    for name, prepare in tops(training, loss_fn, TOL):
        row: dict[str, Any] = {"method": name, "quantity": "λ_max", "peak_bytes": None}
        # Whatever another package raises with this torch is told in the row.
        try:
            measure = partial(prepare(), loss_fn)
            plain = [seconds(loss_fn.plain) for _ in range(5)]
            taken = timed(measure)
            plain += [seconds(loss_fn.plain) for _ in range(5)]
            row |= {**_summary(name, "λ_max", [taken], plain), "peak_bytes": peak_bytes(measure)}
        except ImportError:
            row["status"] = "not installed"
        except Exception as error:
            row["status"] = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        rows.append(row)
        gc.collect()
    return rows


def _summary(name: str, quantity: str, taken: Sequence[Taken], plain: Sequence[float]) -> dict[str, Any]:
    """Return what a method's measurements took; the value is the last step's."""
    each, found = [one / median(plain) for _, one in taken], [one for one, _ in taken]
    return {
        "method": name,
        "quantity": quantity,
        "status": "measured",
        "measurements": len(taken),
        "in_plain_forwards": median(each),
        "in_plain_forwards_each": each,
        "forwards": median(one.forwards for one in found),
        "forwards_mean": mean(one.forwards for one in found),
        "products": found[-1].products,
        "converged": found[-1].converged,
        "value": found[-1].value,
    }


# -- growth -----------------------------------------------------------------------------------------------------------

# What powers of the parameters are worked out of. The number of losses varies from step to step and not with the
# parameters, so that the cost of a search is its number of losses times the last one of these.
FITTED = ("plain_forward_seconds", "search_seconds", "seconds_per_loss")
SIZES = ("1M", "4M", "14M", "30M", "100M")
# Tokens of a step, and searches that count; more where they take little time.
_SEARCHES = {32: 7, 256: 5, 1024: 3}
_QUICK_SEARCHES = {8: 3, 32: 3}
# Steps of training before, on 256 tokens, and measured ones before those that count.
_GROWTH_TRAINED, _GROWTH_WARM_UP = 60, 2


def growth_rows(quick: bool) -> list[dict[str, Any]]:
    """Measure steps of every model, of every number of tokens."""
    found = []
    for size in ("tiny", "small", "1M") if quick else SIZES:
        trained = 20 if quick else _GROWTH_TRAINED
        training = Training.of_text(size, trained // 2)
        training.run(trained, 32 if quick else 256)
        searches = _QUICK_SEARCHES if quick else _SEARCHES
        found += [_growth_row(training, size, tokens, count) for tokens, count in searches.items()]
    return found


def _growth_row(training: Training, size: str, tokens: int, searches: int) -> dict[str, Any]:
    method = Method("sharpkern", "λ_c", search(training, engine="virtual"))
    taken: dict[str, list[Taken]] = defaultdict(list)
    plain: list[float] = []
    for step in range(_GROWTH_WARM_UP + searches):
        if step:
            training.step()
        loss_fn = training.begin(tokens)
        plain += [*_turn([method], loss_fn, step, taken), seconds(loss_fn.plain)]
    counted = taken[method.name][-searches:]
    converged = [(one, found.forwards) for found, one in counted if found.converged]
    if not converged:
        raise RuntimeError(f"no search of {size} and {tokens} tokens has converged: {counted}")
    return {
        "model": size,
        "parameters": training.parameters,
        "tokens": tokens,
        "engine": "virtual",
        "searches": len(converged),
        "not_converged": len(counted) - len(converged),
        "plain_forward_seconds": median(plain[-2 * searches :]),
        "search_seconds": median(one for one, _ in converged),
        "seconds_per_loss": median(one / forwards for one, forwards in converged),
        "forwards": median(forwards for _, forwards in converged),
        "forwards_mean": mean(forwards for _, forwards in converged),
        "peak_bytes": peak_bytes(partial(method.measure, loss_fn)),
        "plain_peak_bytes": peak_bytes(loss_fn.plain),
        "parameter_bytes": training.parameter_bytes,
    }


def exponent(found: Sequence[dict[str, Any]], column: str) -> tuple[float, float]:
    """Return by which power of the parameters a column grows, and the standard error of that: a line in logarithms."""
    x, y = (np.log([row[name] for row in found]) for name in ("parameters", column))
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope), math.sqrt(covariance[0, 0])


def by_tokens(found: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Return the rows of each number of tokens, by the number of parameters."""
    tokens = sorted({row["tokens"] for row in found})
    ordered = sorted(found, key=lambda row: row["parameters"])
    return {number: [row for row in ordered if row["tokens"] == number] for number in tokens}


def draw_growth(record: dict[str, Any], path: Path) -> None:
    """Draw seconds against parameters, one line for each number of tokens, into an image that names its record."""
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
    panels[0].plot([], [], color=GREY, linestyle="--", linewidth=1.0, label="a plain forward pass")
    panels[0].set_yscale("log")
    panels[1].set_ylim(bottom=0)
    for axes, title in zip(panels, titles, strict=True):
        axes.set_xscale("log")
        axes.set_xlabel("parameters")
        axes.set_title(title, fontsize="medium")
        light_grid(axes)
    legend_below(figure, panels, "tokens of a step, and the power of the parameters that each loss grows with")
    figure.savefig(path, metadata={"Description": growth_source(record)})


def growth_source(record: dict[str, Any]) -> str:
    """Return what an image says it was drawn of."""
    figures = json.dumps(record["growth"], sort_keys=True).encode()
    return f"bench/results/peers.json, growth, SHA-256 {hashlib.sha256(figures).hexdigest()}"


def comparisons(quick: bool) -> list[dict[str, Any]]:
    """Return the arguments of `compare` for each model."""
    if quick:
        return [{"size": "tiny", "tokens": 32, "trained": 20, "steps": 2, "everything": True}]
    return [
        {"size": "4M", "tokens": 1024, "trained": 100, "steps": 11, "everything": True},
        {"size": "14M", "tokens": 1024, "trained": 60, "steps": 7, "everything": False},
    ]


def measure(quick: bool) -> dict[str, Any]:
    """Compare, and measure the growth."""
    peers = [row for comparison in comparisons(quick) for row in compare(**comparison)]
    columns = "model quantity method in_plain_forwards in_plain_forwards_each forwards products errors peak_bytes"
    ledger.show("One measurement in training, in plain forward passes", peers, f"{columns} value status")
    growth = growth_rows(quick)
    columns = "model tokens parameters plain_forward_seconds search_seconds seconds_per_loss forwards peak_bytes"
    ledger.show("One warm λ_c in training, medians", growth, columns)
    powers = [
        {"tokens": tokens, **{column: exponent(rows, column)[0] for column in FITTED}}
        for tokens, rows in by_tokens(growth).items()
    ]
    ledger.show("The power of the parameters", powers, " ".join(("tokens", *FITTED)))
    return {"peers": peers, "growth": growth}


if __name__ == "__main__":
    ledger.main(__doc__, measure)
