"""README's figures from the results files: ``python bench/readme.py`` rewrites the tables between its markers."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
METHODS = {"auto": "default", "auto, 8 at a time": "default, 8 at a time", "bisection": "doubling and bisection"}
# Where the gradient is not of the measured loss.
NO_SLOPE = {
    "auto, slope unknown": "default",
    "auto, slope unknown, 8 at a time": "default, 8 at a time",
    "bisection": "doubling and bisection",
}


def latest(name: str) -> dict[str, Any]:
    """The last full record of a results file."""
    records = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    record: dict[str, Any] = [record for record in records if not record["quick"]][-1]
    return record


def line_search() -> str:
    """Evaluations and errors of the default search and of the published one."""
    lines = [
        "| run | search | forwards besides the base loss | passes with it | median error | p95 | other crossings | "
        "error covers truth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = latest("line_search")["line_search"]
    with_slope = {row["run"] for row in rows if row["method"] == "auto"}
    for row in rows:
        methods = METHODS if row["run"] in with_slope else NO_SLOPE
        if row["method"] in methods:
            lines.append(
                f"| {row['run']} | {methods[row['method']]} | {row['evaluations_mean']:.2f} | "
                f"{row['passes_with_base_loss_mean']:.2f} | "
                f"{row['error_median']:.3%} | {row['error_p95']:.2%} | {row['other_crossings']} of {row['points']} | "
                f"{row['covered']:.0%} |"
            )
    single, several, points = mean_passes(rows)
    lines += [
        "",
        f"Over all {points} points a search takes {single:.1f} passes of one step size, or {several:.1f} passes of "
        "eight, with the base loss.",
    ]
    return "\n".join(lines)


def mean_passes(rows: list[dict[str, Any]]) -> tuple[float, float, int]:
    """Passes of the default search, one step size and eight at a time, averaged over points, and how many these are."""
    with_slope = {row["run"] for row in rows if row["method"] == "auto"}
    passes = {"default": 0.0, "default, 8 at a time": 0.0}
    points = 0
    for row in rows:
        method = (METHODS if row["run"] in with_slope else NO_SLOPE).get(row["method"])
        if method in passes:
            passes[method] += row["points"] * row["passes_with_base_loss_mean"]
            points += row["points"] * (method == "default")
    single, several = (total / points for total in passes.values())
    return single, several, points


def cost() -> str:
    """Time and memory of one search in a training loop, by each engine."""
    lines = [
        "| model | tokens | engine | forwards | passes | search, in plain forwards | one of 8 step sizes, in plain "
        "forwards | r_8 | extra memory | largest matrix | parameters |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in latest("line_search")["cost"]:
        ratio = row["pass_over_virtual_pass"]
        megabytes = [row[name] / 1e6 for name in ("extra_bytes", "largest_matrix_bytes", "parameter_bytes")]
        lines.append(
            f"| {row['model']}, {row['parameters'] / 1e6:.2g} M | {row['tokens']} | {row['engine']} | "
            f"{row['forwards']:g} | {row['passes']:g} | {row['search_in_plain_forwards']:.1f} | "
            f"{row['step_size_in_plain_forwards']:.2f} | "
            f"{'' if ratio is None else f'{ratio:.1f}'} | " + " | ".join(f"{size:.1f} MB" for size in megabytes) + " |"
        )
    return "\n".join(lines)


def kernels() -> str:
    """What the newest compiler makes of each kernel."""
    by_version = json.loads((ROOT / "bench" / "results" / "static.json").read_text(encoding="utf-8"))
    newest = by_version[max(by_version, key=lambda version: tuple(map(int, version.split("."))))]
    architectures = ["sm_80", "sm_90", "sm_100", "gfx942"]
    lines = [
        f"| case | kernel | registers {' / '.join(architectures)} | shared memory | spills | matrix instructions | "
        "16-byte loads, stores (sm_90) |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, by_architecture in newest.items():
        for kernel in zip(*(by_architecture[name] for name in architectures), strict=True):
            hopper = kernel[architectures.index("sm_90")]
            matrix = sum(sum(one["matrix"].values()) for one in kernel)
            lines.append(
                f"| {case} | `{hopper['kernel']}` | {' / '.join(str(one['registers']) for one in kernel)} | "
                f"{max(one['shared'] for one in kernel)} B | {sum(one['spills'] for one in kernel)} | {matrix} | "
                f"{hopper['wide_loads']}, {hopper['wide_stores']} |"
            )
    return "\n".join(lines)


def overhead() -> str:
    """What a monitor adds to training time, by how often it measures, and in whole windows of steps."""
    record = latest("overhead")
    found = record["overhead"]
    rows, windows = found["measured_steps"], found["windows"]
    lines = [
        f"| measured on every | training takes longer by, median of {len(rows)} measurements | half of them within |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['every']}th step | {row['overhead']:.1%} | {row['lower_quartile']:.1%} – {row['upper_quartile']:.1%} |"
        for row in found["by_every"]
    ]
    forwards = [row["forwards"] for row in rows]
    steps = median(row["steps"] for row in rows)
    whole = ", ".join(f"{window['overhead']:.1%} ({window['forwards']} forward passes)" for window in windows)
    before, after = record["environment"]["load_average"]
    lines += [
        "",
        f"A measurement took {min(forwards)} to {max(forwards)} forward passes, {median(forwards):g} in the median, in "
        f"the time of {steps:.1f} steps; the first of all, with checks that are made once, in that of "
        f"{found['first_measurement_steps']:.0f}. Whole windows of {windows[0]['steps']} steps with one measurement, "
        f"timed against a twin without a monitor that ends in the same bits: {whole}. The machine had other things to "
        f"do (load average {before:.1f} before, {after:.1f} after).",
    ]
    return "\n".join(lines)


TABLES = {"line search": line_search, "cost": cost, "kernels": kernels, "overhead": overhead}


def with_tables(text: str, tables: Mapping[str, Callable[[], str]] = TABLES) -> str:
    """Markdown with every marked part made anew."""
    for name, make in tables.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = marked.sub(lambda found, make=make: found[1] + make() + "\n" + found[2], text)
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
