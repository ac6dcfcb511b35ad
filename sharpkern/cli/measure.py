"""``sharpkern measure``: λ_c of the checkpoints of a language model on a text."""

from pathlib import Path
from typing import Annotated

import typer

from sharpkern._support.optional import require
from sharpkern.cli.checkpoint import checkpoints
from sharpkern.cli.corpus import check_context, encoder, rows_of, spread
from sharpkern.cli.lm_options import Dtype, Kind, device_of, listed, maker, sample_of
from sharpkern.cli.refusals import EXTRAS, check_output, refusals
from sharpkern.cli.revisions import check_row, measure_all, show, write, write_blocks
from sharpkern.mixtures.fingerprint import fingerprint_of
from sharpkern.mixtures.resume import ResumableLog

HELP = (
    "Measure the critical sharpness of a language model's checkpoints on a text, along the update that batches of the "
    "text give. Writes measure.csv and measure.png. Stopped and called again, it goes on where it was."
)


def command(
    model: Annotated[str, typer.Option(help="Folder of a model saved by transformers, or its name on the hub.")],
    text: Annotated[list[Path], typer.Option(help="File or folder of UTF-8 text; may be repeated.")],
    revisions: Annotated[
        str, typer.Option(help="Revisions in the order of training, commas between; of a folder: folders in it.")
    ] = "",
    direction: Annotated[Kind, typer.Option(help="Optimizer whose update to measure along.")] = Kind.ADAMW,
    batches: Annotated[int, typer.Option(min=1, help="Batches that the update is made of.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens in a row.")] = 512,
    as_bytes: Annotated[bool, typer.Option("--bytes", help="The model's tokens are bytes; no tokenizer.")] = False,
    beta2: Annotated[float, typer.Option(min=0, max=0.999999, help="Decay of AdamW's second moment.")] = 0.95,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of AdamW.")] = 0.1,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; auto: as they were saved.")] = Dtype.AUTO,
    device: Annotated[str | None, typer.Option(help="Where to measure; the GPU if there is one.")] = None,
    sample: Annotated[
        str | None,
        typer.Option(help="Measure a sample of many batches: auto, a share such as 0.25, or a number of batches."),
    ] = None,
    by_block: Annotated[
        bool, typer.Option("--by-block", help="Measure each layer alone too; writes measure_blocks.csv and .png.")
    ] = False,
    output: Annotated[Path, typer.Option(file_okay=False, help="Folder for the files.")] = Path(),
) -> None:
    """Measure, write and tell."""
    with refusals():
        require("measuring checkpoints", EXTRAS)
        check_output(output, "measure.jsonl", "measure.csv", "measure.png")
        place = device_of(device)
        share = sample_of(sample)
        found = checkpoints(model, listed("--revisions", revisions))
        for checkpoint in found:
            check_context(checkpoint, tokens)
        num_rows = batches * batch_size
        rows = rows_of(text, encoder(found[0], as_bytes), tokens, at_least=num_rows, option="--text")
        rows = rows[spread(len(rows), num_rows)]
        settings = {
            "model": model,
            "rows": fingerprint_of(rows),
            "direction": direction.value,
            "batches": batches,
            "batch_size": batch_size,
            "tokens": tokens,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "dtype": dtype.value,
            # A journal without blocks or samples goes on without them.
            **({"by_block": True} if by_block else {}),
            **({} if share is None else {"sample": share}),
        }
        journal = ResumableLog(output / "measure.jsonl", settings, check=check_row)
        make_direction = maker(direction, beta2, weight_decay)
        parts = rows.split(batch_size)
        with refusals(output / "measure.jsonl", len(found)):
            measured = measure_all(
                found,
                parts,
                make_direction,
                journal,
                device=place,
                dtype=dtype.value,
                by_block=by_block,
                sample=share,
            )
        show(measured)
        write(measured, output, "measure")
        if by_block:
            write_blocks(journal.rows, [label for label, _ in measured], output, "measure_blocks")
    typer.echo(f"Wrote {output / 'measure.csv'} and {output / 'measure.png'}.")
    if by_block:
        typer.echo(f"Wrote {output / 'measure_blocks.csv'} and {output / 'measure_blocks.png'}.")
