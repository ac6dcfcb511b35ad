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

import argparse
import gc
import hashlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

# The checkout, also where the package is not installed.
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from ledger import Sitting, append
from other_methods import MAIN, Found, Method, Search, cheap, tops
from rich.console import Console
from rich.table import Table
from workloads import Counted, Point, Seconds, Training

import sharpkern
from sharpkern._support.figures import COLORS, legend_below, light_grid, new_figure
from sharpkern.memory.counter import peak_bytes

TOL = 1e-2
# Measured steps before those that count. Measurements 1, 2, 4, 8, 16, ... of a model make checks of their own.
_WARM_UP = 8
# A search that is off by more, in log units, has found something else, and nothing is recorded.
_SAME = 0.05


@dataclass(frozen=True)
class Taken:
    """One measurement of one method.

    Attributes:
        found: by it.
        seconds: that it took.
    """

    found: Found
    seconds: Seconds

    @classmethod
    def by(cls, measure: Callable[[], Found]) -> "Taken":
        """Measure, and take the time."""
        start = Seconds.now()
        found = measure()
        return cls(found, Seconds.now().since(start))


def compare(size: str, tokens: int, trained: int, steps: int, everything: bool) -> list[dict[str, Any]]:
    """Train a model, and measure its steps by every method."""
    training = Training(size, max(1, trained // 2))
    methods = [method for method in cheap(training) if everything or method.name in MAIN]
    early = _train(training, trained, tokens)
    searches = [method for method in methods if method.quantity == "λ_c"]
    taken: dict[str, list[Taken]] = defaultdict(list)
    truths: list[float | None] = []
    plain: list[Seconds] = []
    first_unit = 0.0
    for step in range(_WARM_UP + steps):
        loss_fn = training.begin(tokens)
        counts = step >= _WARM_UP
        now = _turn(methods if counts else searches, loss_fn, step, taken)
        first_unit = first_unit or _median(now)
        if counts:
            plain += now
            truths.append(true_sharpness(training, loss_fn, taken[searches[0].name][-1].found))
        if step < _WARM_UP + steps - 1:
            training.step()
    about = {
        "model": size,
        "parameters": training.parameters,
        "tokens": tokens,
        "trained": trained,
        "parameter_bytes": sum(p.numel() * p.element_size() for p in training.model.parameters()),
        "plain_forward_ms": 1e3 * _median(plain),
        "plain_peak_bytes": peak_bytes(loss_fn.plain),
    }
    rows = []
    for method in methods:
        counted = taken[method.name][-steps:]
        row = {**about, **_summary(method.name, method.quantity, counted, plain)}
        row["peak_bytes"] = peak_bytes(partial(method.measure, loss_fn))
        if method in searches:
            first = taken[method.name][0]
            row["first_in_plain_forwards"] = first.seconds.wall / first_unit
            row["first_forwards"] = first.found.forwards
            row["errors"] = _errors(method.name, counted, truths)
        if method is searches[0]:
            row["early"] = early
        rows.append(row)
    # What the methods before have left behind is not theirs to be slowed by.
    gc.collect()
    return rows + [{**about, **row} for row in (_top_rows(training, loss_fn) if everything else [])]


def _turn(methods: Sequence[Method], loss_fn: Counted, step: int, taken: dict[str, list[Taken]]) -> list[Seconds]:
    """Measure a step by every method, and return what the plain forward passes between them took."""
    before = [parameter.detach().clone() for parameter in loss_fn.model.parameters()]
    first = step % len(methods)
    plain = []
    for method in [*methods[first:], *methods[:first]]:
        plain.append(Seconds.of(loss_fn.plain))
        taken[method.name].append(Taken.by(partial(method.measure, loss_fn)))
    if not all(map(torch.equal, before, loss_fn.model.parameters())):
        raise RuntimeError("a method has changed the weights, nothing is recorded")
    return plain


def _train(training: Training, steps: int, tokens: int) -> list[dict[str, float]]:
    """Train up to the steps that are compared, and return what a search takes on every tenth of these."""
    search, found = Search(training), []
    for step in range(steps):
        loss_fn = training.begin(tokens)
        if step % 10 == 0:
            found.append({"step": step, "lr": training.lr, "forwards": search(loss_fn).forwards})
        training.step()
    return found


def true_sharpness(training: Training, loss_fn: Counted, near: Found) -> float | None:
    """Return λ_c in float64, by a scan upward from a fifth of an η_c and bisection; None if there is none."""
    if near.value is None:
        return None
    direction = sharpkern.Direction.from_optimizer(training.optimizer)
    by_parameter = dict(zip(direction.parameters, direction.tensors, strict=True))
    weights = {name: parameter.detach() for name, parameter in training.model.named_parameters()}
    moved = {name: by_parameter[parameter] for name, parameter in training.model.named_parameters()}
    point = Point(0, training.lr, direction.slope, training.model, loss_fn.loss_of, loss_fn.batch, weights, moved)
    crossing = point.first_crossing(start=0.4 / near.value, per_decade=10)
    return None if crossing is None else 2 / crossing


def _errors(name: str, taken: Sequence[Taken], truths: Sequence[float | None]) -> list[float]:
    """Return the relative errors of η_c at the steps where there is one."""
    pairs = [(one.found.value, truth) for one, truth in zip(taken, truths, strict=True)]
    errors = [abs(truth / value - 1) for value, truth in pairs if value is not None and truth is not None]
    if not errors or median(errors) > _SAME:
        raise RuntimeError(f"{name} is off, nothing is recorded: it found {pairs}")
    return errors


def _top_rows(training: Training, loss_fn: Counted) -> list[dict[str, Any]]:
    """Return a row for each way to the largest eigenvalue."""
    rows = []
    for name, prepare in tops(training, loss_fn, TOL):
        taken, plain, peak, status = [], [], None, "measured"
        try:
            measure = prepare()
        except ImportError:
            rows.append({"method": name, "quantity": "λ_max", "status": "not installed"})
            continue
        # Whatever another package raises with this torch is told in the row.
        try:
            plain += [Seconds.of(loss_fn.plain) for _ in range(5)]
            taken.append(Taken.by(measure))
            plain += [Seconds.of(loss_fn.plain) for _ in range(5)]
            peak = peak_bytes(measure)
        except Exception as error:
            status = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        summary = _summary(name, "λ_max", taken, plain) if taken else {"method": name, "quantity": "λ_max"}
        rows.append({**summary, "status": status, "peak_bytes": peak})
        del measure
        gc.collect()
    return rows


def _summary(name: str, quantity: str, taken: Sequence[Taken], plain: Sequence[Seconds]) -> dict[str, Any]:
    """Return what a method's measurements took; the value is the last step's."""
    unit, cpu_unit = _median(plain), median(one.cpu for one in plain)
    return {
        "method": name,
        "quantity": quantity,
        "status": "measured",
        "measurements": len(taken),
        "in_plain_forwards": median(one.seconds.wall for one in taken) / unit,
        "in_plain_forwards_each": [one.seconds.wall / unit for one in taken],
        "in_plain_forwards_cpu": median(one.seconds.cpu for one in taken) / cpu_unit,
        "forwards": median(one.found.forwards for one in taken),
        "forwards_mean": mean(one.found.forwards for one in taken),
        "products": taken[-1].found.products,
        "converged": taken[-1].found.converged,
        "value": taken[-1].found.value,
    }


def _median(seconds: Sequence[Seconds]) -> float:
    return median(one.wall for one in seconds)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows as a table for people."""
    columns = (
        "model",
        "method",
        "",
        "plain forwards",
        "of CPU time",
        "from",
        "to",
        "forwards",
        "mean",
        "products",
        "error % median",
        "max",
        "peak / plain",
        "peak / θ",
        "value",
        "first",
    )
    shown = Table(*columns, title="One measurement in training, in plain forward passes of the same run; one thread")
    for row in rows:
        who = [f"{row['model']}, {row['tokens']} tokens", row["method"], row["quantity"]]
        if "measurements" not in row:
            shown.add_row(*who, row["status"])
            continue
        errors = row.get("errors")
        each = row["in_plain_forwards_each"]
        peak = row["peak_bytes"]
        shown.add_row(
            *who,
            *(f"{x:.2f}" for x in (row["in_plain_forwards"], row["in_plain_forwards_cpu"], min(each), max(each))),
            f"{row['forwards']:g}",
            f"{row['forwards_mean']:.1f}",
            str(row["products"] or ""),
            *((f"{100 * median(errors):.3f}", f"{100 * max(errors):.3f}") if errors else ("", "")),
            *((f"{peak / row['plain_peak_bytes']:.2f}", f"{peak / row['parameter_bytes']:.2f}") if peak else ("", "")),
            "" if row["value"] is None else f"{row['value']:.5g}",
            f"{row['first_in_plain_forwards']:.1f}" if "first_in_plain_forwards" in row else "",
        )
        if row["status"] != "measured":
            shown.add_row("", row["status"])
    return shown


# What powers of the parameters are worked out of. The number of losses varies from step to step and not with the
# parameters, so that the cost of a search is its number of losses times the last one of these.
FITTED = ("plain_forward_seconds", "search_seconds", "seconds_per_loss")
SIZES = ("1M", "4M", "14M", "30M", "100M")
TOKENS = (32, 256, 1024)
# Searches of each, those that count; more where they take little time.
_SEARCHES = {32: 7, 256: 5, 1024: 3}
# Steps of training before, on the tokens in the middle, and measured ones before those that count.
_GROWTH_TRAINED, _GROWTH_WARM_UP = 60, 2


def growth_rows(quick: bool) -> list[dict[str, Any]]:
    """Measure steps of every model, of every number of tokens."""
    sizes, token_counts = (("tiny", "small", "1M"), (8, 32)) if quick else (SIZES, TOKENS)
    found = []
    for size in sizes:
        trained = 20 if quick else _GROWTH_TRAINED
        training = Training(size, trained // 2)
        for _ in range(trained):
            training.begin(token_counts[len(token_counts) // 2])
            training.step()
        found += [_growth_row(training, size, tokens, 3 if quick else _SEARCHES[tokens]) for tokens in token_counts]
    return found


def _growth_row(training: Training, size: str, tokens: int, searches: int) -> dict[str, Any]:
    monitor = sharpkern.Monitor(training.model, training.optimizer)
    plain, taken = [], []
    for step in range(_GROWTH_WARM_UP + searches):
        loss_fn = training.begin(tokens)
        before = Seconds.of(loss_fn.plain)
        seconds = Seconds.of(lambda loss_fn=loss_fn: monitor(loss_fn))
        after = Seconds.of(loss_fn.plain)
        if step >= _GROWTH_WARM_UP:
            plain += [before.wall, after.wall]
            taken.append((seconds.wall, monitor.history[-1].measurement))
        if step < _GROWTH_WARM_UP + searches - 1:
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
    """Return by which power of the parameters a column grows, and the standard error of that: a line in logarithms."""
    x = np.log([row["parameters"] for row in found])
    y = np.log([row[column] for row in found])
    slope, constant = np.polyfit(x, y, 1)
    residual = ((y - slope * x - constant) ** 2).sum() / (len(found) - 2)
    return float(slope), math.sqrt(residual / ((x - x.mean()) ** 2).sum())


def by_tokens(found: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Return the rows of each number of tokens, by the number of parameters."""
    tokens = sorted({row["tokens"] for row in found})
    ordered = sorted(found, key=lambda row: row["parameters"])
    return {number: [row for row in ordered if row["tokens"] == number] for number in tokens}


def growth_table(found: Sequence[dict[str, Any]]) -> Table:
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
    panels[0].plot([], [], color="#555555", linestyle="--", linewidth=1.0, label="a plain forward pass")
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


def main() -> None:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--only", choices=("peers", "growth"), help="one of the two parts; nothing is recorded")
    parser.add_argument("--json", type=Path, help="append the record to this file")
    arguments = parser.parse_args()
    if arguments.only and arguments.json:
        parser.error("a record holds both parts: leave --only out")
    torch.set_num_threads(1)
    console = Console(width=190)
    sitting = Sitting(arguments.quick)
    rows: list[dict[str, Any]] = []
    grown: list[dict[str, Any]] = []
    if arguments.only != "growth":
        for comparison in comparisons(arguments.quick):
            rows += compare(**comparison)
        console.print(table(rows))
    if arguments.only != "peers":
        grown = growth_rows(arguments.quick)
        console.print(growth_table(grown))
    record = sitting.record(peers=rows, growth=grown)
    before, after = record["environment"]["load_average"]
    print(f"{record['environment']['seconds']:.0f} s; load average {before:.1f} before, {after:.1f} after")
    if arguments.json:
        append(arguments.json, record)


def comparisons(quick: bool) -> list[dict[str, Any]]:
    """Return the arguments of `compare` for each model."""
    if quick:
        return [{"size": "tiny", "tokens": 32, "trained": 20, "steps": 2, "everything": True}]
    return [
        {"size": "4M", "tokens": 1024, "trained": 100, "steps": 11, "everything": True},
        {"size": "14M", "tokens": 1024, "trained": 60, "steps": 7, "everything": False},
    ]


if __name__ == "__main__":
    main()
