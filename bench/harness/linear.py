"""y[k] = x[k] (W + α_k D)ᵀ for K step sizes of M tokens each: every way, beside bare products and the obvious way."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sharpkern import ops
from sharpkern.engines.virtual.linear import moving_linear
from sharpkern.ops.update import StoredUpdate

from .cases import Bench, Cases, fused_linear
from .timing import Json, each_call

# Every variant evaluates so many step sizes in a call: all of them at once, or some at a time.
NUM_STEPS = 8
_AT_ONCE = (1, 4, NUM_STEPS)
# The obvious way, and one weight at a time in a scratch: nothing is gained from several step sizes.
NAIVE, ONE_AT_A_TIME = "clone and add", "formed singly"
# Up to here it is the reading of weights that takes the time.
FEW_TOKENS = 64
# Relative error of a product, against float64.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# Targets on a GPU, 8 step sizes at once: how many times as fast as the obvious way the quickest one is with few
# tokens, and the share of the bare product's speed with 4096, each weight formed.
_LEAST_TIMES_NAIVE = 3.0
_SHARE_OF_PRODUCT = 0.85

Outputs = list[Tensor]


class _Variant(NamedTuple):
    way: str
    at_once: int
    run: Callable[[], Outputs]


def cases(bench: Bench) -> Cases:
    """Return one case per number of tokens and shape of the weight."""
    if bench.machine.is_gpu:
        shapes = [(4096, 4096), (11008, 4096), (4096, 11008)]
        tokens: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    elif bench.quick:
        shapes, tokens = [(384, 384)], (8, 128)
    else:
        shapes, tokens = [(384, 384), (1536, 384), (384, 1536)], (8, 16, 32, 64, 256, 1024)
    return {
        f"{rows}x{columns} M={num}": partial(_timed, bench, (rows, columns), num)
        for num, (rows, columns) in product(tokens, shapes)
    }


def _timed(bench: Bench, shape: tuple[int, int], num_tokens: int) -> Iterator[Json]:
    """Check every way against float64, and time those that are right; shares are per step size."""
    bench.require("form")
    machine, layer = bench.machine, _Layer(bench, shape, num_tokens)
    about: Json = {"tokens": num_tokens, "shape": shape, "dtype": str(layer.dtype).removeprefix("torch.")}
    right = []
    for variant in layer.ways(bench):
        error = layer.error(variant.run)
        passed = error <= _TOLERANCE[layer.dtype]
        yield {"way": variant.way, "at_once": variant.at_once, "error": error, "passed": passed}
        if passed:
            right.append(variant)
    bare = [_Variant(name, 1, layer.product) for name in ("product", "product again")]
    variants = {f"{variant.way} K={variant.at_once}": variant for variant in [*bare, *right]}
    calls = {name: each_call(variant.run) for name, variant in variants.items()}
    copy, copied = machine.copy()
    timings = machine.time({**calls, "copy": copy}, 0.3 if machine.is_gpu else 0.1)
    bandwidth = copied / timings["copy"].median
    taken = {name: timing.median for name, timing in timings.items()}
    for name, variant in variants.items():
        row: Json = {"variant": name, "way": variant.way, "at_once": variant.at_once, **about, "of": "product"}
        row["share"] = taken["product K=1"] / taken[name]
        if variant in right and num_tokens <= FEW_TOKENS:
            row["share_of_floor"] = NUM_STEPS // variant.at_once * layer.nbytes / bandwidth / taken[name]
        if machine.is_gpu and variant.at_once == NUM_STEPS:
            if num_tokens <= FEW_TOKENS:
                row["least_times_naive"] = _LEAST_TIMES_NAIVE
            elif (variant.way, num_tokens) == ("formed", 4096):
                row |= {"target": _SHARE_OF_PRODUCT, "accept": _SHARE_OF_PRODUCT}
        yield {**row, "step_sizes": NUM_STEPS, **timings[name].to_json()}


class _Layer:
    """A linear layer of K inputs on weights that are not in the cache: every pass over them takes the next pair."""

    def __init__(self, bench: Bench, shape: tuple[int, int], num_tokens: int) -> None:
        machine = bench.machine
        self.dtype = torch.bfloat16 if machine.is_gpu else torch.float32
        self.nbytes = 2 * self.dtype.itemsize * shape[0] * shape[1]
        self._backend = bench.backend
        self._x = machine.randn(NUM_STEPS, num_tokens, shape[1], dtype=self.dtype)
        randn = partial(machine.randn, *shape, dtype=self.dtype)
        # The bare product reads W alone.
        seeds = range(machine.rotations(self.nbytes // 2))
        pairs = [StoredUpdate(randn(seed=seed, scale=0.02), randn(seed=seed + 100)) for seed in seeds]
        self._next = cycle(pairs)
        self._last = pairs[-1]
        self._alpha = torch.linspace(-1e-2, -1e-3, NUM_STEPS, device=machine.device)
        self._numbers = self._alpha.tolist()
        self._scratch = torch.empty(1, *shape, dtype=self.dtype, device=machine.device)

    def ways(self, bench: Bench) -> list[_Variant]:
        """Return every way and number of step sizes at once; the fused kernel where it runs and passed its check."""

        def naive(pair: StoredUpdate, k: int) -> Tensor:
            return pair.base.clone().add_(pair.delta, alpha=self._numbers[k])

        def formed(pair: StoredUpdate, k: int) -> Tensor:
            alpha = self._alpha[k : k + 1]
            return ops.form(pair.base, pair.delta, alpha, out=self._scratch, backend=self._backend)[0]

        singly = [(NAIVE, naive), (ONE_AT_A_TIME, formed)]
        several = [
            _Variant(way, at_once, partial(self._several, way, at_once))
            for way, at_once in product(("products", "formed", "fused"), _AT_ONCE)
            if way != "fused" or (bench.backend == "triton" and fused_linear(at_once) in bench.passed)
        ]
        return [_Variant(name, 1, partial(self._one_at_a_time, weight)) for name, weight in singly] + several

    def error(self, run: Callable[[], Outputs]) -> float:
        """Return the norm of the last output's error over that of the exact one, of some hundred of the tokens."""
        some = slice(None, None, max(1, self._x.shape[1] // 256))
        found = run()[-1][-1][some]
        exact = self._x[-1, some].double() @ self._last.delta.double().mul_(self._numbers[-1]).add_(self._last.base).T
        return float((found - exact).norm() / exact.norm())

    def product(self) -> Outputs:
        """Return the products of every input with W alone."""
        return self._one_at_a_time(lambda pair, k: pair.base)

    def _one_at_a_time(self, weight: Callable[[StoredUpdate, int], Tensor]) -> Outputs:
        return [F.linear(x, weight(self._pair(), k))[None] for k, x in enumerate(self._x)]

    def _several(self, way: str, at_once: int) -> Outputs:
        parts = zip(self._x.split(at_once), self._alpha.split(at_once), strict=True)
        pairs = ((x, alpha, self._pair()) for x, alpha in parts)
        return [moving_linear(x, pair.base, pair, alpha, dtype=self.dtype, way=way) for x, alpha, pair in pairs]

    def _pair(self) -> StoredUpdate:
        self._last = next(self._next)
        return self._last
