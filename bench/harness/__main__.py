"""``python -m sharpkern.bench``, for a checkout that is not installed."""

import typer

from sharpkern.cli.bench import HELP, command

if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(help=HELP)(command)
    app()
