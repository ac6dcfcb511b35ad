"""What benchmarks count and time: calls of a loss, and seconds."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from runs import Batch, Loss
from torch import Tensor, nn


@dataclass(frozen=True)
class Seconds:
    """Time taken, on the clock and of the processor alone; other programs lengthen the first."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> "Seconds":
        """The time at this moment, of two of which the difference counts."""
        return cls(time.perf_counter(), time.process_time())

    @classmethod
    def of(cls, function: Callable[[], object]) -> "Seconds":
        """The time that a call takes.

        Args:
            function: to call.
        """
        start = cls.now()
        function()
        return cls.now().since(start)

    def since(self, start: "Seconds") -> "Seconds":
        """The time from a start to here."""
        return Seconds(self.wall - start.wall, self.cpu - start.cpu)


class Counted:
    """The loss of one batch, and how often it was asked for.

    Args:
        model: to evaluate.
        loss_of: loss of outputs and targets.
        batch: inputs and targets.
    """

    def __init__(self, model: nn.Module, loss_of: Loss, batch: Batch) -> None:
        self.model, self.loss_of, self.batch = model, loss_of, batch
        self.calls = 0

    def __call__(self) -> Tensor:
        """Evaluate it, with a graph where gradients are enabled."""
        self.calls += 1
        return self.loss_of(self.model(self.batch[0]), self.batch[1])

    def plain(self) -> float:
        """Evaluate it without a graph, which is what times are given in."""
        with torch.no_grad():
            return float(self())
