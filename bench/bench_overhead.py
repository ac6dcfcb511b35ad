"""What a Monitor adds to training time: a GPT-2 of 32 M parameters on the CPU, measured on every 50th step.

    python bench/bench_overhead.py [--steps N] [--windows N] [--measurements N] [--quick] [--json PATH]

In one run, in one thread, two ways:

- Whole windows of 50 steps, trained by twins, one with a monitor, which measures once in each window, and one without.
  They take turns at every step, so that whatever else the machine does slows both alike, and have to end each window
  in the same bits, or nothing is recorded.
- Steps that are measured against their neighbours that are not. What one measurement adds, in steps, divided by n, is
  the overhead of measuring on every n-th step.

One sequence of 256 tokens makes a step: few, so that weights formed for a probe weigh more beside its products, and
λ_c varies more from batch to batch, than in runs of more tokens.
"""

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

# The checkout, also where the package is not installed.
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from ledger import Sitting, append
from torch import Tensor
from workloads import Seconds, text

import sharpkern

EVERY = (10, 20, 50, 100, 200)
# Steps before anything counts; the first is measured, and makes the checks that are made once.
_WARM_UP = 20
# From one measured step to the next, where single steps are compared.
_SPACING = 4


class Training:
    """Next-byte prediction on Python's help topics, by AdamW."""

    def __init__(self, width: int, layers: int, context: int, every: int) -> None:
        torch.manual_seed(0)
        sizes = {"vocab_size": 256, "n_positions": context, "n_embd": width, "n_layer": layers, "n_head": 8}
        others = {"bos_token_id": None, "eos_token_id": None}
        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **others))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
        self.monitor = sharpkern.Monitor(self.model, self.optimizer, every=every)
        self._data, self._context = text(), context

    def step(self, number: int, measured: bool) -> Seconds:
        """Train one step."""
        first = number * self._context % (len(self._data) - self._context)
        tokens = self._data[None, first : first + self._context]

        def loss_fn() -> Tensor:
            loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
            return loss

        # Dropout masks are the step's, whoever has drawn before.
        torch.manual_seed(number)
        start = Seconds.now()
        self.optimizer.zero_grad()
        loss_fn().backward()
        if measured:
            self.monitor(loss_fn)
        self.optimizer.step()
        return Seconds.now().since(start)

    def bits(self) -> list[Tensor]:
        """Weights and optimizer state."""
        state = [value for slot in self.optimizer.state.values() for value in slot.values()]
        return [*self.model.parameters(), *state]


def windows(training: Training, twin: Training, num_steps: int, num_windows: int) -> list[dict[str, Any]]:
    """Train twins in turns, step by step."""
    rows = []
    # The first step is measured, which starts from the last result.
    training.monitor.step = 0
    for window in range(num_windows):
        taken: dict[bool, list[Seconds]] = {True: [], False: []}
        for number in range(num_steps):
            for measured in (True, False) if number % 2 == 0 else (False, True):
                one = training if measured else twin
                taken[measured].append(one.step(_WARM_UP + window * num_steps + number, measured))
        if not all(map(torch.equal, training.bits(), twin.bits())):
            raise RuntimeError("training with a monitor differs from training without, nothing is recorded")
        wall, cpu = (
            {measured: sum(getattr(one, clock) for one in each) for measured, each in taken.items()}
            for clock in ("wall", "cpu")
        )
        rows.append(
            {
                "steps": num_steps,
                "with_seconds": wall[True],
                "without_seconds": wall[False],
                "overhead": wall[True] / wall[False] - 1,
                "overhead_cpu": cpu[True] / cpu[False] - 1,
                "forwards": training.monitor.history[-1].measurement.forwards,
            }
        )
    return rows


def measured_steps(training: Training, num: int, start: int) -> list[dict[str, Any]]:
    """Train on, some steps measured, and compare each with the steps around it that are not."""
    # The monitor is due on each call here.
    monitor = training.monitor
    taken, measurements = [], {}
    for number in range(num * _SPACING + _SPACING // 2):
        measured = number % _SPACING == _SPACING // 2
        monitor.step = 0
        taken.append(training.step(start + number, measured))
        if measured:
            measurements[number] = monitor.history[-1].measurement
    rows = []
    for number, measurement in measurements.items():
        around = [n for n in range(number - _SPACING // 2, number + _SPACING // 2 + 1) if n not in measurements]
        plain = [taken[n] for n in around if n < len(taken)]
        wall, cpu = median(one.wall for one in plain), median(one.cpu for one in plain)
        rows.append(
            {
                "steps": taken[number].wall / wall - 1,
                "steps_cpu": taken[number].cpu / cpu - 1,
                "step_seconds": wall,
                "seconds": measurement.seconds,
                "forwards": measurement.forwards,
                "status": measurement.status,
            }
        )
    return rows


def overhead(num_steps: int, num_windows: int, num_measured: int, quick: bool = False) -> dict[str, Any]:
    """Run the benchmark."""
    width, layers, context = (32, 2, 32) if quick else (512, 10, 256)
    training, twin = (Training(width, layers, context, num_steps) for _ in range(2))
    first = [training.step(number, measured=number == 0) for number in range(_WARM_UP)]
    for number in range(_WARM_UP):
        twin.step(number, measured=False)
    in_windows = windows(training, twin, num_steps, num_windows)
    del twin
    steps = measured_steps(training, num_measured, _WARM_UP + num_windows * num_steps)
    costs = sorted(row["steps"] for row in steps)
    quarter = len(costs) // 4
    return {
        "model": "GPT-2",
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "tokens": context,
        "step_seconds": median(row["step_seconds"] for row in steps),
        "first_measurement_steps": first[0].wall / median(one.wall for one in first[1:]) - 1,
        "windows": in_windows,
        "measured_steps": steps,
        "by_every": [
            {
                "every": every,
                "overhead": median(costs) / every,
                "lower_quartile": costs[quarter] / every,
                "upper_quartile": costs[-1 - quarter] / every,
                "overhead_cpu": median(row["steps_cpu"] for row in steps) / every,
            }
            for every in EVERY
        ],
    }


def main() -> None:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="steps of a window, of which one is measured")
    parser.add_argument("--windows", type=int, default=2, help="how many windows")
    parser.add_argument("--measurements", type=int, default=12, help="measured steps that are compared with others")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--json", type=Path, help="append the record to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sitting = Sitting(arguments.quick)
    found = overhead(arguments.steps, arguments.windows, arguments.measurements, arguments.quick)
    record = sitting.record(overhead=found, environment={"transformers": transformers.__version__})
    for row in found["windows"]:
        print(
            f"{row['steps']} steps {row['with_seconds']:.1f} s with a monitor, {row['without_seconds']:.1f} s without, "
            f"{row['overhead']:+.1%} (processor time {row['overhead_cpu']:+.1%}), {row['forwards']} forwards"
        )
    print(f"step {found['step_seconds']:.2f} s; first measurement {found['first_measurement_steps']:.1f} steps")
    for row in found["by_every"]:
        print(
            f"every {row['every']}: {row['overhead']:.1%}, half of them from {row['lower_quartile']:.1%} to "
            f"{row['upper_quartile']:.1%} (processor time {row['overhead_cpu']:.1%})"
        )
    before, after = record["environment"]["load_average"]
    print(f"load average {before:.1f} before, {after:.1f} after")
    if arguments.json:
        append(arguments.json, record)


if __name__ == "__main__":
    main()
