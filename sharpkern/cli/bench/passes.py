"""Losses at eight step sizes: one pass each by the virtual engine, all in one pass by the batched one."""

import gc
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch

import sharpkern
from sharpkern.cli.bench.language_model import LARGE, SAME_LOSS, SMALL, TINY, LanguageModel, Preset
from sharpkern.cli.bench.machine import Machine, peak_fields
from sharpkern.cli.bench.record import Json
from sharpkern.cli.bench.scene import USABLE
from sharpkern.cli.bench.side_by_side import engines
from sharpkern.cli.bench.suite import Bench, Case
from sharpkern.engines.batched import NUM_PARALLEL, BatchedEngine
from sharpkern.engines.session import Engine
from sharpkern.errors import EngineUnsupportedError

_REPEATS = 5
# Of weights with standard deviation 0.02, along a direction with 1.
_STEP_SIZES = [0.02 * (k + 1) / NUM_PARALLEL for k in range(NUM_PARALLEL)]
# Most bytes of weights, direction and all that a pass for eight step sizes takes, at 7 billion parameters.
_MOST_BYTES = 31 << 30


def cases(bench: Bench) -> dict[str, Case]:
    """Return one case per model and number of tokens. One model exists at a time, made for its first case."""
    made: dict[str, _Scene] = {}

    def scene(preset: Preset) -> _Scene:
        if preset.name not in made:
            bench.require("form", "embedding", "linear_cross_entropy")
            made.clear()
            gc.collect()
            bench.machine.release_memory()
            made[preset.name] = _Scene(bench.machine, preset)
        return made[preset.name]

    def timed(preset: Preset, num_tokens: int) -> Iterator[Json]:
        return _timed(scene(preset), num_tokens)

    presets, tokens = _sizes(bench)
    return {f"{one.name}, {num} tokens": partial(timed, one, num) for one in presets for num in tokens}


def _sizes(bench: Bench) -> tuple[list[Preset], tuple[int, ...]]:
    """Return models and numbers of tokens: on a GPU the two largest models that fit with a direction."""
    if not bench.machine.is_gpu:
        return ([TINY], (16, 64)) if bench.quick else ([SMALL], (32, 256))
    room = USABLE * bench.machine.memory
    return [one for one in LARGE if 2 * one.dtype.itemsize * one.num_parameters < room][:2], (64, 512, 4096)


class _Scene(LanguageModel):
    """A model, and a direction of random numbers in memory."""

    def __init__(self, machine: Machine, preset: Preset) -> None:
        super().__init__(machine, preset)
        parameters = self.model.parameters()
        tensors = {p: machine.randn(*p.shape, dtype=p.dtype, seed=seed) for seed, p in enumerate(parameters)}
        self.direction = sharpkern.Direction.from_tensors(tensors, self.model)


def _timed(scene: _Scene, num_tokens: int) -> Iterator[Json]:
    """Hold the batched engine's losses against the virtual one's, and time and weigh passes of both."""
    machine, loss_fn = scene.machine, partial(scene.loss, num_tokens=num_tokens)
    about = {**scene.about(), "tokens": num_tokens, "direction_bytes": scene.direction.nbytes}
    yield {"scene": about}
    names = ("virtual", "batched")
    with engines(names, scene.model, loss_fn, scene.direction) as opened:
        try:
            expected, found = (engine.losses(_STEP_SIZES) for engine in opened)
            agreement = _agreement(expected, found, SAME_LOSS[scene.preset.dtype])
            yield agreement
            if not agreement["passed"]:
                return
            passes = [partial(engine.losses, _STEP_SIZES[: _at_once(engine)]) for engine in opened]
            peaks = [machine.peak(one) for one in passes]
            # In turns, so that clocks and other load meet all alike; each waits for its losses.
            calls: list[Callable[[], object]] = [loss_fn, *passes]
            turns = [[machine.milliseconds(call) for call in calls] for _ in range(_REPEATS)]
        except (torch.OutOfMemoryError, EngineUnsupportedError) as error:
            yield {"variant": "batched", "outcome": _outcome(error), **about}
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


def _agreement(expected: list[float], found: list[float], tolerance: float) -> Json:
    difference = max(abs(one / other - 1) for one, other in zip(found, expected, strict=True))
    # Or else nothing would have been compared.
    moved = max(expected) / min(expected) - 1 > 2 * tolerance
    return {"engine": "batched", "losses": found, "difference": difference, "passed": moved and difference <= tolerance}


def _at_once(engine: Engine) -> int:
    return engine.chunk_size if isinstance(engine, BatchedEngine) else 1


def _outcome(error: Exception) -> str:
    return "out of memory" if isinstance(error, torch.OutOfMemoryError) else "cannot be batched"
