"""What the benchmarks train and measure: real runs, frozen at chosen steps, and GPTs of 1 to 100 million parameters.

Each run trains as usual; at the steps to measure it yields a `Point` that evaluates L(θ − ηΔθ) for any η, in fp32 and
in float64. Δθ is what the optimizer's own step did, (θ − θ′)/η, so that the runs need no formula.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import ledger  # noqa: F401 - makes the checkout importable
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from sharpkern.cli.digits import digits, network

_Result = TypeVar("_Result")
Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Pre-norm transformer block with causal attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, time, width] to the same."""
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class GPT(nn.Module):
    """Small decoder-only language model on bytes."""

    def __init__(self, width: int = 64, num_layers: int = 2, num_heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(num_layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map bytes [batch, time] to logits [batch, time, 256]."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over all tokens."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def standard_digits() -> Batch:
    """Return the demo's digits with pixels of 0 to 1, on which the runs' learning rates were chosen."""
    images, targets = digits()
    return images / 2, targets


def text() -> Tensor:
    """Return the bytes of Python's help topics."""
    from pydoc_data.topics import topics

    return torch.frombuffer(bytearray("\n".join(topics.values()), "utf-8"), dtype=torch.uint8).long()


@dataclass(frozen=True)
class Run:
    """How to train, and at which steps to measure."""

    name: str  # in the table
    kind: str  # "digits" (MLP) or "text" (GPT)
    num_steps: int
    lr: float  # the peak
    measured: Sequence[int]  # steps
    batch_size: int | None = None  # None for the full batch
    momentum: float = 0.0  # of SGD (digits)
    warmup: int = 0  # steps, linear
    decay: int = 0  # steps at the end, linear
    other_batch: bool = False  # whether to measure the loss of another batch than the gradient's
    seed: int = 0  # of the weights and the batches

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        up = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        down = min(1.0, (self.num_steps - step) / self.decay) if self.decay else 1.0
        return self.lr * up * down

    def points(self) -> Iterator["Point"]:
        """Train, and yield a point at each step to measure."""
        torch.manual_seed(self.seed)
        draw = self._batches(torch.Generator().manual_seed(self.seed + 1))
        loss_of: Loss
        if self.kind == "digits":
            model: nn.Module = network(self.seed)
            loss_of = F.cross_entropy
            optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), self.lr, momentum=self.momentum)
        else:
            model, loss_of = GPT(), token_loss
            optimizer = torch.optim.AdamW(model.parameters(), self.lr, betas=(0.9, 0.95), weight_decay=0.1)
        measured = set(self.measured)
        for step in range(self.num_steps):
            lr = self.lr_at(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = draw()
            optimizer.zero_grad()
            loss_of(model(batch[0]), batch[1]).backward()
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            optimizer.step()
            if step in measured:
                direction = {name: (before[name] - p.detach()) / lr for name, p in model.named_parameters()}
                gradient = {name: p.grad for name, p in model.named_parameters()}
                slope = sum(float((gradient[name].double() * d.double()).sum()) for name, d in direction.items())
                used = draw() if self.other_batch else batch
                yield Point(step, lr, None if self.other_batch else slope, model, loss_of, used, before, direction)

    def _batches(self, generator: torch.Generator) -> Callable[[], Batch]:
        """Return a function that draws the next batch."""
        if self.kind == "text":
            data, num_rows = text(), self.batch_size or 1

            def rows_of_text() -> Batch:
                starts = torch.randint(0, len(data) - 65, (num_rows,), generator=generator)
                rows = data[starts[:, None] + torch.arange(65)]
                return rows[:, :-1], rows[:, 1:]

            return rows_of_text
        images, targets = standard_digits()
        size = self.batch_size
        if size is None:
            return lambda: (images, targets)

        def some_digits() -> Batch:
            rows = torch.randint(0, len(images), (size,), generator=generator)
            return images[rows], targets[rows]

        return some_digits


@dataclass(frozen=True)
class Point:
    """The loss along the update at one training step; θ and Δθ are by name."""

    step: int
    lr: float
    slope: float | None
    model: nn.Module
    loss_of: Loss
    batch: Batch
    weights: dict[str, Tensor]
    direction: dict[str, Tensor]

    @property
    def norm_sq(self) -> float:
        """|Δθ|²."""
        return sum(float((d.double() ** 2).sum()) for d in self.direction.values())

    @torch.no_grad()
    def loss(self, eta: float) -> float:
        """Return L(θ − ηΔθ)."""
        moved = {name: torch.sub(w, self.direction[name], alpha=eta) for name, w in self.weights.items()}
        return float(self.loss_of(functional_call(self.model, moved, (self.batch[0],)), self.batch[1]))

    def to(self, dtype: torch.dtype) -> "Point":
        """Return the same in a dtype, on a copy of the model."""
        inputs, targets = self.batch
        batch = inputs.to(dtype) if inputs.is_floating_point() else inputs, targets
        weights, direction = ({name: t.to(dtype) for name, t in one.items()} for one in (self.weights, self.direction))
        model = copy.deepcopy(self.model).to(dtype)
        return replace(self, model=model, batch=batch, weights=weights, direction=direction)

    def measured(self, dtype: torch.dtype) -> tuple[nn.Module, Callable[[], Tensor], dict[str, Tensor]]:
        """Return what a measurement is given, in a dtype: the model at θ, its loss, and Δθ by name."""
        point = self.to(dtype)
        point.model.load_state_dict(point.weights, strict=False)
        return point.model, lambda: point.loss_of(point.model(point.batch[0]), point.batch[1]), point.direction

    def first_crossing(self, start: float | None = None, per_decade: int = 20) -> float | None:
        """Return the first crossing in float64, found by a fine scan upward and bisection; None if there is none."""
        wide = self.to(torch.float64)
        base = wide.loss(0.0)
        lo = self.lr / 30 if start is None else start
        if wide.loss(lo) > base:
            return None
        while lo < self.lr * 10**4.5:
            hi = lo * 10 ** (1 / per_decade)
            if not wide.loss(hi) <= base:
                while hi / lo > 1 + 1e-5:
                    middle = math.sqrt(lo * hi)
                    lo, hi = (middle, hi) if wide.loss(middle) <= base else (lo, middle)
                return hi
            lo = hi
        return None


def standard_runs(quick: bool) -> list[Run]:
    """Return the runs of the benchmark."""
    gpt = {"kind": "text", "batch_size": 16, "warmup": 100}
    if quick:
        return [
            Run("MLP, full batch (demo)", "digits", 60, 0.1, range(0, 60, 12)),
            Run("MLP, SGD batch 64", "digits", 150, 0.1, range(0, 150, 5), batch_size=64),
            Run("GPT, AdamW", num_steps=130, lr=3e-3, measured=[*range(3), *range(60, 130, 8)], **gpt),
        ]
    return [
        Run("MLP, full batch (demo)", "digits", 600, 0.1, range(0, 600, 6)),
        Run("MLP, SGD batch 64", "digits", 400, 0.1, range(0, 400, 2), batch_size=64),
        Run("MLP, SGD momentum", "digits", 400, 0.03, range(0, 400, 2), batch_size=64, momentum=0.9),
        Run("MLP, SGD lr 0.5", "digits", 300, 0.5, range(0, 300, 3), batch_size=64, seed=2),
        Run("GPT, AdamW", num_steps=600, lr=3e-3, measured=[*range(10), *range(10, 600, 6)], decay=150, **gpt),
        Run("GPT, lr 3e-2", num_steps=200, lr=3e-2, measured=[*range(10), *range(10, 200, 6)], seed=6, **gpt),
        Run("GPT, no warm-up", "text", 60, 1e-3, range(0, 60, 2), batch_size=16, seed=22),
        Run("GPT, another batch", num_steps=400, lr=3e-3, measured=range(100, 400, 6), other_batch=True, seed=7, **gpt),
    ]


def timed(function: Callable[[], _Result]) -> tuple[_Result, float]:
    """Return what a call gives, and the seconds that it takes."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def seconds(function: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    return timed(function)[1]


class Counted:
    """The loss of one batch, and how often it was asked for."""

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


class Size(NamedTuple):
    """Shape of a model of bytes, the learning rate after the warm-up, and the positions, which a sequence fills."""

    width: int
    layers: int
    heads: int
    lr: float
    context: int = 256


# Named by their parameters.
SIZES = {
    "least": Size(8, 1, 2, 1e-2),
    "tiny": Size(32, 1, 2, 1e-3),
    "small": Size(64, 2, 2, 1e-3),
    "0.1M": Size(64, 2, 4, 1e-3, 64),
    "1M": Size(128, 4, 4, 1e-3),
    "4M": Size(256, 5, 4, 1e-3),
    "5M": Size(256, 6, 8, 1e-3, 1024),
    "14M": Size(432, 6, 8, 6e-4),
    "30M": Size(512, 9, 8, 6e-4),
    "100M": Size(768, 14, 12, 3e-4),
}


class Training:
    """A model in training, step by step, each on the batch that comes next."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_of: Loss,
        batch: Callable[[int], Batch],
        warm_up: int = 1,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._loss_of, self._batch, self._warm_up = loss_of, batch, warm_up
        self._peak_lr, self._steps = self.lr, 0

    @classmethod
    def of_text(cls, size: str, warm_up: int = 1) -> "Training":
        """Return next-byte prediction on Python's help topics by AdamW."""
        torch.manual_seed(0)
        width, layers, heads, lr, context = SIZES[size]
        model = GPT(width, layers, heads, context)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
        data, start = text(), 0

        def batch(tokens: int) -> Batch:
            nonlocal start
            start = 0 if start + tokens >= len(data) else start
            piece = data[start : start + tokens + 1]
            start += tokens
            inputs, targets = (part.view(-1, min(tokens, context)) for part in (piece[:-1], piece[1:]))
            return inputs, targets

        return cls(model, optimizer, token_loss, batch, warm_up)

    @classmethod
    def of_digits(cls) -> "Training":
        """Return the demo's network on its digits, by SGD."""
        images, targets = standard_digits()
        model, generator = network(), torch.Generator().manual_seed(0)

        def batch(size: int) -> Batch:
            rows = torch.randint(0, len(images), (size,), generator=generator)
            return images[rows], targets[rows]

        return cls(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, batch)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(p.nbytes for p in self.model.parameters())

    def begin(self, tokens: int) -> Counted:
        """Take the gradient of the next batch, of so many tokens or samples, and return the loss of that batch."""
        self.optimizer.param_groups[0]["lr"] = self._peak_lr * min(1.0, (self._steps + 1) / self._warm_up)
        loss_fn = Counted(self.model, self._loss_of, self._batch(tokens))
        self.optimizer.zero_grad()
        loss_fn().backward()
        return loss_fn

    def step(self) -> None:
        """Take the step that `begin` has prepared."""
        self.optimizer.step()
        self._steps += 1
