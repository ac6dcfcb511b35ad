"""The results ledger: files of `results/` to which every run adds a record, with all that its figures depend on.

What was recorded once is never changed. ``python bench/readme.py`` makes the tables and plots of README and docs from
the last full record of each file.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

# The checkout, also where the package is not installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from sharpkern._support.files import replacing
from sharpkern.bench.environment import look

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
Measure = Callable[[bool], dict[str, Any]]


def main(about: str | None, measure: Measure) -> None:
    """Run a benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small version, whose figures mean nothing")
    parser.add_argument("--json", type=Path, help="add the record to this file")
    arguments = parser.parse_args()
    run(measure, arguments.quick, arguments.json)


def run(measure: Measure, quick: bool, path: Path | None) -> None:
    """Run a benchmark in one thread, and add its record to a file if there is one."""
    torch.set_num_threads(1)
    made = record(quick, measure)
    conditions = made["environment"]
    before, after = conditions["load_average"]
    print(f"{conditions['seconds']:.0f} s; load average {before:.1f} before, {after:.1f} after")
    if path:
        append(path, made)


def record(quick: bool, measure: Measure) -> dict[str, Any]:
    """Measure, and return the results with the conditions they were made under."""
    # The sources are those of the start, whatever is edited meanwhile.
    conditions = {**look(), "numpy": np.__version__, "threads": torch.get_num_threads()}
    started, before = time.perf_counter(), os.getloadavg()[0]
    results = measure(quick)
    conditions |= {"load_average": [before, os.getloadavg()[0]], "seconds": time.perf_counter() - started}
    return {"environment": conditions, "quick": quick, **results}


def append(path: Path, made: dict[str, Any]) -> None:
    """Add a record to the list in a file; those that are there stay, also if this is interrupted."""
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(json.dumps([*records, made], indent=1) + "\n", encoding="utf-8")


def table(head: str, line: str, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table from its titles and the format of a row's fields."""
    return [f"| {head} |", "|---" * (head.count(" | ") + 1) + "|", *(f"| {line.format(**row)} |" for row in rows)]


def latest(name: str) -> dict[str, Any]:
    """Return the last full record of a file."""
    records = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    made: dict[str, Any] = [one for one in records if not one["quick"]][-1]
    return made


def show(title: str, rows: Iterable[Mapping[str, Any]], columns: str) -> None:
    """Print some columns of rows, named as in the record; of a list its smallest and its largest number."""
    table = Table(*(name.replace("_", " ") for name in columns.split()), title=title)
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns.split()))
    Console(width=190).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return f"{_cell(min(value))} to {_cell(max(value))}" if value else ""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
