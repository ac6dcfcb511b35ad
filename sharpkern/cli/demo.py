"""``sharpkern demo``: full-batch gradient descent on handwritten digits, watched to the edge of stability and along it.

The Hessian sharpness λ_max rises while the network trains, until it meets 2/η, where a step no longer contracts along
the sharpest direction. The critical sharpness λ_c of the update stays far below, then jumps to 2/η too.
"""

import csv
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from sharpkern._extras import missing
from sharpkern.direction import Direction
from sharpkern.directional import directional_sharpness
from sharpkern.hessian import hessian_sharpness
from sharpkern.monitor import Monitor, Record
from sharpkern.plot import plot_history
from sharpkern.thresholds import stability_threshold

HELP = (
    "Train a small network on handwritten digits to the edge of stability, in under a minute on one CPU core. "
    "Writes demo.csv and demo.png, and says in words what was seen."
)

# Odd, both: at the edge of stability the iterate swings from side to side with a period of two steps, and an even
# stride would only ever see one of the sides.
MONITOR_EVERY = 3
HESSIAN_EVERY = 15

# Share of the run, at its end, that the medians are of.
LAST_SHARE = 0.4


@dataclass(frozen=True)
class HessianPoint:
    """What second derivatives say at one step.

    Attributes:
        step: The step.
        hessian_sharpness: λ_max(H), in 1/learning-rate.
        directional_sharpness: ΔθᵀHΔθ/Δθᵀg, in 1/learning-rate.
        products: Hessian-vector products that λ_max took.
    """

    step: int
    hessian_sharpness: float
    directional_sharpness: float
    products: int


@dataclass
class DemoRun:
    """A training run and what was measured in it.

    Attributes:
        lr: Learning rate η.
        threshold: 2/η.
        num_samples: Size of the full batch.
        num_steps: Steps that were asked for.
        history: The Monitor's records.
        hessian: What Lanczos saw.
        diverged_at: The step at which the loss was no longer finite, or None.
    """

    lr: float
    threshold: float
    num_samples: int
    num_steps: int
    history: list[Record] = field(default_factory=list)
    hessian: list[HessianPoint] = field(default_factory=list)
    diverged_at: int | None = None


def digits(num_samples: int = 1797, seed: int = 0, noisy_share: float = 0.2) -> tuple[Tensor, Tensor]:
    """Load scikit-learn's handwritten digits, some with a random label, which keeps the loss from reaching zero.

    Args:
        num_samples: How many, from the first on.
        seed: Chooses the labels that are replaced, and by what.
        noisy_share: Share of the labels to replace.

    Returns:
        Inputs, float32 [num_samples, 64] in 0 … 2, and labels, int64 [num_samples].

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing("scikit-learn", "demo", "the digits data set") from error
    pixels, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.tensor(pixels[:num_samples], dtype=torch.float32) / 8
    clean = torch.tensor(labels[:num_samples])
    replaced = torch.rand(len(clean), generator=generator) < noisy_share
    return inputs, torch.where(replaced, torch.randint(10, clean.shape, generator=generator), clean)


def network(seed: int = 0, width: int = 128) -> nn.Sequential:
    """Build an MLP of four linear layers with GELU between them, in torch's default initialization.

    Args:
        seed: Of the initialization; torch's random stream is left as it was.
        width: Of the hidden layers.

    Returns:
        The model, 64 inputs and 10 outputs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(64, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, 10),
        )


def train(
    num_steps: int, lr: float, num_samples: int, seed: int, on_step: Callable[[Monitor], None] = lambda monitor: None
) -> DemoRun:
    """Run gradient descent and measure all three sharpnesses on the way.

    Args:
        num_steps: Steps of gradient descent.
        lr: Learning rate η.
        num_samples: How many digits.
        seed: Of the initialization and the label noise.
        on_step: Called after every step.

    Returns:
        The run, which ends early where the loss is no longer finite.
    """
    inputs, labels = digits(num_samples, seed)
    model = network(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    monitor = Monitor(model, optimizer, every=MONITOR_EVERY)
    threshold = stability_threshold(optimizer)
    assert isinstance(threshold, float)
    run = DemoRun(lr, threshold, num_samples, num_steps, history=monitor.history)

    def loss_fn() -> Tensor:
        return F.cross_entropy(model(inputs), labels)

    eigenvector = None
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = loss_fn()
        if not loss.isfinite():
            run.diverged_at = step
            break
        loss.backward()
        monitor(loss_fn)
        if step % HESSIAN_EVERY == 0:
            top = hessian_sharpness(model, loss_fn, v0=eigenvector)
            eigenvector = top.vector
            along = directional_sharpness(model, loss_fn, Direction.from_optimizer(optimizer), method="hvp")
            run.hessian.append(HessianPoint(step, top.value, along, top.iterations))
        optimizer.step()
        on_step(monitor)
    return run


def summary(run: DemoRun) -> str:
    """Say what the run shows, from its numbers.

    Args:
        run: The run, with at least one measurement.

    Returns:
        One paragraph.
    """
    return " ".join([_setting(run), _rise(run), _end(run), _cost(run)])


def _setting(run: DemoRun) -> str:
    """Name the run."""
    losses = [record.measurement.base_loss for record in run.history]
    steps = f"{run.num_steps} steps" if run.diverged_at is None else f"{run.diverged_at} of {run.num_steps} steps"
    text = (
        f"{steps} of full-batch gradient descent at η = {run.lr:g} on {run.num_samples} digits took the loss from "
        f"{losses[0]:.2f} to {losses[-1]:.2f}; the stability threshold 2/η is {run.threshold:.4g}."
    )
    return text if run.diverged_at is None else f"{text} Then the loss was no longer finite: the run diverged."


def _rise(run: DemoRun) -> str:
    """Say when λ_max met the threshold and when λ_c jumped, or that they did not."""
    reached = next((point.step for point in run.hessian if point.hessian_sharpness >= run.threshold), None)
    largest = max(point.hessian_sharpness for point in run.hessian)
    text = (
        f"λ_max never reached it: its largest value was {largest:.3g}."
        if reached is None
        else f"λ_max reached it at step {reached}."
    )
    jumped = next((step for step, value in _critical(run) if value >= run.threshold / 2), None)
    if jumped is None:
        return f"{text} λ_c did not jump: it stayed below half of 2/η."
    before = [value for step, value in _critical(run) if step < jumped]
    if not before:
        return f"{text} λ_c was above half of 2/η from the first step on."
    return f"{text} λ_c jumped at step {jumped}: its median before was {statistics.median(before):.2g}."


def _end(run: DemoRun) -> str:
    """Give the medians at the end of the run and compare them with 2/η."""
    first = (1 - LAST_SHARE) * run.num_steps
    medians = {
        "λ_c": _median([value for step, value in _critical(run) if step >= first]),
        "λ_max": _median([point.hessian_sharpness for point in run.hessian if point.step >= first]),
        "λ_dir": _median([point.directional_sharpness for point in run.hessian if point.step >= first]),
    }
    listed = ", ".join(f"{name} {value:.3g} ({value / run.threshold:.2f} × 2/η)" for name, value in medians.items())
    ratio = medians["λ_c"] / run.threshold
    if math.isnan(ratio):
        verdict = "the end of the run has no λ_c to judge by"
    elif abs(ratio - 1) <= 0.05:
        verdict = "λ_c stands at 2/η to within 5 %, the edge of stability"
    elif abs(ratio - 1) <= 0.25:
        verdict = "λ_c stands near 2/η, but not within 5 % of it"
    else:
        verdict = (
            "λ_c does not stand at 2/η: the edge of stability was NOT seen; try more steps or another learning rate"
        )
    return f"Medians over the last {100 * LAST_SHARE:.0f} %: {listed}; {verdict}."


def _cost(run: DemoRun) -> str:
    """Say what a measurement took, and how many have no value."""
    forwards = statistics.mean(record.measurement.forwards for record in run.history)
    products = statistics.mean(point.products for point in run.hessian)
    text = f"One λ_c took {forwards:.1f} forward passes on average, one λ_max {products:.1f} Hessian-vector products."
    failed = [record.measurement.status for record in run.history if record.measurement.status != "converged"]
    if not failed:
        return text
    counts = ", ".join(f"{failed.count(status)} {status}" for status in sorted(set(failed)))
    return f"{text} Of {len(run.history)} measurements of λ_c some have no value: {counts}."


def _critical(run: DemoRun) -> Iterator[tuple[int, float]]:
    """Return step and λ_c of the measurements that converged."""
    return (
        (record.step, record.measurement.sharpness)
        for record in run.history
        if record.measurement.status == "converged"
    )


def _median(values: Sequence[float]) -> float:
    """Return the median, nan of nothing."""
    return statistics.median(values) if values else math.nan


def write_csv(run: DemoRun, path: Path) -> None:
    """Write one row per measurement; second derivatives only where they were computed.

    Args:
        run: The run.
        path: The file, written anew.
    """
    second = {point.step: point for point in run.hessian}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["step", "loss", "lambda_c", "status", "error", "forwards", "lambda_max", "lambda_dir", "two_over_lr"]
        )
        for record in run.history:
            m, point = record.measurement, second.get(record.step)
            derivatives = (point.hessian_sharpness, point.directional_sharpness) if point else ("", "")
            writer.writerow(
                [record.step, m.base_loss, m.sharpness, m.status, m.error, m.forwards, *derivatives, run.threshold]
            )


def draw(run: DemoRun, path: Path) -> None:
    """Draw the run into an image.

    Args:
        run: The run.
        path: The file.
    """
    plot_history(
        run.history,
        path,
        extra={
            r"Hessian sharpness $\lambda_{\max}$": [(p.step, p.hessian_sharpness) for p in run.hessian],
            r"directional sharpness $\lambda_{\mathrm{dir}}$": [(p.step, p.directional_sharpness) for p in run.hessian],
        },
        title=f"Gradient descent on {run.num_samples} digits, learning rate {run.lr:g}",
    )


def command(
    steps: Annotated[int, typer.Option(min=10, help="Steps of gradient descent.")] = 600,
    lr: Annotated[float, typer.Option(min=1e-4, help="Learning rate η.")] = 0.1,
    samples: Annotated[int, typer.Option(min=50, max=1797, help="How many digits; 600 for a quick look.")] = 1797,
    seed: Annotated[int, typer.Option(help="Of the initialization and the label noise.")] = 0,
    output: Annotated[Path, typer.Option(file_okay=False, help="Folder for demo.csv and demo.png.")] = Path(),
) -> None:
    """Train, measure, write and tell.

    Args:
        steps: Steps of gradient descent.
        lr: Learning rate.
        samples: How many digits.
        seed: Of the run.
        output: Folder that is written to; made if it is not there.

    Raises:
        Exit: With code 1 if an optional package is missing.
    """
    for package in ("sklearn", "matplotlib"):
        if find_spec(package) is None:
            typer.echo(str(missing(package, "demo", "sharpkern demo")), err=True)
            raise typer.Exit(1)
    output.mkdir(parents=True, exist_ok=True)
    with _one_thread(), _progress(steps) as on_step:
        run = train(steps, lr, samples, seed, on_step)
    write_csv(run, output / "demo.csv")
    draw(run, output / "demo.png")
    from rich.console import Console

    console = Console(highlight=False)
    console.print(summary(run))
    console.print(f"Wrote {output / 'demo.csv'} and {output / 'demo.png'}.", soft_wrap=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one core: the same bits on every run, and no slower at this size."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def _progress(num_steps: int) -> Iterator[Callable[[Monitor], None]]:
    """Show a progress bar with the latest measurement on the error stream, and take it away at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=num_steps)
        yield lambda monitor: progress.update(task, advance=1, description=str(monitor))
