"""What the scripts of the paper's figures share: command line, what is done already, CSV and PNG, words in the README.

A figure is made of pieces of work, such as training runs. Each piece gives rows, which are on the disk when it is done,
so that a script that was stopped goes on with the next piece.
"""

import argparse
import csv
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
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
class Order:
    """What the command line asks for.

    Attributes:
        quick: a small version of everything, in seconds.
        work: folder for what is kept between calls, such as checkpoints.
        data: folder of a larger data set, or None.
    """

    quick: bool
    work: Path
    data: Path | None = None


@dataclass(frozen=True)
class Figure:
    """One figure of the paper on small scale.

    Attributes:
        name: of the script and of its files.
        about: one line for ``--help``.
        setting: what the rows depend on; after an edit of it the rows that were kept are refused.
        pieces: the pieces of work by name, in order.
        draw: draws all rows into an image.
        findings: says what the rows show, as Markdown with every number worked out of them.
        takes_data: whether there is a larger data set that ``--data`` may name.
    """

    name: str
    about: str
    setting: Callable[[Order], object]
    pieces: Callable[[Order], Mapping[str, Piece]]
    draw: Callable[[list[Row], Path], None]
    findings: Callable[[list[Row]], str]
    takes_data: bool = False


def main(figure: Figure, arguments: list[str] | None = None) -> None:
    """Make a figure: its CSV, its PNG, the conditions it was made under, and what it shows in words."""
    parser = argparse.ArgumentParser(description=figure.about)
    parser.add_argument("--quick", action="store_true", help="a small version, to see that everything runs")
    parser.add_argument("--output", type=Path, help="folder for the files (default: results beside the script)")
    if figure.takes_data:
        parser.add_argument("--data", type=Path, help="folder of the data set of the paper, if it is at hand")
    given = parser.parse_args(arguments)
    output = given.output or (RESULTS / "quick" if given.quick else RESULTS)
    order = Order(given.quick, output / "work" / figure.name, getattr(given, "data", None))
    order.work.mkdir(parents=True, exist_ok=True)
    rows, seconds = _rows(figure, order)
    _write_csv(rows, output / f"{figure.name}.csv")
    conditions = {
        "seconds": round(seconds),
        "quick": order.quick,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sharpkern": sharpkern.__version__,
    }
    (output / f"{figure.name}.json").write_text(json.dumps(conditions, indent=1) + "\n", encoding="utf-8")
    # As they are read from the file, so that picture and words are made of what is committed.
    rows = read_rows(figure.name, output)
    figure.draw(rows, output / f"{figure.name}.png")
    print(figure.findings(rows))


def read_rows(name: str, folder: Path = RESULTS) -> list[Row]:
    """Read the rows of a figure."""
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return [{key: _value(text) for key, text in row.items() if text != ""} for row in csv.DictReader(file)]


def runtime(name: str, folder: Path = RESULTS) -> str:
    """Say how long a figure took, and on what."""
    conditions = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    minutes = conditions["seconds"] / 60
    threads = conditions["threads"]
    return (
        f"made in {f'{minutes:.0f} minutes' if minutes >= 1.5 else f'{60 * minutes:.0f} seconds'} "
        f"on {threads} thread{'s' * (threads > 1)} of a CPU"
    )


def _rows(figure: Figure, order: Order) -> tuple[list[Row], float]:
    """Return the rows of all pieces, of which those that were done before are only read, and the seconds they took."""
    settings = {
        "figure": figure.name,
        "quick": order.quick,
        "data": order.data and str(order.data),
        "setting": repr(figure.setting(order)),
    }
    pieces = figure.pieces(order)
    journal = ResumableLog(order.work / "pieces.jsonl", settings)
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


def _write_csv(rows: list[Row], path: Path) -> None:
    """Write rows, with a column for every key of any of them, floats to six digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
        )


def _value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
