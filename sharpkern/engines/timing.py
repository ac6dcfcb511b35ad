"""Which engine is quicker for a model in a loop: what their passes took, as it was measured on the way."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sharpkern import ops
from sharpkern.engines.tracked import TrackedParam

# A warm-started search needs 3.52 passes of one step size, or 1.48 of eight, the base loss among them
# (bench/results/line_search.json).
_WORTH = 3.52 / 1.48
_KEPT = 8
# The first pass of an engine compiles kernels and fills caches.
_LEAST = 2


def may_batch(pairs: Sequence[TrackedParam]) -> bool:
    """Whether several step sizes at a time may be quicker."""
    # Ranks would not agree on what is quickest.
    distributed = torch.distributed
    alone = not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)
    # On a CPU eight cost more than a whole search one at a time (bench/results/line_search.json).
    return alone and all(ops.has_kernels(pair.weight.device) for pair in pairs)


@dataclass
class EngineTimes:
    """Times of passes of one model and closure, by the size of their work.

    Batches are told apart by their size; what was measured for one size holds for the next ones of that size.
    """

    _work: int = 0
    _seconds: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))

    def engine(self) -> str:
        """The engine for the next search: "virtual", or "batched" where that is quicker or its time is not known."""
        single, several = (self._seconds[name, self._work] for name in ("virtual", "batched"))
        if not single:
            return "virtual"
        return "batched" if len(several) < _LEAST or min(several) < _WORTH * min(single) else "virtual"

    def note(self, engine: str, work: int, seconds: Sequence[float]) -> None:
        """Remember a search."""
        # Batches of a similar length take a similar time.
        self._work = round(2 * math.log2(max(1, work)))
        times = self._seconds[engine, self._work]
        times += seconds
        del times[:-_KEPT]
