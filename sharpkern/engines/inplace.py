"""The in-place engine: writes θ − ηΔθ into the model from a backup, and puts θ back bit for bit.

For what the virtual engine cannot see into: compiled models, CUDA graphs, scripted modules, opaque kernels.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sharpkern import ops
from sharpkern.engines.evaluation.closure import Closure
from sharpkern.engines.tracked import Step, TrackedParam
from sharpkern.errors import EngineFallbackWarning, warn
from sharpkern.ops.together import kind_of, prepared_together
from sharpkern.ops.update import ParamUpdate, StoredUpdate
from sharpkern.tensors.storage import storage_pointer

Backup = Literal["auto", "device", "host"]

# A call that writes θ + αΔθ of some weights, and one of them.
Launch = tuple[Callable[..., object], Tensor]


class InPlaceEngine:
    """Evaluates losses at θ − ηΔθ by writing the parameters; `close` is an exact copy back, never a subtraction."""

    name = "inplace"
    writes = True

    def __init__(
        self,
        pairs: Sequence[TrackedParam],
        closure: Closure,
        around: AbstractContextManager[object],
        backup: Backup = "auto",
        publish: Callable[[], object] = lambda: None,
    ) -> None:
        self._pairs = pairs
        self._publish = publish
        self._closure = closure
        self._around = around
        copies = None if backup == "host" else _on_device(pairs, may_fail=backup == "auto")
        self._from_host = copies is None
        # None where a full-precision master stands in.
        self._copies = [_on_host(pair) for pair in pairs] if copies is None else copies
        self._moves = [
            pair.move if copy is None or self._from_host else pair.move.at(copy)
            for pair, copy in zip(pairs, self._copies, strict=True)
        ]
        self._places: list[int | None] = []
        self._alpha = 0.0
        self._closed = False

    @property
    def rounded(self) -> set[int]:
        """Indices of the pairs whose θ + αΔθ is rounded to the weight's dtype: all of them."""
        return {pair.owner for pair in self._pairs}

    def losses(self, step_sizes: Sequence[float]) -> list[float]:
        """Losses at θ − ηΔθ for each step size η."""
        return [self._closure(self._around, prepare=partial(self._write, -eta)) for eta in step_sizes]

    def oracle_loss(self, eta: float) -> float:
        """The loss at θ − ηΔθ, where every reader of θ finds it."""
        return self.losses([eta])[0]

    def close(self) -> None:
        """Make the model's parameters θ again, bit for bit. May be called again after an interrupt."""
        if not self._closed:
            # Also where no step was taken: a compiled closure may have written it, as an embedding with max_norm does.
            self._alpha = math.nan
            self._write(0.0)
            self._closed = True

    def _write(self, alpha: float) -> None:
        """Make the model's parameters θ + αΔθ, formed from the backup and not from the last step size."""
        if alpha == self._alpha:
            return
        # Unknown until the last parameter is written: a write that is interrupted half-way is restored too.
        self._alpha = math.nan
        try:
            self._write_weights(Step(alpha))
        finally:
            # What was written is the model's from here on. Other ranks do so too, also where it fails on this one.
            self._publish()
        # An enclosing autocast may hold casts of the former weights.
        torch.clear_autocast_cache()
        self._alpha = alpha

    def _write_weights(self, step: Step) -> None:
        self._find_weights()
        if self._from_host:
            self._write_from_host(step)
        elif step:
            self._form(step)
        else:
            torch._foreach_copy_([weight for weight, _ in self._writes], [move.base for _, move in self._writes])

    def _find_weights(self) -> None:
        """Note where the weights lie: a closure may have given them other memory, as a flattened LSTM does."""
        places = [storage_pointer(pair.weight) for pair in self._pairs]
        if places != self._places:
            # detach() shares the version counter, so autograd notices the write.
            weights = [pair.weight.detach() for pair in self._pairs]
            self._writes: list[tuple[Tensor, ParamUpdate]] = list(zip(weights, self._moves, strict=True))
            self._launches: list[Launch] | None = None
            self._others: list[tuple[Tensor, ParamUpdate, bool]] = []
            self._places = places

    def _write_from_host(self, step: Step) -> None:
        """Bring θ back first, and move it where it is."""
        for (weight, move), copy in zip(self._writes, self._copies, strict=True):
            if copy is not None:
                weight.copy_(copy, non_blocking=True)
            if step:
                move.form(step.of(move), dtype=weight.dtype, out=weight.unsqueeze(0))
            elif copy is None:
                weight.copy_(move.base)

    def _form(self, step: Step) -> None:
        """Write θ + αΔθ, most of it by a few calls."""
        if self._launches is None:
            self._launches, self._others = self._prepared(step)
        for launch, like in self._launches:
            launch(alpha=step.on(like.device))
        stored: dict[Tensor, list[tuple[Tensor, StoredUpdate]]] = {}
        for weight, move, alone in self._others:
            if isinstance(move, StoredUpdate) and alone:
                stored.setdefault(step.of(move), []).append((weight, move))
            else:
                # Memory that parameters share is written once for each of them, every time by the same values.
                move.form(step.of(move), dtype=weight.dtype, out=weight.unsqueeze(0))
        for alpha, writes in stored.items():
            ops.axpy_(
                [weight for weight, _ in writes],
                [move.base for _, move in writes],
                [move.delta for _, move in writes],
                alpha,
            )

    def _prepared(self, step: Step) -> tuple[list[Launch], list[tuple[Tensor, ParamUpdate, bool]]]:
        """What launches can be made again write, with a tensor on their device, and what is written otherwise."""
        num_sharing = Counter(pair.memory for pair in self._pairs)
        alike: dict[Hashable, list[tuple[Tensor, ParamUpdate]]] = {}
        others: list[tuple[Tensor, ParamUpdate, bool]] = []
        for pair, (weight, move) in zip(self._pairs, self._writes, strict=True):
            alone = num_sharing[pair.memory] == 1
            if alone and ops.has_kernels(weight.device) and move.wide == torch.float32:
                alike.setdefault((weight.device, kind_of(move)), []).append((weight, move))
            else:
                others.append((weight, move, alone))
        launches: list[Launch] = []
        for writes in alike.values():
            like = writes[0][0]
            launch = prepared_together([move for _, move in writes], [to for to, _ in writes], step.on(like.device))
            if launch is None:
                others += [(weight, move, True) for weight, move in writes]
            else:
                launches.append((launch, like))
        return launches, others


def _on_device(pairs: Sequence[TrackedParam], *, may_fail: bool) -> list[Tensor | None] | None:
    """Copies of the weights that have no master, beside them; None where there is no room and that may be."""
    try:
        return [pair.weight.detach().clone() if pair.move.base is pair.weight else None for pair in pairs]
    except torch.OutOfMemoryError:
        if not may_fail:
            raise
    warn(
        "the copy of θ that is measured in place from is on the host, since the device has no room for it: every step "
        "size takes longer; sharpkern.memory_plan says what each engine takes",
        EngineFallbackWarning,
    )
    return None


def _on_host(pair: TrackedParam) -> Tensor | None:
    """A copy of a weight that has no master, where a GPU reads it the quickest."""
    if pair.move.base is not pair.weight:
        return None
    weight = pair.weight.detach()
    return torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda).copy_(weight)
