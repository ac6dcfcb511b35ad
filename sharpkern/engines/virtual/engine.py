"""The virtual engine: losses at θ − ηΔθ, one step size at a time, without writing θ, and the guards of each pass."""

import math
import time
from collections.abc import Sequence

from sharpkern.engines.evaluation.closure import Closure
from sharpkern.engines.evaluation.compiled import Eagerly
from sharpkern.engines.tracked import TrackedParam
from sharpkern.engines.virtual.audit import StorageWatch, oracle_loss
from sharpkern.engines.virtual.layers import Kept
from sharpkern.engines.virtual.mode import VirtualParameters
from sharpkern.errors import EngineUnsupportedError


class VirtualEngine:
    """Evaluates losses at θ − ηΔθ one step size at a time, without writing θ.

    Attributes:
        seconds: of every pass that forms weights, for as many step sizes as the engine takes at a time.
    """

    name = "virtual"
    writes = False

    def __init__(
        self, pairs: Sequence[TrackedParam], closure: Closure, num_steps: int = 1, kept: Kept | None = None
    ) -> None:
        self._pairs = pairs
        self._closure = closure
        self._kept = kept or Kept(0)
        self._mode = VirtualParameters(pairs, closure.precision, closure.guard, num_steps, self._kept)
        self.seconds: list[float] = []
        self._unused: set[int] = set()
        self._deferral_works = False

    @property
    def rounded(self) -> set[int]:
        """Indices of the pairs whose θ + αΔθ was rounded to the weight's dtype in some call."""
        return self._mode.rounded

    def losses(self, step_sizes: Sequence[float]) -> list[float]:
        """Losses at θ − ηΔθ for each step size η."""
        losses = []
        for eta in step_sizes:
            started = time.perf_counter()
            losses.append(self._loss(eta))
            if eta:
                self.seconds.append(time.perf_counter() - started)
        return losses

    @property
    def work(self) -> int:
        """Outputs of all matrix products that the last pass made for one step size."""
        return self._mode.work

    def oracle_loss(self, eta: float) -> float:
        """The loss at θ − ηΔθ by the storage oracle, which shares none of the mode's knowledge of torch's calls."""
        return oracle_loss(self._pairs, self._closure, eta)

    def close(self) -> None:
        """End the mode; there is nothing to put back, as θ was not written."""
        self._mode.ended = True

    def _loss(self, eta: float) -> float:
        loss = self._pass(eta)
        if self._closure.asked:
            # An expert without tokens, or a read that the mode cannot see? Look again, one level lower.
            watch = StorageWatch(self._pairs)
            try:
                loss = self._pass(eta, watch)
            except RuntimeError as error:
                if "TorchScript" not in str(error):
                    raise
                raise EngineUnsupportedError("scripted code, which no mode can look into, reads parameters") from error
            hidden = self._hidden(watch) | self._read_by_nobody()
            if self._closure.asked or self._closure.ranks.any_of([bool(hidden)])[0]:
                raise EngineUnsupportedError(
                    f"{len(hidden) or 'some'} of {len(self._pairs)} parameters are read where torch's "
                    "Python calls do not show it (scripted code, other threads, extensions, or aliases of weights made "
                    "before the measurement)"
                )
            self._unused |= self._unread()
        return loss

    def _hidden(self, watch: StorageWatch) -> set[int]:
        """Parameters that the last pass has read, and the mode has not seen it."""
        unread = self._unread()
        # Of parameters that share memory, those that the mode has seen read explain why that was read.
        explained = {pair.memory for pair in self._pairs if pair.owner in self._mode.read}
        return {pair.owner for pair in self._pairs if pair.owner in unread and pair.memory in watch.touched - explained}

    def _read_by_nobody(self) -> set[int]:
        """Parameters with a gradient that the mode has seen no rank read.

        They were read when that was taken, if perhaps by code that torch does not see.
        """
        unread, had_gradient = self._unread(), self._closure.guard.had_gradient
        owners = [pair.owner for pair in self._pairs]
        flags = [owner not in unread for owner in owners] + [had_gradient(pair.weight) for pair in self._pairs]
        if self._closure.ranks.alike:
            flags = self._closure.ranks.any_of(flags)
        read, with_gradient = flags[: len(owners)], flags[len(owners) :]
        return {owner for owner, seen, has in zip(owners, read, with_gradient, strict=True) if has and not seen}

    def _unread(self) -> set[int]:
        return {pair.owner for pair in self._pairs} - self._mode.read - self._unused

    def _pass(self, eta: float, watch: StorageWatch | None = None) -> float:
        self._mode.begin(-eta)
        self._kept.begin((eta,))
        loss = self._closure(
            Eagerly(self._mode, *([watch] if watch else [])),
            # On another rank it may be an expert that has no tokens here.
            ask=lambda: bool(self._unread() if watch is None else self._hidden(watch)),
        )
        return self._pass(eta, watch) if self._may_have_read_placeholders([loss]) else loss

    def _may_have_read_placeholders(self, losses: Sequence[float]) -> bool:
        """Whether a loss may be the NaN of a placeholder for logits; then there will be none in the passes to come."""
        tail = self._mode.tail
        if tail.used and all(map(math.isnan, losses)) and not self._deferral_works:
            tail.enabled = False
            return True
        self._deferral_works |= tail.used
        return False
