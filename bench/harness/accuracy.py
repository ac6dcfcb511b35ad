"""Whether results are right: as close to float64 as torch comes in the same dtype, and the same bits every time.

What does not pass here is not timed.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sharpkern import ops
from sharpkern.ops.linear_cross_entropy import cross_entropy_of_rows, linear_cross_entropy

from .calls import BF16, FP32, Call
from .cases import Bench, Cases, checks
from .formulas import FORMULAS
from .timing import Json

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Relative error of a mean over tokens. Products of 16-bit numbers are exact in fp32, so that only sums differ; where
# torch cannot widen on the way, a bf16 logit is off by 2⁻⁹, which averages out.
_HEAD_TOLERANCE = {FP32: 1e-5, BF16: 1e-4}


def cases(bench: Bench) -> Cases:
    """Return one case per operation of `sharpkern.ops`, and one of the head that is made of them."""

    def of(calls: Callable[[], Iterable[Call]]) -> Callable[[], Iterator[Json]]:
        return lambda: judged(bench, calls())

    return {**{name: of(calls) for name, calls in checks(bench).items()}, "linear_cross_entropy": partial(_head, bench)}


def checked(bench: Bench, operation: str) -> Bench:
    """Return the bench that times an operation too, if that passes its check here and now."""
    rows = list(cases(bench)[operation]())
    passed = bench.passed | {operation} if rows and all(row["passed"] for row in rows) else bench.passed
    return replace(bench, passed=passed)


def judged(bench: Bench, calls: Iterable[Call]) -> Iterator[Json]:
    """Yield the row of each call; ValueError for none: an operation that was not checked has not passed."""
    row = None
    for call in calls:
        row = judge(bench, call)
        yield row
    if row is None:
        raise ValueError("calls must hold one call at least, got none; an iterator that is used up holds none")


def judge(bench: Bench, call: Call, function: Callable[..., Any] | None = None) -> Json:
    """Return how the backend under test, or a function in its place, compares with float64.

    The row has the largest error as a multiple of its budget, how many repeats had other bits, and whether it passed.
    """
    if function is None:
        function = partial(getattr(ops, call.operation), backend=bench.backend_to_check)
    with poisoned():
        found = call.result(function)
    in_torch = call.result(FORMULAS[call.operation])
    compared = zip(found, call.exact(), in_torch, strict=True)
    floor = call.floor()
    worst = max(excess(*tensors, roundings=call.roundings, floor=floor) for tensors in compared)
    # Races are a GPU's: elsewhere a few repeats show that the check runs.
    repeats = (300 if bench.machine.is_gpu else 3) if call.repeated else 0
    differing = sum(
        ~same_bits(tensor, again)
        for _ in range(repeats)
        for tensor, again in zip(found, call.result(function), strict=True)
    )
    return {
        "operation": call.operation,
        **call.about,
        "error_of_budget": worst,
        "repeats": repeats,
        "repeats_with_other_bits": int(differing),
        "passed": worst <= 1 and int(differing) == 0,
    }


def excess(
    found: Tensor, exact: Tensor, in_torch: Tensor, *, roundings: float = 0.5, floor: float | Tensor = 0.0
) -> float:
    """Return the largest error over what is allowed for that element; infinite where a NaN, shape or dtype is wrong."""
    if found.shape != exact.shape or found.dtype != in_torch.dtype:
        return float("inf")
    info = torch.finfo(found.dtype)
    unit = info.eps * exact.abs() + info.smallest_normal * info.eps
    # A hundredth more: fp32 arithmetic that is followed by a rounding to 16 bits rounds twice.
    budget = (in_torch.double() - exact).abs() + 1.01 * roundings * unit + floor
    ratio = (found.double() - exact).abs() / budget
    return float(ratio.nan_to_num(nan=torch.inf).max()) if ratio.numel() else 0.0


def bits(tensor: Tensor) -> Tensor:
    """Return the bit patterns of a floating tensor, to compare signs of zero and NaN as well."""
    return tensor.contiguous().view(_BITS[tensor.element_size()])


def same_bits(one: Tensor, other: Tensor) -> Tensor:
    """Return whether two tensors agree in every bit, as a tensor that has not been waited for."""
    return (bits(one) == bits(other)).all()


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory that torch leaves uninitialised with NaN: what a kernel does not write shows."""
    # A module that is a property besides, which no type checker sees.
    deterministic: Any = torch.utils.deterministic
    fills = deterministic.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fills
        torch.set_deterministic_debug_mode(mode)


def _head(bench: Bench) -> Iterator[Json]:
    """Compare the chunked loss with that of logits in float64: of a weight, and of one formed chunk by chunk."""
    machine, backend = bench.machine, bench.backend_to_check
    vocabulary, width, num_tokens = 9001, 256, 129
    alpha = torch.tensor([-0.3], device=machine.device)
    labels = machine.integers(vocabulary, num_tokens, seed=1)
    labels[3] = -100
    for dtype, tolerance in _HEAD_TOLERANCE.items():
        if dtype == BF16 and machine.runs_kernels and not machine.is_gpu:
            # Triton's interpreter rounds bf16 wrongly.
            continue
        hidden = machine.randn(num_tokens, width, dtype=dtype)
        W, D = (machine.randn(vocabulary, width, dtype=dtype, seed=seed, scale=0.1) for seed in (1, 2))

        def rows(part: slice, W: Tensor = W, D: Tensor = D) -> Tensor:
            return ops.form(W[part], D[part], alpha, backend=backend)[0]

        with poisoned():
            found = {
                "weight": linear_cross_entropy(hidden, W, labels, backend=backend),
                "formed rows": cross_entropy_of_rows(hidden, vocabulary, rows, labels, backend=backend),
            }
        for name, weight in (("weight", W), ("formed rows", FORMULAS["form"](W, D, alpha)[0])):
            exact = F.cross_entropy(hidden.double() @ weight.double().T, labels)
            error = float((found[name].double() - exact).abs() / exact)
            about = {"of": name, "dtypes": str(dtype).removeprefix("torch."), "error": error, "tolerance": tolerance}
            yield {"operation": "linear_cross_entropy", **about, "passed": error <= tolerance}
