"""Whole language models: one measurement by each engine, and losses at eight step sizes in one pass or in eight."""

import copy
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import torch

import sharpkern
from sharpkern.engines.batched.engine import NUM_PARALLEL, BatchedEngine
from sharpkern.engines.session import Engine
from sharpkern.errors import EngineUnsupportedError

from .cases import Bench, Cases
from .models import LARGE, SAME_LOSS, SMALL, TINY, USABLE, Moving, Preset, Training, engines, fitting
from .timing import Json, each_call

# Most bytes that the virtual engine may take beyond a plain forward pass with a chunked head.
_BEYOND_PLAIN = 1 << 30
_REPEATS, _PASS_REPEATS = 3, 5
# Of weights with standard deviation 0.02, along a direction with 1.
_STEP_SIZES = [0.02 * (k + 1) / NUM_PARALLEL for k in range(NUM_PARALLEL)]
# What a measurement calls by any engine.
_NEEDED = "form form_adam form_steps_ sum_steps adam_sums reduce axpy_ embedding linear_cross_entropy".split()
# Most bytes of weights, direction and all that a pass for eight step sizes takes, at 7 billion parameters.
_MOST_BYTES = 31 << 30


def _agreement(found: Sequence[float], expected: Sequence[float], tolerance: float, least_move: float = -1.0) -> Json:
    """Return how losses compare with those expected, which have to differ by more than a least move."""
    difference = max(abs(one / other - 1) for one, other in zip(found, expected, strict=True))
    moved = max(expected) / min(expected) - 1 > least_move
    return {"difference": difference, "passed": moved and difference <= tolerance}


def _or_why_not(variant: str, about: Json, rows: Iterator[Json]) -> Iterator[Json]:
    """Pass on what is measured; where memory or an engine does not suffice, say so in a row."""
    try:
        yield from rows
    except (torch.OutOfMemoryError, EngineUnsupportedError) as error:
        outcome = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"cannot be {variant}"
        yield {"variant": variant, "outcome": outcome, **about}


# -- one measurement --------------------------------------------------------------------------------------------------


def measurements(bench: Bench) -> Cases:
    """Return one case per way to evaluate the losses. They share one model, made for the first of them."""

    @cache
    def scene() -> Training:
        bench.require(*_NEEDED)
        return Training(bench.machine, fitting(bench.machine, bench.quick))

    def engine(name: str, *, resident: bool) -> Iterator[Json]:
        return _or_why_not(name, scene().about(), _engine(scene(), name, resident=resident))

    return {
        "plain forward": lambda: _plain(scene()),
        "virtual, first measurement": lambda: _first(scene()),
        "virtual, from the optimizer's state": lambda: engine("virtual", resident=False),
        "virtual, direction in memory": lambda: engine("virtual", resident=True),
        "in place": lambda: engine("inplace", resident=False),
        "deep copy": lambda: _or_why_not("deep copy", scene().about(), _deep_copy(scene())),
    }


def _plain(scene: Training) -> Iterator[Json]:
    """Time and weigh the forward pass that everything is held against, with stock logits and chunk by chunk."""
    calls = {"plain": scene.loss, "plain, chunked head": scene.chunked_loss}
    # Building the model takes its time: something to show for it.
    yield {"scene": scene.about()}
    stock, chunked = (float(call()) for call in calls.values())
    compared = _agreement([chunked], [stock], SAME_LOSS[scene.preset.dtype])
    yield {"compared": list(calls), **compared}
    if not compared["passed"]:
        return
    peaks = {name: scene.machine.peak(call) for name, call in calls.items()}
    timings = scene.machine.time({name: each_call(call) for name, call in calls.items()}, scene.seconds)
    plain_ms = 1e3 * timings["plain"].median
    for name, timing in timings.items():
        yield {"variant": name, "plain_ms": plain_ms, **scene.about(), **peaks[name], **timing.to_json()}


def _first(scene: Training) -> Iterator[Json]:
    """Weigh the first measurement of the model, which begins at the optimizer's learning rate and makes the checks."""
    peak, first = scene.machine.peak(lambda: scene.measured), scene.measured
    fields = {"forwards": first.forwards, "ms_per_forward": 1e3 * first.seconds / first.forwards}
    yield {"variant": "virtual", **fields, **_measured_fields(first), **peak, **scene.about()}


def _engine(scene: Training, engine: str, *, resident: bool) -> Iterator[Json]:
    """Hold one engine's losses against the virtual one's, and time and weigh its measurements.

    λ_c is not held against anything: a search along a curve with several crossings may end at another one for a
    difference in the last bit.
    """
    machine = scene.machine
    direction_ms, direction = machine.milliseconds(lambda: scene.direction(resident=resident))
    step_sizes, expected = zip(*scene.losses, strict=True)
    losses = scene.losses_by(engine, direction, step_sizes)
    agreement = _agreement(losses, expected, SAME_LOSS[scene.preset.dtype], least_move=0.0)
    compared = {"engine": engine, "step_sizes": step_sizes, "losses": losses, **agreement}
    if not agreement["passed"]:
        yield compared
        return
    options: Json = {"engine": engine, "initial_lr": scene.start}
    measure = partial(sharpkern.critical_sharpness, scene.model, scene.loss, direction, **options)
    measure()
    plain_peak, peak = machine.peak(scene.chunked_loss), machine.peak(measure)
    # In turns, so that clocks and other load meet both alike.
    turns = [(machine.milliseconds(scene.loss)[0], measure()) for _ in range(_REPEATS)]
    plain_ms, found = zip(*turns, strict=True)
    yield {**compared, **_measured_fields(found[0])}
    per_forward = sorted(1e3 * m.seconds / m.forwards for m in found)
    row: Json = {
        "variant": engine,
        "direction_in_memory": resident,
        "direction_bytes": direction.nbytes,
        "direction_ms": direction_ms,
        "ms_per_forward": statistics.median(per_forward),
        "ms_per_forward_range": [per_forward[0], per_forward[-1]],
        "plain_ms": statistics.median(plain_ms),
        "forwards": found[0].forwards,
        **peak,
        **scene.about(),
    }
    if peak:
        row["beyond_plain"] = peak["allocated"] - plain_peak["allocated"]
        if engine == "virtual" and not resident:
            row["most_beyond_plain"] = _BEYOND_PLAIN
    yield row


def _measured_fields(found: sharpkern.Measurement) -> Json:
    return {name: getattr(found, name) for name in ("status", "sharpness", "base_loss", "error", "retained")}


def _deep_copy(scene: Training) -> Iterator[Json]:
    """Evaluate one step size in a copy of the model: the obvious way."""
    machine, twin = scene.machine, None
    eta, expected = scene.losses[-1]
    direction = scene.direction(resident=True)
    deltas = dict(zip(direction.parameters, direction.tensors, strict=True))

    def evaluate() -> torch.Tensor:
        nonlocal twin
        twin = copy.deepcopy(scene.model) if twin is None else twin
        for moved, parameter in zip(twin.parameters(), scene.model.parameters(), strict=True):
            if parameter in deltas:
                torch.add(parameter, deltas[parameter], alpha=-eta, out=moved)
        return scene.loss(twin)

    peak = machine.peak(evaluate)
    compared = _agreement([float(evaluate())], [expected], SAME_LOSS[scene.preset.dtype])
    yield {"compared": ["deep copy", "virtual"], "step_size": eta, **compared}
    if not compared["passed"]:
        return
    timings = machine.time({"deep copy": each_call(evaluate), "plain": each_call(scene.loss)}, scene.seconds)
    fields = {"direction_bytes": direction.nbytes, **peak, **scene.about()}
    plain_ms = 1e3 * timings["plain"].median
    yield {"variant": "deep copy", "plain_ms": plain_ms, **fields, **timings["deep copy"].to_json()}


# -- eight step sizes -------------------------------------------------------------------------------------------------


def passes(bench: Bench) -> Cases:
    """Return one case per model and number of tokens. One model exists at a time, made for its first case."""
    made: dict[str, Moving] = {}

    def scene(preset: Preset) -> Moving:
        if preset.name not in made:
            bench.require("form", "embedding", "linear_cross_entropy")
            made.clear()
            gc.collect()
            torch.cuda.empty_cache()
            made[preset.name] = Moving(bench.machine, preset)
        return made[preset.name]

    def timed(preset: Preset, num_tokens: int) -> Iterator[Json]:
        return _passes(scene(preset), num_tokens)

    presets, tokens = _sizes(bench)
    return {f"{one.name}, {num} tokens": partial(timed, one, num) for one in presets for num in tokens}


def _sizes(bench: Bench) -> tuple[list[Preset], tuple[int, ...]]:
    """Return models and numbers of tokens: on a GPU the two largest models that fit with a direction."""
    if not bench.machine.is_gpu:
        return ([TINY], (16, 64)) if bench.quick else ([SMALL], (32, 256))
    room = USABLE * bench.machine.memory
    return [one for one in LARGE if 2 * one.dtype.itemsize * one.num_parameters < room][:2], (64, 512, 4096)


def _passes(scene: Moving, num_tokens: int) -> Iterator[Json]:
    """Say what a pass is of, and time and weigh passes of both engines."""
    about = {**scene.about(), "tokens": num_tokens, "direction_bytes": scene.direction.nbytes}
    yield {"scene": about}
    yield from _or_why_not("batched", about, _passes_of_both(scene, partial(scene.loss, num_tokens=num_tokens), about))


def _passes_of_both(scene: Moving, loss_fn: Callable[[], torch.Tensor], about: Json) -> Iterator[Json]:
    """Hold the batched engine's losses against the virtual one's, and time and weigh passes of both."""
    machine, tolerance = scene.machine, SAME_LOSS[scene.preset.dtype]
    with engines(("virtual", "batched"), scene.model, loss_fn, scene.direction) as opened:
        expected, found = (engine.losses(_STEP_SIZES) for engine in opened)
        agreement = _agreement(found, expected, tolerance, least_move=2 * tolerance)
        yield {"engine": "batched", "losses": found, **agreement}
        if not agreement["passed"]:
            return
        one_pass = [partial(engine.losses, _STEP_SIZES[: _at_once(engine)]) for engine in opened]
        peaks = [machine.peak(one) for one in one_pass]
        # In turns, so that clocks and other load meet all alike; each waits for its losses.
        calls: list[Callable[[], object]] = [loss_fn, *one_pass]
        turns = [[machine.milliseconds(call)[0] for call in calls] for _ in range(_PASS_REPEATS)]
    plain, *taken = (statistics.median(column) for column in zip(*turns, strict=True))
    for engine, peak, pass_ms in zip(opened, peaks, taken, strict=True):
        at_once = _at_once(engine)
        row: Json = {
            "variant": engine.name,
            "at_once": at_once,
            "pass_ms": pass_ms,
            "ms_per_step_size": pass_ms / at_once,
            "plain_ms": plain,
            "pass_over_virtual": pass_ms / taken[0],
            **peak,
            **about,
        }
        if peak:
            row["total_bytes"] = peak["allocated"] + about["weight_bytes"] + scene.direction.nbytes
            if (scene.preset.name, at_once) == ("7B", NUM_PARALLEL):
                row["most_total_bytes"] = _MOST_BYTES
        yield row


def _at_once(engine: Engine) -> int:
    return engine.chunk_size if isinstance(engine, BatchedEngine) else 1
