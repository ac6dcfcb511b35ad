"""Memory-bound kernels as a share of a copy that takes turns with them, beside plain torch doing the same."""

from collections.abc import Iterator
from functools import partial

from .cases import Backend, Bench, Cases, Timed, timed, timed_on_model
from .timing import Json, Variant


def cases(bench: Bench) -> Cases:
    """Return one case per operation, number of step sizes, and kind of operands."""
    # Less than a tenth of the memory for the largest case, which has eight results.
    numel = bench.pick(gpu=min(1 << 28, bench.machine.memory // 300 // 16 * 16), cpu=1 << 22, quick=1 << 20)
    # The linear layer has a section of its own.
    streams = {name: one for name, one in timed(bench, numel).items() if not one.operation.startswith("linear")}
    return {name: partial(_timed, bench, one) for name, one in {**streams, **timed_on_model(bench)}.items()}


def _timed(bench: Bench, case: Timed) -> Iterator[Json]:
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
