"""One operation over sizes, in the form of `triton.testing`: a CSV and a picture, beside torch, eager and compiled.

Every line is checked against float64 at every size, and timed there only if it is right.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sharpkern._support.figures import COLORS, light_grid, new_figure, save_figure
from sharpkern._support.files import write_rows

from .accuracy import checked, judge
from .calls import Call
from .cases import Bench, BlockedError, timed
from .formulas import FORMULAS
from .timing import Json, machine_here

# Of a line's columns: the median, and the rates at the 80th and the 20th percentile of the time.
ENDS = ("", "-min", "-max")
# More buffers are not rotated: where operands are this small it is the launch that takes the time.
_MOST_BUFFERS = 64

Say = Callable[[str], None]
Function = Callable[..., Any] | None


def sizes(bench: Bench) -> list[int]:
    """Return numbers of elements, a factor of four apart."""
    return [1 << power for power in range(12, bench.pick(gpu=28, cpu=24, quick=20) + 1, 2)]


@torch.no_grad()
def sweep(operation: str, beside: Path, *, quick: bool, say: Say) -> int:
    """Write a CSV and a PNG per case of an operation beside a path; return the exit code, 1 where a line was wrong."""
    bench = Bench(machine_here(), quick)
    cases = timed(bench, 1 << 12)
    known = dict.fromkeys(case.operation for case in cases.values())
    if operation not in known:
        raise ValueError(f"sweep must be one of {', '.join(known)}, got {operation!r}")
    bench, right = checked(bench, operation), True
    for name in (name for name, case in cases.items() if case.operation == operation):
        try:
            rows, all_right = _rows(bench, name, say)
        except BlockedError as error:
            say(str(error))
            return 1
        right &= all_right
        path = beside.with_name(f"{beside.stem}-{re.sub(r'[^a-z0-9]+', '-', name.lower())}.csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, rows)
        device = torch.cuda.get_device_name() if bench.machine.is_gpu else "CPU, one thread"
        _draw(rows, f"{name}, {device}", path.with_suffix(".png"))
        say(f"{name}: wrote {path} and {path.with_suffix('.png').name}")
    return 0 if right else 1


def _rows(bench: Bench, name: str, say: Say) -> tuple[list[Json], bool]:
    """Return a row per size with the rate of every line that is right there, and whether all were."""
    rows, right = [], True
    # Graphs of other shapes are forgotten.
    torch._dynamo.reset()
    formula = FORMULAS[timed(bench, 1 << 12)[name].make()[0].operation]
    functions: dict[str, Function] = {"sharpkern": None, "torch": formula, "torch.compile": torch.compile(formula)}
    for numel in sizes(bench):
        case = timed(bench, numel)[name]
        load = case.load(bench)
        count = min(_MOST_BUFFERS, bench.machine.rotations(load.nbytes))
        calls = [load.calls[0], *(case.load(bench).calls[0] for _ in range(count - 1))]
        wrong = {line: why for line, function in functions.items() if (why := _wrong(bench, calls[0], function))}
        variants = {line: partial(_call, bench, calls, functions[line]) for line in functions if line not in wrong}
        timings = bench.machine.time(variants, 0.5 if bench.machine.is_gpu else 0.1) if variants else {}
        amount, unit = (load.flops / 1e12, "TFLOP/s") if load.flops else (load.nbytes / 1e9, "GB/s")
        row: Json = {"elements": numel}
        for line in functions:
            found = timings.get(line)
            rates = [f"{amount / s:.4g}" for s in (found.median, found.p80, found.p20)] if found else [""] * 3
            row |= {f"{line}{end} ({unit})": rate for end, rate in zip(ENDS, rates, strict=True)}
        rows.append(row)
        right &= not wrong
        told = [f"{line} {row[f'{line} ({unit})']} {unit}" for line in timings]
        say(f"{name}, {numel} elements: {', '.join(told)}")
        for line, why in wrong.items():
            say(f"{name}, {numel} elements, {line}: not timed: {why}")
    return rows, right


def _call(bench: Bench, calls: Sequence[Call], function: Function, number: int) -> Any:
    """Make the call whose turn it is, or its formula."""
    call = calls[number % len(calls)]
    return call.formula(function) if function else call.run(bench.backend)


def _wrong(bench: Bench, call: Call, function: Function) -> str:
    """Say what is wrong with a line, if anything is."""
    try:
        row = judge(bench, call, function)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "" if row["passed"] else f"error {row['error_of_budget']:.3g} of its budget"


def _draw(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw rates against sizes, with a band from the 20th to the 80th percentile."""
    figure = new_figure(6, 4)
    axes = figure.subplots()
    _, *names = rows[0]
    for i, color in zip(range(0, len(names), len(ENDS)), COLORS, strict=False):
        of_line = names[i : i + len(ENDS)]
        found = [(row["elements"], *(float(row[name]) for name in of_line)) for row in rows if row[of_line[0]]]
        if found:
            x, middle, slow, fast = zip(*found, strict=True)
            axes.plot(x, middle, color=color, marker=".", label=of_line[0].split(" (")[0])
            axes.fill_between(x, slow, fast, color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="elements", ylabel=names[0].split("(")[1].rstrip(")"), title=title)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    light_grid(axes)
    save_figure(figure, path)
