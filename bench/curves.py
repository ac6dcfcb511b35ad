"""The loss along the update, recorded in float64 on small training runs, and line searches replayed on the records.

    python bench/curves.py record [--only NAME]              # trains, and adds what is missing to the file of curves
    python bench/curves.py replay [--quick] [--json PATH]    # searches along all of them

The search was first made on the ``tuned`` runs, which are those of `bench_line_search.py`. Of the ``untuned`` ones,
eight tasks were looked at with another seed while the search learned to stop early. The ``held out`` runs were
recorded after its constants were fixed, but three rules have changed since: two looks at the noise at first, another
one when the loss has halved, and the guard for unexpectedly far answers.
"""

import argparse
import gzip
import json
import math
import random
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# The checkout, also where the package is not installed.
sys.path.insert(0, str(Path(__file__).parent.parent))

import ledger
import numpy as np
import torch
import workloads
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW
from workloads import GPT, Loss, Point, Run, Training, classified, gpt_adamw, images, ramps, sentences, trained
from workloads import stack as _stack

from sharpkern.search import LineSearch, SearchMemory, SearchResult

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
    """

    step: int  # of training
    lr: float  # in use
    base_loss: float  # f(0)
    slope: float  # −f′(0)
    norm_sq: float  # |Δθ|²
    crossing: float  # the first η with f(η) > f(0)
    bend: list[float] = field(repr=False)  # w·exp(−x) at each of `NODES`; nan where the loss is not finite

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


def curve_of(point: Point) -> Curve | None:
    """Return the curve of a point, or None where the loss does not fall at first, or not rise at last."""
    point, lr, slope = point.to(torch.float64), point.lr, point.slope
    base_loss = point.loss(0.0)

    def rise(eta: float) -> float:
        return point.loss(eta) - base_loss

    if slope is None or slope <= 0:
        return None
    lo = 1e-2 * min(lr, 0.1 * abs(base_loss) / slope)
    top = max(1e4 * lr, 100 * abs(base_loss) / slope)
    while not rise(lo) <= 0:
        lo /= 4
        if lo < 1e-12 * lr:
            return None
    while rise(lo * _SCAN) <= 0:
        lo *= _SCAN
        if lo > top:
            return None
    hi = lo * _SCAN
    while True:
        crossing = _zero(rise, lo, hi)
        rises = [rise(crossing * math.exp(x)) for x in NODES]
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
    return Curve(point.step, lr, base_loss, slope, point.norm_sq, crossing, rounded)


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


def _convolution(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after))


def _of_images(width: int, *body: nn.Module) -> nn.Sequential:
    """Return a classifier of images in a row, whose body ends in so many channels."""
    rest = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *body, *rest)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(width, width), _convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


def _cnn() -> nn.Sequential:
    first, second = _convolution(1, 16), _convolution(16, 32)
    return _of_images(32, first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU())


def _resnet() -> nn.Sequential:
    return _of_images(16, _convolution(1, 16), nn.ReLU(), _Residual(16), nn.MaxPool2d(2), _Residual(16))


class ViT(nn.Module):
    """Transformer on the sixteen 2 × 2 patches of an image."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches, self.head = nn.Linear(4, width), nn.Linear(width, 10)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of every image."""
        patches = F.unfold(images.view(-1, 1, 8, 8), 2, stride=2).transpose(1, 2)
        return self.head(self.blocks(self.patches(patches) + self.positions).mean(1))


class Recurrent(nn.Module):
    """Language model on bytes with one recurrent layer."""

    def __init__(self, layer: type[nn.LSTM] | type[nn.GRU], width: int) -> None:
        super().__init__()
        self.tokens, self.layer = nn.Embedding(256, 48), layer(48, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of every next token."""
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


# --- Runs ----------------------------------------------------------------------------------------------------------


def _reconstructed(seed: int) -> Callable[[], Loss]:
    draw = images(seed, 64)

    def loss() -> Loss:
        inputs, _ = draw()
        return Loss(F.mse_loss, (inputs, inputs))

    return loss


def _denoised(seed: int) -> Callable[[], Loss]:
    """Return losses of a model that is to find the noise in images, told how much there is."""
    draw, generator = images(seed, 64), torch.Generator().manual_seed(seed + 1)

    def loss() -> Loss:
        clean, _ = draw()
        angle = 0.5 * math.pi * torch.rand(len(clean), 1, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        waves = angle * torch.arange(1, 17, 2)
        inputs = torch.cat([angle.cos() * (2 * clean - 1) + angle.sin() * noise, waves.sin(), waves.cos()], 1)
        return Loss(F.mse_loss, (inputs, noise))

    return loss


def _clipped(outputs: tuple[Tensor, Tensor], played: Sequence[Tensor]) -> Tensor:
    """Return the policy loss of PPO, with those of the value and of the entropy."""
    (log_p, value), (actions, rewards, advantage, old_log_p) = outputs, played
    ratio = (log_p.gather(1, actions)[:, 0] - old_log_p).exp()
    clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return 0.5 * F.mse_loss(value, rewards) - clipped.mean() + 0.01 * (log_p.exp() * log_p).sum(-1).mean()


def _ppo(seed: int) -> Training:
    """Return PPO on parts of 256 actions, drawn anew every 16 steps, with linear rewards."""
    model, generator = _ActorCritic(), torch.Generator().manual_seed(seed + 1)
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

    def loss() -> Loss:
        if training.steps % 16 == 0:
            played[:] = play()
        rows = torch.randperm(256, generator=generator)[:64]
        states, *rest = (column[rows] for column in played)
        return Loss(_clipped, (states, rest))

    training = trained(model, Adam, loss, lr=1e-3)
    return training


def with_muon(model: GPT) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for the rest."""
    inner = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not q for q in inner)]
    adamw = AdamW(others, 3e-3, betas=(0.9, 0.95))
    return [torch.optim.Muon(inner, lr=0.02, weight_decay=0.0), adamw]


def _muon(seed: int) -> Training:
    model = GPT(48)
    return Training(model, with_muon(model), sentences(seed + 1, 8), _RAMPS)


def _run(
    group: str,
    model: Callable[[], nn.Module],
    optimizer: Callable[..., torch.optim.Optimizer],
    draw: Callable[[int], Callable[[], Loss]],
    schedule: Callable[[int], float] = workloads.CONSTANT,
    **options: float,
) -> Run:
    """Return a run of a model by one optimizer on what is drawn by a seed of its own."""
    return Run(lambda seed: trained(model(), optimizer, draw(seed + 1), schedule, **options), MEASURED, group=group)


_RAMPS = ramps(NUM_STEPS, 100, 100)
_digits = partial(classified, size=32)
_sentences, _short = (partial(sentences, num_rows=8, length=length) for length in (64, 32))

RUNS: dict[str, Run] = {
    "MLP, SGD": Run(workloads.mlp, range(0, NUM_STEPS, 4), group="tuned"),
    "MLP, SGD momentum": Run(partial(workloads.mlp, lr=0.03, momentum=0.9), range(0, NUM_STEPS, 4), group="tuned"),
    "GPT, AdamW": Run(partial(workloads.gpt, schedule=_RAMPS), MEASURED, group="tuned"),
    "PPO, Adam": Run(_ppo, sorted({*MEASURED, *range(16, NUM_STEPS, 13)}), group="untuned"),
    "diffusion, AdamW": _run("untuned", partial(_stack, 80, 128, 128, 64, between=nn.SiLU), AdamW, _denoised, lr=2e-3),
    "autoencoder, Adafactor": _run(
        "untuned", partial(_stack, 64, 64, 8, 64, 64), torch.optim.Adafactor, _reconstructed, lr=0.02
    ),
    "CNN with BatchNorm, SGD momentum": _run("untuned", _cnn, SGD, _digits, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "CNN with BatchNorm, Adam, batch 8": _run("untuned", _cnn, Adam, partial(classified, size=8), lr=1e-3),
    "ViT, label smoothing": _run(
        "untuned", ViT, AdamW, partial(classified, size=64, label_smoothing=0.1), _RAMPS, lr=2e-3, weight_decay=0.05
    ),
    "LSTM, Adam": _run(
        "untuned", partial(Recurrent, nn.LSTM, 96), Adam, partial(sentences, num_rows=8, length=48), lr=3e-3
    ),
    "GPT, Muon": Run(_muon, MEASURED, group="untuned"),
    "GPT, AdamW, batch 8": _run("untuned", partial(GPT, 48, 3), gpt_adamw, _sentences, _RAMPS, lr=2e-3),
    "GPT, Lion, batch 8": _run("untuned", partial(GPT, 48), Lion, _sentences, _RAMPS, lr=3e-4),
    "ResNet with BatchNorm, SGD": _run("held out", _resnet, SGD, _digits, lr=0.1),
    "MLP with BatchNorm, AdamW": _run(
        "held out", partial(_stack, 64, 96, 96, 10, between=nn.ReLU, norm=True), AdamW, _digits, lr=2e-3
    ),
    "GRU, RMSprop": _run("held out", partial(Recurrent, nn.GRU, 64), torch.optim.RMSprop, _short, lr=1e-3),
    "GPT of width 32, SGD momentum": _run("held out", partial(GPT, 32, 1), SGD, _short, _RAMPS, lr=0.1, momentum=0.9),
}


def record(name: str, seed: int = 0) -> list[Curve]:
    """Train a run and return its curves."""
    return list(filter(None, map(curve_of, replace(RUNS[name], seed=seed).points())))


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


# --- Searches ------------------------------------------------------------------------------------------------------

# Of each run, the noise of its losses in float32 is drawn from this range, relative to the base loss.
NOISE = (5e-8, 2e-7)
# An answer this far off, in log units, is another crossing and not an inexact one.
MISSED = 0.25
SEARCHES: dict[str, dict[str, Any]] = {
    "rtol 0.01": {},
    "rtol 0.05": {"rtol": 0.05},
    "8 at a time": {"num_parallel": 8},
    "bisection": {"method": "bisection"},
}


class Answer(NamedTuple):
    """What a search said at a step of training."""

    step: int
    result: SearchResult
    crossing: float | None  # the first one, if it is known
    passes: int = 1

    @property
    def miss(self) -> float:
        """The distance of the answer from the first crossing, in log units; nan where there is none."""
        there = self.crossing is not None and self.result.status == "converged"
        return abs(math.log(self.result.critical_lr / self.crossing)) if there else math.nan


def search(loss: Callable[[float], float], base_loss: float, **options: Any) -> SearchResult:
    """Search along a loss."""
    line = LineSearch(base_loss, **options)
    while step_sizes := line.ask():
        line.tell([loss(eta) for eta in step_sizes])
    return line.result()


def replay(curves: Sequence[Curve], seed: str = "0", **options: Any) -> list[Answer]:
    """Search along the curves of a run, each search warm-started by the last; every loss has noise of its own."""
    rng = random.Random(seed)
    noise = math.exp(rng.uniform(*map(math.log, NOISE)))
    memory: SearchMemory | None = None
    answers = []
    for curve in curves:

        def loss(eta: float, curve: Curve = curve) -> float:
            rise = curve.rise(eta) if eta else 0.0
            return curve.base_loss + rise + rng.gauss(0.0, noise * abs(curve.base_loss))

        known = {"slope": curve.slope, "norm_sq": curve.norm_sq, "initial_lr": curve.lr, "memory": memory}
        result = search(loss, loss(0.0), **known, **options)
        memory = result.memory
        answers.append(Answer(curve.step, result, curve.crossing))
    return answers


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return evaluations, the base loss not counted, and errors of searches."""
    found = [answer for answer in answers if not math.isnan(answer.miss)]
    misses = np.array([answer.miss for answer in found])
    evaluations = np.array([answer.result.evaluations for answer in answers])
    median, p95, p99 = (float(np.percentile(misses, q)) for q in (50, 95, 99))
    return {
        "searches": len(answers),
        "without_answer": sum(answer.result.status != "converged" for answer in answers),
        "evaluations_mean": float(evaluations.mean()),
        "evaluations_p95": float(np.percentile(evaluations, 95)),
        "error_median": median,
        "error_p95": p95,
        "error_p99": p99,
        "missed": int((misses > MISSED).sum()),
        "covered": float(np.mean([answer.miss <= math.log1p(answer.result.error) for answer in found])),
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


def measure(quick: bool) -> dict[str, Any]:
    """Search along all recorded curves, with noise of one seed or of four."""
    found = rows(load(), 1 if quick else 4)
    columns = "search group run evaluations_mean evaluations_p95 error_median error_p95 error_p99 missed covered"
    ledger.show("Searches along recorded losses", found, columns)
    return {"search": found}


def main() -> None:
    """Record or replay."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("record", "replay"))
    parser.add_argument("--only", choices=RUNS, help="record this run, also where it is recorded already")
    parser.add_argument("--quick", action="store_true", help="replay with noise of one seed in place of four")
    parser.add_argument("--json", type=Path, help="append the rows of a replay to this file")
    arguments = parser.parse_args()
    if arguments.what == "replay":
        ledger.run(measure, arguments.quick, arguments.json)
        return
    torch.set_num_threads(1)
    curves = load()
    for name in [arguments.only] if arguments.only else [name for name in RUNS if name not in curves]:
        curves[name], taken = workloads.timed(partial(record, name))
        save(curves)
        print(f"{name}: {len(curves[name])} curves after {taken:.0f} s", flush=True)


if __name__ == "__main__":
    main()
