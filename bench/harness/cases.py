"""Every operation once: how a call of it is made, the bytes and flops it takes, and how exact its result has to be.

What is checked (`checks`) and what is timed (`timed`) are calls from the same makers. A timed case hands out its calls
only where the bench knows that the operation has passed its check.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from sharpkern import ops

from .formulas import FORMULAS, adam_update, sgd_update
from .timing import Json, Machine

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
Backend = Literal["auto", "triton", "torch"]
Shape = tuple[int, ...]
Shapes = Sequence[Shape]
Cases = dict[str, Callable[[], Iterator[Json]]]

# Shares of the copy bandwidth to reach, and to accept: a stream in and out, and one with eight results or five streams.
_STREAM, _MANY = (0.92, 0.85), (0.88, 0.80)
_STEPS = (-0.3, 0.0, 0.7, -1e-3, 0.11, -0.5, 1e-5, 0.25)
_ADAM: Json = {"beta1": 0.9, "beta2": 0.999, "correction1": 1 - 0.9**10, "correction2": 1 - 0.999**10, "eps": 1e-8}
_DECAY: Json = {"weight_decay": 0.1}
_MOMENTUM: Json = {"momentum": 0.9, "weight_decay": 0.1}


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


@dataclass(frozen=True)
class Call:
    """One call of an operation, with what its result has to be."""

    operation: str  # name in `sharpkern.ops` and in `FORMULAS`
    operands: Sequence[Any]
    about: Json  # what sets this call apart, for the record
    nbytes: int  # what it has to move: every operand read once, every result written once
    flops: int = 0  # of a matrix product; 0 where bytes count
    options: Json = field(default_factory=dict)
    written: int = 0  # how many of the first operands are written; they are the result then
    roundings: float = 0.5  # units in the last place of the exact result that are added to torch's error
    # An absolute error that is added: for sums whose terms are larger than the result.
    floor: Callable[[], float | Tensor] = lambda: 0.0
    repeated: bool = False  # whether the check repeats the call to see that its bits stay the same

    def run(self, backend: Backend) -> Any:
        """Call the operation."""
        return getattr(ops, self.operation)(*self.operands, **self.options, backend=backend)

    def formula(self, function: Callable[..., Any]) -> Any:
        """Call the formula, or what it was compiled to."""
        return function(*self.operands, **self._options())

    def repeat(self, wanted: bool = True) -> "Call":
        """Return the call, to be repeated when it is checked."""
        return replace(self, repeated=wanted)

    def into(self, buffer: Tensor) -> "Call":
        """Return the call with its K results written into a buffer, as engines do."""
        theta, alpha = self.operands[0], self.operands[-1]
        out = buffer[: len(alpha) * theta.numel()].view(len(alpha), *theta.shape)
        return replace(self, options={**self.options, "out": out})

    def result(self, function: Callable[..., Any]) -> list[Tensor]:
        """Return what a function makes of the operands, with copies of those that are written."""
        copies = [tree_map(Tensor.clone, operand) for operand in self.operands[: self.written]]
        returned = function(*copies, *self.operands[self.written :], **self._options())
        found: list[Tensor] = tree_leaves(copies if self.written else returned)
        return found

    def exact(self) -> list[Tensor]:
        """Return the result in float64, of the operands as they are."""
        operands, options = tree_map(_widened, (list(self.operands), self._options("dtype", "seed")))
        return replace(self, operands=operands, options=options).result(FORMULAS[self.operation])

    def _options(self, *without: str) -> Json:
        return {name: value for name, value in self.options.items() if name not in {"out", *without}}


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _nbytes(*operands: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(operands) if isinstance(leaf, Tensor))


class Make:
    """Makes calls on one machine, one method per operation."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._randn = machine, machine.randn

    def axpy_(self, shapes: Shapes, *dtypes: torch.dtype) -> Call:
        """The write of all tensors from θ₀; dtypes of θ, θ₀ and Δθ."""
        theta = [torch.full(shape, torch.nan, dtype=dtypes[0], device=self._machine.device) for shape in shapes]
        operands = theta, self._list(shapes, dtypes[1], 1000), self._list(shapes, dtypes[2], 2000), self.alpha(1)
        return Call("axpy_", operands, _about(*dtypes), _nbytes(operands), written=1)

    def form(self, shape: Shape, num_steps: int, *dtypes: torch.dtype, seed: int | None = None) -> Call:
        """W + α_k D; dtypes of W and D."""
        W, D = (self._randn(*shape, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes))
        about = _about(*dtypes, size=W.numel(), num_steps=num_steps)
        nbytes = _nbytes(W, D) + num_steps * W.nbytes
        options = {} if seed is None else {"seed": seed}
        operands = W, D, self.alpha(num_steps)
        return Call("form", operands, about, nbytes, options=options, roundings=1.0 if options else 0.5)

    def form_adam(self, shape: Shape, num_steps: int, *dtypes: torch.dtype, options: Json = _DECAY) -> Call:
        """θ + α_k Δθ out of Adam's state, without step sizes Δθ itself; dtypes of θ and state."""
        largest = {"max_exp_avg_sq": self._second_moment(shape, FP32, 9)} if "max_exp_avg_sq" in options else {}
        moments = self._randn(*shape, dtype=dtypes[1], seed=2), self._second_moment(shape, dtypes[1], 3)
        return self._formed("form_adam", shape, num_steps, moments, dtypes, options, _ADAM | options | largest)

    def form_sgd(self, shape: Shape, num_steps: int, *dtypes: torch.dtype, options: Json = _MOMENTUM) -> Call:
        """θ + α_k Δθ out of SGD's momentum, without step sizes Δθ itself; dtypes of θ and momentum."""
        stored = self._randn(*shape, dtype=dtypes[1], seed=2) if "momentum" in options else None
        return self._formed("form_sgd", shape, num_steps, (stored,), dtypes, options, options)

    def sums(self, formed: Call) -> Call:
        """Δθᵀg and |Δθ|² over the step that a call of `form_adam` or `form_sgd` takes."""
        operation = formed.operation.removeprefix("form_") + "_sums"
        update = adam_update if operation == "adam_sums" else sgd_update
        operands = formed.operands[:-1]
        options = formed._options("dtype")

        def floor() -> Tensor:
            # Every term carries the fp32 roundings of its Δθ, whose terms may cancel.
            delta = update(*map(_widened, operands), **{name: _widened(value) for name, value in options.items()})
            return 1e-6 * torch.stack([(delta * operands[1]).abs().sum(), delta.square().sum()])

        call = Call(operation, operands, formed.about, _nbytes(operands, options), options=options, floor=floor)
        return call.repeat(formed.repeated)

    def reduce(self, shapes: Shapes, *dtypes: torch.dtype) -> Call:
        """The sums over all tensors; dtypes of θ, Δθ and g."""
        operands = [self._list(shapes, dtype, 1000 * role) for role, dtype in enumerate(dtypes)]

        def floor() -> Tensor:
            magnitudes: Tensor = FORMULAS["reduce"](*([one.abs().double() for one in role] for role in operands))
            return 1e-13 * magnitudes

        return Call("reduce", operands, _about(*dtypes), _nbytes(operands), floor=floor)

    def embedding(self, table: Shape, indices: Shape, num_steps: int, *dtypes: torch.dtype) -> Call:
        """Random rows of W + α_k D, which alone are read; dtypes of W and D."""
        W, D = (self._randn(*table, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes))
        rows = self._machine.integers(len(W), *indices)
        per_element = W.itemsize + D.itemsize + num_steps * W.itemsize
        about = _about(*dtypes, size=table[1], num_steps=num_steps)
        return Call("embedding", (rows, W, D, self.alpha(num_steps)), about, rows.numel() * table[1] * per_element)

    def norm(self, operation: str, rows: int, width: int, num_steps: int, *dtypes: torch.dtype) -> Call:
        """A norm of K inputs with a moving weight, and for layer_norm a moving bias; dtypes of x and of directions."""
        x = self._randn(num_steps, rows, width, dtype=dtypes[0])
        vectors = [self._randn(width, dtype=dtype, seed=seed) for seed, dtype in enumerate(dtypes * 2, start=1)]
        operands = x, *vectors[: 2 if operation == "rms_norm" else 4], self.alpha(num_steps)
        # Rows add up in another order: a few fp32 roundings at the size of a normalised element, which is about 1.
        exactness: Json = {"roundings": 1.0, "floor": lambda: 4e-6}
        about = _about(*dtypes, size=width, num_steps=num_steps)
        return Call(operation, operands, about, _nbytes(operands) + x.nbytes, options={"eps": 1e-5}, **exactness)

    def online_cross_entropy_(self, tokens: int, width: int, softcap: float | None = None, *, first: int = 0) -> Call:
        """The statistics of every token carried on by one chunk of logits; they are new where it is the first."""
        statistics = self._randn(tokens), self._randn(tokens, seed=1).exp_(), self._randn(tokens, seed=2)
        if first == 0:
            statistics = statistics[0].fill_(-torch.inf), statistics[1].zero_(), statistics[2].zero_()
        logits, labels = self._randn(tokens, width, seed=3, scale=4.0), self._machine.integers(2 * width, tokens)
        about = {"size": width, "softcap": softcap, "chunk": "later chunk" if first else "first chunk"}
        # exp and tanh are good to a few units in the last place, those of tanh multiplied by the cap.
        cap = softcap or 0.0
        exactness: Json = {"written": 3, "roundings": 32 + 8 * cap, "floor": lambda: 1e-6 * cap}
        operands, nbytes = (*statistics, logits, labels, first), _nbytes(statistics, statistics, logits, labels)
        return Call("online_cross_entropy_", operands, about, nbytes, options={"softcap": softcap}, **exactness)

    def linear(self, shape: Shape, inputs: Shape, num_steps: int, *dtypes: torch.dtype) -> Call:
        """A linear layer on inputs [K, M], or [1, M] that all share; dtypes of x and W, of D, and of the result."""
        x = self._randn(*inputs, shape[1], dtype=dtypes[0])
        W, D = (self._randn(*shape, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes[:2], start=1))
        alpha = self.alpha(num_steps)
        assert alpha is not None

        def floor() -> Tensor:
            # Sums add up in another order, and a weight half-way between two of 16 bits may be rounded to the other.
            magnitudes: Tensor = FORMULAS["linear"](*(one.abs().double() for one in (x, W, D, alpha)))
            largest = x.abs().amax(-1, keepdim=True).double() * (W.abs() + D.abs()).amax(-1).double()
            return 1e-6 * magnitudes + torch.finfo(x.dtype).eps * largest

        about = _about(*dtypes, size=shape[1], num_steps=num_steps, inputs=inputs[0], tokens=inputs[1])
        options: Json = {"dtype": dtypes[2]} if len(dtypes) > 2 else {}
        results = num_steps * inputs[1] * shape[0]
        nbytes = _nbytes(x, W, D) + results * dtypes[-1 if options else 0].itemsize
        flops = 2 * results * shape[1]
        return Call("linear", (x, W, D, alpha), about, nbytes, flops, options=options, floor=floor)

    def alpha(self, num_steps: int) -> Tensor | None:
        """Return step sizes of both signs, 0 among them where there are several; None for none."""
        return torch.tensor(_STEPS[:num_steps], device=self._machine.device) if num_steps else None

    def _formed(
        self,
        operation: str,
        shape: Shape,
        num_steps: int,
        state: Any,
        dtypes: tuple[torch.dtype, ...],
        changes: Json,
        options: Json,
    ) -> Call:
        theta, grad = (self._randn(*shape, dtype=dtypes[0], seed=seed) for seed in range(2))
        numbers = {name: value for name, value in changes.items() if isinstance(value, (int, float))}
        about = _about(*dtypes, size=theta.numel(), num_steps=num_steps) | numbers
        operands = theta, grad, *state, self.alpha(num_steps)
        results = max(1, num_steps) * theta.numel() * options.get("dtype", theta.dtype).itemsize
        # Terms of the update, up to about 20, may cancel.
        nbytes = _nbytes(operands[:-1], options) + results
        return Call(operation, operands, about, nbytes, options=options, floor=lambda: 1e-5)

    def _second_moment(self, shape: Shape, dtype: torch.dtype, seed: int) -> Tensor:
        return self._randn(*shape, seed=seed).square_().add_(0.25).to(dtype)

    def _list(self, shapes: Shapes, dtype: torch.dtype, seed: int) -> list[Tensor]:
        return [self._randn(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate(shapes)]


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
        coupled = _DECAY | {"decoupled": False, "grad_factor": -0.5, "rate": 3.0}
        amsgrad = {"weight_decay": 0.0, "max_exp_avg_sq": True}
        for num_steps, options in [(3, coupled), (3, amsgrad), (0, _DECAY | {"dtype": FP32})]:
            yield make.form_adam((4097,), num_steps, last, FP32, options=options)

    def form_sgd() -> Iterator[Call]:
        yield from (make.form_sgd((size,), 3, dtype, FP32) for dtype, size in product((FP32, last), sizes))
        yield make.form_sgd((large,), 8, last, FP32).repeat()
        nesterov = _MOMENTUM | {"nesterov": True, "dampening": 0.0, "grad_factor": -0.5, "rate": 3.0}
        for num_steps, options in [(3, nesterov), (3, _DECAY), (0, _MOMENTUM | {"dtype": FP32})]:
            yield make.form_sgd((4097,), num_steps, last, FP32, options=options)

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
    """Return by name what is timed on all parameters of a model; forming them is one launch each."""
    make = Make(bench.machine)
    fits = bench.machine.memory > 24 << 30
    shapes = olmo2_1b(bench.pick(gpu=1 if fits else 2, cpu=8, quick=16))

    def each(one: Callable[..., Call], *dtypes: torch.dtype) -> list[Call]:
        largest = max(torch.Size(shape).numel() for shape in shapes)
        buffer = torch.empty(largest, dtype=BF16, device=bench.machine.device)
        return [one(shape, 1, *dtypes).into(buffer) for shape in shapes]

    return {
        "axpy, whole model": Timed("axpy_", lambda: [make.axpy_(shapes, BF16, BF16, BF16)], _STREAM),
        "reduce, whole model": Timed("reduce", lambda: [make.reduce(shapes, BF16, BF16, BF16)], _STREAM),
        "form K=1, whole model": Timed("form", lambda: each(make.form, BF16, BF16)),
        "form from AdamW state K=1, whole model": Timed("form_adam", lambda: each(make.form_adam, BF16, FP32)),
        "sums over an AdamW step, whole model": Timed(
            "adam_sums", lambda: [make.sums(call) for call in each(make.form_adam, BF16, FP32)]
        ),
    }


def _about(*dtypes: torch.dtype, **more: int) -> Json:
    return {"dtypes": " ".join(str(dtype).removeprefix("torch.") for dtype in dtypes), **more}
