"""The sitting in short, for people: what the machine reaches first, then shares of it, and what went wrong last."""

from collections.abc import Iterable, Iterator
from typing import Any

from sharpkern.cli.bench import views
from sharpkern.cli.bench.plan import GATE, Section
from sharpkern.cli.bench.record import DONE, LEFT_OUT, NOT_RUN, Json, Record

# Columns of a width that fits a log: the one command's output is often all that comes back.
WIDTH = 118


def show(record: Record, sections: Iterable[Section]) -> None:
    """Print the tables of a sitting.

    Args:
        record: of the sitting.
        sections: which to show.
    """
    from rich.console import Console

    console = Console(width=WIDTH, highlight=False, markup=False)
    chosen = {section.name: section for section in sections}
    console.print(_header(record.environment), soft_wrap=True)
    if reached := _with_rows(record.cases("ceilings")):
        console.print(f"Ceilings: {views.ceilings(reached)}")
    # What matters most comes last: of a long output often only the end is kept.
    makers = {
        "compiled": views.compiled,
        "linear": views.linear,
        "head": views.head,
        "passes": views.passes,
        "model": views.model,
        "streaming": views.streaming,
    }
    for name, make in makers.items():
        if name in chosen and (cases := _with_rows(record.cases(name))):
            view = make(cases).filled()
            console.print(f"\n{chosen[name].title}{': ' if view.about else ''}{view.about}", style="italic")
            console.print(_table(view))
            for column in view.columns:
                if column in views.NOTES:
                    console.print(f"  {column}: {views.NOTES[column]}")
    console.print()
    if GATE in chosen and (checked := _with_any_rows(record.cases(GATE))):
        console.print(f"{chosen[GATE].title}: {views.correctness(checked)}")
    for line in _outcomes(record, chosen.values()):
        console.print(line, soft_wrap=True)


def _header(environment: Json) -> str:
    commit = environment["commit"][:12] if environment["commit"] else "commit unknown"
    commit += " with changes" if environment["dirty"] else ""
    device = environment["gpu"] or f"{environment['machine']} CPU, one thread"
    versions = [f"{name} {environment[name]}" for name in ("driver", "torch", "triton") if environment[name]]
    return f"{device}: {', '.join(versions)}, sharpkern {environment['sharpkern']} ({commit})"


def _table(view: views.View) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for i, column in enumerate(view.columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    for line in view.lines:
        table.add_row(*line)
    return table


def _outcomes(record: Record, sections: Iterable[Section]) -> Iterator[str]:
    """Say of every section how it went, and name the cases that did not go well."""
    for section in sections:
        entry = record.sections.get(section.name, {"status": NOT_RUN, "cases": {}})
        cases = entry["cases"]
        done = sum(case["status"] == DONE for case in cases.values())
        counted = "" if entry["status"] == LEFT_OUT else f", {done} of {len(cases)} cases"
        reason = f": {entry['error']}" if entry.get("error") else ""
        yield f"{section.name}: {entry['status']}{counted}{reason}"
        for name, case in cases.items():
            if case["status"] != DONE:
                yield f"  {name}: {case['status'].upper()}{': ' + case['error'] if case.get('error') else ''}"
                yield from (f"    {_wrong(row)}" for row in case.get("rows", []) if row.get("passed") is False)


def _wrong(row: Json) -> str:
    return ", ".join(f"{key} {views.number(value)}" for key, value in row.items() if key != "passed")


def _with_rows(cases: Json) -> views.Cases:
    """Return the rows of the cases that are done."""
    return {name: case["rows"] for name, case in cases.items() if case["status"] == DONE}


def _with_any_rows(cases: Json) -> views.Cases:
    """Return the rows of all cases that have some, also where they went wrong."""
    return {name: case["rows"] for name, case in cases.items() if case.get("rows")}
