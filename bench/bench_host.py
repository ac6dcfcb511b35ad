"""What measuring on a GPU takes of the host's time, in plain forward passes, without a GPU.

    python bench/bench_host.py [--quick] [--json PATH]

Triton's compiler and launch path run over a stub of the driver (tests/helpers/fake_gpu.py), on a model that has the
structure of Llama-7B with narrow layers. So that next to nothing is computed, and what is left is the host's work. It
is the time of one thread, less what plain torch takes to fill in numbers. All cases are timed in turns in one process;
medians make the table.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).parents[1]))

import ledger

import sharpkern
from sharpkern.bench.models import engines
from sharpkern.engines.virtual import lm_head
from tests.helpers.fake_gpu import Counts, FakeGPU, missing
from tests.helpers.llama import TrainedLlama

_LAYERS, _ROUNDS = (32, 9), (2, 2)


class _Empty(TorchFunctionMode):
    """Sees every call and changes none: what any mode takes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def host(quick: bool) -> dict[str, Any]:
    """Count and time."""
    if (reason := missing()) is not None:
        sys.exit(f"no GPU that computes nothing: {reason}")
    torch.set_num_threads(1)
    gpu = FakeGPU()
    # The logits of narrow layers are deferred as those of wide ones are.
    lm_head.HEAD_THRESHOLD = 2**16
    layers, rounds = _LAYERS[quick], _ROUNDS[quick]
    llama = TrainedLlama(layers)
    first = _first_measurements(gpu, TrainedLlama(layers))
    with ExitStack() as stack:
        cases = _cases(llama, stack)
        counts = {}
        for name, call in cases.items():
            call()
            with gpu.counted() as counted:
                call()
            counts[name] = counted
        # In the memory of formed weights there are weights by now.
        gpu.leaves_out_forms = True
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, call in cases.items():
                gpu.filling, started = 0.0, time.thread_time()
                call()
                seconds[name].append(time.thread_time() - started - gpu.filling)
    return _told(llama, seconds, counts, first)


def _cases(llama: TrainedLlama, stack: ExitStack) -> dict[str, Callable[[], object]]:
    tick = [0]

    def plain() -> Tensor:
        with torch.no_grad():
            return llama.loss()

    def empty() -> Tensor:
        with torch.no_grad(), _Empty():
            return llama.loss()

    def probes(engine: str, resident: bool, num: int = 1, step: float = 1e-4) -> Callable[[], object]:
        # An open engine hides the gradients of its model.
        with torch.enable_grad():
            own = TrainedLlama(llama.layers)
        direction = sharpkern.Direction.from_optimizer(own.optimizer, resident=resident)
        (opened,) = stack.enter_context(engines([engine], own.model, own.loss, direction))

        def probe() -> list[float]:
            tick[0] += 1
            return opened.losses([step * (k + 1) * (1 + 1e-3 * tick[0]) for k in range(num)])

        return probe

    return {
        "plain forward": plain,
        "plain forward under an empty mode": empty,
        "direction from state": lambda: sharpkern.Direction.from_optimizer(llama.optimizer, resident=False),
        "virtual, α = 0": probes("virtual", False, step=0.0),
        "virtual, from state": probes("virtual", False),
        "virtual, resident": probes("virtual", True),
        "in place, from state": probes("inplace", False),
        "in place, resident": probes("inplace", True),
        "batched, 8, from state": probes("batched", False, 8),
    }


def _first_measurements(gpu: FakeGPU, llama: TrainedLlama) -> Counts:
    """Count what the first ten measurements of a monitor take."""
    monitor = sharpkern.Monitor(llama.model, llama.optimizer, every=1)
    with gpu.counted() as counts:
        for _ in range(10):
            monitor(llama.loss)
    return counts


def _told(
    llama: TrainedLlama, seconds: dict[str, list[float]], counts: dict[str, Counts], first: Counts
) -> dict[str, Any]:
    median = {name: statistics.median(times) for name, times in seconds.items()}
    plain = median["plain forward"]
    rows = [
        {
            "case": name,
            "ms": 1e3 * median[name],
            "plain_forwards": median[name] / plain,
            "launches": counts[name].launches.total(),
            **counts[name].to_json(),
        }
        for name in seconds
    ]
    tensors = len(list(llama.model.parameters()))
    print(f"{tensors} tensors, load {os.getloadavg()[0]:.1f}")
    for row in rows:
        print(f"{row['case']:36s} {row['ms']:8.1f} ms  × plain {row['plain_forwards']:5.2f}  {counts[row['case']]}")
    print(f"ten measurements: {first}")
    return {
        "tensors": tensors,
        "layers": llama.layers,
        "load": round(os.getloadavg()[0], 2),
        "rows": rows,
        "ten_measurements": first.to_json(),
    }


if __name__ == "__main__":
    ledger.main(__doc__, host)
