"""y = x(W + αD)ᵀ for M tokens: what forming the weight costs beside the bare product, by each method."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from sharpkern import ops
from sharpkern.cli.bench.record import Json
from sharpkern.cli.bench.suite import Bench, Case

# Step sizes that one reading of W and D serves.
_STEPS_PER_PASS = 8
# Relative error of a product of bf16 factors, against float64.
_TOLERANCE = 1e-2

Method = Callable[[int], list[Tensor]]


def cases(bench: Bench) -> dict[str, Case]:
    """Return one case per shape of the weight and number of tokens."""
    gpu = bench.machine.is_gpu
    shapes = [(4096, 4096), (11008, 4096), (4096, 11008)] if gpu else [(256, 256)]
    tokens = (64, 256, 512, 1024, 2048, 4096, 8192) if gpu else (64, 256)
    return {
        f"{rows}x{columns} M={num}": partial(_timed, bench, (rows, columns), num)
        for num, (rows, columns) in product(tokens, shapes)
    }


def _timed(bench: Bench, shape: tuple[int, int], num_tokens: int) -> Iterator[Json]:
    """Check every method against float64, and time those that are right; shares are per step size."""
    bench.require("form")
    layer = _Layer(bench, shape, num_tokens)
    methods: dict[str, Method] = {
        "clone and add": layer.clone_and_add,
        "form": layer.form,
        f"form {_STEPS_PER_PASS} at once": layer.form_together,
        "two products": layer.two_products,
    }
    exact = layer.exact()
    for name, method in list(methods.items()):
        error = float((method(0)[0] - exact).norm() / exact.norm())
        yield {"method": name, "error": error, "passed": error <= _TOLERANCE}
        if not error <= _TOLERANCE:
            del methods[name]
    del exact
    variants = {"product": layer.product, "product again": layer.product, **methods}
    timings = bench.machine.time(variants, 0.5 if bench.machine.is_gpu else 0.1)
    for name, timing in timings.items():
        num_steps = len(variants[name](0))
        row: Json = {"variant": name, "share": num_steps * timings["product"].median / timing.median, "of": "product"}
        yield {**row, "step_sizes": num_steps, "tokens": num_tokens, "shape": shape, **timing.to_json()}


class _Layer:
    """A linear layer on weights that are not in the cache; every method returns one output per step size."""

    def __init__(self, bench: Bench, shape: tuple[int, int], num_tokens: int) -> None:
        machine = bench.machine
        dtype = torch.bfloat16 if machine.is_gpu else torch.float32
        self._backend = bench.backend
        self._x = machine.randn(num_tokens, shape[1], dtype=dtype)
        self._weights = [
            (
                machine.randn(*shape, dtype=dtype, seed=seed, scale=0.02),
                machine.randn(*shape, dtype=dtype, seed=seed + 100),
            )
            for seed in range(machine.rotations(2 * dtype.itemsize * shape[0] * shape[1]))
        ]
        self._alphas = torch.linspace(-1e-2, -1e-3, _STEPS_PER_PASS, device=machine.device)
        self._alpha = -1e-2
        self._scratch = torch.empty(_STEPS_PER_PASS, *shape, dtype=dtype, device=machine.device)

    def exact(self) -> Tensor:
        W, D = self._pair(0)
        return self._x.double() @ (W.double() + self._alpha * D.double()).T

    def product(self, call: int) -> list[Tensor]:
        W, _ = self._pair(call)
        return [F.linear(self._x, W)]

    def clone_and_add(self, call: int) -> list[Tensor]:
        W, D = self._pair(call)
        return [F.linear(self._x, W.clone().add_(D, alpha=self._alpha))]

    def form(self, call: int) -> list[Tensor]:
        return self._formed(call, 1)

    def form_together(self, call: int) -> list[Tensor]:
        return self._formed(call, _STEPS_PER_PASS)

    def two_products(self, call: int) -> list[Tensor]:
        W, D = self._pair(call)
        return [torch.addmm(F.linear(self._x, W), self._x, D.t(), alpha=self._alpha)]

    def _formed(self, call: int, num_steps: int) -> list[Tensor]:
        W, D = self._pair(call)
        weights = ops.form(W, D, self._alphas[:num_steps], out=self._scratch[:num_steps], backend=self._backend)
        return [F.linear(self._x, weight) for weight in weights]

    def _pair(self, call: int) -> tuple[Tensor, Tensor]:
        return self._weights[call % len(self._weights)]
