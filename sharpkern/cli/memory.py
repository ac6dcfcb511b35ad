"""``sharpkern memory``: what a measurement will take at scale, before there is a GPU."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from sharpkern.cli.lm_options import Dtype
from sharpkern.cli.refusals import check_file, refusals
from sharpkern.memory.architectures import ARCHITECTURES
from sharpkern.memory.optimizers import OPTIMIZERS
from sharpkern.memory.planning import memory_plan

HELP = (
    "Count what measuring a language model would take in memory, by every method, and which card holds it. Needs "
    "neither GPU nor memory: the engines run on tensors that have shapes and no values."
)


class Optimizer(str, Enum):
    """What trains the model."""

    NONE = "none"
    ADAMW_FP32 = "adamw-fp32"
    ADAMW_BF16 = "adamw-bf16"
    ADAMW_MASTERS = "adamw-masters"
    ADAMW_8BIT = "adamw-8bit"


class Head(str, Enum):
    """How the model's loss is written."""

    STOCK = "stock"
    CHUNKED = "chunked"


def command(
    model: Annotated[
        str, typer.Argument(help=f"{', '.join(ARCHITECTURES)}; or a config.json of transformers, or its folder.")
    ],
    tokens: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 4096,
    batch_size: Annotated[int, typer.Option(help="Sequences on each GPU.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; auto: as the configuration says.")] = Dtype.AUTO,
    optimizer: Annotated[
        Optimizer, typer.Option(help="; ".join(f"{name}: {what}" for name, what in OPTIMIZERS.items()) + ".")
    ] = Optimizer.ADAMW_FP32,
    gpus: Annotated[int, typer.Option(help="Over which FSDP2 shards.")] = 1,
    steps: Annotated[int, typer.Option(help="Step sizes of one pass of the batched engine.")] = 8,
    head: Annotated[
        Head, typer.Option(help="Logits of the whole vocabulary in the loss as it is written, or chunks of them.")
    ] = Head.STOCK,
    json: Annotated[Path | None, typer.Option(dir_okay=False, help="File for the numbers, in bytes.")] = None,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="File for a picture.")] = None,
) -> None:
    """Plan, tell and write."""
    from rich.console import Console

    with refusals():
        for option, path in (("--json", json), ("--plot", plot)):
            if path is not None:
                check_file(option, path)
        plan = memory_plan(
            model,
            tokens=tokens,
            batch_size=batch_size,
            dtype=None if dtype is Dtype.AUTO else getattr(torch, dtype.value),
            optimizer=optimizer.value,
            num_gpus=gpus,
            num_steps=steps,
            head=head.value,
        )
        Console().print(plan)
        for path in filter(None, (json, plot)):
            path.parent.mkdir(parents=True, exist_ok=True)
        if json is not None:
            plan.save(json)
            typer.echo(f"Wrote {json}.")
        if plot is not None:
            plan.plot(plot)
            typer.echo(f"Wrote {plot}.")
