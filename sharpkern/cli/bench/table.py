"""The sitting in short, for people: shares of ceilings with their targets first, and what did not go well last."""

from collections.abc import Iterable, Iterator
from typing import Any

from sharpkern.cli.bench.plan import Section
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

    console = Console(width=WIDTH, highlight=False)
    chosen = {section.name: section for section in sections}
    console.print(_header(record.environment), soft_wrap=True)
    # What matters most comes last: of a long output often only the end is kept.
    makers = {"compiled": _compiled, "linear": _linear, "head": _head, "model": _model, "streaming": _streaming}
    for name, make in makers.items():
        if name in chosen and (cases := _with_rows(record.cases(name))):
            console.print(_table(chosen[name].title, *make(cases)))
    for line in _ceilings(record.cases("ceilings")):
        console.print(line, soft_wrap=True)
    for line in _outcomes(record, chosen.values()):
        console.print(line, soft_wrap=True, markup=False)


def verdict(row: Json) -> str:
    """Return how a row stands to its target.

    Args:
        row: of a case.

    Returns:
        "reached", "accepted", "MISSED", or nothing where there is no target.
    """
    if "target" in row:
        return "reached" if row["share"] >= row["target"] else "accepted" if row["share"] >= row["accept"] else "MISSED"
    if "most_beyond_plain" in row:
        return "reached" if row["beyond_plain"] <= row["most_beyond_plain"] else "MISSED"
    return ""


def _header(environment: Json) -> str:
    commit = (environment["commit"] or "commit unknown")[:12] + (" with changes" if environment["dirty"] else "")
    device = environment["gpu"] or f"{environment['machine']} CPU, one thread"
    versions = [f"{name} {environment[name]}" for name in ("driver", "torch", "triton") if environment[name]]
    return f"{device}: {', '.join(versions)}, sharpkern {environment['sharpkern']} ({commit})"


def _table(title: str, columns: list[str], lines: Iterable[list[str]]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    for line in lines:
        table.add_row(*line)
    return table


def _streaming(cases: Json) -> tuple[list[str], Iterator[list[str]]]:
    def lines() -> Iterator[list[str]]:
        for name, rows in cases.items():
            first, again = rows[0], rows[1]
            plain = next((row for row in rows if row["variant"] == "torch"), None)
            yield [
                name,
                first["variant"],
                f"{1e3 * first['median']:.3f}",
                "" if first["host"] is None else f"{1e3 * first['host']:.3f}",
                f"{first['share']:.3f}",
                f"{abs(again['share'] - first['share']):.3f}",
                f"{plain['share']:.3f}" if plain else "",
                _target(first),
                verdict(first),
            ]

    return ["kernel", "backend", "ms", "host ms", "share of copy", "± run", "torch", "target", ""], lines()


def _head(cases: Json) -> tuple[list[str], Iterator[list[str]]]:
    lines = (
        [
            f"{name}: {row['variant']}",
            f"{1e3 * row['median']:.2f}",
            f"{row['share']:.3f}",
            _gigabytes(row.get("allocated")),
            _target(row),
            verdict(row),
        ]
        for name, rows in cases.items()
        for row in rows
        if "variant" in row and not row["variant"].endswith("again")
    )
    return ["loss", "ms", "share of product", "peak GB", "target", ""], lines


def _linear(cases: Json) -> tuple[list[str], Iterator[list[str]]]:
    methods = list(dict.fromkeys(row["variant"] for rows in cases.values() for row in rows if "variant" in row))

    def lines() -> Iterator[list[str]]:
        for name, rows in cases.items():
            shares = {row["variant"]: f"{row['share']:.2f}" for row in rows if "variant" in row}
            yield [name, *(shares.get(method, "") for method in methods[1:])]

    return ["share of product", *methods[1:]], lines()


def _model(cases: Json) -> tuple[list[str], Iterator[list[str]]]:
    def lines() -> Iterator[list[str]]:
        for name, rows in cases.items():
            sharpness = next((row["sharpness"] for row in rows if "sharpness" in row), None)
            for row in rows:
                if "variant" in row:
                    yield [
                        f"{row['model']}: {row['variant'] if name == 'plain forward' else name}",
                        row.get("outcome") or _milliseconds(row),
                        _gigabytes(row.get("allocated")),
                        _gigabytes(row.get("reserved")),
                        _gigabytes(row.get("beyond_plain")),
                        _number(sharpness),
                        verdict(row),
                    ]

    columns = ["model", "ms per forward", "peak GB", "reserved GB", "beyond plain GB", "λ_c", ""]
    return columns, lines()


def _compiled(cases: Json) -> tuple[list[str], Iterator[list[str]]]:
    lines = (
        [f"{name}: {row['kernel']}", *(str(row[key]) for key in ("registers", "spills", "shared", "warps"))]
        for name, rows in cases.items()
        for row in rows
    )
    return ["kernel", "registers", "spills", "shared B", "warps"], lines


def _ceilings(cases: Json) -> Iterator[str]:
    rows = [row for rows in _with_rows(cases).values() for row in rows]
    for row in rows:
        if "bytes_per_second" in row:
            yield f"{row['variant']}: {row['bytes_per_second'] / 1e9:.0f} GB/s"
        else:
            yield f"{row['variant']}: {row['flop_per_second'] / 1e12:.1f} TFLOP/s"


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
    return ", ".join(f"{key} {_number(value)}" for key, value in row.items() if key != "passed")


def _with_rows(cases: Json) -> dict[str, list[Json]]:
    """Return the rows of the cases that are done."""
    return {name: case["rows"] for name, case in cases.items() if case["status"] == DONE}


def _target(row: Json) -> str:
    return f"{row['target']:.2f} ({row['accept']:.2f})" if "target" in row else ""


def _milliseconds(row: Json) -> str:
    if "ms_per_forward" in row:
        return f"{row['ms_per_forward']:.1f}"
    return f"{1e3 * row['median']:.1f}" if "median" in row else ""


def _gigabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f}"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
