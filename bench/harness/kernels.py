"""Kernels by themselves: streams as shares of a copy, the loss of a language model's head, and what was compiled."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sharpkern import ops
from sharpkern.ops.linear_cross_entropy import VOCABULARY_CHUNK, cross_entropy_of_rows, linear_cross_entropy

from .calls import BF16, Backend, Call, Make
from .cases import Bench, Cases, Timed, fused_linear, timed, timed_on_model
from .timing import Json, Variant, each_call

# Share of the bare matrix product's speed to reach, and to accept, with the weight formed on the way.
_TARGET, _ACCEPT = 0.74, 0.68
# Relative difference of two losses in bf16, the stock one rounding its logits to bf16.
_TOLERANCE = 2e-3
# Elements of what is compiled: enough for the launch configuration of large tensors.
_NUMEL = 1 << 24


def _streams(bench: Bench, numel: int) -> dict[str, Timed]:
    """Return what is bound by memory; the linear layer has a section of its own."""
    return {name: one for name, one in timed(bench, numel).items() if not one.operation.startswith("linear")}


def streaming(bench: Bench) -> Cases:
    """Return one case per operation, number of step sizes, and kind of operands."""
    # Less than a tenth of the memory for the largest case, which has eight results.
    numel = bench.pick(gpu=min(1 << 28, bench.machine.memory // 300 // 16 * 16), cpu=1 << 22, quick=1 << 20)
    loads = {**_streams(bench, numel), **timed_on_model(bench)}
    return {name: partial(_stream, bench, one) for name, one in loads.items()}


def _stream(bench: Bench, case: Timed) -> Iterator[Json]:
    """Time one load: the kernel twice, for the noise, plain torch, and a copy of the same number of bytes."""
    machine, load = bench.machine, case.load(bench)
    loads = [load, *(case.load(bench) for _ in range(machine.rotations(load.nbytes) - 1))]
    copy, copied = machine.copy(load.nbytes)

    def variant(backend: Backend) -> Variant:
        return lambda call: loads[call % len(loads)].run(backend)

    variants = {bench.backend: variant(bench.backend), f"{bench.backend} again": variant(bench.backend)}
    if bench.backend == "triton":
        variants["torch"] = variant("torch")
    timings = machine.time({**variants, "copy": copy}, 1.0 if machine.is_gpu else 0.2)
    bandwidth = copied / timings["copy"].median
    for name in variants:
        row = {"variant": name, "bytes": load.nbytes, "share": load.nbytes / timings[name].median / bandwidth}
        if case.target is not None and name == "triton" and machine.is_gpu:
            row |= {"target": case.target[0], "accept": case.target[1]}
        yield {**row, "of": "copy", **timings[name].to_json()}
    yield {"variant": "copy", "bytes": copied, "bytes_per_second": bandwidth, **timings["copy"].to_json()}


def head(bench: Bench) -> Cases:
    """Return one case per number of tokens."""
    numbers = bench.pick(gpu=4096, cpu=256, quick=64), bench.pick(gpu=1024, cpu=64, quick=32)
    return {f"T={num}": partial(_head, bench, num) for num in numbers}


def _head(bench: Bench, num_tokens: int) -> Iterator[Json]:
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


def compiled(bench: Bench) -> Cases:
    """Return one case per kind of launch."""

    def layer(num_steps: int, tokens: int) -> list[Call]:
        return [Make(bench.machine).linear((4096, 4096), (num_steps, tokens), num_steps, BF16, BF16)]

    cases = _streams(bench, _NUMEL)
    for num_steps, tokens in ((1, 16), (8, 16), (8, 64), (8, 128), (8, 512)):
        of_layer = Timed(fused_linear(num_steps), partial(layer, num_steps, tokens))
        cases[f"linear K={num_steps} M={tokens}"] = of_layer
    return {name: partial(_facts, bench, one) for name, one in cases.items()}


def _facts(bench: Bench, case: Timed) -> Iterator[Json]:
    """Launch a kernel and yield what became of it; a register that is spilled goes through memory."""
    load = case.load(bench)
    before = {id(kernel) for kernel in _loaded()}
    load.run("triton")
    bench.machine.synchronize()
    for kernel in _loaded():
        if id(kernel) not in before:
            yield {
                "kernel": kernel.name,
                "registers": kernel.n_regs,
                "spills": kernel.n_spills,
                "shared": kernel.metadata.shared,
                "warps": kernel.metadata.num_warps,
            }


def _loaded() -> list[Any]:
    """Return every kernel of this package that is compiled and loaded in this process."""
    from triton.runtime.jit import JITFunction

    found = []
    for module in pkgutil.walk_packages(importlib.import_module("sharpkern.kernels").__path__, "sharpkern.kernels."):
        for function in vars(importlib.import_module(module.name)).values():
            if isinstance(function, JITFunction):
                # The kernels of a device come first in what Triton keeps for it.
                found += [kernel for kept in function.device_caches.values() for kernel in kept[0].values()]
    return [kernel for kernel in {id(kernel): kernel for kernel in found}.values() if kernel.module is not None]
