"""``sharpkern mix``: which share of old text in a mix with new text lets neither get worse, before training on it."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from sharpkern._support.optional import require
from sharpkern.cli.checkpoint import checkpoints
from sharpkern.cli.corpus import check_context, encoder, row_loss, rows_of, spread
from sharpkern.cli.lm_options import Dtype, Kind, device_of, listed, maker
from sharpkern.cli.refusals import EXTRAS, check_output, refusals
from sharpkern.mixtures.results import MixtureSweep, Summary
from sharpkern.mixtures.sweep import mixture_sweep

HELP = (
    "Measure, for every share of old text in a mix with new text, how far a language model could step along the mix's "
    "update before its loss on either text rises. Writes mix.csv and mix.png, and names the sweet spot. Stopped and "
    "called again, it goes on where it was."
)


def command(
    old: Annotated[list[Path], typer.Option(help="File or folder of text the model knows; may be repeated.")],
    new: Annotated[list[Path], typer.Option(help="File or folder of text it is to learn; may be repeated.")],
    model: Annotated[str, typer.Option(help="Folder of a model saved by transformers, or its name on the hub.")],
    revision: Annotated[str, typer.Option(help="Revision of the model; of a folder: a folder in it.")] = "",
    ratios: Annotated[str, typer.Option(help="Shares of old text, commas between.")] = "0,.1,.2,.3,.4,.5,.6,.7,.8,.9,1",
    direction: Annotated[Kind, typer.Option(help="Optimizer whose update to measure along.")] = Kind.ADAMW,
    batches: Annotated[int, typer.Option(min=1, help="Mixed batches that an update is made of.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a mixed batch.")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens in a row.")] = 512,
    heldout: Annotated[int, typer.Option(min=1, help="Rows of each text to measure the loss on; not in the mix.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Updates of other rows for each share.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the rows in the mix.")] = 0,
    as_bytes: Annotated[bool, typer.Option("--bytes", help="The model's tokens are bytes; no tokenizer.")] = False,
    beta2: Annotated[float, typer.Option(min=0, max=0.999999, help="Decay of AdamW's second moment.")] = 0.95,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of AdamW.")] = 0.1,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; auto: as they were saved.")] = Dtype.AUTO,
    device: Annotated[str | None, typer.Option(help="Where to measure; the GPU if there is one.")] = None,
    output: Annotated[Path, typer.Option(file_okay=False, help="Folder for the files.")] = Path(),
) -> None:
    """Sweep, write and tell."""
    with refusals():
        require("measuring checkpoints", EXTRAS)
        check_output(output, "mix.jsonl", "mix.csv", "mix.png")
        place, shares = device_of(device), _shares(ratios)
        (checkpoint,) = checkpoints(model, [revision] if revision else [])
        check_context(checkpoint, tokens)
        encode = encoder(checkpoint, as_bytes)
        tasks, sources = {}, {}
        for name, paths in (("old", old), ("new", new)):
            rows = rows_of(paths, encode, tokens, at_least=heldout + batch_size, option=f"--{name}")
            tasks[name], sources[name] = _apart(rows, heldout)
        loaded = checkpoint.load(place, dtype.value)
        with refusals(output / "mix.jsonl", len(set(shares)) * repeats):
            sweep = mixture_sweep(
                loaded,
                # As even as can be: the mean over batches is then that over rows.
                {name: list(rows.tensor_split(-(-heldout // batch_size))) for name, rows in tasks.items()},
                sources,
                shares,
                maker(direction, beta2, weight_decay),
                batch_loss=partial(row_loss, loaded),
                batch_size=batch_size,
                num_batches=batches,
                repeats=repeats,
                seed=seed,
                path=output / "mix.jsonl",
            )
        _show(sweep)
        sweep.to_csv(output / "mix.csv")
        sweep.plot(output / "mix.png")
    typer.echo(f"Wrote {output / 'mix.csv'} and {output / 'mix.png'}.")


def _shares(ratios: str) -> list[float]:
    """Read shares."""
    try:
        shares = [float(word) for word in listed("--ratios", ratios)]
    except ValueError:
        raise ValueError(f"--ratios must be numbers with commas between, got {ratios!r}; pass 0,0.5,1") from None
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"--ratios must be within [0, 1], got {ratios}; they are shares of old text")
    return shares


def _apart(rows: Tensor, heldout: int) -> tuple[Tensor, Tensor]:
    """Return rows to measure on, from all over the text, and all others."""
    taken = torch.zeros(len(rows), dtype=torch.bool)
    taken[spread(len(rows), heldout)] = True
    return rows[taken], rows[~taken]


def _show(sweep: MixtureSweep) -> None:
    """Print λ_c of both texts at every share, and the sweet spot in words."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="λ_c along the mix's update: median (quartiles)")
    for column in ("share of old", *sweep.tasks):
        table.add_column(column, justify="right")
    for shares in sweep.mixes:
        cells = []
        for task in sweep.tasks:
            found = sweep.summary(shares, task)
            values = f"{found.sharpness:.4g} ({found.sharpness_low:.3g} – {found.sharpness_high:.3g})"
            cells.append("\n".join([values, *_not_converged(found)]))
        table.add_row(f"{shares[0]:g}", *cells)
    console = Console(highlight=False)
    console.print(table)
    console.print(_sweet_spot(sweep))


def _not_converged(found: Summary) -> Iterator[str]:
    """Say what became of the repeats without an η_c of their own."""
    for outcome, meaning in (
        ("ascent", "uphill at once"),
        ("unbounded", "no rise found"),
        ("unresolved", "rise too early to resolve"),
        ("failed", "not measured"),
    ):
        count = getattr(found, outcome)
        if count:
            yield f"{count} of {found.repeats} {meaning}"


def _sweet_spot(sweep: MixtureSweep) -> str:
    """Say which share to take."""
    spot = sweep.sweet_spot
    if spot is None:
        return (
            "No sweet spot: at every share the loss on one of the texts rises from the first step on, as far as can be "
            "told (inf), or could not be measured (nan)."
        )
    unbounded = sweep.summary(tuple(spot.shares.values()), spot.task).unbounded
    until = f"before the loss on {spot.task} text rises" if not unbounded else "and in some repeats no rise was found"
    said = (
        f"Sweet spot: {spot.shares['old']:.0%} old text, which allows steps of η = {spot.critical_lr:.3g} "
        f"(λ_c {spot.sharpness:.4g}) {until}."
    )
    alone = sorted(shares[0] for shares in spot.of_repeats)
    return f"{said} By single repeats: {alone[0]:.0%} to {alone[-1]:.0%}." if alone else said
