"""What the compiler made of every kernel on this GPU: registers, shared memory, spills, as the driver says."""

import importlib
import pkgutil
from collections.abc import Iterator
from functools import partial
from typing import Any

from .cases import BF16, Bench, Call, Cases, Make, Timed, fused_linear, timed
from .timing import Json

# Elements: enough for the launch configuration of large tensors.
_NUMEL = 1 << 24


def cases(bench: Bench) -> Cases:
    """Return one case per kind of launch."""
    streams = {name: one for name, one in timed(bench, _NUMEL).items() if not one.operation.startswith("linear")}
    layers = {
        f"linear K={num_steps} M={tokens}": Timed(fused_linear(num_steps), partial(_layer, bench, num_steps, tokens))
        for num_steps, tokens in ((1, 16), (8, 16), (8, 64), (8, 128), (8, 512))
    }
    return {name: partial(_facts, bench, one) for name, one in {**streams, **layers}.items()}


def _layer(bench: Bench, num_steps: int, tokens: int) -> list[Call]:
    return [Make(bench.machine).linear((4096, 4096), (num_steps, tokens), num_steps, BF16, BF16)]


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
