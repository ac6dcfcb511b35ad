"""Line searches side by side on real training runs, against the first crossing in float64; then time and memory.

    python bench/bench_line_search.py [--quick] [--json PATH]

Every method measures the same points, warm-started from its own last result. Evaluations do not count the base loss,
which a training step has; passes do: it takes one of its own, or a place in the first pass for several step sizes.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The checkout, also where the package is not installed.
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from cost import cost_rows, workloads
from ledger import Sitting, append
from rich.console import Console
from rich.table import Table
from runs import Point, Run, standard_runs

from sharpkern.search import LineSearch, SearchMemory, SearchResult, warm_grid

METHODS: dict[str, dict[str, Any]] = {
    "auto": {},
    "auto, rtol 0.1": {"rtol": 0.1},
    "auto, rtol 0.001": {"rtol": 0.001},
    "auto, certify": {"certify": True},
    "auto, slope unknown": {},
    "auto, slope unknown, 8 at a time": {"num_parallel": 8},
    "auto, 4 at a time": {"num_parallel": 4},
    "auto, 8 at a time": {"num_parallel": 8},
    "bisection": {"method": "bisection"},
}
QUICK = ("auto", "auto, 8 at a time", "bisection")
# Of runs that measure another batch than the gradient's, and of all others.
OTHER_BATCH = ("auto, slope unknown", "auto, slope unknown, 8 at a time", "bisection")
OWN_BATCH = tuple(method for method in METHODS if method != "auto, slope unknown, 8 at a time")
# An answer this far off, in log units, is another crossing and not an inexact one.
OTHER_CROSSING = 0.25


@dataclass
class Series:
    """Results of one method on one run."""

    memory: SearchMemory | None = None
    steps: list[int] = field(default_factory=list)
    results: list[SearchResult] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    truths: list[float | None] = field(default_factory=list)

    def measure(self, point: Point, base_loss: float, truth: float | None, slope: float | None, options: Any) -> None:
        """Measure one point, starting from the last result, with the base loss in the first pass as a measurement."""
        known = {"slope": slope, "norm_sq": point.norm_sq}
        num_parallel = options.get("num_parallel", 1)
        first = warm_grid(self.memory, **known, num=num_parallel - 1) if num_parallel > 1 else ()
        search = LineSearch(
            base_loss,
            **known,
            initial_lr=point.lr,
            memory=self.memory,
            probes=[(eta, point.loss(eta)) for eta in first],
            **options,
        )
        while step_sizes := search.ask():
            search.tell([point.loss(eta) for eta in step_sizes])
        result = search.result()
        self.memory = result.memory
        self.steps.append(point.step)
        self.results.append(result)
        self.passes.append(result.passes if first else 1 + result.passes)
        self.truths.append(truth)

    def row(self, run: str, method: str) -> dict[str, Any]:
        """Return the summary; errors are relative, over the points where both sides found a crossing."""
        pairs = [
            (abs(math.log(result.critical_lr / truth)), result.error)
            for result, truth in zip(self.results, self.truths, strict=True)
            if truth is not None and result.status == "converged"
        ]
        errors, reported = (np.array(column) for column in zip(*pairs, strict=True))
        evaluations = np.array([result.evaluations for result in self.results])
        first = [result.evaluations for step, result in zip(self.steps, self.results, strict=True) if step < 10]
        median, p95, p99 = (float(np.percentile(errors, q)) for q in (50, 95, 99))
        return {
            "run": run,
            "method": method,
            "points": len(self.results),
            "steps": [self.steps[0], self.steps[-1]],
            "evaluations_mean": float(evaluations.mean()),
            "evaluations_p95": float(np.percentile(evaluations, 95)),
            "passes_with_base_loss_mean": float(np.mean(self.passes)),
            "evaluations_first_ten_steps": float(np.mean(first)) if first else None,
            "error_median": median,
            "error_p95": p95,
            "error_p99": p99,
            "other_crossings": int((errors > OTHER_CROSSING).sum()),
            "covered": float((errors <= reported).mean()),
            "statuses": {
                status: [r.status for r in self.results].count(status)
                for status in sorted({r.status for r in self.results})
            },
            "no_crossing_in_scan": sum(truth is None for truth in self.truths),
        }


def measure_run(run: Run, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Train the run and return one row per method."""
    series = {method: Series() for method in methods}
    for point in run.points():
        truth, base_loss = point.first_crossing(), point.loss(0.0)
        for method in methods:
            slope = None if "slope unknown" in method else point.slope
            series[method].measure(point, base_loss, truth, slope, METHODS[method])
    return [series[method].row(run.name, method) for method in methods]


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the rows as a table for people."""
    columns = (
        "run",
        "method",
        "points",
        "evaluations",
        "p95",
        "passes + f(0)",
        "first 10",
        "error %",
        "p95",
        "p99",
        "other",
        "covered",
    )
    shown = Table(*columns, title="Line search: evaluations, passes with the base loss, error of η_c")
    last = None
    for row in rows:
        if row["run"] != last:
            shown.add_section()
        first = row["evaluations_first_ten_steps"]
        shown.add_row(
            row["run"] if row["run"] != last else "",
            row["method"],
            str(row["points"]),
            f"{row['evaluations_mean']:.2f}",
            f"{row['evaluations_p95']:.0f}",
            f"{row['passes_with_base_loss_mean']:.2f}",
            "" if first is None else f"{first:.1f}",
            *(f"{100 * row[key]:.3f}" for key in ("error_median", "error_p95", "error_p99")),
            str(row["other_crossings"]),
            f"{100 * row['covered']:.1f}",
        )
        last = row["run"]
    return shown


def cost_table(rows: list[dict[str, Any]]) -> Table:
    """Return the cost rows as a table for people."""
    columns = (
        "model",
        "tokens",
        "engine",
        "forwards",
        "passes",
        "plain forward ms",
        "search / plain",
        "of 8 / plain",
        "r_8",
        "direction / plain",
        "extra MB",
        "largest matrix MB",
        "parameters MB",
    )
    shown = Table(
        *columns,
        title="One warm-started search in training, medians, one thread; of 8: per step size; r_8: pass of 8 / of 1",
    )
    for row in rows:
        ratio = row["pass_over_virtual_pass"]
        shown.add_row(
            f"{row['model']}, {row['parameters'] / 1e6:.2g} M",
            str(row["tokens"]),
            row["engine"],
            f"{row['forwards']:g}",
            f"{row['passes']:g}",
            f"{row['plain_forward_ms']:.2f}",
            f"{row['search_in_plain_forwards']:.2f}",
            f"{row['step_size_in_plain_forwards']:.2f}",
            "" if ratio is None else f"{ratio:.2f}",
            f"{row['direction_in_plain_forwards']:.2f}",
            *(f"{row[key] / 1e6:.2f}" for key in ("extra_bytes", "largest_matrix_bytes", "parameter_bytes")),
        )
    return shown


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short runs, three methods, under a minute")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=150)
    sitting = Sitting(arguments.quick)
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for run in standard_runs(arguments.quick):
        own_batch = QUICK if arguments.quick else OWN_BATCH
        rows += measure_run(run, OTHER_BATCH if run.other_batch else own_batch)
        print(f"{run.name}: done after {time.perf_counter() - started:.0f} s", file=sys.stderr)
    console.print(table(rows))
    costs = [row for workload in workloads(arguments.quick) for row in cost_rows(workload)]
    console.print(cost_table(costs))
    if arguments.json:
        append(arguments.json, sitting.record(line_search=rows, cost=costs))


if __name__ == "__main__":
    main()
