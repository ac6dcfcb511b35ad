"""What the memory and the matrix units of this machine reach: a large copy, and a large product of random numbers."""

from collections.abc import Iterator

import torch

from sharpkern.cli.bench.record import Json
from sharpkern.cli.bench.suite import Bench, Case


def cases(bench: Bench) -> dict[str, Case]:
    """Return the two ceilings."""
    return {"copy": lambda: copy(bench), "product": lambda: product(bench)}


def copy(bench: Bench) -> Iterator[Json]:
    """Time a copy within the device's memory, 8 GB of it on a large GPU; bytes read and written count."""
    machine = bench.machine
    nbytes = bench.pick(gpu=min(8 << 30, machine.memory // 4), cpu=1 << 28, quick=1 << 26)
    source = machine.randn(nbytes // 4)
    target = torch.empty_like(source)
    variants = {name: lambda _: target.copy_(source) for name in ("copy", "copy again")}
    for name, timing in machine.time(variants, 1.0 if machine.is_gpu else 0.3).items():
        yield {"variant": name, "bytes": 2 * nbytes, "bytes_per_second": 2 * nbytes / timing.median, **timing.to_json()}


def product(bench: Bench) -> Iterator[Json]:
    """Time a square matrix product: bf16, 8192 on a GPU; fp32 and small on a CPU."""
    machine = bench.machine
    size = bench.pick(gpu=8192, cpu=1024, quick=512)
    dtype = torch.bfloat16 if machine.is_gpu else torch.float32
    a, b = (machine.randn(size, size, dtype=dtype, seed=seed) for seed in range(2))
    variants = {name: lambda _: a @ b for name in ("product", "product again")}
    for name, timing in machine.time(variants, 1.0 if machine.is_gpu else 0.3).items():
        yield {"variant": name, "size": size, "flop_per_second": 2 * size**3 / timing.median, **timing.to_json()}
