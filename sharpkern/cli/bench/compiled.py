"""What the compiler made of every kernel on this GPU: registers, shared memory, spills, as the driver says."""

import importlib
import pkgutil
from collections.abc import Iterator
from functools import partial
from typing import Any

from sharpkern.cli.bench.record import Json
from sharpkern.cli.bench.streaming import Kind, kinds
from sharpkern.cli.bench.suite import Bench, Case

# Elements: enough for the launch configuration of large tensors.
_NUMEL = 1 << 24


def cases(bench: Bench) -> dict[str, Case]:
    """Return one case per kind of launch."""
    return {name: partial(_facts, bench, kind) for name, kind in kinds(bench, _NUMEL).items()}


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
