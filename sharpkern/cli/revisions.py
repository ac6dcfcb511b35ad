"""λ_c of checkpoints, one of them in memory at a time, and what is written of them."""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from sharpkern._support.figures import draw_alone
from sharpkern._support.files import write_rows
from sharpkern._support.progress import progress_bar
from sharpkern.cli.checkpoint import Checkpoint
from sharpkern.cli.corpus import row_loss
from sharpkern.directions.direction import Direction
from sharpkern.measures.batch_directions import gradient_direction
from sharpkern.measures.blockwise import blockwise_critical_sharpness
from sharpkern.measures.critical import critical_sharpness
from sharpkern.measures.micro_batches import MicroBatch
from sharpkern.measures.result import Measurement, check_values
from sharpkern.mixtures.resume import ResumableLog, Row, restored
from sharpkern.mixtures.sweep import MakeDirection
from sharpkern.monitoring.monitor import Record
from sharpkern.monitoring.plot import draw_blocks, plot_history
from sharpkern.ops.reductions import inner_product, total


def measure_all(
    found: Sequence[Checkpoint],
    data: Sequence[Tensor],
    make_direction: MakeDirection,
    journal: ResumableLog,
    *,
    device: torch.device,
    dtype: str,
    by_block: bool = False,
    sample: float | str | None = None,
) -> list[tuple[str, Measurement]]:
    """Measure checkpoint after checkpoint; those that the journal holds are not measured again.

    Each search starts from the last one's result.
    """
    done = {row["revision"]: row["mark"] for row in journal.rows}
    marks = {checkpoint.label: checkpoint.mark() for checkpoint in found}
    changed = [label for label, mark in marks.items() if done.get(label, mark) != mark]
    if changed:
        raise ValueError(
            f"{', '.join(changed)} must be what was measured before, got other weights by now; give another --output"
        )
    left = [checkpoint for checkpoint in found if checkpoint.label not in done]
    with progress_bar(len(found), done=len(found) - len(left)) as advance:
        for checkpoint in left:
            model = checkpoint.load(device, dtype)
            m, blocks = _measure(model, data, make_direction, _last_found(journal.rows), by_block, sample)
            # Before the next one is loaded.
            del model
            row = {"revision": checkpoint.label, "mark": marks[checkpoint.label], "measurement": asdict(m)}
            journal.add(row | ({"blocks": {name: asdict(m) for name, m in blocks.items()}} if by_block else {}))
            advance(f"{checkpoint.label}: λ_c {m.sharpness:.4g} ({m.status})")
    by_label = {row["revision"]: restored(Measurement, row["measurement"]) for row in journal.rows}
    return [(checkpoint.label, by_label[checkpoint.label]) for checkpoint in found]


def check_row(row: Row) -> None:
    """Refuse a row of the journal that `measure_all` has not written."""
    if row.keys() - {"blocks"} != {"revision", "mark", "measurement"}:
        raise ValueError(f"it holds {', '.join(row)}")
    if not isinstance(row["revision"], str) or not isinstance(row["mark"], str):
        raise ValueError(f"revision and mark are {row['revision']!r} and {row['mark']!r}")
    for entry in (row["measurement"], *row.get("blocks", {}).values()):
        m = restored(Measurement, entry)
        check_values(m.status, m.critical_lr, m.sharpness, m.base_loss)


def steps_of(labels: Sequence[str]) -> list[int] | None:
    """Read the training step out of every revision's name."""
    found = [re.search(r"(?:step|checkpoint)[-_]?(\d+)", label) for label in labels]
    steps = [int(match[1]) for match in found if match is not None]
    grows = all(a < b for a, b in pairwise(steps))
    return steps if len(steps) == len(labels) and grows else None


def write(measured: Sequence[tuple[str, Measurement]], folder: Path, name: str) -> None:
    """Write a table and a picture."""
    labels = [label for label, _ in measured]
    steps = steps_of(labels)
    places = steps if steps is not None else range(len(labels))
    records = [Record(step, None, m) for step, (_, m) in zip(places, measured, strict=True)]
    columns = ("loss", "lambda_c", "critical_lr", "status", "error", "forwards", "engine", "retained", "seconds")
    rows = []
    for label, record in zip(labels, records, strict=True):
        row = record.row()
        step = record.step if steps is not None else None
        rows.append({"revision": label, "step": step, **{column: row[column] for column in columns}})
    write_rows(folder / f"{name}.csv", rows)
    plot_history(records, folder / f"{name}.png", xlabel="step" if steps is not None else "revision, in order")


def write_blocks(rows: Sequence[Row], labels: Sequence[str], folder: Path, name: str) -> None:
    """Write a table and a heat map of the blocks, by depth and revision."""
    found = {row["revision"]: {b: restored(Measurement, m) for b, m in row["blocks"].items()} for row in rows}
    columns = ("lambda_c", "critical_lr", "status", "error", "forwards", "seconds")
    table = []
    for label in labels:
        for block, m in found[label].items():
            row = Record(0, None, m).row()
            table.append({"revision": label, "block": block, **{column: row[column] for column in columns}})
    write_rows(folder / f"{name}.csv", table)
    measured = [(label, found[label]) for label in labels]
    draw_alone(lambda axes: draw_blocks(axes, measured, xlabel="revision"), folder / f"{name}.png", None)


def show(measured: Sequence[tuple[str, Measurement]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("revision", "loss", "λ_c", "η_c", "± (relative)", "status", "retained"):
        table.add_column(column, justify="left" if column in ("revision", "status") else "right")
    for label, m in measured:
        numbers = (f"{value:.4g}" for value in (m.base_loss, m.sharpness, m.critical_lr))
        table.add_row(label, *numbers, f"{m.error:.2g}", m.status, f"{m.retained:.2f}")
    Console(highlight=False).print(table)


def _measure(
    model: nn.Module,
    data: Sequence[Tensor],
    make_direction: MakeDirection,
    initial_lr: float | None,
    by_block: bool,
    sample: float | str | None,
) -> tuple[Measurement, dict[str, Measurement]]:
    """Measure λ_c of the mean loss of all batches along the update that is made of them, and that of each block."""
    # They note the losses that the update is made of.
    losses = [MicroBatch(partial(row_loss, model, rows)) for rows in data]
    direction = make_direction(model, losses)

    def mean() -> Tensor:
        return torch.stack([loss() for loss in losses]).mean()

    if sample is None:
        m = critical_sharpness(model, mean, direction, initial_lr=initial_lr)
    else:
        sloping = replace(direction, slope=_slope(direction, gradient_direction(model, losses)))
        m = critical_sharpness(model, losses, sloping, initial_lr=initial_lr, sample=sample)
    return m, blockwise_critical_sharpness(model, mean, direction) if by_block else {}


def _slope(direction: Direction, gradient: Direction) -> float:
    """Return Δθᵀg."""
    by_parameter = dict(zip(gradient.parameters, gradient.tensors, strict=True))
    pairs = zip(direction.parameters, direction.tensors, strict=True)
    return total(inner_product(delta, by_parameter[parameter]) for parameter, delta in pairs)


def _last_found(rows: Sequence[Row]) -> float | None:
    return next(
        (row["measurement"]["critical_lr"] for row in reversed(rows) if row["measurement"]["status"] == "converged"),
        None,
    )
