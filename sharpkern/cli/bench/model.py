"""One measurement of a large model by each engine: λ_c, time per forward pass, and peak memory."""

import copy
import statistics
import time
from collections.abc import Iterator
from functools import cache

import torch

import sharpkern
from sharpkern.cli.bench.language_model import SAME_LOSS
from sharpkern.cli.bench.machine import each_call, peak_fields
from sharpkern.cli.bench.record import Json
from sharpkern.cli.bench.scene import Scene, fitting
from sharpkern.cli.bench.suite import Bench, Case

# Most bytes that the virtual engine may take beyond a plain forward pass with a chunked head.
_BEYOND_PLAIN = 1 << 30
_REPEATS = 3


def cases(bench: Bench) -> dict[str, Case]:
    """Return one case per way to evaluate the losses. They share one model, made for the first of them."""

    @cache
    def scene() -> Scene:
        bench.require("form", "form_adam", "adam_sums", "reduce", "axpy_", "embedding", "linear_cross_entropy")
        return Scene(bench.machine, fitting(bench.machine, bench.quick))

    return {
        "plain forward": lambda: _plain(scene()),
        "virtual, first measurement": lambda: _first(scene()),
        "virtual, from the optimizer's state": lambda: _engine(scene(), "virtual", resident=False),
        "virtual, direction in memory": lambda: _engine(scene(), "virtual", resident=True),
        "in place": lambda: _engine(scene(), "inplace", resident=False),
        "deep copy": lambda: _deep_copy(scene()),
    }


def _plain(scene: Scene) -> Iterator[Json]:
    """Time and measure the forward pass that everything is held against, with stock logits and chunk by chunk."""
    calls = {"plain": scene.loss, "plain, chunked head": scene.chunked_loss}
    # Building the model takes its time: something to show for it.
    yield {"scene": scene.about()}
    losses = {name: float(call()) for name, call in calls.items()}
    difference = abs(losses["plain"] / losses["plain, chunked head"] - 1)
    yield {"compared": list(calls), "difference": difference, "passed": difference <= SAME_LOSS[scene.preset.dtype]}
    peaks = {name: scene.machine.peak(call) for name, call in calls.items()}
    seconds = 1.5 if scene.machine.is_gpu else 0.2
    timings = scene.machine.time({name: each_call(call) for name, call in calls.items()}, seconds)
    plain_ms = 1e3 * timings["plain"].median
    for name, timing in timings.items():
        yield {"variant": name, "plain_ms": plain_ms, **scene.about(), **peak_fields(peaks[name]), **timing.to_json()}


def _first(scene: Scene) -> Iterator[Json]:
    """Weigh the first measurement of the model, which begins at the optimizer's learning rate and makes the checks."""
    peak = scene.machine.peak(lambda: scene.measured)
    first = scene.measured
    fields = {"forwards": first.forwards, "ms_per_forward": 1e3 * first.seconds / first.forwards}
    yield {"variant": "virtual", **fields, **_measured_fields(first), **peak_fields(peak), **scene.about()}


def _engine(scene: Scene, engine: str, *, resident: bool) -> Iterator[Json]:
    """Hold one engine's losses against the virtual one's, and time and weigh its measurements."""
    machine = scene.machine
    try:
        machine.synchronize()
        started = time.perf_counter()
        direction = scene.direction(resident=resident)
        machine.synchronize()
        seconds_for_direction = time.perf_counter() - started
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
    plain_ms, measurements = zip(*turns, strict=True)
    yield {"engine": engine, **_agreement(scene, engine, direction), **_measured_fields(measurements[0])}
    per_forward = sorted(1e3 * m.seconds / m.forwards for m in measurements)
    row: Json = {
        "variant": engine,
        "direction_in_memory": resident,
        "direction_bytes": direction.nbytes,
        "direction_ms": 1e3 * seconds_for_direction,
        "ms_per_forward": statistics.median(per_forward),
        "ms_per_forward_range": [per_forward[0], per_forward[-1]],
        "plain_ms": statistics.median(plain_ms),
        "forwards": measurements[0].forwards,
        **peak_fields(peak),
        **scene.about(),
    }
    if peak is not None and plain_peak is not None:
        row["beyond_plain"] = peak.allocated - plain_peak.allocated
        if engine == "virtual" and not resident:
            row["most_beyond_plain"] = _BEYOND_PLAIN
    yield row


def _agreement(scene: Scene, engine: str, direction: sharpkern.Direction) -> Json:
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
    fields = ("status", "sharpness", "base_loss", "error", "retained")
    return {name: getattr(found, name) for name in fields}


def _deep_copy(scene: Scene) -> Iterator[Json]:
    """Evaluate one step size in a copy of the model: the obvious way."""
    machine = scene.machine
    eta, expected = scene.losses[-1]
    try:
        direction = scene.direction(resident=True)
        deltas = dict(zip(direction.parameters, direction.tensors, strict=True))
        twin = None

        def evaluate() -> torch.Tensor:
            nonlocal twin
            twin = copy.deepcopy(scene.model) if twin is None else twin
            for moved, parameter in zip(twin.parameters(), scene.model.parameters(), strict=True):
                if parameter in deltas:
                    torch.add(parameter, deltas[parameter], alpha=-eta, out=moved)
            return scene.loss(twin)

        peak = machine.peak(evaluate)
        loss = float(evaluate())
        variants = {"deep copy": each_call(evaluate), "plain": each_call(scene.loss)}
        timings = machine.time(variants, 1.5 if machine.is_gpu else 0.2)
    except torch.OutOfMemoryError:
        yield {"variant": "deep copy", "outcome": "out of memory", **scene.about()}
        return
    difference = abs(loss / expected - 1)
    passed = difference <= SAME_LOSS[scene.preset.dtype]
    yield {"compared": ["deep copy", "virtual"], "step_size": eta, "difference": difference, "passed": passed}
    fields = {"direction_bytes": direction.nbytes, **peak_fields(peak), **scene.about()}
    plain_ms = 1e3 * timings["plain"].median
    yield {"variant": "deep copy", "plain_ms": plain_ms, **fields, **timings["deep copy"].to_json()}
