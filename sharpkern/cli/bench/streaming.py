"""Memory-bound kernels as a share of a copy that takes turns with them, beside plain torch doing the same."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from sharpkern import ops
from sharpkern.cli.bench.loads import BF16, FP32, Load, Loads, Shapes, olmo2_1b
from sharpkern.cli.bench.machine import Variant
from sharpkern.cli.bench.record import Json
from sharpkern.cli.bench.suite import Bench, Case

# Shares of the copy bandwidth to reach, and to accept: a stream in and out, and one with eight results or five streams.
_STREAM, _MANY = (0.92, 0.85), (0.88, 0.80)


@dataclass(frozen=True)
class Kind:
    """What is timed in one case.

    Attributes:
        operation: whose check of correctness has to have passed.
        build: makes operands and call.
        target: share to reach and share to accept, None where launches count for more than bytes.
    """

    operation: str
    build: Callable[[], Load]
    target: tuple[float, float] | None = None


def cases(bench: Bench) -> dict[str, Case]:
    """Return one case per operation, number of step sizes, and kind of operands."""
    # Less than a tenth of the memory for the largest case, which has eight results.
    numel = bench.pick(gpu=min(1 << 28, bench.machine.memory // 300 // 16 * 16), cpu=1 << 22, quick=1 << 20)
    all_kinds = {**kinds(bench, numel), **_model_kinds(bench)}
    return {name: partial(_timed, bench, kind) for name, kind in all_kinds.items()}


def kinds(bench: Bench, numel: int) -> dict[str, Kind]:
    """Return what is done to one large tensor.

    Args:
        bench: the machine.
        numel: elements of the tensor.

    Returns:
        By name.
    """
    make = Loads(bench.machine)
    big: Shapes = [(numel,)]
    rows, width = bench.pick(gpu=16384, cpu=1024, quick=256), bench.pick(gpu=4096, cpu=4096, quick=1024)
    look_up = partial(make.embedding, bench.pick(gpu=100352, cpu=8192, quick=1024), width, rows)
    rms_norm, layer_norm = partial(make.norm, ops.rms_norm, 2), partial(make.norm, ops.layer_norm, 4)
    chunk = partial(make.online_cross_entropy, rows // 4, 4096)
    return {
        "axpy": Kind("axpy_", partial(make.axpy, big), _STREAM),
        "form K=1": Kind("form", partial(make.form, big, 1), _STREAM),
        "form K=8": Kind("form", partial(make.form, big, 8), _MANY),
        "form from AdamW state K=1": Kind("form_adam", partial(make.form_adam, big, 1, FP32), _MANY),
        "form from AdamW state K=8": Kind("form_adam", partial(make.form_adam, big, 8, FP32), _MANY),
        "form from bf16 AdamW state K=1": Kind("form_adam", partial(make.form_adam, big, 1, BF16), _MANY),
        "form from SGD state K=1": Kind("form_sgd", partial(make.form_sgd, big, 1), _STREAM),
        "form from SGD state K=8": Kind("form_sgd", partial(make.form_sgd, big, 8), _MANY),
        "sums over an AdamW step": Kind("adam_sums", partial(make.adam_sums, big, FP32), _MANY),
        "sums over an SGD step": Kind("sgd_sums", partial(make.sgd_sums, big), _STREAM),
        "reduce": Kind("reduce", partial(make.reduce, big), _STREAM),
        "form stochastic K=1": Kind("form stochastic", partial(make.form, big, 1, seed=1), _STREAM),
        "form stochastic K=8": Kind("form stochastic", partial(make.form, big, 8, seed=1), _MANY),
        "embedding K=1": Kind("embedding", partial(look_up, 1), _STREAM),
        "embedding K=8": Kind("embedding", partial(look_up, 8), _MANY),
        "rms_norm K=1": Kind("rms_norm", partial(rms_norm, 2 * rows, width, 1), _STREAM),
        "rms_norm K=8": Kind("rms_norm", partial(rms_norm, rows // 4, width, 8), _STREAM),
        "layer_norm K=1": Kind("layer_norm", partial(layer_norm, 2 * rows, width, 1), _STREAM),
        "online cross-entropy": Kind("online_cross_entropy_", chunk, _STREAM),
    }


def _model_kinds(bench: Bench) -> dict[str, Kind]:
    """Return what is done to all parameters of a model; forming them is one launch each."""
    make = Loads(bench.machine)
    fits = bench.machine.memory > 24 << 30
    model = olmo2_1b(bench.pick(gpu=1 if fits else 2, cpu=8, quick=16))
    return {
        "axpy, whole model": Kind("axpy_", partial(make.axpy, model), _STREAM),
        "reduce, whole model": Kind("reduce", partial(make.reduce, model), _STREAM),
        "form K=1, whole model": Kind("form", partial(make.form, model, 1)),
        "form from AdamW state K=1, whole model": Kind("form_adam", partial(make.form_adam, model, 1, FP32)),
        "sums over an AdamW step, whole model": Kind("adam_sums", partial(make.adam_sums, model, FP32)),
    }


def _timed(bench: Bench, kind: Kind) -> Iterator[Json]:
    """Time one load: the kernel twice, for the noise, plain torch, and a copy of the same number of bytes."""
    bench.require(kind.operation)
    machine = bench.machine
    load = kind.build()
    loads = [load, *(kind.build() for _ in range(machine.rotations(load.nbytes) - 1))]
    copy, copied = machine.copy(load.nbytes)

    def variant(backend: str) -> Variant:
        return lambda call: loads[call % len(loads)].run(backend=backend)

    variants = {bench.backend: variant(bench.backend), f"{bench.backend} again": variant(bench.backend)}
    if bench.backend == "triton":
        variants["torch"] = variant("torch")
    timings = machine.time({**variants, "copy": copy}, 1.0 if machine.is_gpu else 0.2)
    bandwidth = copied / timings["copy"].median
    for name in variants:
        row = {"variant": name, "bytes": load.nbytes, "share": load.nbytes / timings[name].median / bandwidth}
        if kind.target is not None and name == "triton" and machine.is_gpu:
            row |= {"target": kind.target[0], "accept": kind.target[1]}
        yield {**row, "of": "copy", **timings[name].to_json()}
    yield {"variant": "copy", "bytes": copied, "bytes_per_second": bandwidth, **timings["copy"].to_json()}
