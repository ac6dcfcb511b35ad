"""Bad input on the command line: one message and an exit code, no traceback."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

import typer

# What commands that read checkpoints and draw need.
EXTRAS = {"transformers": "transformers", "matplotlib.figure": "plot"}


@contextmanager
def refusals(journal: Path | None = None, total: int = 0) -> Iterator[None]:
    """Tell what is wrong with the input, or with a file, and stop; and where a run was stopped that can go on."""
    try:
        yield
    except KeyboardInterrupt:
        done = 0
        with suppress(OSError):
            # The first line holds the settings.
            done = max(0, (journal.read_bytes().count(b"\n") if journal else 0) - 1)
        typer.echo(f"Stopped at {done} of {total}: the same command goes on." if total else "Stopped.", err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    except ImportError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


def check_output(folder: Path, *names: str) -> None:
    """Refuse a folder for results that could not be written in the end."""
    for name in names:
        reason = _hindrance(folder / name)
        if reason:
            raise ValueError(
                f"--output must be a folder that can be written, got {folder} ({reason}); choose another, or mend that"
            )


def check_file(option: str, path: Path) -> None:
    """Refuse a file for results that could not be written in the end."""
    reason = _hindrance(path)
    if reason:
        raise ValueError(f"{option} must be a file that can be written, got {path} ({reason}); choose another")


def _hindrance(path: Path) -> str | None:
    """Say what keeps a file from being written, None where nothing does."""
    if path.is_dir():
        return f"{path} is a folder"
    if path.exists():
        return None if os.access(path, os.W_OK) else f"{path} must not be written"
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        return f"{above} is no folder"
    try:
        with TemporaryFile(dir=above):
            return None
    except OSError as error:
        return f"nothing can be written into {above}: {error.strerror}"
