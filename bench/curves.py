"""The loss along the update, recorded in float64 on small training runs, and line searches replayed on the records.

    python bench/curves.py record [--only NAME]              # trains, and adds what is missing to the file of curves
    python bench/curves.py replay [--quick] [--json PATH]    # searches along all of them

The search was first made on the ``tuned`` runs, which are those of `bench_line_search.py`. Of the ``untuned`` ones,
eight tasks were looked at with another seed while the search learned to stop early. The ``held out`` runs were
recorded after its constants were fixed, but three rules have changed since: two looks at the noise at first, another
one when the loss has halved, and the guard for unexpectedly far answers.
"""

import argparse
import copy
import gzip
import json
import math
import random
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

# The checkout, also where the package is not installed.
sys.path.insert(0, str(Path(__file__).parent.parent))

import ledger
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from workloads import GPT, standard_digits, text, token_loss

from sharpkern.cli.digits import network
from sharpkern.search import LineSearch, SearchMemory

FILE = ledger.RESULTS / "curves.json.gz"
# Step sizes of a record over the first crossing, in log: dense around it.
_SPACINGS = ((-6, -3, 0.25), (-3, -1.5, 0.125), (-1.5, 1.5, 0.05), (1.5, 4.01, 0.125))
NODES = tuple(round(float(x), 4) for spacing in _SPACINGS for x in np.arange(*spacing))
# The first crossing is looked for upward in steps of this factor, and then on the nodes.
_SCAN = 1.3
NUM_STEPS = 400
MEASURED = (0, 1, 2, 5, *range(10, NUM_STEPS, 10))


@dataclass
class Curve:
    """The loss along one update, around its first crossing.

    With x = log(η/η_c) the record is of w·exp(−x), where w = 1 + (f(η) − f(0))/(slope·η): a constant on a quadratic.

    Attributes:
        step: of training.
        lr: the learning rate in use.
        base_loss: f(0).
        slope: −f′(0).
        norm_sq: |Δθ|².
        crossing: the first η with f(η) > f(0).
        bend: w·exp(−x) at each of `NODES`; nan where the loss is not finite.
    """

    step: int
    lr: float
    base_loss: float
    slope: float
    norm_sq: float
    crossing: float
    bend: list[float] = field(repr=False)

    def rise(self, eta: float) -> float:
        """Return f(η) − f(0), by cubics through four nodes each."""
        x = math.log(eta / self.crossing)
        inside = min(max(x, NODES[0]), NODES[-1])
        first = min(max(bisect_left(NODES, inside) - 2, 0), len(NODES) - 4)
        xs, values = NODES[first : first + 4], self.bend[first : first + 4]
        bend = sum(
            value * math.prod((inside - other) / (node - other) for other in xs if other != node)
            for node, value in zip(xs, values, strict=True)
        )
        w = bend * math.exp(x)
        return (w - 1.0) * self.slope * eta if math.isfinite(w) else math.inf


# --- Training ------------------------------------------------------------------------------------------------------


Loss = Callable[[nn.Module], Tensor]


@dataclass
class Training:
    """A model in training.

    Attributes:
        model: that is trained.
        optimizers: each with its share of the parameters.
        draw: returns the loss, as a function of the model in any precision, of the batch of a step.
        schedule: share of the learning rate at a step.
    """

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    draw: Callable[[int], Loss]
    schedule: Callable[[int], float] = lambda step: 1.0

    def curves(self, measured: Sequence[int]) -> Iterator[Curve]:
        """Train, and record the loss along the update at each step measured, where there is a first crossing."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        peaks = [group["lr"] for group in groups]
        for step in range(max(measured) + 1):
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * self.schedule(step)
            loss_of = self.draw(step)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss_of(self.model).backward()
            before = copy.deepcopy(self.model) if step in measured else None
            gradients = [None if p.grad is None else p.grad.double() for p in self.model.parameters()]
            for optimizer in self.optimizers:
                optimizer.step()
            if before is not None:
                lr = groups[0]["lr"]
                pairs = zip(before.parameters(), self.model.parameters(), strict=True)
                direction = [(old.detach().double() - new.detach().double()) / lr for old, new in pairs]
                slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None)
                curve = _record(_Line(before, loss_of, direction), step, lr, slope)
                if curve is not None:
                    yield curve


class _Line:
    """The loss along a direction in float64."""

    def __init__(self, model: nn.Module, loss_of: Loss, direction: Sequence[Tensor]) -> None:
        self._model, self._loss_of = copy.deepcopy(model).double(), loss_of
        self._weights = [p.detach().clone() for p in self._model.parameters()]
        self._direction = direction
        self.base_loss = self._loss(0.0)
        self.norm_sq = sum(float((d**2).sum()) for d in direction)

    def rise(self, eta: float) -> float:
        """Return f(η) − f(0)."""
        return self._loss(eta) - self.base_loss

    @torch.no_grad()
    def _loss(self, eta: float) -> float:
        for p, w, d in zip(self._model.parameters(), self._weights, self._direction, strict=True):
            torch.sub(w, d, alpha=eta, out=p)
        return float(self._loss_of(self._model))


def _record(line: _Line, step: int, lr: float, slope: float) -> Curve | None:
    """Return the curve, or None where the loss does not fall at first, or not rise at last."""
    if slope <= 0:
        return None
    lo = 1e-2 * min(lr, 0.1 * abs(line.base_loss) / slope)
    top = max(1e4 * lr, 100 * abs(line.base_loss) / slope)
    while not line.rise(lo) <= 0:
        lo /= 4
        if lo < 1e-12 * lr:
            return None
    while line.rise(lo * _SCAN) <= 0:
        lo *= _SCAN
        if lo > top:
            return None
    hi = lo * _SCAN
    while True:
        crossing = _zero(line.rise, lo, hi)
        rises = [line.rise(crossing * math.exp(x)) for x in NODES]
        below = next((i for i, x in enumerate(NODES) if x < -1e-9 and not rises[i] <= 0), None)
        if not below:
            break
        # The scan stepped over a rise.
        lo, hi = (crossing * math.exp(x) for x in NODES[below - 1 : below + 1])
    bend = [
        math.exp(-x) * (1.0 + rise / (slope * crossing * math.exp(x))) for x, rise in zip(NODES, rises, strict=True)
    ]
    rounded = [float(f"{value:.6g}") if math.isfinite(value) else math.nan for value in bend]
    rounded[NODES.index(0.0)] = 1.0
    return Curve(step, lr, line.base_loss, slope, line.norm_sq, crossing, rounded)


def _zero(rise: Callable[[float], float], lo: float, hi: float) -> float:
    """Return where the rise begins, between a fall and a rise."""
    from scipy.optimize import brentq

    while not math.isfinite(rise(hi)) and hi / lo > 1 + 1e-8:
        middle = math.sqrt(lo * hi)
        lo, hi = (middle, hi) if rise(middle) <= 0 else (lo, middle)
    return float(brentq(rise, lo, hi, rtol=1e-9)) if math.isfinite(rise(hi)) else hi


# --- Models --------------------------------------------------------------------------------------------------------


class Lion(torch.optim.Optimizer):
    """Sign of a momentum that looks one gradient ahead (Chen et al. 2023)."""

    def __init__(self, parameters: Iterator[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step."""
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(torch.lerp(p.grad, momentum, beta1).sign_(), alpha=lr)
                momentum.lerp_(p.grad, 1 - beta2)


def _stack(*widths: int, between: Callable[[], nn.Module] = nn.GELU, norm: bool = False) -> nn.Sequential:
    """Return linear layers with something between them."""
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(widths)):
        if i:
            layers += [nn.BatchNorm1d(before)] * norm + [between()]
        layers.append(nn.Linear(before, after))
    return nn.Sequential(*layers)


def _convolution(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after))


def _cnn() -> nn.Sequential:
    """Return two convolutions with BatchNorm, for images in a row."""
    first, second = _convolution(1, 16), _convolution(16, 32)
    body = (first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU())
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(width, width), _convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


def _resnet() -> nn.Sequential:
    body = (_convolution(1, 16), nn.ReLU(), _Residual(16), nn.MaxPool2d(2), _Residual(16))
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


class _ViT(nn.Module):
    """Transformer on the sixteen 2 × 2 patches of an image."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches, self.head = nn.Linear(4, width), nn.Linear(width, 10)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images.view(-1, 1, 8, 8), 2, stride=2).transpose(1, 2)
        return self.head(self.blocks(self.patches(patches) + self.positions).mean(1))


class _Recurrent(nn.Module):
    """Language model on bytes with one recurrent layer."""

    def __init__(self, layer: type[nn.LSTM] | type[nn.GRU], width: int) -> None:
        super().__init__()
        self.tokens, self.layer = nn.Embedding(256, 48), layer(48, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.tokens(tokens))[0])


class _ActorCritic(nn.Module):
    """Four actions and a value from eight numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.action, self.value = nn.Linear(64, 4), nn.Linear(64, 1)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(states)
        return self.action(hidden).log_softmax(-1), self.value(hidden)[:, 0]


# --- Batches -------------------------------------------------------------------------------------------------------


def _like(model: nn.Module, x: Tensor) -> Tensor:
    """Return numbers in the model's precision."""
    return x.to(next(model.parameters()).dtype)


def _images(size: int, seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a function that draws digits, a fifth of them with a wrong label."""
    images, targets = standard_digits()
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.randint(0, len(images), (size,), generator=generator)
        return images[rows], targets[rows]

    return draw


def _classified(size: int, seed: int, label_smoothing: float = 0.0) -> Callable[[int], Loss]:
    draw = _images(size, seed)

    def loss(step: int) -> Loss:
        images, targets = draw()
        return lambda model: F.cross_entropy(model(_like(model, images)), targets, label_smoothing=label_smoothing)

    return loss


def _sentences(num_rows: int, length: int, seed: int) -> Callable[[int], Loss]:
    data, generator = text(), torch.Generator().manual_seed(seed)

    def loss(step: int) -> Loss:
        starts = torch.randint(0, len(data) - length - 1, (num_rows,), generator=generator)
        rows = torch.stack([data[start : start + length + 1] for start in starts])
        return lambda model: token_loss(model(rows[:, :-1]), rows[:, 1:])

    return loss


def _reconstructed(seed: int) -> Callable[[int], Loss]:
    draw = _images(64, seed)

    def loss(step: int) -> Loss:
        images, _ = draw()
        return lambda model: F.mse_loss(model(_like(model, images)), _like(model, images))

    return loss


def _denoised(seed: int) -> Callable[[int], Loss]:
    """Return losses of a model that is to find the noise in images, told how much there is."""
    draw, generator = _images(64, seed), torch.Generator().manual_seed(seed + 1)

    def loss(step: int) -> Loss:
        images, _ = draw()
        angle = 0.5 * math.pi * torch.rand(len(images), 1, generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        waves = angle * torch.arange(1, 17, 2)
        inputs = torch.cat([angle.cos() * (2 * images - 1) + angle.sin() * noise, waves.sin(), waves.cos()], 1)
        return lambda model: F.mse_loss(model(_like(model, inputs)), _like(model, noise))

    return loss


def _rewarded(model: nn.Module, seed: int) -> Callable[[int], Loss]:
    """Return clipped policy losses (PPO) on parts of 256 actions, drawn anew every 16 steps, with linear rewards."""
    generator = torch.Generator().manual_seed(seed)
    preferences = torch.randn(8, 4, generator=generator)
    played: list[Tensor] = []

    def play() -> list[Tensor]:
        states = torch.randn(256, 8, generator=generator)
        with torch.no_grad():
            log_p, value = model(states)
        actions = torch.multinomial(log_p.exp(), 1, generator=generator)
        rewards = (states @ preferences).gather(1, actions)[:, 0] + 0.3 * torch.randn(256, generator=generator)
        advantage = (rewards - value - (rewards - value).mean()) / (rewards - value).std()
        return [states, actions, rewards, advantage, log_p.gather(1, actions)[:, 0]]

    def loss(step: int) -> Loss:
        if step % 16 == 0:
            played[:] = play()
        rows = torch.randperm(256, generator=generator)[:64]
        states, actions, *rest = (column[rows] for column in played)

        def of(model: nn.Module) -> Tensor:
            rewards, advantage, old_log_p = (_like(model, column) for column in rest)
            log_p, value = model(_like(model, states))
            ratio = (log_p.gather(1, actions)[:, 0] - old_log_p).exp()
            clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            return 0.5 * F.mse_loss(value, rewards) - clipped.mean() + 0.01 * (log_p.exp() * log_p).sum(-1).mean()

        return of

    return loss


# --- Runs ----------------------------------------------------------------------------------------------------------


def _warm_up(step: int) -> float:
    """Share of the learning rate: up in 100 steps, down in the last 100."""
    return min(1.0, (step + 1) / 100, (NUM_STEPS - step) / 100)


def _with_muon(model: GPT) -> list[torch.optim.Optimizer]:
    inner = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not q for q in inner)]
    adamw = torch.optim.AdamW(others, 3e-3, betas=(0.9, 0.95))
    return [torch.optim.Muon(inner, lr=0.02, weight_decay=0.0), adamw]


def _trained(
    model: nn.Module, optimizer: type[torch.optim.Optimizer], draw: Callable[[int], Loss], **options: Any
) -> Training:
    schedule = options.pop("schedule", None)
    training = Training(model, [optimizer(model.parameters(), **options)], draw)
    return training if schedule is None else Training(model, training.optimizers, draw, schedule)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        group: "tuned", "untuned" or "held out".
        make: builds it, from the seed of its batches.
        measured: the steps to record.
    """

    group: str
    make: Callable[[int], Training]
    measured: Sequence[int] = MEASURED


def _ppo(seed: int) -> Training:
    model = _ActorCritic()
    return _trained(model, torch.optim.Adam, _rewarded(model, seed), lr=1e-3)


def _muon(seed: int) -> Training:
    model = GPT(48)
    return Training(model, _with_muon(model), _sentences(8, 64, seed), _warm_up)


_Adam, _AdamW, _SGD = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD
_GPT_ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1, "schedule": _warm_up}

RUNS: dict[str, Run] = {
    "MLP, SGD": Run(
        "tuned", lambda s: _trained(network(s - 1), _SGD, _classified(64, s), lr=0.1), range(0, NUM_STEPS, 4)
    ),
    "MLP, SGD momentum": Run(
        "tuned",
        lambda s: _trained(network(s - 1), _SGD, _classified(64, s), lr=0.03, momentum=0.9),
        range(0, NUM_STEPS, 4),
    ),
    "GPT, AdamW": Run("tuned", lambda s: _trained(GPT(), _AdamW, _sentences(16, 64, s), lr=3e-3, **_GPT_ADAMW)),
    "PPO, Adam": Run("untuned", _ppo, sorted({*MEASURED, *range(16, NUM_STEPS, 13)})),
    "diffusion, AdamW": Run(
        "untuned", lambda s: _trained(_stack(80, 128, 128, 64, between=nn.SiLU), _AdamW, _denoised(s), lr=2e-3)
    ),
    "autoencoder, Adafactor": Run(
        "untuned", lambda s: _trained(_stack(64, 64, 8, 64, 64), torch.optim.Adafactor, _reconstructed(s), lr=0.02)
    ),
    "CNN with BatchNorm, SGD momentum": Run(
        "untuned", lambda s: _trained(_cnn(), _SGD, _classified(32, s), lr=0.05, momentum=0.9, weight_decay=1e-4)
    ),
    "CNN with BatchNorm, Adam, batch 8": Run("untuned", lambda s: _trained(_cnn(), _Adam, _classified(8, s), lr=1e-3)),
    "ViT, label smoothing": Run(
        "untuned",
        lambda s: _trained(_ViT(), _AdamW, _classified(64, s, 0.1), lr=2e-3, weight_decay=0.05, schedule=_warm_up),
    ),
    "LSTM, Adam": Run("untuned", lambda s: _trained(_Recurrent(nn.LSTM, 96), _Adam, _sentences(8, 48, s), lr=3e-3)),
    "GPT, Muon": Run("untuned", _muon),
    "GPT, AdamW, batch 8": Run(
        "untuned", lambda s: _trained(GPT(48, 3), _AdamW, _sentences(8, 64, s), lr=2e-3, **_GPT_ADAMW)
    ),
    "GPT, Lion, batch 8": Run(
        "untuned", lambda s: _trained(GPT(48), Lion, _sentences(8, 64, s), lr=3e-4, schedule=_warm_up)
    ),
    "ResNet with BatchNorm, SGD": Run("held out", lambda s: _trained(_resnet(), _SGD, _classified(32, s), lr=0.1)),
    "MLP with BatchNorm, AdamW": Run(
        "held out",
        lambda s: _trained(_stack(64, 96, 96, 10, between=nn.ReLU, norm=True), _AdamW, _classified(32, s), lr=2e-3),
    ),
    "GRU, RMSprop": Run(
        "held out", lambda s: _trained(_Recurrent(nn.GRU, 64), torch.optim.RMSprop, _sentences(8, 32, s), lr=1e-3)
    ),
    "GPT of width 32, SGD momentum": Run(
        "held out",
        lambda s: _trained(GPT(32, 1), _SGD, _sentences(8, 32, s), lr=0.1, momentum=0.9, schedule=_warm_up),
    ),
}


def record(name: str, seed: int = 0) -> list[Curve]:
    """Train a run and return its curves."""
    run = RUNS[name]
    torch.manual_seed(seed)
    return list(run.make(seed + 1).curves(run.measured))


def load(path: Path = FILE) -> dict[str, list[Curve]]:
    """Return the curves of each run recorded."""
    if not path.exists():
        return {}
    stored = json.loads(gzip.decompress(path.read_bytes()))
    return {name: [Curve(**curve) for curve in curves] for name, curves in stored.items()}


def save(curves: Mapping[str, Sequence[Curve]], path: Path = FILE) -> None:
    """Write curves, the same bytes for the same curves."""
    stored = {name: [asdict(curve) for curve in curves[name]] for name in RUNS if name in curves}
    path.write_bytes(gzip.compress(json.dumps(stored).encode(), 9, mtime=0))


# --- Replay --------------------------------------------------------------------------------------------------------

# Of each run, the noise of its losses in float32 is drawn from this range, relative to the base loss.
NOISE = (5e-8, 2e-7)
# An answer this far off, in log units, is another crossing and not an inexact one.
MISSED = 0.25
SEARCHES: dict[str, dict[str, Any]] = {
    "rtol 0.01": {},
    "rtol 0.05": {"rtol": 0.05},
    "bisection": {"method": "bisection"},
}


@dataclass(frozen=True)
class Answer:
    """What a search said of one curve.

    Attributes:
        step: of training.
        evaluations: base loss not counted.
        status: of the search.
        miss: distance of its answer from the first crossing, in log units; nan where there is none.
        reported: the distance that it reported.
    """

    step: int
    evaluations: int
    status: str
    miss: float
    reported: float


def replay(curves: Sequence[Curve], seed: str = "0", **options: Any) -> list[Answer]:
    """Search along the curves of a run, each search warm-started by the last; every loss has noise of its own."""
    rng = random.Random(seed)
    noise = math.exp(rng.uniform(*map(math.log, NOISE)))
    memory: SearchMemory | None = None
    answers = []
    for curve in curves:
        size = noise * abs(curve.base_loss)
        search = LineSearch(
            curve.base_loss + rng.gauss(0.0, size),
            slope=curve.slope,
            norm_sq=curve.norm_sq,
            initial_lr=curve.lr,
            memory=memory,
            **options,
        )
        while step_sizes := search.ask():
            search.tell([curve.base_loss + curve.rise(eta) + rng.gauss(0.0, size) for eta in step_sizes])
        result = search.result()
        memory = result.memory
        found = result.status == "converged"
        miss = abs(math.log(result.critical_lr / curve.crossing)) if found else math.nan
        reported = math.log1p(result.error) if found else math.nan
        answers.append(Answer(curve.step, result.evaluations, result.status, miss, reported))
    return answers


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return evaluations and errors of searches."""
    found = [answer for answer in answers if answer.status == "converged"]
    misses = np.array([answer.miss for answer in found])
    evaluations = np.array([answer.evaluations for answer in answers])
    median, p95, p99 = (float(np.percentile(misses, q)) for q in (50, 95, 99))
    return {
        "searches": len(answers),
        "without_answer": len(answers) - len(found),
        "evaluations_mean": float(evaluations.mean()),
        "evaluations_p95": float(np.percentile(evaluations, 95)),
        "error_median": median,
        "error_p95": p95,
        "error_p99": p99,
        "missed": int((misses > MISSED).sum()),
        "covered": float(np.mean([answer.miss <= answer.reported for answer in found])),
    }


def rows(curves: Mapping[str, Sequence[Curve]], seeds: int) -> list[dict[str, Any]]:
    """Return a row for each search and run, and one for each search and all runs of a group."""
    found = []
    for name, options in SEARCHES.items():
        groups: dict[str, list[Answer]] = {}
        for run, of_run in curves.items():
            answers = [answer for seed in range(seeds) for answer in replay(of_run, f"{run} {seed}", **options)]
            found.append({"search": name, "group": RUNS[run].group, "run": run, **summary(answers)})
            groups.setdefault(RUNS[run].group, []).extend(answers)
        found += [
            {"search": name, "group": group, "run": "all", **summary(answers)} for group, answers in groups.items()
        ]
    return found


def _table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows for people."""
    lines = [f"{'search':12}{'group':10}{'run':36}evaluations, p95    error %, p95, p99     missed  covered %"]
    for row in found:
        errors = "".join(f"{100 * row[key]:8.3f}" for key in ("error_median", "error_p95", "error_p99"))
        lines.append(
            f"{row['search']:12}{row['group']:10}{row['run']:36}{row['evaluations_mean']:6.2f}"
            f"{row['evaluations_p95']:6.0f}{errors}{row['missed']:8}{100 * row['covered']:10.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Record or replay."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("record", "replay"))
    parser.add_argument("--only", choices=RUNS, help="record this run, also where it is recorded already")
    parser.add_argument("--quick", action="store_true", help="replay with noise of one seed in place of four")
    parser.add_argument("--json", type=Path, help="append the rows of a replay to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    curves = load()
    if arguments.what == "record":
        for name in [arguments.only] if arguments.only else [name for name in RUNS if name not in curves]:
            started = time.perf_counter()
            curves[name] = record(name)
            save(curves)
            print(f"{name}: {len(curves[name])} curves after {time.perf_counter() - started:.0f} s", flush=True)
        return
    made = ledger.record(arguments.quick, lambda quick: {"search": rows(curves, 1 if quick else 4)})
    print(_table(made["search"]))
    if arguments.json:
        ledger.append(arguments.json, made)


if __name__ == "__main__":
    main()
