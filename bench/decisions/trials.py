"""`sharpkern.LRCap` and `sharpkern.find_lr` on small training runs, beside the same runs without them.

    python bench/decisions/trials.py run [--tasks "MLP/SGD;GPT/AdamW"] [--seeds N]   # trains what runs.csv lacks
    python bench/decisions/trials.py quick                        # trains some of it anew, and compares
    python bench/readme.py                                        # tables of docs/decisions.md, and the picture

For each task and optimizer a sweep over thirds of a decade finds the best peak of 300 steps (15 of warm-up, then a
cosine to a tenth; the larger GPT takes 1000 steps, 50 of warm-up). Then runs with other seeds begin at 1, 10 and 100
times that peak, with and without the cap. The constants of both were chosen on tasks of the kinds in ``KNOWN``, and on
none of the others.
"""

import argparse
import csv
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

# The checkout, also where the package is not installed, and the runs that the benchmarks share.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from curves import Recurrent, ViT, with_muon
from ledger import table
from torch import Tensor, nn
from torch.nn import functional as F
from workloads import GPT, Batch, stack, standard_digits, text, token_loss

import sharpkern

FILE, PICTURE = Path(__file__).parent / "runs.csv", Path(__file__).parent / "cap.png"
MULTIPLES = (1, 10, 100)
EACH = "cap, each step"
POLICIES = {"none": "no cap", "cap": "**cap**", EACH: "cap, measured in each of the first 40 steps"}
# Seeds of sweeps, and the first one of all other runs.
SWEPT, FIRST_SEED = (0, 1), 20
# A run has failed that loses more than this share of what the best peak gains.
FAILED = 0.25
# Where a sweep begins, in thirds of decades.
START = {"SGD": -1, "momentum": -3, "AdamW": -7, "Muon": -5}


@dataclass(frozen=True)
class Trial:
    """One training run, or one suggested rate.

    Attributes:
        task: its name.
        optimizer: its name.
        policy: "none"; "cap"; "cap, each step", which measures in each of the first 40 steps; "find_lr", "range test",
            which suggest a peak and do not train.
        multiple: of the best peak, 0 in the sweep for it.
        peak: learning rate.
        seed: of weights and batches.
        initial: loss before.
        final: loss after, inf where the run has diverged, nan of a suggestion.
        forwards: that measurements took.
        seconds: of one CPU core.
    """

    task: str
    optimizer: str
    policy: str
    multiple: int
    peak: float
    seed: int
    initial: float
    final: float
    forwards: int
    seconds: float

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from others."""
        return self.task, self.optimizer, self.policy, self.multiple, round(3 * math.log10(self.peak)), self.seed


# --- Tasks ---------------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """A GRU that reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(8, 48, batch_first=True), nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [batch, 64] to logits."""
        return self.head(self.layer(images.view(-1, 8, 8))[0][:, -1])


class Scaled(nn.Module):
    """Multiplies by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return self.factor * x


def _deep() -> nn.Module:
    model = stack(*[64] * 7, 10, between=nn.Tanh)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, 1.4)
    return model


def _cnn() -> nn.Module:
    first, second = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 24, 3, padding=1)
    body = (first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.Flatten())
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *body, nn.Linear(384, 10))


_ALL = ("SGD", "momentum", "AdamW")
MODELS: dict[str, tuple[Callable[[], nn.Module], Sequence[str]]] = {
    "MLP": (lambda: stack(64, 64, 64, 10, between=nn.ReLU), _ALL),
    "deep tanh net": (_deep, _ALL),
    "CNN": (_cnn, _ALL),
    "autoencoder": (lambda: stack(64, 96, 16, 96, 64, between=nn.ReLU), _ALL),
    "GRU": (Rows, _ALL),
    "unnormalised inputs": (lambda: nn.Sequential(Scaled(16.0), stack(64, 96, 96, 10, between=nn.ReLU)), _ALL),
    "GPT": (lambda: GPT(64, 2, 4, 48), _ALL),
    "ViT": (ViT, ("momentum", "AdamW")),
    "LSTM": (lambda: Recurrent(nn.LSTM, 96), ("momentum", "AdamW")),
    "GPT, Muon": (lambda: GPT(64, 2, 4, 48), ("Muon",)),
    # 5.5 million parameters.
    "larger GPT": (lambda: GPT(272, 6, 4, 48), ("AdamW", "Muon")),
}
KNOWN = tuple(MODELS)[:7]
OF_TEXT = ("GPT", "LSTM")
# One seed where others have several.
SLOW = ("GPT", "ViT", "LSTM", "GPT, Muon", "larger GPT")


def steps_of(task: str) -> int:
    """Return how many steps a run takes."""
    return 1000 if task == "larger GPT" else 300


@cache
def _data() -> tuple[Tensor, Batch]:
    return text(), standard_digits()


class Task:
    """A model and its data."""

    def __init__(self, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = MODELS[name][0]()
        self.of_text, self._rebuilds = any(kind in name for kind in OF_TEXT), name == "autoencoder"
        self.steps = steps_of(name)
        self._generator = torch.Generator().manual_seed(1000 + seed)
        self._text, self._digits = _data()

    def draw(self, size: int | None = None, generator: torch.Generator | None = None) -> Batch:
        """Return the next batch."""
        generator = generator or self._generator
        if self.of_text:
            starts = torch.randint(len(self._text) - 49, (size or 12,), generator=generator)
            rows = self._text[starts[:, None] + torch.arange(49)]
            return rows[:, :-1], rows[:, 1:]
        images, labels = self._digits
        rows = torch.randint(len(images), (size or 64,), generator=generator)
        return images[rows], labels[rows]

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        inputs, targets = batch
        if self._rebuilds:
            return 10 * F.mse_loss(self.model(inputs), inputs)
        return token_loss(self.model(inputs), targets) if self.of_text else F.cross_entropy(self.model(inputs), targets)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the loss of all images, or of much text."""
        return float(self.loss(self.draw(96, torch.Generator().manual_seed(5)) if self.of_text else self._digits))

    def optimizers(self, name: str, lr: float) -> list[torch.optim.Optimizer]:
        """Return those that step together; a peak is of the first."""
        parameters = self.model.parameters()
        if name == "AdamW":
            return [torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.01)]
        if name == "Muon":
            both = with_muon(self.model)
            ratio = lr / both[0].param_groups[0]["lr"]
            for group in (group for one in both for group in one.param_groups):
                group["lr"] *= ratio
            return both
        return [torch.optim.SGD(parameters, lr, momentum=0.9 if name == "momentum" else 0.0)]


# --- Runs ----------------------------------------------------------------------------------------------------------


def share_of_peak(step: int, steps: int) -> float:
    """Up in a twentieth of the steps, then down to a tenth along a cosine."""
    warm_up = steps // 20
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def train(task: str, optimizer: str, policy: str, multiple: int, peak: float, seed: int) -> Trial:
    """Train a model."""
    started, own = time.process_time(), Task(task, seed)
    optimizers, initial, final = own.optimizers(optimizer, peak), own.evaluate(), math.nan
    groups = [group for one in optimizers for group in one.param_groups]
    peaks = [group["lr"] for group in groups]
    every = (lambda step: step < 40 or step % 10 == 0) if policy == EACH else sharpkern.LRCap.every(10)
    monitor = sharpkern.Monitor(own.model, optimizers, every=every)
    cap = sharpkern.LRCap(monitor, optimizers, peak=peak) if policy != "none" else None
    for step in range(own.steps):
        for group, its_peak in zip(groups, peaks, strict=True):
            group["lr"] = its_peak * share_of_peak(step, own.steps)
        batch = own.draw()
        own.model.zero_grad()
        loss = own.loss(batch)
        loss.backward()
        if not float(loss.detach()) < 50 * (initial + 1):
            final = math.inf
            break
        if cap is not None:
            monitor(lambda batch=batch: own.loss(batch), loss=loss)
            cap.step()
        for one in optimizers:
            one.step()
    final = own.evaluate() if math.isnan(final) else final
    final = final if math.isfinite(final) else math.inf
    forwards = sum(record.measurement.forwards for record in monitor.history)
    seconds = round(time.process_time() - started, 2)
    return Trial(task, optimizer, policy, multiple, peak, seed, initial, final, forwards, seconds)


def suggested(task: str, optimizer: str, policy: str, seed: int) -> Trial:
    """Suggest a peak."""
    started, own = time.process_time(), Task(task, seed)
    (sgd,), initial = own.optimizers(optimizer, 1e-3), own.evaluate()
    peak = _followed(own, sgd) if policy == "find_lr" else _range_test(own, sgd, initial)
    seconds = round(time.process_time() - started, 2)
    return Trial(task, optimizer, policy, 0, peak, seed, initial, math.nan, 0, seconds)


def _followed(task: Task, optimizer: torch.optim.Optimizer) -> float:
    batches = [task.draw() for _ in range(40)]
    return float(sharpkern.find_lr(task.model, optimizer, batches, task.loss).lr)


def _range_test(task: Task, optimizer: torch.optim.Optimizer, initial: float) -> float:
    """The rate at which the smoothed loss is lowest in 100 steps that go through 5.5 decades."""
    lowest, weight, smooth, best = math.inf, 0.0, 0.0, 1e-5
    for step in range(100):
        lr = 1e-5 * 10 ** (5.5 * step / 99)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss = task.loss(task.draw())
        loss.backward()
        now = float(loss.detach())
        if not now < 3 * initial + 1:
            break
        smooth, weight = 0.8 * smooth + 0.2 * now, 0.8 * weight + 0.2
        if smooth / weight < lowest:
            lowest, best = smooth / weight, lr
        optimizer.step()
    return best


class Log:
    """The runs of a file, to which new ones are added at once."""

    def __init__(self, path: Path = FILE) -> None:
        self._path = path
        self.trials = {trial.key: trial for trial in load(path)}

    def get(self, key: tuple[Any, ...], make: Callable[[], Trial]) -> Trial:
        """Return a run, from the file if it is there."""
        if key not in self.trials:
            made = self.trials[key] = make()
            is_new = not self._path.exists()
            with self._path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, [field.name for field in fields(Trial)])
                if is_new:
                    writer.writeheader()
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(made).items()})
            print(*asdict(made).values(), flush=True)
        return self.trials[key]


def load(path: Path = FILE) -> list[Trial]:
    """Return the runs of a file."""
    if not path.exists():
        return []
    kinds = {field.name: field.type for field in fields(Trial)}
    with path.open(newline="", encoding="utf-8") as file:
        return [Trial(**{k: kinds[k](v) for k, v in row.items()}) for row in csv.DictReader(file)]


def best_peak(log: Log, task: str, optimizer: str) -> float:
    """Climb down the sweep from where it begins, and return the peak with the lowest mean loss."""
    means: dict[int, float] = {}

    def loss(index: int) -> float:
        if index not in means:
            losses = []
            for seed in SWEPT[: 1 if task in SLOW else None]:
                key = (task, optimizer, "none", 0, index, seed)
                trial = log.get(key, lambda seed=seed: train(task, optimizer, "none", 0, 10 ** (index / 3), seed))
                losses.append(min(trial.final, 1.5 * trial.initial))
            means[index] = statistics.mean(losses)
        return means[index]

    here = START[optimizer]
    while True:
        best = min((here - 1, here, here + 1), key=loss)
        if best == here:
            return 10 ** (here / 3)
        here = best


def trials(log: Log, asked: Sequence[str], num_seeds: int) -> Iterator[Trial]:
    """Go through all runs, those that are there and those that are made."""
    for task, optimizer in (entry.split("/") for entry in asked):
        best = best_peak(log, task, optimizer)
        seeds = range(FIRST_SEED, FIRST_SEED + (1 if task in SLOW else num_seeds))
        for seed, multiple, policy in product(seeds, MULTIPLES, POLICIES):
            # Where the others of this kind had failed, to see why.
            if policy == EACH and (optimizer != "momentum" or multiple != 10):
                continue
            peak = best * multiple
            key = (task, optimizer, policy, multiple, round(3 * math.log10(peak)), seed)
            yield log.get(key, partial(train, task, optimizer, policy, multiple, peak, seed))
        # Of suggestions the peak is not known before.
        known = {(one.task, one.optimizer, one.policy, one.seed) for one in log.trials.values()}
        for policy, seed in product(("find_lr", "range test") if optimizer in ("SGD", "momentum") else (), SWEPT):
            key = (task, optimizer, policy, seed)
            if key not in known:
                yield log.get(key, partial(suggested, *key))


# --- Tables --------------------------------------------------------------------------------------------------------


def regrets(found: Iterable[Trial]) -> list[tuple[Trial, float]]:
    """Return each run with its final loss above that of the best peak, as a share of what this has gained."""
    runs = [trial for trial in found if trial.multiple]
    reference: dict[tuple[str, str], list[Trial]] = {}
    for trial in runs:
        if (trial.policy, trial.multiple) == ("none", 1):
            reference.setdefault((trial.task, trial.optimizer), []).append(trial)
    means = {key: statistics.mean(one.final for one in group) for key, group in reference.items()}
    assert all(map(math.isfinite, means.values()))
    return [
        (one, (min(one.final, 1.5 * one.initial) - best) / (one.initial - best))
        for one in runs
        if (best := means.get((one.task, one.optimizer))) is not None
    ]


def failures(found: Iterable[Trial]) -> dict[tuple[str, str, str, int], int]:
    """Return how many runs of each kind have failed."""
    counts: dict[tuple[str, str, str, int], int] = {}
    for one, regret in regrets(found):
        key = (one.task, one.optimizer, one.policy, one.multiple)
        counts[key] = counts.get(key, 0) + (regret > FAILED)
    return {key: counts[key] for key in sorted(counts)}


def _percent(share: float, digits: int = 0) -> str:
    # Not minus nothing.
    return f"{round(share, digits + 2) + 0.0:.{digits}%}"


def cap_table(found: Sequence[Trial] | None = None) -> list[str]:
    """Mean regret and failures, by optimizer, with the tasks that constants were chosen on and with others."""
    rows = regrets(load() if found is None else found)
    lines = []
    for new, optimizer, policy in product((False, True), START, POLICIES):
        cells = []
        for multiple in MULTIPLES:
            own = [
                (one.task, regret)
                for one, regret in rows
                if (one.optimizer, one.policy, one.multiple) == (optimizer, policy, multiple)
                and (one.task not in KNOWN) == new
            ]
            tasks = dict.fromkeys(task for task, _ in own)
            means = [statistics.mean(regret for task, regret in own if task == one) for one in tasks]
            failed = sum(regret > FAILED for _, regret in own)
            cells.append(f"{_percent(statistics.mean(means), 1)} | {failed} of {len(own)}" if own else " | ")
        if any(cell != " | " for cell in cells):
            about = "new" if new else "known", optimizer, POLICIES[policy]
            lines.append({"cells": " | ".join([*about, *cells])})
    head = " | ".join(["tasks | optimizer | policy", *(f"×{m}: mean regret | failed" for m in MULTIPLES)])
    return table(head, "{cells}", lines)


def task_table(found: Sequence[Trial] | None = None) -> list[str]:
    """Mean regret of every task, without and with the cap."""
    rows = regrets(load() if found is None else found)
    lines = []
    for task, optimizer in dict.fromkeys((one.task, one.optimizer) for one, _ in rows):
        cells = []
        for multiple, policy in product(MULTIPLES, ("none", "cap")):
            own = [
                (one, regret)
                for one, regret in rows
                if (one.task, one.optimizer, one.multiple, one.policy) == (task, optimizer, multiple, policy)
            ]
            cells.append(_percent(statistics.mean(regret for _, regret in own)) if own else "")
        peak = next(o.peak for o, _ in rows if (o.task, o.optimizer, o.multiple) == (task, optimizer, 1))
        lines.append({"cells": " | ".join([task, optimizer, f"{peak:.2g}", *cells])})
    head = " | ".join(["task | optimizer | best peak", *(f"×{m}, no cap | ×{m}, cap" for m in MULTIPLES)])
    return table(head, "{cells}", lines)


def find_table(found: Sequence[Trial] | None = None) -> list[str]:
    """How far suggestions are from the best peak of the sweep."""
    all_found = load() if found is None else found
    best = {(one.task, one.optimizer): one.peak for one in all_found if (one.policy, one.multiple) == ("none", 1)}
    lines = []
    for optimizer in ("SGD", "momentum"):
        logs = {
            method: [
                (one.task not in KNOWN, math.log(one.peak / best[one.task, optimizer]))
                for one in all_found
                if (one.optimizer, one.policy) == (optimizer, method) and (one.task, optimizer) in best
            ]
            for method in ("find_lr", "range test")
        }
        # In favour of the range test: its factor is the best one for these very runs.
        middle = statistics.mean(log for _, log in logs["range test"]) if logs["range test"] else 0.0
        for new, (method, off) in product((False, True), logs.items()):
            misses = [abs(log - (middle if method == "range test" else 0.0)) for is_new, log in off if is_new == new]
            if misses:
                name = method if method == "find_lr" else f"range test, lowest loss × {math.exp(-middle):.2g}"
                logs_off = statistics.median(misses), max(misses)
                about = "new" if new else "known", optimizer, name, str(len(misses))
                lines.append({"cells": " | ".join([*about, *(f"×{math.exp(log):.1f}" for log in logs_off)])})
    return table("tasks | optimizer | method | suggestions | off by, median | at most", "{cells}", lines)


def costs(found: Sequence[Trial] | None = None) -> list[str]:
    """What the runs took, in one sentence."""
    all_found = load() if found is None else found
    runs = [one for one in all_found if one.multiple]
    capped = [one for one in runs if one.policy == "cap" and math.isfinite(one.final)]
    forwards = [one.forwards for one in capped if steps_of(one.task) == 300]
    minutes = sum(one.seconds for one in all_found) / 60
    return [
        f"{len(all_found)} runs, {minutes:.0f} minutes of one CPU core, on a busy machine. A capped run of 300 "
        f"steps took {statistics.median(forwards):.0f} forward passes for its measurements (median; at most "
        f"{max(forwards)})."
    ]


def draw(path: Path = PICTURE) -> None:
    """Draw the regret of every run."""
    from sharpkern._support.figures import BLUE, GREY, light_grid, new_figure, save_figure

    rows = regrets(load())
    kinds = [kind for kind in START if any(one.optimizer == kind for one, _ in rows)]
    figure = new_figure(9.0, 3.2)
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True), kinds, strict=True):
        for policy, color, marker, shift in (("none", GREY, "x", -0.12), ("cap", BLUE, "o", 0.12)):
            own = [(one.multiple, regret) for one, regret in rows if (one.optimizer, one.policy) == (kind, policy)]
            xs = [MULTIPLES.index(multiple) + shift for multiple, _ in own]
            style = {"color": color, "markersize": 4, "alpha": 0.6, "label": "no cap" if policy == "none" else "cap"}
            axes.plot(xs, [100 * regret for _, regret in own], marker, **style)
        axes.axhline(100 * FAILED, color="black", linewidth=0.8, linestyle="--")
        axes.set_yscale("symlog", linthresh=10)
        axes.set_xticks(range(len(MULTIPLES)), [f"×{m}" for m in MULTIPLES])
        axes.set_title(kind, fontsize="medium")
        light_grid(axes)
    figure.axes[0].set_ylabel("regret (%)")
    figure.axes[0].legend(fontsize="small")
    figure.supxlabel("peak learning rate, in multiples of the best", fontsize="medium")
    save_figure(figure, path)


def quick() -> tuple[dict[Any, int], dict[Any, int]]:
    """Train two of the runs anew; return their failures, and those of the same runs in the file."""
    own = [one for one in load() if (one.task, one.optimizer) == ("MLP", "AdamW")]
    best = [one for one in own if one.multiple == 1]
    kept = [one for one in own if (one.multiple, one.seed) == (10, FIRST_SEED)]
    made = [train(one.task, one.optimizer, one.policy, one.multiple, one.peak, one.seed) for one in kept]
    return failures([*best, *made]), failures([*best, *kept])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("run", "quick"))
    everything = ";".join(f"{task}/{optimizer}" for task, (_, kinds) in MODELS.items() for optimizer in kinds)
    parser.add_argument("--tasks", default=everything, help="TASK/OPTIMIZER, with semicolons between them")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each kind, of quick tasks")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if asked.what == "run":
        for _ in trials(Log(), asked.tasks.split(";"), asked.seeds):
            pass
        for table in (cap_table, task_table, find_table, costs):
            print(*table(), "", sep="\n")
        return
    made, kept = quick()
    print(made, "as in the file" if made == kept else f"and not as in the file: {kept}")


if __name__ == "__main__":
    main()
