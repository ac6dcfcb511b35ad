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
import torch
from curves import Answer, search, summary
from torch import nn
from workloads import Counted, Point, Run, Training, in_turns, mlp, seconds, standard_runs

import sharpkern
from sharpkern.bench.models import engines
from sharpkern.engines.batched.engine import NUM_PARALLEL
from sharpkern.memory.counter import peak_bytes
from sharpkern.search import SearchMemory, SearchResult, warm_grid

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


def measure_point(
    point: Point, base_loss: float, slope: float | None, memory: SearchMemory | None, options: dict[str, Any]
) -> tuple[SearchResult, int]:
    """Return the result, and the passes that it took with the base loss in the first one as a measurement has it."""
    known = {"slope": slope, "norm_sq": point.norm_sq}
    num_parallel = options.get("num_parallel", 1)
    first = warm_grid(memory, **known, num=num_parallel - 1) if num_parallel > 1 else ()
    probes = [(eta, point.loss(eta)) for eta in first]
    result = search(point.loss, base_loss, **known, initial_lr=point.lr, memory=memory, probes=probes, **options)
    return result, result.passes + (not first)


def measure_run(name: str, run: Run, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Train the run and return one row per method."""
    answers: dict[str, list[Answer]] = {method: [] for method in methods}
    for double in run.points():
        truth, point = double.first_crossing(), double.to(torch.float32)
        base_loss = point.loss(0.0)
        for method, found in answers.items():
            slope = None if "slope unknown" in method else point.slope
            memory = found[-1].result.memory if found else None
            result, passes = measure_point(point, base_loss, slope, memory, METHODS[method])
            found.append(Answer(point.step, result, truth, passes))
    return [{"run": name, "method": method, **_row(found)} for method, found in answers.items()]


def _row(answers: Sequence[Answer]) -> dict[str, Any]:
    first = [answer.result.evaluations for answer in answers if answer.step < 10]
    row = summary(answers)
    return {
        "points": row.pop("searches"),
        "steps": [answers[0].step, answers[-1].step],
        "passes_with_base_loss_mean": mean(answer.passes for answer in answers),
        "evaluations_first_ten_steps": mean(first) if first else None,
        "other_crossings": row.pop("missed"),
        **row,
        "statuses": dict(Counter(sorted(answer.result.status for answer in answers))),
        "no_crossing_in_scan": sum(answer.crossing is None for answer in answers),
    }


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
    small = [Workload("MLP", partial(mlp, 0), 64, few), Workload("GPT", partial(Training.of_text, "0.1M"), 32, few)]
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
        if step:
            training.step()
        loss_fn = training.begin(workload.tokens)
        if step >= _TRAINED:
            for engine in in_turns(ENGINES, step):
                plain.append(seconds(loss_fn.plain))
                calls = loss_fn.calls
                found = monitors[engine](loss_fn)
                searches[engine].append(_Search(found, loss_fn.calls - calls))
            building.append(seconds(lambda: sharpkern.Direction.from_optimizer(optimizer)))
    counted = _converged({engine: searches[engine][_WARM_UP:] for engine in ENGINES})
    plain_seconds = median(plain)
    direction = sharpkern.Direction.from_optimizer(optimizer)
    eta = counted["virtual"][-1].found.critical_lr
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
            "forwards": median(one.found.forwards for one in of_one),
            "passes": median(one.passes for one in of_one),
            "search_in_plain_forwards": median(one.found.seconds for one in of_one) / plain_seconds,
            "step_size_in_plain_forwards": per_step_size[engine],
            "pass_over_virtual_pass": ratio if engine == "batched" else None,
            "extra_bytes": peak_bytes(partial(losses, engine)) - forward_peak,
        }
        for engine, of_one in counted.items()
    ]


class _Search(NamedTuple):
    found: sharpkern.Measurement
    passes: int


def _converged(searches: dict[str, list[_Search]]) -> dict[str, list[_Search]]:
    """Return the searches of the steps at which every engine found a crossing."""
    steps = [one for one in zip(*searches.values(), strict=True) if all(s.found.status == "converged" for s in one)]
    for i, engine in enumerate(searches):
        off = [abs(math.log(one[i].found.critical_lr / one[0].found.critical_lr)) for one in steps]
        if not off or median(off) > _SAME:
            raise RuntimeError(f"engine {engine} disagrees with {ENGINES[0]}, nothing is timed: {searches}")
    return {engine: [one[i] for one in steps] for i, engine in enumerate(searches)}


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
    for name, run in standard_runs(quick).items():
        print(name, file=sys.stderr)
        rows += measure_run(name, run, OTHER_BATCH if run.other_batch else QUICK if quick else OWN_BATCH)
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
