"""A progress bar on the error stream, where that is a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[str], None]


@contextmanager
def progress_bar(total: int, *, done: int = 0, shown: bool = True, words: str = "") -> Iterator[Advance]:
    """Show how far a long run is, and take the bar away at the end."""
    if not shown:
        yield lambda words: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    console = Console(stderr=True)
    # Elsewhere an empty line would be left of it.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(words, total=total, completed=done)
        yield lambda words: progress.update(task, advance=1, description=words)
