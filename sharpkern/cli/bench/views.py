"""What the table of each section says: its columns and lines, made of the rows that were recorded."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sharpkern.cli.bench.record import Json
from sharpkern.cli.bench.ways import REFERENCES, WAYS, Summary, summaries

# Rows of the cases of a section, by case.
Cases = dict[str, list[Json]]

# Below so many parameters the layers of a model take less time than it takes to call them.
_FEW_PARAMETERS = 1_000_000

# What a column's title leaves open.
NOTES = {
    "host ms": "what the host takes to launch it",
    "share of copy": "bytes per second over those of a copy that took turns with it",
    "share of product": "speed over that of the bare matrix product, which took turns with it",
    "± run": "how far the share was off when the same was timed a second time",
    "at once": "step sizes that one pass serves",
    "× virtual pass": "time of a pass over that of one for one step size",
    "in all GB": "peak, weights and direction",
    "× naive": "speed of the quickest way over that of clone, add and multiply",
    "of floor": "what reading W and D would take at the speed of a copy, over what the quickest way takes",
    "torch": "the share of plain torch doing the same",
    "target": "share to reach, and in brackets the least that is accepted",
    "× plain": "ms per forward over those of a plain one that took turns with it; a measurement's checks count too",
    "peak GB": "memory of tensors above what was there before the call",
    "reserved GB": "memory that the allocator took from the device for it",
    "beyond plain GB": "peak above that of the plain forward pass with a chunked head",
}


@dataclass(frozen=True)
class View:
    """A table in text.

    Attributes:
        columns: their titles.
        lines: one text per column.
        about: what all figures are of, for the title.
    """

    columns: list[str]
    lines: list[list[str]]
    about: str = ""

    def filled(self) -> "View":
        """Return the view without the columns in which no line has anything."""
        kept = [i for i in range(len(self.columns)) if any(line[i] for line in self.lines)]
        lines = [[line[i] for i in kept] for line in self.lines]
        return View([self.columns[i] for i in kept], lines, self.about)


def streaming(cases: Cases) -> View:
    """Return the kernels as shares of a copy."""
    columns = ["kernel", "backend", "ms", "host ms", "share of copy", "± run", "torch", "target", ""]
    lines = []
    for name, rows in cases.items():
        first, again, *others = rows
        plain = next((row for row in others if row["variant"] == "torch"), None)
        lines.append(
            [
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
        )
    return View(columns, lines)


def head(cases: Cases) -> View:
    """Return the losses as shares of the matrix product."""
    columns = ["loss", "ms", "share of product", "peak GB", "target", ""]
    timed = [(name, row) for name, rows in cases.items() for row in rows if "variant" in row]
    lines = [
        [
            f"{name}: {row['variant']}",
            f"{1e3 * row['median']:.2f}",
            f"{row['share']:.3f}",
            _gigabytes(row.get("allocated")),
            _target(row),
            verdict(row),
        ]
        for name, row in timed
        if not row["variant"].endswith("again")
    ]
    return View(columns, lines, _each_once(f"vocabulary {row['vocabulary']}, width {row['width']}" for _, row in timed))


def linear(cases: Cases) -> View:
    """Return the ways side by side, each the median over the shapes."""
    columns = ["tokens", "at once", *REFERENCES[1:], *WAYS, "× naive", "of floor", "± run", "target", ""]
    found = summaries(cases)
    lines = [
        [
            str(summary.tokens),
            str(summary.at_once),
            *(_share(summary.references, name) for name in REFERENCES[1:]),
            *(_share(summary.shares, way) for way in WAYS),
            f"{summary.times_naive:.2f}",
            _share(summary.floor, summary.best),
            f"{abs(1 - summary.references.get(REFERENCES[0], math.nan)):.2f}",
            *_asked_of(summary),
        ]
        for summary in found
    ]
    about = (
        f"{'; '.join(dict.fromkeys(summary.dtype for summary in found))}, speed per step size as a share of the bare"
    )
    return View(columns, lines, f"{about} product's, median over shapes")


def model(cases: Cases) -> View:
    """Return time and memory of every way to evaluate the losses of a model."""
    columns = ["model", "ms per forward", "× plain", "peak GB", "reserved GB", "beyond plain GB", "λ_c", ""]
    timed = [(name, row) for name, rows in cases.items() for row in rows if "variant" in row]
    lines = []
    for name, row in timed:
        taken = _milliseconds(row)
        sharpness = next((other["sharpness"] for other in cases[name] if "sharpness" in other), None)
        lines.append(
            [
                f"{row['model']}: {row['variant'] if name == 'plain forward' else name}",
                row.get("outcome") or ("" if taken is None else f"{taken:.1f}"),
                f"{taken / row['plain_ms']:.2f}" if taken is not None and "plain_ms" in row else "",
                _gigabytes(row.get("allocated")),
                _gigabytes(row.get("reserved")),
                _gigabytes(row.get("beyond_plain")),
                number(sharpness),
                verdict(row),
            ]
        )
    return View(columns, lines, _each_once(_model_size(row) for _, row in timed))


def passes(cases: Cases) -> View:
    """Return one pass for several step sizes beside one pass each."""
    columns = [
        "model",
        "engine",
        "at once",
        "ms per step size",
        "× plain",
        "× virtual pass",
        "peak GB",
        "in all GB",
        "",
    ]
    timed = [(name, row) for name, rows in cases.items() for row in rows if "variant" in row]
    lines = []
    for name, row in timed:
        if "outcome" in row:
            lines.append([name, row["variant"], "", row["outcome"], "", "", "", "", ""])
            continue
        lines.append(
            [
                name,
                row["variant"],
                str(row["at_once"]),
                f"{row['ms_per_step_size']:.2f}",
                f"{row['ms_per_step_size'] / row['plain_ms']:.2f}",
                f"{row['pass_over_virtual']:.2f}",
                _gigabytes(row.get("allocated")),
                _gigabytes(row.get("total_bytes")),
                verdict(row),
            ]
        )
    return View(columns, lines, "losses along a direction in memory")


def compiled(cases: Cases) -> View:
    """Return what the compiler made of the kernels."""
    lines = [
        [f"{name}: {row['kernel']}", *(str(row[key]) for key in ("registers", "spills", "shared", "warps"))]
        for name, rows in cases.items()
        for row in rows
    ]
    return View(["kernel", "registers", "spills", "shared B", "warps"], lines)


def ceilings(cases: Cases) -> str:
    """Return, in a line, what a copy and a matrix product reach."""

    def rate(row: Json) -> str:
        if "bytes_per_second" in row:
            return f"{significant(row['bytes_per_second'] / 1e9)} GB/s"
        return f"{significant(row['flop_per_second'] / 1e12)} TFLOP/s"

    return ", ".join(f"{row['variant']} {rate(row)}" for rows in cases.values() for row in rows)


def correctness(cases: Cases) -> str:
    """Return, in a line, what was compared with float64 and how close it came."""
    judged = [(name, row) for name, rows in cases.items() for row in rows]
    worst, operation = max((_share_of_budget(row), name) for name, row in judged)
    repeats = sum(row.get("repeats", 0) for _, row in judged)
    differing = sum(row.get("repeats_with_other_bits", 0) for _, row in judged)
    return (
        f"{len(judged)} calls of {', '.join(dict.fromkeys(name for name, _ in judged))}; largest error "
        f"{significant(worst)} of its budget, by {operation}; {repeats} repeats, {differing} of them with other bits"
    )


def verdict(row: Json) -> str:
    """Return how a row stands to its target.

    Args:
        row: of a case.

    Returns:
        "reached", "accepted", "MISSED", or nothing where there is no target.
    """
    if "target" in row:
        return "reached" if row["share"] >= row["target"] else "accepted" if row["share"] >= row["accept"] else "MISSED"
    for most, field in (("most_beyond_plain", "beyond_plain"), ("most_total_bytes", "total_bytes")):
        if most in row:
            return "reached" if row[field] <= row[most] else "MISSED"
    return ""


def number(value: Any) -> str:
    """Return a value with four digits where it is a float; nothing for None."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def significant(value: float) -> str:
    """Return a number that is not negative with three significant digits at least, and no exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _share_of_budget(row: Json) -> float:
    """Return an error over what it may be; infinity is recorded by name."""
    return float(row["error_of_budget"] if "error_of_budget" in row else row["error"] / row["tolerance"])


def _model_size(row: Json) -> str:
    count = row["parameters"]
    parameters = f"{significant(count / 1e9)} billion" if count >= 1e9 else f"{significant(count / 1e6)} million"
    size = f"{row['model']} of {parameters} parameters, {row['tokens']} tokens, AdamW moments in {row['moments']}"
    return f"{size}; so small that fixed costs per call dominate" if count < _FEW_PARAMETERS else size


def _share(shares: Mapping[str, float], name: str) -> str:
    return f"{shares[name]:.2f}" if name in shares else ""


def _asked_of(summary: Summary) -> tuple[str, str]:
    """Return what is asked of a way to take several step sizes, and how that stands."""
    least, share = summary.asked("least_times_naive"), summary.asked("target")
    if least is not None:
        return f"{least:g} × naive", "reached" if summary.times_naive >= least else "MISSED"
    if share is not None:
        return f"formed {share:.2f}", "reached" if summary.shares["formed"] >= share else "MISSED"
    return "", ""


def _each_once(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


def _target(row: Json) -> str:
    return f"{row['target']:.2f} ({row['accept']:.2f})" if "target" in row else ""


def _milliseconds(row: Json) -> float | None:
    if "ms_per_forward" in row:
        return float(row["ms_per_forward"])
    return 1e3 * row["median"] if "median" in row else None


def _gigabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f}"
