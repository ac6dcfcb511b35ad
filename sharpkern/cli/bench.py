"""``sharpkern bench``: every kernel and engine on this machine, see `sharpkern.bench.sitting`."""

import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sharpkern.bench.report import show
from sharpkern.bench.sitting import BUDGET, INCOMPLETE, SECTIONS, begin, run
from sharpkern.bench.sweep import sweep as sweep_sizes
from sharpkern.cli.refusals import refusals

HELP = (
    "Measure every kernel against what this machine's memory and matrix units reach, and whole models by each engine, "
    "in under ten minutes. Without a GPU: the part that needs none. A second call on the same machine, versions and "
    "sources completes the first."
)

# Seconds that the first look at the machine may take; torch is read from a cold disk there.
_LOOK = 90.0


def command(
    output: Annotated[
        Path, typer.Option(help="JSON file of sittings; this one is continued in it or added to it.")
    ] = Path("sharpkern-bench.json"),
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, a minute on two CPU cores.")] = False,
    section: Annotated[
        list[str] | None,
        typer.Option(help=f"Run only this section; may be repeated. One of {', '.join(s.name for s in SECTIONS)}."),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="Instead: time this operation over sizes, into CSV and PNG files beside the output."),
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds for everything.", min=1)] = BUDGET,
    commit: Annotated[str | None, typer.Option(help="Commit to record where there is no git to ask.")] = None,
) -> None:
    """Run the bench and print its table."""
    started = time.monotonic()
    say = partial(typer.echo, err=True)
    if sweep is not None:
        with refusals():
            code = sweep_sizes(sweep, output, quick=quick, say=say)
        raise typer.Exit(code)
    try:
        with refusals():
            record, sections = begin(output, section or [], quick=quick, limit=min(_LOOK, budget), commit=commit)
    except RuntimeError as error:
        say(str(error))
        raise typer.Exit(1) from error
    if record.environment["gpu"] is None:
        say("NO GPU: small sizes by plain torch. Nothing of this sitting is of a kernel; what needs a GPU is left out.")
    try:
        run(record, sections, quick=quick, budget=budget - (time.monotonic() - started), tell=say)
    except KeyboardInterrupt:
        say(f"Interrupted. What was found so far is in {output}; the same call goes on from there.")
        raise typer.Exit(130) from None
    show(record, sections)
    typer.echo(f"Wrote {output}.")
    if any(record.sections[one.name]["status"] == INCOMPLETE for one in sections):
        raise typer.Exit(1)
