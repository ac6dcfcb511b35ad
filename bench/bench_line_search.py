"""Line searches side by side on real training runs, against the first crossing in float64; then time and memory.

    python bench/bench_line_search.py [--quick] [--json PATH]

Every method measures the same points, warm-started from its own last result. Evaluations do not count the base loss,
which a training step has; passes do: it takes one of its own, or a place in the first pass for several step sizes.
"""

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean, median
from typing import Any, NamedTuple

import ledger
import numpy as np
from torch import nn
from workloads import Counted, Point, Run, Training, seconds, standard_runs

import sharpkern
from sharpkern.bench.models import engines
from sharpkern.engines.batched.engine import NUM_PARALLEL
from sharpkern.memory.counter import peak_bytes
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


class Series:
    """Results of one method on one run."""

    def __init__(self) -> None:
        self.memory: SearchMemory | None = None
        self.steps: list[int] = []
        self.results: list[SearchResult] = []
        self.passes: list[int] = []
        self.truths: list[float | None] = []

    def measure(self, point: Point, base_loss: float, truth: float | None, slope: float | None, options: Any) -> None:
        """Measure one point, starting from the last result, with the base loss in the first pass as a measurement."""
        known = {"slope": slope, "norm_sq": point.norm_sq}
        num_parallel = options.get("num_parallel", 1)
        first = warm_grid(self.memory, **known, num=num_parallel - 1) if num_parallel > 1 else ()
        probes = [(eta, point.loss(eta)) for eta in first]
        search = LineSearch(base_loss, **known, initial_lr=point.lr, memory=self.memory, probes=probes, **options)
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
        evaluations = [result.evaluations for result in self.results]
        first = [count for step, count in zip(self.steps, evaluations, strict=True) if step < 10]
        return {
            "run": run,
            "method": method,
            "points": len(self.results),
            "steps": [self.steps[0], self.steps[-1]],
            "evaluations_mean": mean(evaluations),
            "evaluations_p95": float(np.percentile(evaluations, 95)),
            "passes_with_base_loss_mean": mean(self.passes),
            "evaluations_first_ten_steps": mean(first) if first else None,
            "error_median": float(np.median(errors)),
            "error_p95": float(np.percentile(errors, 95)),
            "error_p99": float(np.percentile(errors, 99)),
            "other_crossings": int((errors > OTHER_CROSSING).sum()),
            "covered": float((errors <= reported).mean()),
            "statuses": dict(Counter(sorted(result.status for result in self.results))),
            "no_crossing_in_scan": self.truths.count(None),
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


ENGINES = ("virtual", "batched", "inplace")
# Steps of training before the first search, and searches before those that count, which make the checks.
_TRAINED, _WARM_UP = 10, 2
# Engines may differ by as much as their searches' tolerance, in log units.
_SAME = 0.03


class Workload(NamedTuple):
    """A model in training: its name in the table, tokens or samples of a step, and steps whose searches count."""

    name: str
    make: Callable[[], Training]
    tokens: int
    steps: int


def workloads(quick: bool) -> list[Workload]:
    """Return what is measured: from models whose calls take longer than their products to one where these count."""
    few = 3 if quick else 31
    small = [Workload("MLP", Training.of_digits, 64, few), Workload("GPT", partial(Training.of_text, "0.1M"), 32, few)]
    large = (("14M", 32, 15), ("30M", 32, 9), ("30M", 256, 3), ("5M", 1024, 3))
    gpts = [Workload("GPT", partial(Training.of_text, size), tokens, steps) for size, tokens, steps in large]
    return small if quick else small + gpts


def cost_rows(workload: Workload) -> list[dict[str, Any]]:
    """Train a model with a monitor per engine, warm-started each from its own last search, in turns.

    Passes, searches and plain forwards take turns, and medians are compared, so that a busy machine slows all alike.
    """
    training = workload.make()
    model, optimizer = training.model, training.optimizer
    monitors = {engine: sharpkern.Monitor(model, optimizer, engine=engine) for engine in ENGINES}
    plain: list[float] = []
    building: list[float] = []
    searches: dict[str, list[_Search]] = defaultdict(list)
    for step in range(_TRAINED + _WARM_UP + workload.steps):
        loss_fn = training.begin(workload.tokens)
        if step >= _TRAINED:
            first = step % len(ENGINES)
            for engine in ENGINES[first:] + ENGINES[:first]:
                plain.append(seconds(loss_fn.plain))
                calls = loss_fn.calls
                found = monitors[engine](loss_fn)
                passes = loss_fn.calls - calls
                searches[engine].append(_Search(found.critical_lr, found.status, found.forwards, passes, found.seconds))
            building.append(seconds(lambda: sharpkern.Direction.from_optimizer(optimizer)))
        if step < _TRAINED + _WARM_UP + workload.steps - 1:
            training.step()
    counted = _converged({engine: searches[engine][_WARM_UP:] for engine in ENGINES})
    plain_seconds = median(plain)
    direction = sharpkern.Direction.from_optimizer(optimizer)
    eta = counted["virtual"][-1].critical_lr
    step_sizes = [eta * (k + 1) / NUM_PARALLEL for k in range(NUM_PARALLEL)]
    per_step_size = _per_step_size(model, loss_fn, direction, step_sizes, workload.steps)

    def losses(engine: str) -> None:
        # What an engine takes to be opened counts.
        with engines([engine], model, loss_fn, direction) as (opened,):
            opened.losses(step_sizes)

    about = {
        "model": workload.name,
        "tokens": workload.tokens,
        "parameters": training.parameters,
        "plain_forward_ms": 1e3 * plain_seconds,
        "direction_in_plain_forwards": median(building) / plain_seconds,
        "largest_matrix_bytes": max(p.nbytes for p in model.parameters()),
        "parameter_bytes": training.parameter_bytes,
    }
    ratio = NUM_PARALLEL * per_step_size["batched"] / per_step_size["virtual"]
    forward_peak = peak_bytes(loss_fn.plain)
    return [
        {
            **about,
            "engine": engine,
            "searches": len(of_one),
            "forwards": median(search.forwards for search in of_one),
            "passes": median(search.passes for search in of_one),
            "search_in_plain_forwards": median(search.seconds for search in of_one) / plain_seconds,
            "step_size_in_plain_forwards": per_step_size[engine],
            "pass_over_virtual_pass": ratio if engine == "batched" else None,
            "extra_bytes": peak_bytes(partial(losses, engine)) - forward_peak,
        }
        for engine, of_one in counted.items()
    ]


class _Search(NamedTuple):
    critical_lr: float
    status: str
    forwards: int
    passes: int
    seconds: float


def _converged(searches: dict[str, list[_Search]]) -> dict[str, list[_Search]]:
    """Return the searches of the steps at which every engine found a crossing."""
    steps = [found for found in zip(*searches.values(), strict=True) if all(s.status == "converged" for s in found)]
    kept = {engine: [found[i] for found in steps] for i, engine in enumerate(searches)}
    for engine, found in kept.items():
        off = [abs(math.log(one.critical_lr / kept["virtual"][i].critical_lr)) for i, one in enumerate(found)]
        if not off or median(off) > _SAME:
            raise RuntimeError(f"engine {engine} disagrees with virtual, nothing is timed: {searches}")
    return kept


def _per_step_size(
    model: nn.Module, loss_fn: Counted, direction: sharpkern.Direction, step_sizes: list[float], repeats: int
) -> dict[str, float]:
    """Return what each engine takes for one of several step sizes, in plain forwards."""
    found = {}
    # What one engine writes the others must not read.
    for names in (("virtual", "batched"), ("inplace",)):
        with engines(names, model, loss_fn, direction) as opened:
            calls = [loss_fn.plain, *(partial(engine.losses, step_sizes) for engine in opened)]
            turns = [[seconds(call) for call in calls] for _ in range(max(5, repeats) + 1)]
        plain, *taken = (median(column) for column in zip(*turns[1:], strict=True))
        found |= {name: one / (len(step_sizes) * plain) for name, one in zip(names, taken, strict=True)}
    return found


def measure(quick: bool) -> dict[str, Any]:
    """Compare the searches, then the engines."""
    rows: list[dict[str, Any]] = []
    for run in standard_runs(quick):
        print(run.name, file=sys.stderr)
        rows += measure_run(run, OTHER_BATCH if run.other_batch else QUICK if quick else OWN_BATCH)
    columns = (
        "run method points evaluations_mean evaluations_p95 passes_with_base_loss_mean evaluations_first_ten_steps"
    )
    columns += " error_median error_p95 error_p99 other_crossings covered"
    ledger.show("Line search: evaluations, passes with the base loss, error of η_c", rows, columns)
    costs = [row for workload in workloads(quick) for row in cost_rows(workload)]
    columns = "model parameters tokens engine forwards passes plain_forward_ms search_in_plain_forwards"
    columns += " step_size_in_plain_forwards pass_over_virtual_pass direction_in_plain_forwards extra_bytes"
    ledger.show("One warm-started search in training, medians", costs, columns)
    return {"line_search": rows, "cost": costs}


if __name__ == "__main__":
    ledger.main(__doc__, measure)
