"""``sharpkern bench``: one command for one sitting at a GPU, of which nothing can get lost.

Every section runs in processes of its own and within its own time. Crashes, hangs, faults of the device and wrong
results are recorded as that, and the next case goes on. What has not passed its check of correctness is not timed. The
record is on the disk after every step, and a second call with the same file goes on where the first one ended.
"""

import time
from pathlib import Path
from typing import Annotated

import typer

from sharpkern.cli.bench.plan import BUDGET, SECTIONS, with_gate

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
    budget: Annotated[float, typer.Option(help="Seconds for everything.", min=1)] = BUDGET,
    commit: Annotated[str | None, typer.Option(help="Commit to record where there is no git to ask.")] = None,
) -> None:
    """Run the bench and print its table.

    Args:
        output: the file.
        quick: whether to take the small sizes.
        section: names of the sections to run; all by default.
        budget: seconds; what does not fit is left to the next call.
        commit: recorded where git does not know.

    Raises:
        BadParameter: if a section is unknown, or the output is a folder, holds something else or cannot be written.
        Exit: with code 1 where a case crashed, hung, failed or was wrong, and 130 on Ctrl-C.
    """
    started = time.monotonic()
    # Workers import this package too, and need none of this.
    from sharpkern.cli.bench import runner, table
    from sharpkern.cli.bench.environment import look_from_outside
    from sharpkern.cli.bench.record import INCOMPLETE, Record

    try:
        sections = with_gate(SECTIONS, section or [])
        environment = look_from_outside(min(_LOOK, budget))
        environment["commit"] = environment["commit"] or commit
        record = Record(output, environment, quick)
        # What cannot be written is better known before anything is measured.
        record.save()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except OSError as error:
        said = f"output must be a file that can be written, got {output}"
        raise typer.BadParameter(f"{said} ({error.strerror}: {error.filename}); choose another name") from error
    except RuntimeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    if environment["gpu"] is None:
        typer.echo("No GPU: small sizes by plain torch, and the sections that need a GPU are left out.", err=True)
    budget -= time.monotonic() - started
    try:
        runner.run(record, sections, quick=quick, budget=budget, tell=lambda line: typer.echo(line, err=True))
    except KeyboardInterrupt:
        typer.echo(f"Interrupted. What was found so far is in {output}; the same call goes on from there.", err=True)
        raise typer.Exit(130) from None
    table.show(record, sections)
    typer.echo(f"Wrote {output}.")
    if any(record.sections[one.name]["status"] == INCOMPLETE for one in sections):
        raise typer.Exit(1)
