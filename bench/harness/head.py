"""The loss of a language model's last hidden states: chunk by chunk, against logits that exist as a whole."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sharpkern import ops
from sharpkern.ops.linear_cross_entropy import VOCABULARY_CHUNK, cross_entropy_of_rows, linear_cross_entropy

from .cases import Bench, Cases
from .timing import Json, each_call

# Share of the bare matrix product's speed to reach, and to accept, with the weight formed on the way.
_TARGET, _ACCEPT = 0.74, 0.68
# Relative difference of two losses in bf16, the stock one rounding its logits to bf16.
_TOLERANCE = 2e-3


def cases(bench: Bench) -> Cases:
    """Return one case per number of tokens."""
    numbers = bench.pick(gpu=4096, cpu=256, quick=64), bench.pick(gpu=1024, cpu=64, quick=32)
    return {f"T={num}": partial(_timed, bench, num) for num in numbers}


def _timed(bench: Bench, num_tokens: int) -> Iterator[Json]:
    """Time and weigh the loss four ways, once they are seen to agree."""
    bench.require("linear_cross_entropy", "online_cross_entropy_", "form")
    machine, backend = bench.machine, bench.backend
    vocabulary = bench.pick(gpu=100352, cpu=16380, quick=8190)
    width = bench.pick(gpu=4096, cpu=256, quick=128)
    dtype = torch.bfloat16 if machine.is_gpu else torch.float32
    hidden = machine.randn(num_tokens, width, dtype=dtype)
    W, D = (machine.randn(vocabulary, width, dtype=dtype, seed=seed, scale=0.02) for seed in (1, 2))
    labels = machine.integers(vocabulary, num_tokens, seed=3)
    alpha = torch.tensor([-1e-2], device=machine.device)
    scratch = torch.empty(1, VOCABULARY_CHUNK, width, dtype=dtype, device=machine.device)

    def rows(part: slice) -> Tensor:
        return ops.form(W[part], D[part], alpha, out=scratch[:, : part.stop - part.start], backend=backend)[0]

    def stock(weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels)

    calls: dict[str, Callable[[], Tensor]] = {
        "formed and chunked": lambda: cross_entropy_of_rows(hidden, vocabulary, rows, labels, backend=backend),
        "chunked": lambda: linear_cross_entropy(hidden, W, labels, backend=backend),
        "formed, then stock": lambda: stock(ops.form(W, D, alpha, backend=backend)[0]),
        "stock": lambda: stock(W),
    }
    losses = {name: float(call()) for name, call in calls.items()}
    for first, second in (("formed and chunked", "formed, then stock"), ("chunked", "stock")):
        difference = abs(losses[first] / losses[second] - 1)
        yield {"compared": [first, second], "difference": difference, "passed": difference <= _TOLERANCE}
        if difference > _TOLERANCE:
            return
    peaks = {name: machine.peak(call) for name, call in calls.items()}
    variants = {**calls, "formed and chunked again": calls["formed and chunked"], "product": lambda: hidden @ W.T}
    seconds = 2.0 if machine.is_gpu else 0.2
    timings = machine.time({name: each_call(call) for name, call in variants.items()}, seconds)
    for name, timing in timings.items():
        row: Json = {"variant": name, "share": timings["product"].median / timing.median, "of": "product"}
        if name == "formed and chunked" and machine.is_gpu and num_tokens == 4096:
            row |= {"target": _TARGET, "accept": _ACCEPT}
        yield {**row, **peaks.get(name, {}), "vocabulary": vocabulary, "width": width, **timing.to_json()}
