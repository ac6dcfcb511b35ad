"""The figures of README and docs from the results files: ``python bench/readme.py`` writes them between their markers.

It draws the plots too.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any

# The checkout, also where the package is not installed.
sys.path.insert(0, str(Path(__file__).parent.parent))

import bench_memory
from bench_peers import FITTED, by_tokens, draw_growth, exponent
from ledger import RESULTS, ROOT, latest

PAGES = (ROOT / "README.md", ROOT / "docs" / "numbers.md", ROOT / "docs" / "curves-and-blocks.md")
PLOT = RESULTS / "growth.png"
METHODS = {"auto": "default", "auto, 8 at a time": "default, 8 at a time", "bisection": "doubling and bisection"}
# Steps between measurements, of the one number that README tells.
_USUAL = 50
# Where the gradient is not of the measured loss.
NO_SLOPE = {
    "auto, slope unknown": "default",
    "auto, slope unknown, 8 at a time": "default, 8 at a time",
    "bisection": "doubling and bisection",
}


def line_search() -> str:
    """Evaluations and errors of the default search and of the published one."""
    lines = [
        "| run | search | forward passes, base loss not counted | passes, base loss counted | median error | 95th "
        "percentile | another crossing found | true value within `error` |",
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
        f"Averaged over all {points} points, a search takes {single:.1f} passes with one step size each, or "
        f"{several:.1f} passes with eight step sizes each. The base loss is counted.",
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
    by_version = json.loads((RESULTS / "static.json").read_text(encoding="utf-8"))
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
        f"| measured on every | training takes longer by (median of {len(rows)} measurements) | middle half of them |",
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
        f"A measurement took {min(forwards)} to {max(forwards)} forward passes (median {median(forwards):g}). It took "
        f"as long as {steps:.1f} training steps (median). The first measurement of a run makes extra checks and took "
        f"as long as {found['first_measurement_steps']:.0f} steps.",
        "",
        f"Check by whole windows of {windows[0]['steps']} steps with one measurement each, against a twin run without "
        f"a monitor that ends in the same bits: {whole}. The machine was not idle (load average {before:.1f} before, "
        f"{after:.1f} after).",
    ]
    return "\n".join(lines)


def overhead_in_brief() -> str:
    """What a measurement on every 50th step costs, in one sentence."""
    found = latest("overhead")["overhead"]
    (row,) = (row for row in found["by_every"] if row["every"] == _USUAL)
    return (
        f"**Cost: {row['overhead']:.1%} longer training** with a measurement on every {_USUAL}th step "
        f"({found['model']} of {found['parameters'] / 1e6:.0f} M parameters, AdamW, {found['tokens']} tokens a step, "
        "one CPU thread; [how it was measured](docs/numbers.md#what-a-monitor-adds-to-training))."
    )


def peers() -> str:
    """One measurement by each method, in plain forward passes of the same run."""
    record = latest("peers")
    models: dict[str, dict[str, dict[str, Any]]] = {}
    for row in record["peers"]:
        name = row["method"] if row["quantity"] == "training" else f"{row['quantity']}, {row['method']}"
        models.setdefault(f"{row['parameters'] / 1e6:.2g} M", {})[name] = row
    # Largest eigenvalues are computed of the first model alone.
    (first, of_first), *others = models.items()
    about = of_first["forward + backward"]
    lines = [
        f"| method | time in plain forward passes, {' | '.join(f'{name} parameters' for name in models)} | losses "
        "evaluated | error of η_c, median and worst | peak memory beyond θ, in θ | λ at the last step |",
        "|---|---" + "|---" * len(others) + "|---|---|---|---|",
        f"| plain forward pass | 1 {'| 1 ' * len(others)}| 1 | | {_in_theta('plain_peak_bytes', about)} | |",
    ]
    for name in of_first:
        rows = [of_one.get(name, {}) for of_one in models.values()]
        times = [_time(row) for row in rows]
        row = rows[0]
        forwards = " and ".join(dict.fromkeys(f"{row['forwards']:g}" for row in rows if "forwards" in row))
        products = row.get("products")
        work = f"{products} product{'s' * (products > 1)}" if products else forwards
        errors = row.get("errors")
        value = row.get("value")
        lines.append(
            f"| {name} | {' | '.join(times)} | {work} | {f'{median(errors):.2%}, {max(errors):.2%}' if errors else ''} "
            f"| {_in_theta('peak_bytes', row)} | {'' if value is None else f'{value:.4g}'} |"
        )
    auto = {name: of_one["λ_c, sharpkern, auto, virtual"] for name, of_one in models.items()}
    counts = " and ".join(f"{row['measurements']} ({name})" for name, row in auto.items())
    each = [row["in_plain_forwards_each"] for row in auto.values()]
    spreads = " and ".join(f"{min(taken):.1f} to {max(taken):.1f}, {mean(taken):.1f} on average," for taken in each)
    firsts = " and ".join(f"{row['first_in_plain_forwards']:.0f}" for row in auto.values())
    early = ", ".join(str(one["forwards"]) for one in auto[first]["early"])
    before, after = record["environment"]["load_average"]
    lines += [
        "",
        f"Medians over {counts} successive steps of {about['tokens']} tokens, after the warm-up. The largest "
        f"eigenvalues were computed at the last step only. Load average {before:.1f} before, {after:.1f} after.",
        "",
        f"Single measurements of the default search (λ_c, sharpkern, auto, virtual) took {spreads} plain forward "
        f"passes. The first measurement of a model starts cold and makes extra checks. It took {firsts}. During the "
        f"first {about['trained']} steps, half of them warm-up, every tenth step was measured. These searches "
        f"evaluated {early} losses ({first}).",
    ]
    return "\n".join(lines)


def peers_in_brief() -> str:
    """The default search beside the published method, one exact product and the quickest package for λ_max."""
    record = latest("peers")
    models: dict[int, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in record["peers"]:
        models.setdefault(row["parameters"], {})[row["quantity"], row["method"]] = row
    first, *others = models.values()
    eigenvalues = [row for row in first.values() if row["quantity"] == "λ_max" and "sharpkern" not in row["method"]]
    quickest = min(eigenvalues, key=lambda row: row.get("in_plain_forwards", math.inf))["method"]
    names = [f"{parameters / 1e6:.2g} M parameters" for parameters in models]
    lines = [
        f"| method | measures | forward passes, {' | '.join(names)} | extra memory, in model sizes |",
        "|---|---|---" + "|---" * len(others) + "|---|",
    ]
    for quantity, method, label, what in (
        ("λ_c", "sharpkern, auto, virtual", "**sharpkern**", "λ_c"),
        ("λ_c", "published method", "published method, our version", "λ_c"),
        ("λ_dir", "double backward", "exact Hessian-vector product", "curvature along the update"),
        ("λ_max", quickest, quickest, "largest Hessian eigenvalue"),
    ):
        rows = [of_one.get((quantity, method), {}) for of_one in models.values()]
        lines.append(f"| {label} | {what} | {' | '.join(map(_time, rows))} | {_in_theta('peak_bytes', rows[0])} |")
    times = [_time(of_one["training", "forward + backward"]) for of_one in models.values()]
    training = " and ".join(dict.fromkeys(times))
    each = first["λ_c", "sharpkern, auto, virtual"]["in_plain_forwards_each"]
    lines += [
        "",
        "Time is in plain forward passes of the same model and batch, median over training steps, on one CPU thread. "
        f"Forward and backward together take {training}. Single sharpkern measurements took {min(each):.1f} to "
        f"{max(each):.1f} ({names[0]}).",
    ]
    return "\n".join(lines)


def _time(row: Mapping[str, Any]) -> str:
    return f"{row['in_plain_forwards']:.1f}" if "in_plain_forwards" in row else row.get("status", "")


def _in_theta(column: str, row: Mapping[str, Any]) -> str:
    return f"{row[column] / row['parameter_bytes']:.2f}" if row.get(column) else ""


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def growing() -> str:
    """One λ_c by parameters and tokens, and the power of the parameters that it grows with."""
    rows = by_tokens(latest("peers")["growth"])
    lines = [
        "| tokens | parameters | plain forward pass | one λ_c | in plain forward passes | losses evaluated | each loss "
        "| peak memory beyond θ, in θ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for tokens, of_one in rows.items():
        for row in of_one:
            plain, search, loss = (row[column] for column in FITTED)
            lines.append(
                f"| {tokens} | {row['parameters'] / 1e6:.3g} M | {_duration(plain)} | {_duration(search)} | "
                f"{search / plain:.1f} | {row['forwards']:g} | {_duration(loss)} | {_in_theta('peak_bytes', row)} |"
            )
    powers = {tokens: [exponent(of_one, column) for column in FITTED] for tokens, of_one in rows.items()}
    said = [
        "; ".join(f"{power[i][0]:.2f} ± {power[i][1]:.2f} at {tokens} tokens" for tokens, power in powers.items())
        for i in range(len(FITTED))
    ]
    lines += [
        "",
        "Time grows as a power of the number of parameters. The exponents (straight-line fits in logarithms, ± "
        "standard error) are:",
        "",
        f"- a plain forward pass: {said[0]}",
        f"- one λ_c: {said[1]}",
        f"- one λ_c, divided by the losses it evaluated: {said[2]}",
    ]
    return "\n".join(lines)


def blocks() -> str:
    """λ_c of every block beside that of the whole, and how often it was the largest, in warm-up and after."""
    record = latest("blocks")
    first, second = record["phases"]
    names = dict.fromkeys(row["block"] for phase in (first, second) for row in phase["blocks"])
    lines = [
        "| block | λ_c over that of the whole, warm-up | after | share of Δθᵀg, warm-up | after | largest λ_c of all, "
        "warm-up | after |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        rows = [next((row for row in one["blocks"] if row["block"] == name), None) for one in (first, second)]
        cells = [
            "" if row is None else f"{row[column]:{style}}"
            for column, style in (("share_of_whole", ".2g"), ("share_of_slope", ".1%"))
            for row in rows
        ]
        counts = [f"{one['limiting'].get(name, 0)} of {one['steps']}" for one in (first, second)]
        lines.append(f"| `{name}` | {' | '.join([*cells, *counts])} |")
    lines += [
        "",
        f"GPT of {record['parameters'] / 1e6:.2g} M parameters, AdamW, {record['tokens']} tokens a step, "
        f"{record['warm_up']} steps of warm-up. Medians over measured steps; λ_c of the whole is "
        f"{first['lambda_c']:.3g} in the warm-up and {second['lambda_c']:.3g} after it. All blocks together took "
        f"{second['forwards_of_blocks']:g} forward passes, the whole "
        f"{median(row['forwards'] for row in record['rows']):g}.",
    ]
    return "\n".join(lines)


TABLES = {
    "blocks": blocks,
    "peers": peers,
    "growth": growing,
    "line search": line_search,
    "cost": cost,
    "kernels": kernels,
    "overhead": overhead,
    "memory": lambda: bench_memory.markdown(latest("memory")),
    "overhead in brief": overhead_in_brief,
    "peers in brief": peers_in_brief,
    "memory in brief": lambda: bench_memory.brief(latest("memory")),
}


def with_tables(text: str, tables: Mapping[str, Callable[[], str]] = TABLES) -> str:
    """Markdown with every marked part made anew."""
    for name, make in tables.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = marked.sub(lambda found, make=make: found[1] + make() + "\n" + found[2], text)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    bench_memory.picture(latest("memory"), RESULTS / "memory.png")
    draw_growth(latest("peers"), PLOT)
