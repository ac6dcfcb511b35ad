"""The in-place engine: writes θ − ηΔθ into the model from a backup, and puts θ back bit for bit.

For what the virtual engine cannot see into: compiled models, CUDA graphs, scripted modules, opaque kernels.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from sharpkern import ops
from sharpkern.engines.closure import Closure
from sharpkern.engines.table import Pair, Step
from sharpkern.moves import Stored


class InPlaceEngine:
    """Evaluates losses at θ − ηΔθ by writing the parameters; `close` is an exact copy back, never a subtraction.

    Args:
        pairs: the parameters that move.
        closure: evaluates the user's loss.
        around: entered around every evaluation.

    Memory: one copy of the parameters that move, on their devices; none for those with a full-precision master, whose
    rounding they are.
    """

    name = "inplace"

    def __init__(self, pairs: Sequence[Pair], closure: Closure, around: AbstractContextManager[object]) -> None:
        self._pairs = pairs
        self._closure = closure
        self._around = around
        self._moves = [
            pair.move.at(pair.weight.detach().clone()) if pair.move.base is pair.weight else pair.move for pair in pairs
        ]
        self._alpha = 0.0

    @property
    def rounded(self) -> set[int]:
        """Indices of the pairs whose θ + αΔθ is rounded to the weight's dtype: all of them."""
        return {pair.owner for pair in self._pairs}

    def losses(self, step_sizes: Sequence[float]) -> list[float]:
        """Losses at θ − ηΔθ for each step size η."""
        return [self._closure(self._around, prepare=partial(self._write, -eta)) for eta in step_sizes]

    def close(self) -> None:
        """Make the model's parameters θ again, bit for bit. May be called again after an interrupt."""
        # Also where no step was taken: a compiled closure may have written them, as an embedding with max_norm does.
        self._alpha = math.nan
        self._write(0.0)

    def _write(self, alpha: float) -> None:
        """Make the model's parameters θ + αΔθ, formed from the backup and not from the last step size."""
        if alpha == self._alpha:
            return
        # Unknown until the last parameter is written: a write that is interrupted half-way is restored too.
        self._alpha = math.nan
        step = Step(alpha)
        stored: dict[Tensor, list[tuple[Tensor, Stored]]] = {}
        for pair, move in zip(self._pairs, self._moves, strict=True):
            # detach() shares the version counter, so autograd notices the write.
            weight = pair.weight.detach()
            if not step:
                weight.copy_(move.base)
            elif isinstance(move, Stored):
                stored.setdefault(step.of(move), []).append((weight, move))
            else:
                move.form(step.of(move), dtype=weight.dtype, out=weight.unsqueeze(0))
        for step_tensor, writes in stored.items():
            ops.axpy_(
                [weight for weight, _ in writes],
                [move.base for _, move in writes],
                [move.delta for _, move in writes],
                step_tensor,
            )
        # An enclosing autocast may hold casts of the former weights.
        torch.clear_autocast_cache()
        self._alpha = alpha
