"""Every operation once: the calls that are checked (`checks`), and those that are timed (`timed`), of the same makers.

A timed case hands out its calls only where the bench knows that the operation has passed its check.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import isqrt
from typing import Any

import torch

from .calls import BF16, DECAY, FP16, FP32, MOMENTUM, Backend, Call, Make, Shape
from .timing import Json, Machine

Cases = dict[str, Callable[[], Iterator[Json]]]

# Shares of the copy bandwidth to reach, and to accept: a stream in and out, and one with eight results or five streams.
_STREAM, _MANY = (0.92, 0.85), (0.88, 0.80)


class BlockedError(Exception):
    """A case times something that has not passed its check of correctness."""


@dataclass(frozen=True)
class Bench:
    """What cases are given: the machine, whether sizes are small, and the operations that have passed their check."""

    machine: Machine
    quick: bool
    passed: frozenset[str] = frozenset()

    @property
    def backend(self) -> Backend:
        """The backend to time: Triton on a GPU, plain torch elsewhere."""
        return "triton" if self.machine.is_gpu else "torch"

    @property
    def backend_to_check(self) -> Backend:
        """The backend to check: Triton where kernels run, under its interpreter too."""
        return "triton" if self.machine.runs_kernels else "torch"

    def require(self, *operations: str) -> None:
        """Go on only where all these have passed their check; BlockedError otherwise."""
        missing = [operation for operation in operations if operation not in self.passed]
        if missing:
            raise BlockedError(f"not timed: {', '.join(missing)} did not pass the check of correctness")

    def pick(self, gpu: int, cpu: int, quick: int | None = None) -> int:
        """Return the size for this machine; ``quick`` is for quick sittings on a CPU."""
        if self.machine.is_gpu:
            return gpu
        return quick if self.quick and quick is not None else cpu


def fused_linear(num_steps: int) -> str:
    """Return the name of the checks of `ops.linear` with K step sizes; by K they are compiled side by side."""
    return f"linear K={num_steps}"


def checks(bench: Bench) -> dict[str, Callable[[], Iterator[Call]]]:
    """Return by operation what makes the calls to check: dtypes and mixes of them, odd sizes, numbers of step sizes."""
    make = Make(bench.machine)
    interpreted = bench.machine.runs_kernels and not bench.machine.is_gpu
    # Triton's interpreter rounds bf16 wrongly and takes seconds for a million elements.
    dtypes = [FP32, FP16] if interpreted else [FP32, FP16, BF16]
    last = dtypes[-1]
    large = 9001 if interpreted else bench.pick(gpu=(1 << 22) + 3, cpu=(1 << 20) + 3, quick=(1 << 16) + 3)
    matrix = (1024, 4096) if bench.machine.is_gpu else (64, 128) if interpreted else (256, 512)
    sizes = [1, 63, 4097, large]
    shapes = [(size,) for size in (*sizes, 0, 1000)]

    def axpy_() -> Iterator[Call]:
        yield from (make.axpy_(shapes, dtype, dtype, dtype).repeat() for dtype in dtypes)
        yield make.axpy_(shapes, last, FP32, FP32)

    def form() -> Iterator[Call]:
        yield from (make.form((size,), 3, dtype, dtype) for dtype, size in product(dtypes, sizes))
        for weight, delta, num_steps in [*((dtype, dtype, 8) for dtype in dtypes), (last, FP32, 1)]:
            yield make.form((large,), num_steps, weight, delta).repeat()
        # Neighbouring elements are not neighbours in the shape.
        call = make.form((130, 70), 3, last, last)
        W, D, alpha = call.operands
        yield replace(call, operands=(W.t(), D.t(), alpha), about={**call.about, "layout": "transposed"})

    def form_stochastic() -> Iterator[Call]:
        for size, num_steps in [(63, 3), (large, 1), (large, 8)]:
            yield make.form((size,), num_steps, BF16, BF16, seed=5).repeat(size == large)

    def form_adam() -> Iterator[Call]:
        kinds = [(dtype, FP32, 3, size) for dtype, size in product((FP32, last), sizes)]
        for dtype, state, num_steps, size in [*kinds, (last, last, 1, large), (last, FP32, 8, large)]:
            yield make.form_adam((size,), num_steps, dtype, state).repeat(size == large)
        coupled = DECAY | {"decoupled": False, "grad_factor": -0.5, "rate": 3.0}
        amsgrad = {"weight_decay": 0.0, "max_exp_avg_sq": True}
        for num_steps, options in [(3, coupled), (3, amsgrad), (0, DECAY | {"dtype": FP32})]:
            yield make.form_adam((4097,), num_steps, last, FP32, options=options)

    def form_sgd() -> Iterator[Call]:
        yield from (make.form_sgd((size,), 3, dtype, FP32) for dtype, size in product((FP32, last), sizes))
        yield make.form_sgd((large,), 8, last, FP32).repeat()
        nesterov = MOMENTUM | {"nesterov": True, "dampening": 0.0, "grad_factor": -0.5, "rate": 3.0}
        for num_steps, options in [(3, nesterov), (3, DECAY), (0, MOMENTUM | {"dtype": FP32})]:
            yield make.form_sgd((4097,), num_steps, last, FP32, options=options)

    def all_steps() -> Iterator[list[Call]]:
        kinds = [(dtype, 1, DECAY) for dtype in dtypes]
        coupled = DECAY | {"decoupled": False, "grad_factor": -0.5, "rate": 3.0}
        amsgrad = {"weight_decay": 0.0, "max_exp_avg_sq": True}
        kinds += [(last, 1, coupled), (last, 1, amsgrad), (last, 1, DECAY | {"dtype": FP32}), (last, 0, DECAY)]
        for dtype, num_steps, options in kinds:
            yield [make.form_adam(shape, num_steps, dtype, FP32, options=options) for shape in shapes]
        nesterov = MOMENTUM | {"nesterov": True, "dampening": 0.0, "grad_factor": -0.5, "rate": 3.0}
        for options in (MOMENTUM, nesterov, DECAY):
            yield [make.form_sgd(shape, 1, last, FP32, options=options) for shape in shapes]

    def reduce() -> Iterator[Call]:
        for operands in [*((dtype,) * 3 for dtype in dtypes), (last, FP32, last)]:
            yield make.reduce(shapes, *operands).repeat()

    mixed = [*((dtype, dtype, 1000, 3) for dtype in dtypes), (last, FP32, 63, 1), (last, last, 4096, 8)]

    def embedding() -> Iterator[Call]:
        for weight, delta, width, num_steps in mixed:
            yield make.embedding((777, width), (3, 67), num_steps, weight, delta).repeat(width == 4096)

    def norm(operation: str) -> Iterator[Call]:
        for dtype, moved, width, num_steps in [*mixed, (last, last, 16384, 1)]:
            yield make.norm(operation, 33, width, num_steps, dtype, moved).repeat(width == 4096)

    def online_cross_entropy_() -> Iterator[Call]:
        for (width, softcap), later in product([(4096, None), (4096, 30.0), (63, None)], (False, True)):
            call = make.online_cross_entropy_(257, width, softcap, first=width if later else 0)
            yield call.repeat(width == 4096)

    def linear(num_steps: int) -> Iterator[Call]:
        # Large ones are those of timed layers to the compiler: what it makes of them is there when they are timed.
        for tokens in (8, 16, 32, 64, 128, 256):
            yield make.linear(matrix, (num_steps, tokens), num_steps, last, last).repeat()
        for dtype, tokens in [*product((FP32, last), (1, 33, 130)), (FP16, 33)]:
            yield make.linear((70, 99), (num_steps, tokens), num_steps, dtype, dtype)
        yield make.linear(matrix, (num_steps, 16), num_steps, last, FP32).repeat()
        yield make.linear(matrix, (1, 24), num_steps, last, last, FP32).repeat()

    return {
        # First what takes the longest to compile.
        **{fused_linear(num_steps): partial(linear, num_steps) for num_steps in (1, 4, 8)},
        "axpy_": axpy_,
        "form": form,
        # Rounds to bf16.
        **({"form stochastic": form_stochastic} if BF16 in dtypes else {}),
        "form_adam": form_adam,
        "form_sgd": form_sgd,
        "adam_sums": lambda: map(make.sums, form_adam()),
        "sgd_sums": lambda: map(make.sums, form_sgd()),
        "form_steps_": lambda: (make.form_steps_(each).repeat() for each in all_steps()),
        "sum_steps": lambda: (make.sum_steps(each).repeat() for each in all_steps()),
        "reduce": reduce,
        "embedding": embedding,
        "rms_norm": partial(norm, "rms_norm"),
        "layer_norm": partial(norm, "layer_norm"),
        "online_cross_entropy_": online_cross_entropy_,
    }


class Load:
    """Calls that are timed as one: on one tensor, or one after another on all parameters of a model."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.nbytes, self.flops = sum(call.nbytes for call in calls), sum(call.flops for call in calls)

    def run(self, backend: Backend) -> None:
        """Make the calls."""
        for call in self.calls:
            call.run(backend)


@dataclass(frozen=True)
class Timed:
    """What is timed in one case."""

    operation: str  # whose check has to have passed, as `checks` names it
    make: Callable[[], list[Call]]  # makes the calls, which `load` alone may ask for
    # Share of a copy to reach and to accept, None where launches count for more than bytes.
    target: tuple[float, float] | None = None

    def load(self, bench: Bench) -> Load:
        """Return what may be timed; BlockedError where the operation has not passed its check."""
        bench.require(self.operation)
        return Load(self.make())


def timed(bench: Bench, numel: int) -> dict[str, Timed]:
    """Return by name what is timed on one tensor of ``numel`` elements; forming writes into a buffer, as engines do."""
    make = Make(bench.machine)
    flat, width = (numel,), min(numel, bench.pick(gpu=4096, cpu=4096, quick=1024))
    rows, side = max(1, numel // width), max(64, isqrt(numel) // 64 * 64)
    vocabulary = bench.pick(gpu=100352, cpu=8192, quick=1024)

    def formed(one: Callable[..., Call], num_steps: int, state: torch.dtype = BF16, **options: Any) -> list[Call]:
        buffer = torch.empty(num_steps * numel, dtype=BF16, device=bench.machine.device)
        return [one(flat, num_steps, BF16, state, **options).into(buffer)]

    form, adam, sgd = (partial(formed, one) for one in (make.form, make.form_adam, make.form_sgd))

    def one_step() -> list[Call]:
        return [make.form_adam(flat, 1, BF16, FP32)]

    def embedding(num_steps: int) -> list[Call]:
        return [make.embedding((vocabulary, width), (rows,), num_steps, BF16, BF16)]

    def norm(operation: str, num_steps: int) -> list[Call]:
        return [make.norm(operation, max(1, rows // num_steps), width, num_steps, BF16, BF16)]

    def linear(num_steps: int) -> list[Call]:
        dtype = BF16 if bench.machine.is_gpu else FP32
        return [make.linear((side, side), (num_steps, 16), num_steps, dtype, dtype)]

    return {
        "axpy": Timed("axpy_", lambda: [make.axpy_([flat], BF16, BF16, BF16)], _STREAM),
        "form K=1": Timed("form", partial(form, 1), _STREAM),
        "form K=8": Timed("form", partial(form, 8), _MANY),
        "form from AdamW state K=1": Timed("form_adam", partial(adam, 1, FP32), _MANY),
        "form from AdamW state K=8": Timed("form_adam", partial(adam, 8, FP32), _MANY),
        "form from bf16 AdamW state K=1": Timed("form_adam", partial(adam, 1, BF16), _MANY),
        "form from SGD state K=1": Timed("form_sgd", partial(sgd, 1), _STREAM),
        "form from SGD state K=8": Timed("form_sgd", partial(sgd, 8), _MANY),
        "sums over an AdamW step": Timed("adam_sums", lambda: [*map(make.sums, adam(1, FP32))], _MANY),
        "form_steps from AdamW state": Timed("form_steps_", lambda: [make.form_steps_(one_step())], _MANY),
        "sum_steps over an AdamW step": Timed("sum_steps", lambda: [make.sum_steps(one_step())], _MANY),
        "sums over an SGD step": Timed("sgd_sums", lambda: [*map(make.sums, sgd(1))], _STREAM),
        "reduce": Timed("reduce", lambda: [make.reduce([flat], BF16, BF16, BF16)], _STREAM),
        "form stochastic K=1": Timed("form stochastic", partial(form, 1, seed=1), _STREAM),
        "form stochastic K=8": Timed("form stochastic", partial(form, 8, seed=1), _MANY),
        "embedding K=1": Timed("embedding", partial(embedding, 1), _STREAM),
        "embedding K=8": Timed("embedding", partial(embedding, 8), _MANY),
        "rms_norm K=1": Timed("rms_norm", partial(norm, "rms_norm", 1), _STREAM),
        "rms_norm K=8": Timed("rms_norm", partial(norm, "rms_norm", 8), _STREAM),
        "layer_norm K=1": Timed("layer_norm", partial(norm, "layer_norm", 1), _STREAM),
        "online cross-entropy": Timed(
            "online_cross_entropy_", lambda: [make.online_cross_entropy_(rows, width)], _STREAM
        ),
        "linear K=1, 16 tokens": Timed(fused_linear(1), partial(linear, 1)),
        "linear K=8, 16 tokens": Timed(fused_linear(8), partial(linear, 8)),
    }


def olmo2_1b(scale: int = 1) -> list[Shape]:
    """Return the shapes of a model of Olmo2's form, 1.5 billion elements in 179 tensors; widths over ``scale``."""
    width, hidden, vocabulary = 2048 // scale, 8192 // scale, 100352 // scale
    layer: list[Shape] = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)] + [(width,)] * 4
    return [(vocabulary, width), *layer * 16, (width,), (vocabulary, width)]


def timed_on_model(bench: Bench) -> dict[str, Timed]:
    """Return by name what is timed on all parameters of a model, by one launch each or by one for all."""
    make = Make(bench.machine)
    fits = bench.machine.memory > 28 << 30
    shapes = olmo2_1b(bench.pick(gpu=1 if fits else 2, cpu=8, quick=16))

    def each(one: Callable[..., Call], *dtypes: torch.dtype) -> list[Call]:
        largest = max(torch.Size(shape).numel() for shape in shapes)
        buffer = torch.empty(largest, dtype=BF16, device=bench.machine.device)
        return [one(shape, 1, *dtypes).into(buffer) for shape in shapes]

    def all_steps() -> list[Call]:
        return [make.form_adam(shape, 1, BF16, FP32) for shape in shapes]

    return {
        "axpy, whole model": Timed("axpy_", lambda: [make.axpy_(shapes, BF16, BF16, BF16)], _STREAM),
        "reduce, whole model": Timed("reduce", lambda: [make.reduce(shapes, BF16, BF16, BF16)], _STREAM),
        "form K=1, whole model": Timed("form", lambda: each(make.form, BF16, BF16)),
        "form from AdamW state K=1, whole model": Timed("form_adam", lambda: each(make.form_adam, BF16, FP32)),
        "sums over an AdamW step, whole model": Timed(
            "adam_sums", lambda: [make.sums(call) for call in each(make.form_adam, BF16, FP32)]
        ),
        "form_steps from AdamW state, whole model": Timed(
            "form_steps_", lambda: [make.form_steps_(all_steps())], _MANY
        ),
        "sum_steps over an AdamW step, whole model": Timed("sum_steps", lambda: [make.sum_steps(all_steps())], _MANY),
    }
