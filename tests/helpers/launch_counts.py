"""How many launches, kernels, refusals and reads measuring takes, on the structure of Llama-7B.

Counts are of the code alone: neither of the machine nor of how a search goes.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sharpkern.kernels import (
    _tables,
    axpy,
    cross_entropy,
    embedding,
    form,
    linear,
    norm,
    optimizer_steps,
    reduce,
    whole_steps,
)
from triton.runtime.jit import JITFunction

import sharpkern
from sharpkern.bench.models import engines
from sharpkern.engines.virtual import lm_head
from tests.helpers.fake_gpu import FakeGPU
from tests.helpers.llama import TrainedLlama

# Committed counts.
TABLE = Path(__file__).parents[2] / "bench" / "results" / "launches.json"

# Step sizes of a pass.
PASSES: dict[str, tuple[str, bool, list[float]]] = {
    "virtual, from state": ("virtual", False, [1e-4]),
    "virtual, resident": ("virtual", True, [1e-4]),
    "virtual, no step": ("virtual", False, [0.0]),
    "in place, from state": ("inplace", False, [1e-4]),
    "in place, resident": ("inplace", True, [1e-4]),
    "batched, 8, from state": ("batched", False, [1e-4 * k for k in range(1, 9)]),
    "batched, 3, from state": ("batched", False, [1e-4 * k for k in range(1, 4)]),
}


def counts(gpu: FakeGPU, layers: int = 32) -> dict[str, Any]:
    """Count what a direction, a pass of each kind, and ten measurements take."""
    with pytest.MonkeyPatch.context() as patch:
        # Narrow layers go the ways of wide ones: logits are deferred, and there is one configuration of each kernel.
        patch.setattr(lm_head, "HEAD_THRESHOLD", 2**16)
        for module in (form, optimizer_steps):
            patch.setattr(module, "STREAMING", module.STREAMING[-2:])
        for module in (axpy, reduce, whole_steps):
            patch.setattr(module, "_CONFIGS", module._CONFIGS[-1:])
        found = {"direction from state": _of_direction(gpu, layers)}
        found |= {name: _of_pass(gpu, layers, *kind) for name, kind in PASSES.items()}
        found |= {
            f"ten measurements, {engine}": _of_monitor(gpu, engine) for engine in ("virtual", "batched", "inplace")
        }
    return found


def _of_direction(gpu: FakeGPU, layers: int) -> dict[str, Any]:
    llama = TrainedLlama(layers)
    with gpu.counted() as counted:
        sharpkern.Direction.from_optimizer(llama.optimizer, resident=False)
    return {**counted.to_json(), "loaded": {}}


def _of_pass(gpu: FakeGPU, layers: int, engine: str, resident: bool, step_sizes: list[float]) -> dict[str, Any]:
    llama = TrainedLlama(layers)
    direction = sharpkern.Direction.from_optimizer(llama.optimizer, resident=resident)
    with ExitStack() as stack:
        (opened,) = stack.enter_context(engines([engine], llama.model, llama.loss, direction))
        opened.losses([eta / 2 for eta in step_sizes])
        with gpu.counted() as counted:
            opened.losses(step_sizes)
    return counted.to_json()


def _of_monitor(gpu: FakeGPU, engine: str) -> dict[str, Any]:
    """Kernels that the first measurements of a run of its own load."""
    llama = TrainedLlama(2)
    forget_kernels()
    with gpu.counted() as counted:
        monitor = sharpkern.Monitor(llama.model, llama.optimizer, engine=engine)  # type: ignore[arg-type]
        for _ in range(10):
            monitor(llama.loss)
    assert all(record.measurement.engine == engine for record in monitor.history)
    found = counted.to_json()
    return {"loaded": found["loaded"], "refused": found["refused"]}


def forget_kernels() -> None:
    """Let Triton load every kernel anew."""
    for module in (_tables, axpy, cross_entropy, embedding, form, linear, norm, optimizer_steps, reduce, whole_steps):
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                value.device_caches.clear()


def committed() -> dict[str, Any]:
    """The counts as they are committed."""
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found
