"""The batched engine: the virtual engine for several step sizes at once, by torch.func.vmap over α.

θ and Δθ are read once for all of them, and what one step size leaves of a device's width unused serves the others: for
sizes at which launches or the reading of weights take the time. Activations exist once for every step size.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sharpkern import ops
from sharpkern.engines.batched.leaks import refuse_leaked_tensors
from sharpkern.engines.evaluation.closure import Closure
from sharpkern.engines.evaluation.compiled import Eagerly
from sharpkern.engines.tracked import Step, TrackedParam
from sharpkern.engines.virtual.engine import VirtualEngine
from sharpkern.engines.virtual.layers import Kept
from sharpkern.errors import EngineUnsupportedError

# Step sizes per pass. Of searches that take several at a time, those of 8 cost the least where batching pays at all.
NUM_PARALLEL = 8


class BatchedEngine(VirtualEngine):
    """Evaluates losses at θ − ηΔθ, several step sizes in one call of the closure, without writing θ.

    Attributes:
        chunk_size: most step sizes per pass; halved, down to 1, where a pass runs out of memory.
    """

    name = "batched"

    def __init__(self, pairs: Sequence[TrackedParam], closure: Closure, kept: Kept | None = None) -> None:
        super().__init__(pairs, closure, NUM_PARALLEL, kept)
        self.chunk_size = NUM_PARALLEL

    def losses(self, step_sizes: Sequence[float]) -> list[float]:
        """Losses at θ − ηΔθ for each step size η."""
        values: list[float] = []
        started = time.perf_counter()
        while len(values) < len(step_sizes):
            part = step_sizes[len(values) : len(values) + self.chunk_size]
            try:
                values += self._several(self._padded(part))[: len(part)]
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self.chunk_size = len(part) // 2
        if len(step_sizes) == NUM_PARALLEL:
            self.seconds.append(time.perf_counter() - started)
        return values

    def _padded(self, step_sizes: Sequence[float]) -> Sequence[float]:
        """As many step sizes as kernels are compiled for, 1 or all of a pass: seconds of compiling for each number."""
        on_gpu = any(ops.has_kernels(pair.weight.device) for pair in self._pairs)
        missing = self.chunk_size - len(step_sizes) if on_gpu and len(step_sizes) > 1 else 0
        return [*step_sizes, *[step_sizes[-1]] * missing]

    def close(self) -> None:
        """As of one step size, and let torch warn again."""
        super().close()
        _warn_of_slices(True)

    def _several(self, step_sizes: Sequence[float]) -> list[float]:
        """The losses of one pass."""
        self._kept.begin(tuple(step_sizes))
        # That vmap goes through some functions slice by slice is right, and we time it.
        _warn_of_slices(False)
        with refuse_leaked_tensors(self._closure.guard.rewind):
            losses = self._closure.several(
                self._around, [-eta for eta in step_sizes], ask=lambda: bool(self._unread()), translate=_unable
            )
            self._mode.alpha = Step(0.0)
        _warn_of_slices(True)
        if self._may_have_read_placeholders(losses):
            return self._several(step_sizes)
        if self._closure.asked:
            # An expert without tokens, or a read that the mode cannot see? One step size alone tells.
            self._loss(step_sizes[0])
        return losses

    def _around(self, alpha: Tensor) -> AbstractContextManager[object]:
        self._mode.begin(alpha)
        distributed = torch.distributed
        together = distributed.is_available() and distributed.is_initialized()
        return Eagerly(self._mode, *([_NoCollectives()] if together else []))


class _NoCollectives(TorchFunctionMode):
    """Refuses functional collectives: vmap hands them on slice by slice, and nobody waits for their results.

    Those that write their tensors have no rule and are refused by torch.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(getattr(func, "__module__", "")).startswith("torch._ops._c10d_functional"):
            raise EngineUnsupportedError("loss_fn calls a collective, which would be of single step sizes")
        return func(*args, **(kwargs or {}))


def _warn_of_slices(enabled: bool) -> None:
    """Whether torch warns of functions that vmap has no rule for; on is the default, and torch does not tell."""
    torch._C._functorch._set_vmap_fallback_warning_enabled(enabled)  # type: ignore[attr-defined]


def _unable(error: BaseException) -> BaseException:
    """What an error inside of vmap means: its own have no type of their own."""
    if type(error) not in (RuntimeError, NotImplementedError):
        return error
    unable = EngineUnsupportedError(
        "the losses of several step sizes cannot be had from one call of loss_fn, as engine='virtual' has them from "
        f"one call each ({_first_line(error)})"
    )
    unable.__cause__ = error
    return unable


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
