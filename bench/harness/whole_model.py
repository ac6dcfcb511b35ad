"""Whole language models: one measurement by each engine, and losses at eight step sizes in one pass or in eight."""

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch

import sharpkern
from sharpkern.engines.batched.engine import NUM_PARALLEL, BatchedEngine
from sharpkern.engines.session import Engine
from sharpkern.errors import EngineUnsupportedError

from .cases import Bench, Cases
from .models import LARGE, SAME_LOSS, SMALL, TINY, USABLE, Moving, Preset, Training, engines, fitting
from .timing import Json, each_call, peak_fields

# Most bytes that the virtual engine may take beyond a plain forward pass with a chunked head.
_BEYOND_PLAIN = 1 << 30
_REPEATS, _PASS_REPEATS = 3, 5
# Of weights with standard deviation 0.02, along a direction with 1.
_STEP_SIZES = [0.02 * (k + 1) / NUM_PARALLEL for k in range(NUM_PARALLEL)]
# Most bytes of weights, direction and all that a pass for eight step sizes takes, at 7 billion parameters.
_MOST_BYTES = 31 << 30


# -- one measurement --------------------------------------------------------------------------------------------------


def measurements(bench: Bench) -> Cases:
    """Return one case per way to evaluate the losses. They share one model, made for the first of them."""

    @cache
    def scene() -> Training:
        bench.require("form", "form_adam", "adam_sums", "reduce", "axpy_", "embedding", "linear_cross_entropy")
        return Training(bench.machine, fitting(bench.machine, bench.quick))

    return {
        "plain forward": lambda: _plain(scene()),
        "virtual, first measurement": lambda: _first(scene()),
        "virtual, from the optimizer's state": lambda: _engine(scene(), "virtual", resident=False),
        "virtual, direction in memory": lambda: _engine(scene(), "virtual", resident=True),
        "in place": lambda: _engine(scene(), "inplace", resident=False),
        "deep copy": lambda: _deep_copy(scene()),
    }


def _plain(scene: Training) -> Iterator[Json]:
    """Time and weigh the forward pass that everything is held against, with stock logits and chunk by chunk."""
    calls = {"plain": scene.loss, "plain, chunked head": scene.chunked_loss}
    # Building the model takes its time: something to show for it.
    yield {"scene": scene.about()}
    losses = {name: float(call()) for name, call in calls.items()}
    compared = _same_loss(scene, losses["plain"], losses["plain, chunked head"])
    yield {"compared": list(calls), **compared}
    if not compared["passed"]:
        return
    peaks = {name: scene.machine.peak(call) for name, call in calls.items()}
    seconds = 1.5 if scene.machine.is_gpu else 0.2
    timings = scene.machine.time({name: each_call(call) for name, call in calls.items()}, seconds)
    plain_ms = 1e3 * timings["plain"].median
    for name, timing in timings.items():
        yield {"variant": name, "plain_ms": plain_ms, **scene.about(), **peak_fields(peaks[name]), **timing.to_json()}


def _same_loss(scene: Training, found: float, expected: float) -> Json:
    difference = abs(found / expected - 1)
    return {"difference": difference, "passed": difference <= SAME_LOSS[scene.preset.dtype]}


def _first(scene: Training) -> Iterator[Json]:
    """Weigh the first measurement of the model, which begins at the optimizer's learning rate and makes the checks."""
    peak = scene.machine.peak(lambda: scene.measured)
    first = scene.measured
    fields = {"forwards": first.forwards, "ms_per_forward": 1e3 * first.seconds / first.forwards}
    yield {"variant": "virtual", **fields, **_measured_fields(first), **peak_fields(peak), **scene.about()}


def _engine(scene: Training, engine: str, *, resident: bool) -> Iterator[Json]:
    """Hold one engine's losses against the virtual one's, and time and weigh its measurements."""
    machine = scene.machine
    try:
        machine.synchronize()
        started = time.perf_counter()
        direction = scene.direction(resident=resident)
        machine.synchronize()
        seconds_for_direction = time.perf_counter() - started
        agreement = _agreement(scene, engine, direction)
        if not agreement["passed"]:
            yield {"engine": engine, **agreement}
            return
        scene.measure(engine, direction, scene.start)
        plain_peak = machine.peak(scene.chunked_loss)
        peak = machine.peak(lambda: scene.measure(engine, direction, scene.start))
        # In turns, so that clocks and other load meet both alike.
        turns = [
            (machine.milliseconds(scene.loss), scene.measure(engine, direction, scene.start)) for _ in range(_REPEATS)
        ]
    except torch.OutOfMemoryError:
        yield {"variant": engine, "outcome": "out of memory", **scene.about()}
        return
    plain_ms, found = zip(*turns, strict=True)
    yield {"engine": engine, **agreement, **_measured_fields(found[0])}
    per_forward = sorted(1e3 * m.seconds / m.forwards for m in found)
    row: Json = {
        "variant": engine,
        "direction_in_memory": resident,
        "direction_bytes": direction.nbytes,
        "direction_ms": 1e3 * seconds_for_direction,
        "ms_per_forward": statistics.median(per_forward),
        "ms_per_forward_range": [per_forward[0], per_forward[-1]],
        "plain_ms": statistics.median(plain_ms),
        "forwards": found[0].forwards,
        **peak_fields(peak),
        **scene.about(),
    }
    if peak is not None and plain_peak is not None:
        row["beyond_plain"] = peak.allocated - plain_peak.allocated
        if engine == "virtual" and not resident:
            row["most_beyond_plain"] = _BEYOND_PLAIN
    yield row


def _agreement(scene: Training, engine: str, direction: sharpkern.Direction) -> Json:
    """Return how the losses of an engine compare with those of the virtual one at the same step sizes.

    λ_c is not held against anything: a search along a curve with several crossings may end at another one for a
    difference in the last bit.
    """
    step_sizes, expected = zip(*scene.losses, strict=True)
    found = scene.losses_by(engine, direction, step_sizes)
    difference = max(abs(one / other - 1) for one, other in zip(found, expected, strict=True))
    # Or else nothing would have been compared.
    moved = len(set(expected)) == len(expected)
    passed = moved and difference <= SAME_LOSS[scene.preset.dtype]
    return {"step_sizes": step_sizes, "losses": found, "difference": difference, "passed": passed}


def _measured_fields(found: sharpkern.Measurement) -> Json:
    return {name: getattr(found, name) for name in ("status", "sharpness", "base_loss", "error", "retained")}


def _deep_copy(scene: Training) -> Iterator[Json]:
    """Evaluate one step size in a copy of the model: the obvious way."""
    machine = scene.machine
    eta, expected = scene.losses[-1]
    twin = None
    try:
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
        compared = _same_loss(scene, float(evaluate()), expected)
        yield {"compared": ["deep copy", "virtual"], "step_size": eta, **compared}
        if not compared["passed"]:
            return
        variants = {"deep copy": each_call(evaluate), "plain": each_call(scene.loss)}
        timings = machine.time(variants, 1.5 if machine.is_gpu else 0.2)
    except torch.OutOfMemoryError:
        yield {"variant": "deep copy", "outcome": "out of memory", **scene.about()}
        return
    fields = {"direction_bytes": direction.nbytes, **peak_fields(peak), **scene.about()}
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
            bench.machine.release_memory()
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
    """Hold the batched engine's losses against the virtual one's, and time and weigh passes of both."""
    machine, loss_fn = scene.machine, partial(scene.loss, num_tokens=num_tokens)
    about = {**scene.about(), "tokens": num_tokens, "direction_bytes": scene.direction.nbytes}
    yield {"scene": about}
    with engines(("virtual", "batched"), scene.model, loss_fn, scene.direction) as opened:
        try:
            expected, found = (engine.losses(_STEP_SIZES) for engine in opened)
            agreement = _batched_agrees(expected, found, SAME_LOSS[scene.preset.dtype])
            yield agreement
            if not agreement["passed"]:
                return
            one_pass = [partial(engine.losses, _STEP_SIZES[: _at_once(engine)]) for engine in opened]
            peaks = [machine.peak(one) for one in one_pass]
            # In turns, so that clocks and other load meet all alike; each waits for its losses.
            calls: list[Callable[[], object]] = [loss_fn, *one_pass]
            turns = [[machine.milliseconds(call) for call in calls] for _ in range(_PASS_REPEATS)]
        except (torch.OutOfMemoryError, EngineUnsupportedError) as error:
            outcome = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "cannot be batched"
            yield {"variant": "batched", "outcome": outcome, **about}
            return
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
            **peak_fields(peak),
            **about,
        }
        if peak is not None:
            row["total_bytes"] = peak.allocated + scene.weight_bytes + scene.direction.nbytes
            if (scene.preset.name, at_once) == ("7B", NUM_PARALLEL):
                row["most_total_bytes"] = _MOST_BYTES
        yield row


def _batched_agrees(expected: list[float], found: list[float], tolerance: float) -> Json:
    difference = max(abs(one / other - 1) for one, other in zip(found, expected, strict=True))
    # Or else nothing would have been compared.
    moved = max(expected) / min(expected) - 1 > 2 * tolerance
    return {"engine": "batched", "losses": found, "difference": difference, "passed": moved and difference <= tolerance}


def _at_once(engine: Engine) -> int:
    return engine.chunk_size if isinstance(engine, BatchedEngine) else 1
