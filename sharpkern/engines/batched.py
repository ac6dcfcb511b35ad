"""The batched engine: the virtual engine for several step sizes at once, by torch.func.vmap over α.

θ and Δθ are read once for all of them, and what one step size leaves of a device's width unused serves the others: for
sizes at which launches or the reading of weights take the time. Activations exist once for every step size.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from sharpkern.engines.closure import Closure
from sharpkern.engines.layers import Kept
from sharpkern.engines.table import Pair
from sharpkern.engines.virtual import VirtualEngine, eagerly
from sharpkern.errors import EngineUnsupportedError

# Step sizes per pass. Of searches that take several at a time, those of 8 cost the least where batching pays at all.
NUM_PARALLEL = 8


class BatchedEngine(VirtualEngine):
    """Evaluates losses at θ − ηΔθ, several step sizes in one call of the closure, without writing θ.

    Args:
        pairs: the parameters that move.
        closure: evaluates the user's loss.
        kept: formed weights that engines of other closures on the same pairs share.

    Attributes:
        chunk_size: most step sizes per pass; halved, down to 1, where a pass runs out of memory.

    Memory: activations, and the logits that are not chunked, once for every step size of a pass; formed weights of one
    layer, for linear layers at most `linear.SCRATCH_BYTES` of them.
    """

    name = "batched"

    def __init__(self, pairs: Sequence[Pair], closure: Closure, kept: Kept | None = None) -> None:
        super().__init__(pairs, closure, NUM_PARALLEL, kept)
        self.chunk_size = NUM_PARALLEL

    def losses(self, step_sizes: Sequence[float]) -> list[float]:
        """Losses at θ − ηΔθ for each step size η.

        Raises:
            EngineUnsupportedError: torch.func.vmap cannot batch what the closure does, or a parameter is read where
                the mode cannot see it.
        """
        values: list[float] = []
        started = time.perf_counter()
        while len(values) < len(step_sizes):
            part = step_sizes[len(values) : len(values) + self.chunk_size]
            try:
                values += self._several(part)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self.chunk_size = len(part) // 2
        if len(step_sizes) == NUM_PARALLEL:
            self.seconds.append(time.perf_counter() - started)
        return values

    def _several(self, step_sizes: Sequence[float]) -> list[float]:
        """The losses of one pass."""
        self._kept.begin(tuple(step_sizes))
        try:
            losses = self._closure.several(self._around, [-eta for eta in step_sizes])
        except RuntimeError as error:
            if type(error) not in (RuntimeError, NotImplementedError):
                raise
            raise EngineUnsupportedError(
                f"the loss of several step sizes cannot be had from one call of loss_fn ({_first_line(error)})"
            ) from error
        if self._may_have_read_placeholders(losses):
            return self._several(step_sizes)
        if self._unread():
            # An expert without tokens, or a read that the mode cannot see? One step size alone tells.
            self._loss(step_sizes[0])
        return losses

    def _around(self, alpha: Tensor) -> AbstractContextManager[object]:
        self._mode.begin(alpha)
        return eagerly(self._mode)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
