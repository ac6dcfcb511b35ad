"""GPTs of 1 to 100 million parameters in training, of which the benchmarks measure the next step."""

from dataclasses import dataclass

import torch
from runs import GPT, text, token_loss
from timing import Counted


@dataclass(frozen=True)
class Size:
    """Shape of a model of 256 bytes and as many positions, and the learning rate that it trains with.

    Attributes:
        width: of the residual stream.
        layers: how many.
        heads: of attention.
        lr: after the warm-up.
    """

    width: int
    layers: int
    heads: int
    lr: float


# Named by their parameters.
SIZES = {
    "tiny": Size(32, 1, 2, 1e-3),
    "small": Size(64, 2, 2, 1e-3),
    "1M": Size(128, 4, 4, 1e-3),
    "4M": Size(256, 5, 4, 1e-3),
    "14M": Size(432, 6, 8, 6e-4),
    "30M": Size(512, 9, 8, 6e-4),
    "100M": Size(768, 14, 12, 3e-4),
}
CONTEXT = 256


class Training:
    """Next-byte prediction on Python's help topics by AdamW: each step the bytes that come next, in sequences of 256.

    Args:
        size: name of the model, of `SIZES`.
        warm_up: steps in which the learning rate rises.

    Attributes:
        model: that is trained.
        optimizer: its optimizer.
    """

    def __init__(self, size: str, warm_up: int) -> None:
        torch.manual_seed(0)
        shape = SIZES[size]
        self.model = GPT(shape.width, shape.layers, shape.heads, CONTEXT)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=shape.lr, betas=(0.9, 0.95), weight_decay=0.1)
        self._peak_lr, self._warm_up = shape.lr, warm_up
        self._data, self._next, self._steps = text(), 0, 0

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.model.parameters())

    def begin(self, tokens: int) -> Counted:
        """Take the gradient of the next batch, and return the loss of that batch.

        Args:
            tokens: of the batch, a multiple of 256 or less.
        """
        self.optimizer.param_groups[0]["lr"] = self._peak_lr * min(1.0, (self._steps + 1) / self._warm_up)
        if self._next + tokens >= len(self._data):
            self._next = 0
        piece = self._data[self._next : self._next + tokens + 1]
        self._next += tokens
        inputs, targets = (part.view(-1, min(tokens, CONTEXT)) for part in (piece[:-1], piece[1:]))
        loss_fn = Counted(self.model, token_loss, (inputs, targets))
        self.optimizer.zero_grad()
        loss_fn().backward()
        return loss_fn

    def step(self) -> None:
        """Take the step that `begin` has prepared."""
        self.optimizer.step()
        self._steps += 1
