"""The command line: ``sharpkern demo``, ``measure``, ``mix``, ``memory``, ``bench`` and ``env``."""

from typing import Annotated

import typer

import sharpkern
from sharpkern.cli import bench, demo, env, measure, memory, mix

app = typer.Typer(
    name="sharpkern",
    help=(
        "Critical sharpness of neural networks while they train: how far the optimizer could step along its own update "
        "before the loss rises. Forward passes only."
    ),
    no_args_is_help=True,
    add_completion=False,
    # Its columns break words in two where the terminal is narrow.
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        typer.echo(f"sharpkern {sharpkern.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Hold the options that stand before the command."""


app.command("demo", help=demo.HELP)(demo.command)
app.command("measure", help=measure.HELP)(measure.command)
app.command("mix", help=mix.HELP)(mix.command)
app.command("memory", help=memory.HELP)(memory.command)
app.command("bench", help=bench.HELP)(bench.command)
app.command("env", help=env.HELP)(env.command)
