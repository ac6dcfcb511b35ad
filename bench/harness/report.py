"""The sitting in short, for people: what the machine reaches first, then shares of it, and what went wrong last."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from .linear import NAIVE, ONE_AT_A_TIME
from .sitting import DONE, GATE, LEFT_OUT, NOT_RUN, Record, Section
from .timing import Json

# Columns of a width that fits a log: the one command's output is often all that comes back.
WIDTH = 118
# Below so many parameters the layers of a model take less time than it takes to call them.
_FEW_PARAMETERS = 1_000_000
# What an engine may choose from to take K step sizes, and what every one of them is held against.
WAYS = ("products", "formed", "fused")
REFERENCES = ("product again", NAIVE, ONE_AT_A_TIME)
_ASKED = {"target", "least_times_naive"}

# Rows of the cases of a section, by case.
Rows = Mapping[str, list[Json]]
Text = Callable[[Any], str]


# -- the ways through a linear layer ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """The ways to take K step sizes of M tokens at once, each the median over shapes."""

    dtype: str  # of inputs and weights, without "torch."
    tokens: int  # per step size, M
    at_once: int  # step sizes per pass, K
    shares: Mapping[str, float]  # speed per step size over that of the bare product, by way
    floor: Mapping[str, float]  # of each way the share of what reading W and D once would take, where tokens are few
    references: Mapping[str, float]  # shares of what takes one step size at a time
    asked: Mapping[str, float]  # "target" or "least_times_naive", where something is asked for

    @property
    def best(self) -> str:
        """The quickest way."""
        return max(self.shares, key=lambda way: self.shares[way])

    @property
    def times_naive(self) -> float:
        """How many times as fast as the obvious way the quickest one is; nan where that was not timed."""
        return self.shares[self.best] / self.references.get(NAIVE, math.nan)


def summaries(cases: Mapping[str, Iterable[Json]]) -> list[Summary]:
    """Return the summaries of the section "linear", ordered by dtype, tokens and step sizes at once."""
    groups: dict[tuple[str, int], list[Json]] = defaultdict(list)
    for row in chain.from_iterable(cases.values()):
        if {"way", "share"} <= row.keys():
            groups[row["dtype"], row["tokens"]].append(row)
    found = []
    for (dtype, tokens), group in sorted(groups.items()):
        references = _medians((row for row in group if row["way"] in REFERENCES), "share")
        ways = [row for row in group if row["way"] in WAYS]
        for at_once in sorted({row["at_once"] for row in ways}):
            rows = [row for row in ways if row["at_once"] == at_once]
            asked = {name: row[name] for row in rows for name in _ASKED & row.keys()}
            shares, floor = (_medians(rows, name) for name in ("share", "share_of_floor"))
            found.append(Summary(dtype, tokens, at_once, shares, floor, references, asked))
    return found


def _medians(rows: Iterable[Json], name: str) -> dict[str, float]:
    """Return the median over shapes by way, of the rows that have the field."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if name in row:
            values[row["way"]].append(row[name])
    return {way: statistics.median(of_way) for way, of_way in values.items()}


# -- texts ------------------------------------------------------------------------------------------------------------


def verdict(row: Json) -> str:
    """Return how a row stands to its target: "reached", "accepted", "MISSED", or nothing where there is none."""
    if "target" in row:
        return "reached" if row["share"] >= row["target"] else "accepted" if row["share"] >= row["accept"] else "MISSED"
    for most, name in (("most_beyond_plain", "beyond_plain"), ("most_total_bytes", "total_bytes")):
        if most in row:
            return "reached" if row[name] <= row[most] else "MISSED"
    return ""


def significant(value: float) -> str:
    """Return a number that is not negative with three significant digits at least, and no exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _number(value: Any) -> str:
    """Return a value with four digits where it is a float; nothing for None."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _field(name: str, digits: int = 0, scale: float = 1.0) -> Text:
    """Return the text of a field times a scale; nothing where a row lacks it."""
    return lambda row: "" if row.get(name) is None else f"{scale * row[name]:.{digits}f}"


def _share(of: str, name: str) -> Text:
    """Return the text of a share of a summary."""
    return lambda summary: f"{getattr(summary, of)[name]:.2f}" if name in getattr(summary, of) else ""


def _asked(summary: Summary) -> str:
    """Return what is asked of a way to take several step sizes."""
    least, share = summary.asked.get("least_times_naive"), summary.asked.get("target")
    return f"{least:g} × naive" if least else f"formed {share:.2f}" if share else ""


def _reached(summary: Summary) -> str:
    least, share = summary.asked.get("least_times_naive"), summary.asked.get("target", 0.0)
    reached = summary.times_naive >= least if least else summary.shares.get("formed", 0.0) >= share
    return "" if not summary.asked else "reached" if reached else "MISSED"


def _timed(rows: Rows) -> list[Json]:
    """Return a line for everything that was timed: what was timed twice, or by plain torch beside, is of one line."""
    lines = []
    for name, of_case in rows.items():
        timed = {row["variant"]: {"case": name, **row} for row in of_case if "variant" in row}
        sharpness = next((row["sharpness"] for row in of_case if "sharpness" in row), None)
        for variant, row in timed.items():
            again = timed.get(f"{variant} again")
            if again is not None and "share" in row:
                row["off"] = abs(again["share"] - row["share"])
            if variant == "triton":
                row["in_torch"] = timed.get("torch", {}).get("share")
            if not variant.endswith(" again") and not ("triton" in timed and variant == "torch") and variant != "copy":
                # Of one evaluation: a call, a forward pass of a measurement, or a step size of a pass.
                of_call = 1e3 * row["median"] if "median" in row else None
                ms = row.get("ms_per_step_size", row.get("ms_per_forward", of_call))
                lines.append({"sharpness": sharpness, "ms": ms, **row})
    return lines


def _model_size(row: Json) -> str:
    count = row["parameters"]
    parameters = f"{significant(count / 1e9)} billion" if count >= 1e9 else f"{significant(count / 1e6)} million"
    size = f"{row['model']} of {parameters} parameters, {row['tokens']} tokens, AdamW moments in {row['moments']}"
    return f"{size}; so small that fixed costs per call dominate" if count < _FEW_PARAMETERS else size


# -- tables -----------------------------------------------------------------------------------------------------------

Columns = Mapping[str, Text]

# Of these, those that a section fills.
COLUMNS: Columns = {
    "case": lambda row: row["case"],
    "variant": lambda row: row["variant"],
    "at once": _field("at_once"),
    "ms": lambda row: row.get("outcome") or ("" if row["ms"] is None else significant(row["ms"])),
    "host ms": _field("host", 3, 1e3),
    "share": _field("share", 3),
    "± run": _field("off", 3),
    "torch": _field("in_torch", 3),
    "× plain": lambda row: f"{row['ms'] / row['plain_ms']:.2f}" if row["ms"] and "plain_ms" in row else "",
    "× virtual": _field("pass_over_virtual", 2),
    "peak GB": _field("allocated", 2, 1e-9),
    "reserved GB": _field("reserved", 2, 1e-9),
    "beyond plain": _field("beyond_plain", 2, 1e-9),
    "in all GB": _field("total_bytes", 2, 1e-9),
    "λ_c": lambda row: _number(row["sharpness"]),
    "target": lambda row: f"{row['target']:.2f} ({row['accept']:.2f})" if "target" in row else "",
    "": verdict,
}
LINEAR: Columns = {
    "tokens": lambda one: str(one.tokens),
    "at once": lambda one: str(one.at_once),
    **{name: _share("references", name) for name in REFERENCES[1:]},
    **{name: _share("shares", name) for name in WAYS},
    "× naive": lambda one: f"{one.times_naive:.2f}",
    "of floor": lambda one: _share("floor", one.best)(one),
    "± run": lambda one: f"{abs(1 - one.references.get(REFERENCES[0], math.nan)):.2f}",
    "target": _asked,
    "": _reached,
}
COMPILED: Columns = {
    "kernel": lambda row: f"{row['case']}: {row['kernel']}",
    **{name: _field(name) for name in ("registers", "spills", "shared", "warps")},
}


def filled(columns: Columns, lines: Sequence[Any]) -> dict[str, list[str]]:
    """Return the texts of the columns in which one of the lines has anything."""
    texts = {title: [text(line) for line in lines] for title, text in columns.items()}
    return {title: column for title, column in texts.items() if any(column)}


def table(name: str, rows: Rows) -> tuple[str, dict[str, list[str]]]:
    """Return what the lines of a section are of, and its columns."""
    if name == "linear":
        found = summaries(rows)
        about = "speed per step size as a share of the bare product's, median over shapes"
        return f"{'; '.join(dict.fromkeys(one.dtype for one in found))}, {about}", filled(LINEAR, found)
    if name == "compiled":
        return "", filled(COMPILED, [{"case": case, **row} for case, of_case in rows.items() for row in of_case])
    lines = _timed(rows)
    of_all = {
        "head": lambda row: f"vocabulary {row['vocabulary']}, width {row['width']}",
        "passes": lambda row: "losses along a direction in memory",
        "model": _model_size,
    }.get(name, lambda row: "")
    return "; ".join(dict.fromkeys(map(of_all, lines))), filled(COLUMNS, lines)


# In the order in which they are shown: of a long output often only the end is kept, and what matters most comes last.
TABLES = ("compiled", "linear", "head", "passes", "model", "streaming")
# What a column's title leaves open.
_NOTES = {
    "ms": "of a call; of a measurement for each forward pass, of a pass for each step size",
    "host ms": "what the host takes to launch it",
    "share": "bytes per second over those of a copy, or speed over that of the bare product, that took turns with it",
    "± run": "how far the share was off when the same was timed a second time",
    "at once": "step sizes that one pass serves",
    "× virtual": "time of a pass over that of one for one step size",
    "in all GB": "peak, weights and direction",
    "× naive": "speed of the quickest way over that of clone, add and multiply",
    "of floor": "what reading W and D would take at the speed of a copy, over what the quickest way takes",
    "torch": "the share of plain torch doing the same",
    "target": "share to reach, and in brackets the least that is accepted",
    "× plain": "ms over those of a plain forward pass that took turns with it; a measurement's checks count too",
    "peak GB": "memory of tensors above what was there before the call",
    "reserved GB": "memory that the allocator took from the device for it",
    "beyond plain": "GB of the peak above that of the plain forward pass with a chunked head",
}


def show(record: Record, sections: Iterable[Section]) -> None:
    """Print the tables of these sections of a sitting, and how each section ended."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(width=WIDTH, highlight=False, markup=False)
    chosen = {section.name: section for section in sections}
    seen = record.environment
    commit = f"{seen['commit'][:12] if seen['commit'] else 'commit unknown'}{' with changes' if seen['dirty'] else ''}"
    versions = [f"{name} {seen[name]}" for name in ("driver", "torch", "triton") if seen[name]]
    device = seen["gpu"] or f"{seen['machine']} CPU, one thread"
    console.print(f"{device}: {', '.join(versions)}, sharpkern {seen['sharpkern']} ({commit})", soft_wrap=True)
    if reached := [row for of_case in _rows_of(record.cases("ceilings")).values() for row in of_case]:
        units = {"bytes_per_second": (1e9, "GB/s"), "flop_per_second": (1e12, "TFLOP/s")}
        rates = [
            (row["variant"], row[name] / size, unit)
            for row in reached
            for name, (size, unit) in units.items()
            if name in row
        ]
        console.print(
            f"Ceilings: {', '.join(f'{variant} {significant(rate)} {unit}' for variant, rate, unit in rates)}"
        )
    for name in TABLES:
        if name in chosen and (rows := _rows_of(record.cases(name))):
            about, columns = table(name, rows)
            console.print(f"\n{chosen[name].title}{': ' if about else ''}{about}", style="italic")
            grid = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
            for i, title in enumerate(columns):
                grid.add_column(title, justify="right" if i else "left", no_wrap=i > 0)
            for cells in zip(*columns.values(), strict=True):
                grid.add_row(*cells)
            console.print(grid)
            for title in filter(_NOTES.get, columns):
                console.print(f"  {title}: {_NOTES[title]}")
    console.print()
    if GATE in chosen and (checked := _rows_of(record.cases(GATE), done=False)):
        console.print(f"{chosen[GATE].title}: {_correctness(checked)}")
    for line in _outcomes(record, chosen.values()):
        console.print(line, soft_wrap=True)


def _correctness(rows: Rows) -> str:
    """Return, in a line, what was compared with float64 and how close it came."""

    def share(row: Json) -> float:
        # Infinity is recorded by name.
        return float(row["error_of_budget"] if "error_of_budget" in row else row["error"] / row["tolerance"])

    judged = [(name, row) for name, of_case in rows.items() for row in of_case]
    worst, operation = max((share(row), name) for name, row in judged)
    repeats = sum(row.get("repeats", 0) for _, row in judged)
    differing = sum(row.get("repeats_with_other_bits", 0) for _, row in judged)
    return (
        f"{len(judged)} calls of {', '.join(dict.fromkeys(name for name, _ in judged))}; largest error "
        f"{significant(worst)} of its budget, by {operation}; {repeats} repeats, {differing} of them with other bits"
    )


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
            yield from (f"  {name}: WARNED: {said}" for said in case.get("warnings", []))
            if case["status"] != DONE:
                yield f"  {name}: {case['status'].upper()}{': ' + case['error'] if case.get('error') else ''}"
                for row in case.get("rows", []):
                    if row.get("passed") is False:
                        yield "    " + ", ".join(
                            f"{key} {_number(value)}" for key, value in row.items() if key != "passed"
                        )


def _rows_of(cases: Json, *, done: bool = True) -> Rows:
    """Return the rows of the cases that are done, or of all that have some."""
    return {
        name: case["rows"] for name, case in cases.items() if (case["status"] == DONE if done else case.get("rows"))
    }
