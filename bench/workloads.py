"""What the benchmarks train and measure: real runs, frozen at chosen steps, and GPTs of 1 to 100 million parameters.

A `Training` trains as usual; at the steps to measure it yields a `Point`, which evaluates L(θ − ηΔθ) for any η. Δθ is
what the optimizers' own step did, (θ − θ′)/η, so that the runs need no formula.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pydoc_data.topics import topics
from typing import Any, TypeVar

import ledger  # noqa: F401 - makes the checkout importable
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from sharpkern.cli.digits import digits, network

_Result = TypeVar("_Result")
Batch = tuple[Tensor, Tensor]
gpt_adamw = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.1)


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


def stack(*widths: int, between: Callable[[], nn.Module] = nn.GELU, norm: bool = False) -> nn.Sequential:
    """Return linear layers with something between them."""
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(widths)):
        if i:
            layers += [nn.BatchNorm1d(before)] * norm + [between()]
        layers.append(nn.Linear(before, after))
    return nn.Sequential(*layers)


# -- losses -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """The loss of a batch, as a function of the model."""

    of: Callable[[Any, Any], Tensor]  # outputs and targets
    batch: Any  # inputs and targets

    def __call__(self, model: nn.Module) -> Tensor:
        """Evaluate it."""
        inputs, targets = self.batch
        return self.of(model(inputs), targets)

    def to(self, dtype: torch.dtype) -> "Loss":
        """Return the same in a dtype."""
        return replace(self, batch=tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, self.batch))


class Counted:
    """The loss of one batch and of one model, how often it was asked for, and its value in training."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model, self.loss, self.calls = model, loss, 0
        self.trained: Tensor | None = None

    def __call__(self) -> Tensor:
        """Evaluate it, with a graph where gradients are enabled."""
        self.calls += 1
        return self.loss(self.model)

    def plain(self) -> float:
        """Evaluate it without a graph, which is what times are given in."""
        with torch.no_grad():
            return float(self())


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over all tokens."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def next_tokens(rows: Tensor) -> Loss:
    """Return the loss of predicting every token of some rows, but the first, from those before."""
    return Loss(token_loss, (rows[:, :-1], rows[:, 1:]))


def standard_digits() -> Batch:
    """Return the demo's digits with pixels of 0 to 1, on which the runs' learning rates were chosen."""
    images, targets = digits()
    return images / 2, targets


def text(words: str = "\n".join(topics.values())) -> Tensor:
    """Return the bytes of a text, which is Python's help topics."""
    return torch.frombuffer(bytearray(words, "utf-8"), dtype=torch.uint8).long()


def images(seed: int, size: int | None = None) -> Callable[..., Batch]:
    """Return a function that draws so many digits, or all; a fifth of them have a wrong label."""
    everything, generator = standard_digits(), torch.Generator().manual_seed(seed)

    def draw(size: int | None = size) -> Batch:
        if size is None:
            return everything
        rows = torch.randint(0, len(everything[0]), (size,), generator=generator)
        return everything[0][rows], everything[1][rows]

    return draw


def classified(seed: int, size: int | None = None, label_smoothing: float = 0.0) -> Callable[..., Loss]:
    """Return a function that draws the loss of some digits, or of all."""
    draw, of = images(seed, size), partial(F.cross_entropy, label_smoothing=label_smoothing)
    return lambda *size: Loss(of, draw(*size))


def sentences(seed: int, num_rows: int, length: int = 64) -> Callable[[], Loss]:
    """Return a function that draws the loss of rows of text."""
    data, generator = text(), torch.Generator().manual_seed(seed)

    def draw() -> Loss:
        starts = torch.randint(0, len(data) - length - 1, (num_rows,), generator=generator)
        return next_tokens(data[starts[:, None] + torch.arange(length + 1)])

    return draw


def stretches(context: int) -> Callable[[int], Loss]:
    """Return a function that reads on so many tokens in the text, in rows of the context at most."""
    data, start = text(), 0

    def draw(tokens: int) -> Loss:
        nonlocal start
        start = 0 if start + tokens >= len(data) else start
        piece = data[start : start + tokens + 1]
        start += tokens
        inputs, targets = (part.view(-1, min(tokens, context)) for part in (piece[:-1], piece[1:]))
        return Loss(token_loss, (inputs, targets))

    return draw


# -- training ---------------------------------------------------------------------------------------------------------


def ramps(num_steps: float = math.inf, warmup: int = 1, decay: int = 1) -> Callable[[int], float]:
    """Return the share of the learning rate at a step: up in the first steps, down in the last ones."""
    return lambda step: min(1.0, (step + 1) / warmup, (num_steps - step) / decay)


CONSTANT = ramps()


class Training:
    """A model in training, step by step, each on the loss that is drawn next."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        draw: Callable[..., Loss],
        schedule: Callable[[int], float] = CONSTANT,
    ) -> None:
        self.model, self.optimizers, self._draw, self._schedule = model, optimizers, draw, schedule
        self._groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._peaks, self.steps = [group["lr"] for group in self._groups], 0

    @classmethod
    def of_text(cls, size: str, warm_up: int = 1) -> "Training":
        """Return a GPT that reads Python's help topics in their order."""
        torch.manual_seed(0)
        width, layers, heads, lr, context = SIZES[size]
        model = GPT(width, layers, heads, context)
        return cls(model, [gpt_adamw(model.parameters(), lr)], stretches(context), ramps(warmup=warm_up))

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The first optimizer."""
        return self.optimizers[0]

    @property
    def lr(self) -> float:
        """The learning rate of the step, of the first group."""
        return float(self._groups[0]["lr"])

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(p.nbytes for p in self.model.parameters())

    def begin(self, *size: int) -> Counted:
        """Take the gradient of the next batch, of so many tokens or samples, and return the loss of that batch."""
        for group, peak in zip(self._groups, self._peaks, strict=True):
            group["lr"] = peak * self._schedule(self.steps)
        loss_fn = Counted(self.model, self._draw(*size))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        loss_fn.trained = loss.detach()
        return loss_fn

    def step(self) -> None:
        """Take the step that `begin` has prepared."""
        for optimizer in self.optimizers:
            optimizer.step()
        self.steps += 1

    def run(self, num_steps: int, *size: int) -> None:
        """Take so many steps."""
        for _ in range(num_steps):
            self.begin(*size)
            self.step()

    def points(self, measured: Sequence[int], other_batch: bool = False) -> Iterator["Point"]:
        """Train, and yield each step to measure, along the batch's loss or another's."""
        for step in range(max(measured) + 1):
            loss = self.begin().loss
            before = copy.deepcopy(self.model) if step in measured else None
            gradients = [None if p.grad is None else p.grad.double() for p in self.model.parameters()]
            self.step()
            if before is not None:
                pairs = zip(before.parameters(), self.model.parameters(), strict=True)
                direction = [(old.detach().double() - new.detach().double()) / self.lr for old, new in pairs]
                slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None)
                loss, slope = (self._draw(), None) if other_batch else (loss, slope)
                weights = [p.detach().clone() for p in before.parameters()]
                yield Point(step, self.lr, slope, before, loss, weights, direction)


# By their parameters: width, layers, heads, learning rate after the warm-up, and positions, which a sequence fills.
SIZES = {
    "least": (8, 1, 2, 1e-2, 256),
    "tiny": (32, 1, 2, 1e-3, 256),
    "small": (64, 2, 2, 1e-3, 256),
    "0.1M": (64, 2, 4, 1e-3, 64),
    "1M": (128, 4, 4, 1e-3, 256),
    "4M": (256, 5, 4, 1e-3, 256),
    "5M": (256, 6, 8, 1e-3, 1024),
    "14M": (432, 6, 8, 6e-4, 256),
    "30M": (512, 9, 8, 6e-4, 256),
    "100M": (768, 14, 12, 3e-4, 256),
}


def trained(
    model: nn.Module,
    optimizer: Callable[..., torch.optim.Optimizer],
    draw: Callable[..., Loss],
    schedule: Callable[[int], float] = CONSTANT,
    **options: Any,
) -> Training:
    """Return the training of all parameters by one optimizer."""
    return Training(model, [optimizer(model.parameters(), **options)], draw, schedule)


def mlp(seed: int, size: int | None = 64, lr: float = 0.1, **options: Any) -> Training:
    """Return the demo's network on so many digits a step, or on all, by SGD."""
    return trained(network(seed), torch.optim.SGD, classified(seed + 1, size), lr=lr, **options)


def gpt(seed: int, lr: float = 3e-3, schedule: Callable[[int], float] = CONSTANT) -> Training:
    """Return a GPT on rows of text by AdamW."""
    return trained(GPT(), gpt_adamw, sentences(seed + 1, 16), schedule, lr=lr)


# -- points -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """The loss along the update at one training step, on a copy of the model that `loss` moves."""

    step: int
    lr: float
    slope: float | None
    model: nn.Module
    loss_of: Loss
    weights: list[Tensor]
    direction: list[Tensor]

    @property
    def norm_sq(self) -> float:
        """|Δθ|²."""
        return sum(float((d.double() ** 2).sum()) for d in self.direction)

    @torch.no_grad()
    def loss(self, eta: float) -> float:
        """Return L(θ − ηΔθ)."""
        for p, w, d in zip(self.model.parameters(), self.weights, self.direction, strict=True):
            torch.sub(w, d, alpha=eta, out=p)
        return float(self.loss_of(self.model))

    def to(self, dtype: torch.dtype) -> "Point":
        """Return the same in a dtype, on a copy of the model."""
        model, loss_of = copy.deepcopy(self.model).to(dtype), self.loss_of.to(dtype)
        weights, direction = ([tensor.to(dtype) for tensor in tensors] for tensors in (self.weights, self.direction))
        return replace(self, model=model, loss_of=loss_of, weights=weights, direction=direction)

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


@dataclass(frozen=True)
class Run:
    """A training run, of which some steps are measured."""

    make: Callable[[int], Training]  # from the seed
    measured: Sequence[int]
    seed: int = 0
    other_batch: bool = False  # whether the loss of another batch than the gradient's is measured
    group: str = ""

    def points(self) -> Iterator[Point]:
        """Train, and yield the steps to measure."""
        torch.manual_seed(self.seed)
        yield from self.make(self.seed).points(self.measured, self.other_batch)


def standard_runs(quick: bool) -> dict[str, Run]:
    """Return the runs of the benchmark by name."""
    warmed = partial(gpt, schedule=ramps(warmup=100))
    if quick:
        return {
            "MLP, full batch (demo)": Run(partial(mlp, size=None), range(0, 60, 12)),
            "MLP, SGD batch 64": Run(mlp, range(0, 150, 5)),
            "GPT, AdamW": Run(warmed, [*range(3), *range(60, 130, 8)]),
        }
    return {
        "MLP, full batch (demo)": Run(partial(mlp, size=None), range(0, 600, 6)),
        "MLP, SGD batch 64": Run(mlp, range(0, 400, 2)),
        "MLP, SGD momentum": Run(partial(mlp, lr=0.03, momentum=0.9), range(0, 400, 2)),
        "MLP, SGD lr 0.5": Run(partial(mlp, lr=0.5), range(0, 300, 3), seed=2),
        "GPT, AdamW": Run(partial(gpt, schedule=ramps(600, 100, 150)), [*range(10), *range(10, 600, 6)]),
        "GPT, lr 3e-2": Run(partial(warmed, lr=3e-2), [*range(10), *range(10, 200, 6)], seed=6),
        "GPT, no warm-up": Run(partial(gpt, lr=1e-3), range(0, 60, 2), seed=22),
        "GPT, another batch": Run(warmed, range(100, 400, 6), seed=7, other_batch=True),
    }


# -- time -------------------------------------------------------------------------------------------------------------


def in_turns(names: Sequence[_Result], round_: int) -> Sequence[_Result]:
    """Return names in their order, beginning with another one each round."""
    first = round_ % len(names)
    return [*names[first:], *names[:first]]


def timed(function: Callable[[], _Result]) -> tuple[_Result, float]:
    """Return what a call gives, and the seconds that it takes."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def seconds(function: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    return timed(function)[1]
