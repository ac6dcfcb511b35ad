"""What the scripts of the paper's figures share: command line, what is done already, CSV and PNG, and their numbers.

A figure is made of pieces of work, such as training runs. Each piece gives rows, which are on the disk when it is done,
so that a script that was stopped goes on with the next piece.
"""

import argparse
import csv
import json
import math
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The checkout, also where the package is not installed, and the runs that the benchmarks share.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import sharpkern
from sharpkern._support.progress import progress_bar
from sharpkern.mixtures.resume import ResumableLog

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
Piece = Callable[[], list[Row]]


@dataclass(frozen=True)
class Figure:
    """One figure of the paper on small scale."""

    name: str  # of the script and of its files
    about: str  # one line for --help
    settings: tuple[Any, Any]  # full and quick: what the rows depend on; after an edit they are computed anew
    # Of a setting, a folder for what is kept between calls, such as checkpoints, and that of a larger data set.
    pieces: Callable[[Any, Path, Path | None], Mapping[str, Piece]]
    draw: Callable[[list[Row], Path], None]
    # What the README here has in the figure's table, by the words in front of it.
    numbers: Callable[[list[Row]], dict[str, str]]
    of_data: tuple[Any, Any] | None = None  # full and quick with a larger data set, which --data names


def main(figure: Figure, arguments: list[str] | None = None) -> None:
    """Make a figure: its CSV, its PNG and the conditions it was made under; print its table for the README."""
    parser = argparse.ArgumentParser(description=figure.about)
    parser.add_argument("--quick", action="store_true", help="a small version, to see that everything runs")
    parser.add_argument("--output", type=Path, help="folder for the files (default: results beside the script)")
    if figure.of_data:
        parser.add_argument("--data", type=Path, help="folder of the data set of the paper, if it is at hand")
    given = parser.parse_args(arguments)
    # The same bits on every machine of a kind, and no slower at this size.
    torch.set_num_threads(1)
    output = given.output or (RESULTS / "quick" if given.quick else RESULTS)
    data = getattr(given, "data", None)
    setting = ((data and figure.of_data) or figure.settings)[given.quick]
    settings = {"figure": figure.name, "quick": given.quick, "data": data and str(data), "setting": repr(setting)}
    work = output / "work" / figure.name
    work.mkdir(parents=True, exist_ok=True)
    rows, seconds = _rows(figure.pieces(setting, work, data), ResumableLog(work / "pieces.jsonl", settings))
    with (output / f"{figure.name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    conditions = {
        "seconds": round(seconds),
        "quick": given.quick,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sharpkern": sharpkern.__version__,
    }
    (output / f"{figure.name}.json").write_text(json.dumps(conditions, indent=1) + "\n", encoding="utf-8")
    # As they are read from the file, so that picture and numbers are made of what is committed.
    rows = read_rows(figure.name, output)
    figure.draw(rows, output / f"{figure.name}.png")
    print(*table(figure.numbers(rows)), sep="\n")


def read_rows(name: str, folder: Path = RESULTS) -> list[Row]:
    """Read the rows of a figure."""
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return [{key: _value(text) for key, text in row.items() if text != ""} for row in csv.DictReader(file)]


def table(numbers: Mapping[str, str]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {name} | {value} |" for name, value in numbers.items()]


def _rows(pieces: Mapping[str, Piece], journal: ResumableLog) -> tuple[list[Row], float]:
    """Return the rows of all pieces, of which those that were done before are only read, and the seconds they took."""
    done = {entry["piece"] for entry in journal.rows}
    with progress_bar(len(pieces), done=len(done), shown=sys.stderr.isatty()) as advance:
        for name, compute in pieces.items():
            if name not in done:
                started = time.perf_counter()
                rows = compute()
                journal.add({"piece": name, "seconds": time.perf_counter() - started, "rows": rows})
                advance(name)
    entries = {entry["piece"]: entry for entry in journal.rows}
    rows = [row for name in pieces for row in entries[name]["rows"]]
    return rows, sum(entry["seconds"] for entry in entries.values())


def _value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


# -- numbers ----------------------------------------------------------------------------------------------------------


def median(values: Iterable[float]) -> float:
    """Return the median of what is a number, nan if nothing is."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def number(value: float) -> str:
    """Return a value to three digits, without an exponent; words where it is none."""
    if math.isnan(value):
        return "no value"
    return "∞" if math.isinf(value) else f"{float(f'{value:.3g}'):g}"


def percent(share: float) -> str:
    """Return a share in whole percent, 0 or 100 of them only where it is none or all."""
    if not math.isfinite(share):
        return number(share)
    return "99 %" if 0.99 < share < 1 else "1 %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def span(values: Iterable[float], text: Callable[[float], str] = number) -> str:
    """Return the smallest and the largest of what is a number."""
    known = [value for value in values if not math.isnan(value)]
    return f"{text(min(known))} to {text(max(known))}" if known else "no value"


def not_converged(rows: Iterable[Row]) -> str:
    """Count the measurements of λ_c that came to no crossing, by what they came to."""
    statuses = [value for row in rows for key, value in row.items() if key.endswith("status")]
    counts = Counter(status for status in statuses if status != "converged")
    return f"{', '.join(f'{counts[status]} {status}' for status in sorted(counts)) or 'none'} of {len(statuses)}"
