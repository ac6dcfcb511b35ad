"""Calls of every operation to check: dtypes, mixed dtypes, odd sizes, one and several step sizes."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from sharpkern.cli.bench.judge import Trial
from sharpkern.cli.bench.record import Json
from sharpkern.cli.bench.suite import Bench

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
_EPS = 1e-5


def fused_linear(num_steps: int) -> str:
    """Return the name of the trials of `ops.linear`; by K they are compiled side by side.

    Args:
        num_steps: K.
    """
    return f"linear K={num_steps}"


class Trials:
    """Makes the trials of each operation on one machine.

    Args:
        bench: the machine.
    """

    def __init__(self, bench: Bench) -> None:
        self._machine = bench.machine
        interpreted = bench.machine.runs_kernels and not bench.machine.is_gpu
        # Triton's interpreter rounds bf16 wrongly and takes seconds for a million elements.
        self._dtypes = [FP32, FP16] if interpreted else [FP32, FP16, BF16]
        self._large = 9001 if interpreted else bench.pick(gpu=(1 << 22) + 3, cpu=(1 << 20) + 3, quick=(1 << 16) + 3)
        self._sizes = [1, 63, 4097, self._large]
        self._matrix = (1024, 4096) if bench.machine.is_gpu else (64, 128) if interpreted else (256, 512)

    def all(self) -> dict[str, Callable[[], Iterator[Trial]]]:
        """Return by operation what makes its trials, anew at each call."""
        return {
            # First what takes the longest to compile.
            **{fused_linear(num_steps): partial(self._linear, num_steps) for num_steps in (1, 4, 8)},
            "axpy_": self._axpy,
            "form": self._form,
            # Rounds to bf16.
            **({"form stochastic": self._form_stochastic} if BF16 in self._dtypes else {}),
            "form_adam": self._form_adam,
            "form_sgd": self._form_sgd,
            "adam_sums": partial(self._sums, "adam_sums", self._form_adam),
            "sgd_sums": partial(self._sums, "sgd_sums", self._form_sgd),
            "reduce": self._reduce,
            "embedding": self._embedding,
            "rms_norm": partial(self._norm, "rms_norm"),
            "layer_norm": partial(self._norm, "layer_norm"),
            "online_cross_entropy_": self._online_cross_entropy,
        }

    def _axpy(self) -> Iterator[Trial]:
        sizes = [*self._sizes, 0, 1000]
        for weights, base, delta in [*((dtype,) * 3 for dtype in self._dtypes), (self._dtypes[-1], FP32, FP32)]:
            theta = [torch.full((size,), torch.nan, dtype=weights, device=self._machine.device) for size in sizes]
            operands = theta, self._list(base, 0, sizes), self._list(delta, 100, sizes), self._alpha(1)
            yield Trial("axpy_", operands, _about(weights, base, delta), written=1, repeated=weights == base)

    def _form(self) -> Iterator[Trial]:
        last = self._dtypes[-1]
        for dtype, size in product(self._dtypes, self._sizes):
            yield self._formed(dtype, dtype, size, 3)
        for weight, delta, num_steps in [*((dtype, dtype, 8) for dtype in self._dtypes), (last, FP32, 1)]:
            yield self._formed(weight, delta, self._large, num_steps, repeated=True)
        # Neighbouring elements are not neighbours in the shape.
        W, D = (self._randn(130, 70, dtype=last, seed=seed).t() for seed in range(2))
        yield Trial("form", (W, D, self._alpha(3)), {"dtypes": _names(last), "layout": "transposed"})

    def _formed(
        self, weight: torch.dtype, delta: torch.dtype, size: int, num_steps: int, *, repeated: bool = False
    ) -> Trial:
        operands = (self._randn(size, dtype=weight), self._randn(size, dtype=delta, seed=1), self._alpha(num_steps))
        return Trial("form", operands, _about(weight, delta, size=size, num_steps=num_steps), repeated=repeated)

    def _form_stochastic(self) -> Iterator[Trial]:
        for size, num_steps in [(63, 3), (self._large, 1), (self._large, 8)]:
            operands = (self._randn(size, dtype=BF16), self._randn(size, dtype=BF16, seed=1), self._alpha(num_steps))
            about = _about(BF16, BF16, size=size, num_steps=num_steps)
            yield Trial("form", operands, about, {"seed": 5}, roundings=1.0, repeated=size == self._large)

    def _form_adam(self) -> Iterator[Trial]:
        last = self._dtypes[-1]
        kinds = [(dtype, FP32, 3, size) for dtype, size in product((FP32, last), self._sizes)]
        kinds += [(last, last, 1, self._large), (last, FP32, 8, self._large)]
        for dtype, state, num_steps, size in kinds:
            yield self._adam(dtype, state, size, num_steps, {"weight_decay": 0.1}, repeated=size == self._large)
        changes = (
            {"weight_decay": 0.1, "decoupled": False, "grad_factor": -0.5, "rate": 3.0},
            {"weight_decay": 0.0, "max_exp_avg_sq": self._second_moment(4097, FP32, seed=9)},
        )
        for change in changes:
            yield self._adam(last, FP32, 4097, 3, change)
        yield self._adam(last, FP32, 4097, 0, {"weight_decay": 0.1, "dtype": FP32})

    def _adam(
        self,
        dtype: torch.dtype,
        state: torch.dtype,
        size: int,
        num_steps: int,
        change: Json,
        *,
        repeated: bool = False,
    ) -> Trial:
        theta, grad = self._randn(size, dtype=dtype), self._randn(size, dtype=dtype, seed=1)
        moments = self._randn(size, dtype=state, seed=2), self._second_moment(size, state, seed=3)
        options = {"beta1": 0.9, "beta2": 0.999, "correction1": 1 - 0.9**10, "correction2": 1 - 0.999**10}
        about = _about(dtype, state, size=size, num_steps=num_steps)
        about |= {name: value for name, value in change.items() if isinstance(value, (int, float))}
        operands = theta, grad, *moments, self._alpha(num_steps)
        # Terms of the update, up to about 20, may cancel.
        return Trial("form_adam", operands, about, {**options, "eps": 1e-8, **change}, floor=1e-5, repeated=repeated)

    def _form_sgd(self) -> Iterator[Trial]:
        last = self._dtypes[-1]
        momentum: Json = {"momentum": 0.9, "weight_decay": 0.1}
        kinds: list[tuple[torch.dtype, int, int, Json]] = [
            (dtype, 3, size, momentum) for dtype, size in product((FP32, last), self._sizes)
        ]
        kinds += [
            (last, 8, self._large, momentum),
            (last, 3, 4097, {**momentum, "nesterov": True, "dampening": 0.0, "grad_factor": -0.5, "rate": 3.0}),
            (last, 3, 4097, {"weight_decay": 0.1}),
            (last, 0, 4097, {**momentum, "dtype": FP32}),
        ]
        for dtype, num_steps, size, options in kinds:
            theta, grad = self._randn(size, dtype=dtype), self._randn(size, dtype=dtype, seed=1)
            buffer = self._randn(size, dtype=FP32, seed=2) if "momentum" in options else None
            about = _about(dtype, FP32, size=size, num_steps=num_steps)
            about |= {name: value for name, value in options.items() if isinstance(value, (int, float))}
            operands = theta, grad, buffer, self._alpha(num_steps)
            yield Trial("form_sgd", operands, about, options, floor=1e-5, repeated=num_steps == 8)

    @staticmethod
    def _sums(operation: str, formed: Callable[[], Iterator[Trial]]) -> Iterator[Trial]:
        """Yield the sums over the steps of other trials."""
        for trial in formed():
            operands = trial.operands[:-1]
            options = {name: value for name, value in trial.options.items() if name != "dtype"}
            delta = Trial(trial.operation, (*operands, None), {}, options).exact()[0]
            magnitudes = torch.stack([(delta * operands[1]).abs().sum(), delta.square().sum()])
            # Every term carries the fp32 roundings of its Δθ.
            floor = 1e-6 * magnitudes
            yield Trial(operation, operands, trial.about, options, floor=floor, repeated=trial.repeated)

    def _reduce(self) -> Iterator[Trial]:
        sizes = [*self._sizes, 0, 1000]
        for dtypes in [*((dtype,) * 3 for dtype in self._dtypes), (self._dtypes[-1], FP32, self._dtypes[-1])]:
            operands = [self._list(dtype, 100 * role, sizes) for role, dtype in enumerate(dtypes)]
            magnitudes = Trial("reduce", [[tensor.abs() for tensor in role] for role in operands], {}).exact()[0]
            yield Trial("reduce", operands, _about(*dtypes), floor=1e-13 * magnitudes, repeated=True)

    def _embedding(self) -> Iterator[Trial]:
        last = self._dtypes[-1]
        kinds = [(dtype, dtype, 1000, 3) for dtype in self._dtypes]
        kinds += [(last, FP32, 63, 1), (last, last, 4096, 8)]
        for weight, delta, width, num_steps in kinds:
            W, D = self._randn(777, width, dtype=weight), self._randn(777, width, dtype=delta, seed=1)
            about = _about(weight, delta, size=width, num_steps=num_steps)
            operands = self._integers(777, 3, 67), W, D, self._alpha(num_steps)
            yield Trial("embedding", operands, about, repeated=width == 4096)

    def _norm(self, operation: str) -> Iterator[Trial]:
        last = self._dtypes[-1]
        kinds = [(dtype, dtype, 1000, 3) for dtype in self._dtypes]
        kinds += [(last, FP32, 63, 1), (last, last, 4096, 8), (last, last, 16384, 1)]
        for dtype, moved, width, num_steps in kinds:
            x = self._randn(num_steps, 33, width, dtype=dtype)
            vectors = [
                self._randn(width, dtype=dtypes, seed=seed) for seed, dtypes in enumerate((dtype, moved) * 2, start=1)
            ]
            operands = x, *vectors[: 2 if operation == "rms_norm" else 4], self._alpha(num_steps)
            about = _about(dtype, moved, size=width, num_steps=num_steps)
            # Rows add up in another order: a few fp32 roundings at the size of a normalised element, which is about 1.
            options = {"eps": _EPS}
            yield Trial(operation, operands, about, options, roundings=1.0, floor=4e-6, repeated=width == 4096)

    def _online_cross_entropy(self) -> Iterator[Trial]:
        num_tokens = 257
        for width, softcap in [(4096, None), (4096, 30.0), (63, None)]:
            seen = self._randn(num_tokens), self._randn(num_tokens, seed=1).exp(), self._randn(num_tokens, seed=2)
            new = torch.full_like(seen[0], -torch.inf), torch.zeros_like(seen[1]), torch.zeros_like(seen[2])
            for which, statistics in (("first chunk", new), ("later chunk", seen)):
                logits, labels = (
                    self._randn(num_tokens, width, seed=3, scale=4.0),
                    self._integers(2 * width, num_tokens),
                )
                first = 0 if which == "first chunk" else width
                about = {"size": width, "softcap": softcap, "chunk": which}
                operands = *statistics, logits, labels, first
                options = {"softcap": softcap}
                # exp and tanh are good to a few units in the last place, those of tanh multiplied by the cap.
                yield Trial(
                    "online_cross_entropy_",
                    operands,
                    about,
                    options,
                    written=3,
                    roundings=32 + 8 * (softcap or 0),
                    floor=1e-6 * (softcap or 0),
                    repeated=width == 4096,
                )

    def _linear(self, num_steps: int) -> Iterator[Trial]:
        last, large, odd = self._dtypes[-1], self._matrix, (70, 99)
        # Large ones are those of timed layers to the compiler: what it makes of them is there when they are timed.
        kinds: list[tuple[torch.dtype, torch.dtype, int, tuple[int, int]]] = [
            *((last, last, tokens, large) for tokens in (8, 16, 32, 64, 128, 256)),
            *((dtype, dtype, tokens, odd) for dtype, tokens in product((FP32, last), (1, 33, 130))),
            (FP16, FP16, 33, odd),
            (last, FP32, 16, large),
        ]
        for dtype, moved, tokens, shape in kinds:
            x = self._randn(num_steps, tokens, shape[1], dtype=dtype)
            yield self._product(num_steps, x, moved, shape[0])
        shared = self._randn(1, 24, large[1], dtype=last)
        yield self._product(num_steps, shared, last, large[0], dtype=FP32)

    def _product(self, num_steps: int, x: Tensor, moved: torch.dtype, rows: int, **options: torch.dtype) -> Trial:
        """Return a linear layer on inputs x, [K, M, C] or [1, M, C]."""
        inputs, tokens, columns = x.shape
        W, D = self._randn(rows, columns, dtype=x.dtype, seed=1), self._randn(rows, columns, dtype=moved, seed=2)
        operands = x, W, D, self._steps(num_steps)
        magnitudes = Trial("linear", [operand.abs() for operand in operands], {}).exact()[0]
        # Sums add up in another order, and a weight half-way between two of 16 bits may be rounded to the other one.
        largest = x.abs().amax(-1, keepdim=True).double() * (W.abs() + D.abs()).amax(-1).double()
        floor = 1e-6 * magnitudes + torch.finfo(x.dtype).eps * largest
        dtypes = x.dtype, moved, *options.values()
        about = _about(*dtypes, size=columns, num_steps=num_steps, inputs=inputs, tokens=tokens)
        return Trial("linear", operands, about, options, floor=floor, repeated=(rows, columns) == self._matrix)

    def _randn(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
        return self._machine.randn(*shape, dtype=dtype, seed=seed, scale=scale)

    def _second_moment(self, size: int, dtype: torch.dtype, seed: int) -> Tensor:
        return (self._randn(size, seed=seed).square() + 0.25).to(dtype)

    def _integers(self, end: int, *shape: int) -> Tensor:
        generator = self._machine.generator(7)
        return torch.randint(0, end, shape, generator=generator, device=self._machine.device)

    def _list(self, dtype: torch.dtype, seed: int, sizes: list[int]) -> list[Tensor]:
        return [self._randn(size, dtype=dtype, seed=seed + i) for i, size in enumerate(sizes)]

    def _alpha(self, num_steps: int) -> Tensor | None:
        """Return step sizes as `_steps`; None for no step size at all."""
        return self._steps(num_steps) if num_steps else None

    def _steps(self, num_steps: int) -> Tensor:
        """Return step sizes of both signs, 0 among them where there are several."""
        steps = [-0.3, 0.0, 0.7, -1e-3, 0.11, -0.5, 1e-5, 0.25]
        return torch.tensor(steps[:num_steps], device=self._machine.device)


def _about(*dtypes: torch.dtype, **more: int) -> Json:
    return {"dtypes": _names(*dtypes), **more}


def _names(*dtypes: torch.dtype) -> str:
    return " ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
