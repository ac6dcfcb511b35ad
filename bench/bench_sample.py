"""λ_c of a step of many micro-batches from a sample of them, on training runs, beside the whole batch measured finely.

    python bench/bench_sample.py [--quick] [--json PATH]

Forwards are those of the whole step, the base losses being known from training; errors are |log(η_c/reference)|.
"steady" are the points where the reference's exponent lies between 0.5 and 1.5, which is what most of training is like.
"""

import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import ledger
import numpy as np
import torch
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F
from workloads import GPT, standard_digits, text, token_loss

import sharpkern
from sharpkern.cli.digits import network

STEADY = (0.5, 1.5)
METHODS: dict[str, dict[str, Any]] = {
    "auto, 5 %": {"sample": "auto"},
    "8, trend line": {"sample": 8, "rtol": 0.2},
}
PLAIN, WHOLE = "plain mean of 1/8", "whole, 0.1 %"
_CONTEXT = 64
# Of a micro-batch: 256 and 1024 tokens.
_SMALL, _LARGE = 4, 16


@dataclass(frozen=True)
class Run:
    """What to train, and when to measure: now and then in the first steps, and often after them."""

    name: str
    model: Callable[[], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    lr: float
    num_micro_batches: int
    num_steps: int
    every: int
    rows: int
    first: int = 44
    max_norm: float | None = None
    warm_up: int = 20

    def steps(self) -> Iterator["Step"]:
        """Train; yield before every step that is measured."""
        torch.manual_seed(0)
        model = self.model()
        optimizer = self.optimizer(model.parameters(), lr=self.lr)
        draw = _text_rows if isinstance(model, GPT) else _digits
        loss_of = token_loss if isinstance(model, GPT) else F.cross_entropy
        generator = torch.Generator().manual_seed(1)
        for step in range(self.num_steps):
            optimizer.param_groups[0]["lr"] = self.lr * min(1.0, (step + 1) / self.warm_up)
            optimizer.zero_grad()
            x, y = draw(self.num_micro_batches * self.rows, generator)
            whole = partial(_loss, model, loss_of, x, y, slice(None))
            own = [slice(k * self.rows, (k + 1) * self.rows) for k in range(self.num_micro_batches)]
            parts = [sharpkern.MicroBatch(partial(_loss, model, loss_of, x, y, rows)) for rows in own]
            is_measured = step % (self.every if step >= self.first else 11) == 0
            # Where nothing is measured, all at once: the same gradient in less time.
            for part in parts if is_measured else ():
                (part() / len(parts)).backward()
            if not is_measured:
                whole().backward()
            clip = None
            if self.max_norm is not None:
                clip = nn.utils.clip_grad_norm_(model.parameters(), self.max_norm), self.max_norm
            if is_measured:
                yield Step(step, model, optimizer, parts, whole, clip)
            optimizer.step()


class Step(NamedTuple):
    """A step of training after its backward pass: micro-batches one by one, and as one batch."""

    number: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    parts: list[sharpkern.MicroBatch]
    whole: Callable[[], Tensor]
    clip: tuple[Tensor, float] | None


def _loss(model: nn.Module, loss_of: Any, x: Tensor, y: Tensor, rows: slice) -> Tensor:
    return loss_of(model(x[rows]), y[rows])


def _digits(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images, targets = standard_digits()
    chosen = torch.randint(0, len(images), (num,), generator=generator)
    return images[chosen], targets[chosen]


def _text_rows(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    data = text()
    starts = torch.randint(0, len(data) - _CONTEXT - 1, (num,), generator=generator)
    both = data[starts[:, None] + torch.arange(_CONTEXT + 1)]
    return both[:, :-1], both[:, 1:]


def gpt(dropout: float = 0.0) -> GPT:
    """Return a language model of 50 thousand parameters."""
    model = GPT(32, 2, 4, _CONTEXT)
    if dropout:
        model.blocks = nn.Sequential(*(nn.Sequential(block, nn.Dropout(dropout)) for block in model.blocks))
    return model


def runs(quick: bool) -> list[Run]:
    """Return what is measured."""
    adamw = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.1)
    momentum = partial(torch.optim.SGD, momentum=0.9)
    digits = Run("digits, momentum", network, momentum, 0.03, 28, 9 if quick else 120, 3, 64, first=3)
    if quick:
        return [digits]
    return [
        digits,
        Run("GPT, AdamW, 256 tokens", gpt, adamw, 3e-3, 32, 124, 4, _SMALL),
        Run("GPT, AdamW, 1024 tokens", gpt, adamw, 3e-3, 32, 124, 4, _LARGE),
        Run("GPT, AdamW, 1024 tokens, clipped", gpt, adamw, 3e-3, 32, 124, 4, _LARGE, max_norm=0.3),
        Run("GPT, AdamW, 1024 tokens, dropout 0.1", partial(gpt, 0.1), adamw, 3e-3, 32, 124, 4, _LARGE),
        Run("GPT, AdamW, 256 tokens", gpt, adamw, 3e-3, 128, 124, 4, _SMALL),
        Run("GPT, AdamW, 1024 tokens", gpt, adamw, 3e-3, 128, 124, 4, _LARGE),
    ]


def measure_run(run: Run) -> list[dict[str, Any]]:
    """Return a row for each method and phase."""
    points: list[dict[str, Any]] = []
    monitors: dict[str, sharpkern.Monitor] = {}
    fine = None
    for step, model, optimizer, parts, whole, clip in run.steps():
        if not monitors:
            random_masks = any(isinstance(module, nn.Dropout) for module in model.modules())
            monitors = {name: sharpkern.Monitor(model, optimizer, **options) for name, options in METHODS.items()}
            fine = sharpkern.Monitor(model, optimizer, rtol=1e-3)
        assert fine is not None
        reference = fine(parts if random_masks else whole)
        assert reference is not None
        found = {}
        for name, monitor in monitors.items():
            monitor.step = step
            found[name] = monitor(parts, clip=clip or 1.0)
        few = random.Random(step).sample(parts, max(4, len(parts) // 8))
        direction = replace(sharpkern.Direction.from_optimizer(optimizer), slope=None)
        found[WHOLE] = reference
        found[PLAIN] = sharpkern.critical_sharpness(model, few, direction, initial_lr=reference.critical_lr)
        if reference.status != "converged":
            continue
        exponent = reference.exponent or found["auto, 5 %"].exponent
        steady = exponent is not None and STEADY[0] <= exponent <= STEADY[1]
        for name, m in found.items():
            error = abs(math.log(m.critical_lr / reference.critical_lr)) if m.status == "converged" else math.inf
            share = len(few) / len(parts) if name == PLAIN else 1.0
            row = {"step": step, "method": name, "phase": "steady" if steady else "other", "error": error}
            row |= {"forwards": m.forwards * share, "said": m.error, "size": m.sample_size, "beta": m.beta}
            points.append(row | {"status": m.status, "exponent": exponent})
        print(run.name, run.num_micro_batches, *points[-4:], sep="\n  ", file=sys.stderr, flush=True)
    return list(_summaries(run, points))


def _summaries(run: Run, points: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for method in (*METHODS, WHOLE, PLAIN):
        for phase in ("steady", "other"):
            own = [one for one in points if (one["method"], one["phase"]) == (method, phase)]
            if not own:
                continue
            errors, said, forwards = (np.array([one[key] for one in own]) for key in ("error", "said", "forwards"))
            yield {
                "run": run.name,
                "micro_batches": run.num_micro_batches,
                "method": method,
                "phase": phase,
                "points": len(own),
                "forwards_mean": float(forwards.mean()),
                "error_median": float(np.median(errors)),
                "error_p90": float(np.percentile(errors, 90)),
                "covered": float((errors <= said).mean()),
                "not_converged": sum(one["status"] != "converged" for one in own),
                "size_median": float(np.median([one["size"] or 0 for one in own])),
            }


def measure(quick: bool) -> dict[str, Any]:
    """Measure the runs."""
    chosen = runs(quick)
    # The longest first; errors and counts do not mind a busy machine.
    with multiprocessing.get_context("spawn").Pool(min(2, len(chosen)), torch.set_num_threads, (1,)) as pool:
        rows = [row for of_run in pool.map(measure_run, chosen[::-1], chunksize=1) for row in of_run]
    columns = "run micro_batches method phase points forwards_mean error_median error_p90 covered not_converged"
    ledger.show("λ_c from a sample of the micro-batches", rows, columns + " size_median")
    return {"sample": rows}


if __name__ == "__main__":
    ledger.main(__doc__, measure)
