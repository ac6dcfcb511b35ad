"""Bad input on the command line: one message and an exit code, no traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def refusals() -> Iterator[None]:
    """Tell what is wrong with the input and stop.

    Yields:
        None: until the block ends.

    Raises:
        BadParameter: for a value that was refused; exit code 2.
        Exit: with code 1 where an optional package is missing.
    """
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except ImportError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
