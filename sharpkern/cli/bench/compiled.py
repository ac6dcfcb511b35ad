"""What the compiler made of every kernel on this GPU: registers, shared memory, spills, as the driver says."""

import importlib
import pkgutil
from collections.abc import Iterator
from functools import partial
from typing import Any

from sharpkern.cli.bench.loads import Loads
from sharpkern.cli.bench.record import Json
from sharpkern.cli.bench.streaming import Kind, kinds
from sharpkern.cli.bench.suite import Bench, Case
from sharpkern.cli.bench.trials import fused_linear

# Elements: enough for the launch configuration of large tensors.
_NUMEL = 1 << 24


def cases(bench: Bench) -> dict[str, Case]:
    """Return one case per kind of launch."""
    all_kinds = {**kinds(bench, _NUMEL), **_linear_kinds(bench)}
    return {name: partial(_facts, bench, kind) for name, kind in all_kinds.items()}


def _linear_kinds(bench: Bench) -> dict[str, Kind]:
    """Return linear layers that are timed in a section of their own."""
    make = Loads(bench.machine)
    return {
        f"linear K={num_steps} M={num_tokens}": Kind(
            fused_linear(num_steps), partial(make.linear, 4096, 4096, num_tokens, num_steps)
        )
        for num_steps, num_tokens in ((1, 16), (8, 16), (8, 64), (8, 128), (8, 512))
    }


def _facts(bench: Bench, kind: Kind) -> Iterator[Json]:
    """Launch a kernel and yield what became of it; a register that is spilled goes through memory."""
    bench.require(kind.operation)
    before = {id(kernel) for kernel in _loaded()}
    kind.build().run(backend="triton")
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
    for module in pkgutil.iter_modules(importlib.import_module("sharpkern.kernels").__path__):
        for function in vars(importlib.import_module(f"sharpkern.kernels.{module.name}")).values():
            if isinstance(function, JITFunction):
                # The kernels of a device come first in what Triton keeps for it.
                found += [kernel for kept in function.device_caches.values() for kernel in kept[0].values()]
    return [kernel for kernel in {id(kernel): kernel for kernel in found}.values() if kernel.module is not None]
