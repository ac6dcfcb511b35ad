"""``sharpkern demo``: full-batch gradient descent on handwritten digits, watched to the edge of stability and along it.

The Hessian sharpness λ_max rises while the network trains, until it meets 2/η, where a step no longer contracts along
the sharpest direction. The critical sharpness λ_c of the update stays far below, then jumps to 2/η too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer

from sharpkern._support.files import write_rows
from sharpkern._support.optional import missing
from sharpkern._support.progress import progress_bar
from sharpkern.cli.demo_summary import summary
from sharpkern.cli.digits import DemoRun, train
from sharpkern.cli.refusals import check_output, refusals
from sharpkern.monitoring.plot import plot_history

HELP = (
    "Train a small network on handwritten digits to the edge of stability, in under a minute on one CPU core. "
    "Writes demo.csv and demo.png, and says in words what was seen."
)


def write_csv(run: DemoRun, path: Path) -> None:
    """Write one row per measurement; second derivatives only where they were computed."""
    second = {point.step: point for point in run.hessian}
    rows = []
    for record in run.history:
        row, point = record.row(), second.get(record.step)
        rows.append(
            {
                **{column: row[column] for column in ("step", "loss", "lambda_c", "status", "error", "forwards")},
                "lambda_max": point.hessian_sharpness if point else None,
                "lambda_dir": point.directional_sharpness if point else None,
                "two_over_lr": run.threshold,
            }
        )
    write_rows(path, rows)


def draw(run: DemoRun, path: Path) -> None:
    """Draw the run into an image."""
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
    """Train, measure, write and tell."""
    for package in ("sklearn", "scipy", "matplotlib"):
        if find_spec(package) is None:
            typer.echo(str(missing(package, "demo", "sharpkern demo")), err=True)
            raise typer.Exit(1)
    with refusals():
        check_output(output, "demo.csv", "demo.png")
        with _one_thread(), progress_bar(steps) as advance:
            run = train(steps, lr, samples, seed, lambda monitor: advance(str(monitor)))
        output.mkdir(parents=True, exist_ok=True)
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
