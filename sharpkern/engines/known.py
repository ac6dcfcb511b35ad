"""What has been found out about a model and a closure, which later measurements need not find out again."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from sharpkern.engines.evaluation.closure import LossFn
from sharpkern.engines.evaluation.reach import fingerprint
from sharpkern.engines.evidence import Slopes, TrainedLoss, is_power


@dataclass
class KnownFacts:
    """What has been found out about one model and the code of one closure.

    Attributes:
        repeatable: the closure gives the same loss twice at θ; not to be checked now.
        agrees: engines whose loss was confirmed by the storage oracle; not to be checked now.
        unchecked: engines that the storage oracle has no memory for.
        unsupported: why an engine cannot be used, by its name.
        num_measurements: measurements begun so far.
        noise: relative standard error of one loss, as it was seen last.
        trained_loss: how the loss that was trained compares with the closure's.
        slopes: how the loss falls, beside what the gradient says.
        excesses: by how many standard errors samples of micro-batches were steeper than the whole batch.
        told_whole: the user was warned that the whole batch is measured in place of a sample.
    """

    repeatable: bool = False
    agrees: set[str] = field(default_factory=set)
    unchecked: set[str] = field(default_factory=set)
    unsupported: dict[str, str] = field(default_factory=dict)
    num_measurements: int = 0
    noise: float = 0.0
    trained_loss: TrainedLoss = field(default_factory=TrainedLoss)
    slopes: Slopes = field(default_factory=Slopes)
    excesses: deque[float] = field(default_factory=lambda: deque(maxlen=16))
    told_whole: bool = False

    def begin(self) -> None:
        """Count a measurement; the 2nd, 4th, 8th and so on check again what was checked before."""
        self.num_measurements += 1
        if is_power(self.num_measurements):
            self.repeatable = False
            self.agrees.clear()


_known: WeakKeyDictionary[nn.Module, dict[Any, KnownFacts]] = WeakKeyDictionary()


def checks_of(model: nn.Module, loss_fn: LossFn, *, alone: bool) -> KnownFacts:
    """The findings about ``model`` and what ``loss_fn`` calls; a new closure over the next batch shares them.

    Ranks check in step: what one has found out by itself is kept apart.
    """
    return _known.setdefault(model, {}).setdefault((fingerprint(loss_fn), model.training, alone), KnownFacts())
