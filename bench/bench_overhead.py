"""What a Monitor adds to training time: a GPT-2 of 32 M parameters on the CPU, measured on every 50th step.

    python bench/bench_overhead.py [--quick] [--json PATH]

In one run, in one thread, two ways:

- Whole windows of 50 steps, trained by twins, one with a monitor, which measures once in each window, and one without.
  They take turns at every step, so that whatever else the machine does slows both alike, and have to end each window
  in the same bits, or nothing is recorded.
- Steps that are measured against their neighbours that are not. What one measurement adds, in steps, divided by n, is
  the overhead of measuring on every n-th step.

One sequence of 256 tokens makes a step: few, so that weights formed for a probe weigh more beside its products, and
λ_c varies more from batch to batch, than in runs of more tokens.
"""

from dataclasses import replace
from statistics import median, quantiles
from typing import Any

import ledger
import torch
import transformers
from torch import Tensor
from workloads import Loss, Training, gpt_adamw, seconds, stretches, token_loss

import sharpkern

EVERY = (10, 20, 50, 100, 200)
# Steps before anything counts; the first is measured, and makes the checks that are made once.
_WARM_UP = 20
# From one measured step to the next, where single steps are compared.
_SPACING = 4


class Watched(Training):
    """GPT-2 in training on Python's help topics, by AdamW, and its Monitor."""

    def __init__(self, width: int, layers: int, context: int, every: int) -> None:
        torch.manual_seed(0)
        sizes = {"vocab_size": 256, "n_positions": context, "n_embd": width, "n_layer": layers, "n_head": 8}
        others = {"bos_token_id": None, "eos_token_id": None}
        model, draw = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **others)), stretches(context)

        def draw_next() -> Loss:
            return replace(draw(context), of=lambda outputs, targets: token_loss(outputs.logits, targets))

        super().__init__(model, [gpt_adamw(model.parameters(), 3e-4)], draw_next)
        self.monitor = sharpkern.Monitor(model, self.optimizer, every=every)

    def train(self, number: int, measured: bool) -> float:
        """Train one step, and return the seconds that it took."""

        def train() -> None:
            loss_fn = self.begin()
            if measured:
                self.monitor(loss_fn, loss=loss_fn.trained)
            self.step()

        # Dropout masks are the step's, whoever has drawn before.
        torch.manual_seed(number)
        return seconds(train)

    def bits(self) -> list[Tensor]:
        """Weights and optimizer state."""
        state = [value for slot in self.optimizer.state.values() for value in slot.values()]
        return [*self.model.parameters(), *state]


def windows(training: Watched, twin: Watched, num_steps: int, num_windows: int) -> list[dict[str, Any]]:
    """Train twins in turns, step by step."""
    rows = []
    # The first step is measured, which starts from the last result.
    training.monitor.step = 0
    for window in range(num_windows):
        taken: dict[bool, list[float]] = {True: [], False: []}
        for number in range(num_steps):
            for measured in (True, False) if number % 2 == 0 else (False, True):
                one = training if measured else twin
                taken[measured].append(one.train(_WARM_UP + window * num_steps + number, measured))
        if not all(map(torch.equal, training.bits(), twin.bits())):
            raise RuntimeError("training with a monitor differs from training without, nothing is recorded")
        with_monitor, without = sum(taken[True]), sum(taken[False])
        row = {"steps": num_steps, "with_seconds": with_monitor, "without_seconds": without}
        forwards = training.monitor.history[-1].measurement.forwards
        rows.append({**row, "overhead": with_monitor / without - 1, "forwards": forwards})
    return rows


def measured_steps(training: Watched, num: int, start: int) -> list[dict[str, Any]]:
    """Train on, some steps measured, and compare each with the steps around it that are not."""
    # The monitor is due on each call here.
    monitor = training.monitor
    taken, measurements = [], {}
    for number in range(num * _SPACING + _SPACING // 2):
        measured = number % _SPACING == _SPACING // 2
        monitor.step = 0
        taken.append(training.train(start + number, measured))
        if measured:
            measurements[number] = monitor.history[-1].measurement
    rows = []
    for number, one in measurements.items():
        around = [n for n in range(number - _SPACING // 2, number + _SPACING // 2 + 1) if n not in measurements]
        plain = median(taken[n] for n in around if n < len(taken))
        fields = {"seconds": one.seconds, "forwards": one.forwards, "status": one.status}
        rows.append({"steps": taken[number] / plain - 1, "step_seconds": plain, **fields})
    return rows


def overhead(quick: bool) -> dict[str, Any]:
    """Train, in windows and then in single steps."""
    width, layers, context = (32, 2, 32) if quick else (512, 10, 256)
    num_steps, num_windows, num_measured = (4, 1, 3) if quick else (50, 2, 12)
    training, twin = (Watched(width, layers, context, num_steps) for _ in range(2))
    first = [training.train(number, measured=number == 0) for number in range(_WARM_UP)]
    for number in range(_WARM_UP):
        twin.train(number, measured=False)
    in_windows = windows(training, twin, num_steps, num_windows)
    del twin
    steps = measured_steps(training, num_measured, _WARM_UP + num_windows * num_steps)
    lower, middle, upper = quantiles((row["steps"] for row in steps), n=4, method="inclusive")
    return {
        "model": "GPT-2",
        "parameters": training.parameters,
        "tokens": context,
        "step_seconds": median(row["step_seconds"] for row in steps),
        "first_measurement_steps": first[0] / median(first[1:]) - 1,
        "windows": in_windows,
        "measured_steps": steps,
        "by_every": [
            {"every": n, "overhead": middle / n, "lower_quartile": lower / n, "upper_quartile": upper / n}
            for n in EVERY
        ],
    }


def measure(quick: bool) -> dict[str, Any]:
    """Run the benchmark and print it."""
    found = overhead(quick)
    ledger.show("Windows", found["windows"], "steps with_seconds without_seconds overhead forwards")
    ledger.show("Single steps", found["measured_steps"], "steps step_seconds seconds forwards status")
    ledger.show("Measured on every n-th step", found["by_every"], "every overhead lower_quartile upper_quartile")
    print(f"first measurement: {found['first_measurement_steps']:.1f} steps")
    return {"overhead": found}


if __name__ == "__main__":
    ledger.main(__doc__, measure)
