"""Whether a result is right: as close to float64 as torch comes in the same dtype, and the same bits every time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import isfunction
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from sharpkern import ops
from sharpkern.cli.bench.record import Json
from sharpkern.cli.bench.suite import Bench

# What results are held against.
_IN_TORCH = {name: partial(function, backend="torch") for name, function in vars(ops).items() if isfunction(function)}

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Trial:
    """One call of an operation whose result is known.

    Attributes:
        operation: name in `sharpkern.ops`.
        operands: positional arguments.
        options: keyword arguments.
        about: what sets this call apart, for the record.
        written: how many of the first operands are written; they are the result then.
        roundings: units in the last place of the exact result that are added to torch's error.
        floor: absolute error that is added: for sums whose terms are larger than the result.
        repeated: whether the call is repeated to see that its bits stay the same.
    """

    operation: str
    operands: Sequence[Any]
    about: Json
    options: Json = field(default_factory=dict)
    written: int = 0
    roundings: float = 0.5
    floor: float | Tensor = 0.0
    repeated: bool = False

    def result(self, function: Callable[..., Tensor | None], **more: Any) -> list[Tensor]:
        """Return what a function makes of the operands, those that are written copied before."""
        copies = [tree_map(Tensor.clone, operand) for operand in self.operands[: self.written]]
        returned = function(*copies, *self.operands[self.written :], **self.options, **more)
        found: list[Tensor] = tree_leaves(copies if self.written else returned)
        return found

    def exact(self) -> list[Tensor]:
        """Return the result in float64, of the operands as they are."""
        options = {name: value for name, value in self.options.items() if name not in {"dtype", "seed"}}
        operands = tree_map(_widened, list(self.operands))
        trial = Trial(self.operation, operands, {}, tree_map(_widened, options), self.written)
        return trial.result(_IN_TORCH[self.operation])


def judged(bench: Bench, trials: Iterable[Trial]) -> Iterator[Json]:
    """Judge trials one after another.

    Args:
        bench: the machine and the backend.
        trials: of one operation.

    Yields:
        A row per trial, see `judge`.

    Raises:
        ValueError: if there is no trial: an operation that was not checked has not passed.
    """
    row = None
    for trial in trials:
        row = judge(bench, trial)
        yield row
    if row is None:
        raise ValueError("trials must hold one trial at least, got none; an iterator that is used up holds none")


def judge(bench: Bench, trial: Trial) -> Json:
    """Run a trial by the backend under test and say how it compares.

    Args:
        bench: the machine and the backend.
        trial: what to run.

    Returns:
        A row: the largest error as a multiple of its budget, how many repeats had other bits, and whether it passed.
    """
    operation = getattr(ops, trial.operation)
    with poisoned():
        found = trial.result(operation, backend=bench.backend_to_check)
    in_torch = trial.result(_IN_TORCH[trial.operation])
    excess = max(
        _excess(*tensors, trial.roundings, trial.floor) for tensors in zip(found, trial.exact(), in_torch, strict=True)
    )
    # Races are a GPU's: elsewhere a few repeats show that the check runs.
    repeats = (300 if bench.machine.is_gpu else 3) if trial.repeated else 0
    differing = sum(
        ~same_bits(tensor, again)
        for _ in range(repeats)
        for tensor, again in zip(found, trial.result(operation, backend=bench.backend_to_check), strict=True)
    )
    return {
        "operation": trial.operation,
        **trial.about,
        "error_of_budget": excess,
        "repeats": repeats,
        "repeats_with_other_bits": int(differing),
        "passed": excess <= 1 and int(differing) == 0,
    }


def _excess(found: Tensor, exact: Tensor, in_torch: Tensor, roundings: float, floor: float | Tensor) -> float:
    """Return the largest error over what is allowed for that element; infinite where a NaN or a shape is wrong."""
    if found.shape != exact.shape or found.dtype != in_torch.dtype:
        return float("inf")
    info = torch.finfo(found.dtype)
    unit = info.eps * exact.abs() + info.smallest_normal * info.eps
    # A hundredth more: fp32 arithmetic that is followed by a rounding to 16 bits rounds twice.
    budget = (in_torch.double() - exact).abs() + 1.01 * roundings * unit + floor
    ratio = (found.double() - exact).abs() / budget
    return float(ratio.nan_to_num(nan=torch.inf).max()) if ratio.numel() else 0.0


def same_bits(one: Tensor, other: Tensor) -> Tensor:
    """Return whether two tensors agree in every bit, as a tensor that has not been waited for."""
    kind = _BITS[one.element_size()]
    return (one.contiguous().view(kind) == other.contiguous().view(kind)).all()


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


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
