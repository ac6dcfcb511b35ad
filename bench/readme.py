"""The figures of README and docs from the results files: ``python bench/readme.py`` writes them between their markers.

It draws the plots too.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

# The checkout, also where the package is not installed.
sys.path.insert(0, str(Path(__file__).parent.parent))

from bench_peers import FITTED, by_tokens, draw_growth, exponent
from decisions import alarms, trials
from ledger import RESULTS, ROOT, latest, table

from sharpkern.memory import report
from sharpkern.memory.plan import MemoryPlan

_GUIDES = ("numbers", "decisions", "curves-and-blocks", "large-batches")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in _GUIDES))
PLOT = RESULTS / "growth.png"
METHODS = {"auto": "default", "auto, 8 at a time": "default, 8 at a time", "bisection": "doubling and bisection"}
# Where the gradient is not of the measured loss.
NO_SLOPE = {
    "auto, slope unknown": "default",
    "auto, slope unknown, 8 at a time": "default, 8 at a time",
    "bisection": "doubling and bisection",
}
# Steps between measurements, of the one number that README tells.
_USUAL = 50
_AUTO = ("λ_c", "sharpkern, auto, virtual")
_TRAINING = ("training", "forward + backward")


def searched() -> list[dict[str, Any]]:
    """Return the rows of the searches that are shown, with the names that they are shown by."""
    rows = latest("line_search")["line_search"]
    with_slope = {row["run"] for row in rows if row["method"] == "auto"}
    named = [{**row, "shown": (METHODS if row["run"] in with_slope else NO_SLOPE).get(row["method"])} for row in rows]
    return [row for row in named if row["shown"]]


def mean_passes() -> tuple[float, float, int]:
    """Passes of the default search, one step size and eight at a time, averaged over points, and how many these are."""
    single, several = (
        [(row["points"], row["passes_with_base_loss_mean"]) for row in searched() if row["shown"] == name]
        for name in ("default", "default, 8 at a time")
    )
    points = sum(num for num, _ in single)
    return *(sum(num * passes for num, passes in one) / points for one in (single, several)), points


def line_search() -> list[str]:
    """Evaluations and errors of the default search and of the published one."""
    single, several, points = mean_passes()
    said = (
        f"Averaged over all {points} points, a search takes {single:.1f} passes with one step size each, or "
        f"{several:.1f} passes with eight step sizes each. The base loss is counted."
    )
    head = (
        "run | search | forward passes, base loss not counted | passes, base loss counted | median error | 95th "
        "percentile | another crossing found | true value within `error`"
    )
    line = (
        "{run} | {shown} | {evaluations_mean:.2f} | {passes_with_base_loss_mean:.2f} | {error_median:.3%} | "
        "{error_p95:.2%} | {other_crossings} of {points} | {covered:.0%}"
    )
    return [*table(head, line, searched()), "", said]


def cost() -> list[str]:
    """Time and memory of one search in a training loop, by each engine."""
    head = (
        "model | tokens | engine | forwards | passes | search, in plain forwards | one of 8 step sizes, in plain "
        "forwards | r_8 | extra memory | largest matrix | parameters"
    )
    line = (
        "{model}, {parameters:.2g} M | {tokens} | {engine} | {forwards:g} | {passes:g} | "
        "{search_in_plain_forwards:.1f} | {step_size_in_plain_forwards:.2f} | {r_8} | {extra_bytes:.1f} MB | "
        "{largest_matrix_bytes:.1f} MB | {parameter_bytes:.1f} MB"
    )
    sizes = ("parameters", "extra_bytes", "largest_matrix_bytes", "parameter_bytes")
    rows = latest("line_search")["cost"]
    in_millions = [{**row, **{name: row[name] / 1e6 for name in sizes}} for row in rows]
    return table(head, line, [{**row, "r_8": _known(row["pass_over_virtual_pass"], ".1f")} for row in in_millions])


def kernels() -> list[str]:
    """What the newest compiler makes of each kernel."""
    by_version = json.loads((RESULTS / "static.json").read_text(encoding="utf-8"))
    newest = by_version[max(by_version, key=lambda version: tuple(map(int, version.split("."))))]
    architectures = ["sm_80", "sm_90", "sm_100", "gfx942"]
    rows = [
        {
            "case": case,
            **kernel[architectures.index("sm_90")],
            "registers": " / ".join(str(one["registers"]) for one in kernel),
            "shared": max(one["shared"] for one in kernel),
            "spills": sum(one["spills"] for one in kernel),
            "matrix": sum(sum(one["matrix"].values()) for one in kernel),
        }
        for case, by_architecture in newest.items()
        for kernel in zip(*(by_architecture[name] for name in architectures), strict=True)
    ]
    head = (
        f"registers {' / '.join(architectures)} | shared memory | spills | matrix instructions | 16-byte loads, stores"
    )
    line = "{case} | `{kernel}` | {registers} | {shared} B | {spills} | {matrix} | {wide_loads}, {wide_stores}"
    return table(f"case | kernel | {head} (sm_90)", line, rows)


def host() -> list[str]:
    """What measuring on a GPU takes of the host's time."""
    record = latest("host")
    rows = [{**row, "launches": sum(row["launches"].values())} for row in record["rows"]]
    before, after = record["environment"]["load_average"]
    return [
        *table("part | plain forward passes | launches", "{case} | {plain_forwards:.2f} | {launches}", rows),
        "",
        f"The model has the {record['tensors']} tensors of Llama-7B, and narrow layers. Load average {before:.1f} "
        f"before, {after:.1f} after.",
    ]


def rounding() -> list[str]:
    """What rounding Δθ to bf16 does."""
    record = latest("rounding")
    head = "optimizer | step | η_c | moved | Δθ in float32: off by | reported | Δθ in bf16: off by | reported"
    line = (
        "{optimizer} | {step} | {eta_c:.3g} | {moved:.3%} | {measured_fp32_off:.2%} | {measured_fp32_said:.2%} | "
        "{measured_bf16_off:.2%} | {measured_bf16_said:.2%}"
    )
    return [*table(head, line, record["rows"]), "", f"{record['tokens']} tokens of text in each batch."]


def overhead() -> list[str]:
    """What a monitor adds to training time, by how often it measures, and in whole windows of steps."""
    record = latest("overhead")
    found = record["overhead"]
    rows, windows = found["measured_steps"], found["windows"]
    head = f"measured on every | training takes longer by (median of {len(rows)} measurements) | middle half of them"
    line = "{every}th step | {overhead:.1%} | {lower_quartile:.1%} – {upper_quartile:.1%}"
    forwards = [row["forwards"] for row in rows]
    steps = median(row["steps"] for row in rows)
    whole = ", ".join(f"{window['overhead']:.1%} ({window['forwards']} forward passes)" for window in windows)
    before, after = record["environment"]["load_average"]
    return [
        *table(head, line, found["by_every"]),
        "",
        f"A measurement took {min(forwards)} to {max(forwards)} forward passes (median {median(forwards):g}). It took "
        f"as long as {steps:.1f} training steps (median). The first measurement of a run makes extra checks and took "
        f"as long as {found['first_measurement_steps']:.0f} steps.",
        "",
        f"Check by whole windows of {windows[0]['steps']} steps with one measurement each, against a twin run without "
        f"a monitor that ends in the same bits: {whole}. The machine was not idle (load average {before:.1f} before, "
        f"{after:.1f} after).",
    ]


def small_models() -> list[str]:
    """What one measurement takes in training on small models, the loss given."""
    record = latest("small")
    head = "parameters | tokens | `rtol` | plain forward pass | one λ_c, in plain forward passes | losses evaluated"
    line = (
        "{parameters:.2g} M | {tokens} | {rtol} | {plain_forward_ms:.1f} ms | {in_plain_forwards:.1f} "
        "(mean {in_plain_forwards_mean:.1f}) | {forwards_mean:.2f}"
    )
    rows = [{**row, "parameters": row["parameters"] / 1e6} for row in record["small"]]
    before, after = record["environment"]["load_average"]
    return [*table(head, line, rows), "", f"Load average {before:.1f} before, {after:.1f} after."]


def overhead_in_brief() -> list[str]:
    """What a measurement on every 50th step costs, in one sentence."""
    found = latest("overhead")["overhead"]
    (row,) = (row for row in found["by_every"] if row["every"] == _USUAL)
    return [
        f"**Cost: {row['overhead']:.1%} longer training** with a measurement on every {_USUAL}th step "
        f"({found['model']} of {found['parameters'] / 1e6:.0f} M parameters, AdamW, {found['tokens']} tokens a step, "
        "one CPU thread; [how it was measured](docs/numbers.md#what-a-monitor-adds-to-training))."
    ]


def measured_by_peers() -> tuple[dict[str, Any], dict[tuple[str, str], list[dict[str, Any]]], list[str]]:
    """Return the record, the rows of each quantity and method, one per model, and what the models are called."""
    record = latest("peers")
    names = list(dict.fromkeys(f"{row['parameters'] / 1e6:.2g} M" for row in record["peers"]))
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in record["peers"]:
        time = _known(row.get("in_plain_forwards"), ".1f") or row["status"]
        memory = f"{row['peak_bytes'] / row['parameter_bytes']:.2f}" if row["peak_bytes"] else ""
        rows.setdefault((row["quantity"], row["method"]), []).append({**row, "time": time, "memory": memory})
    return record, rows, names


def _times(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Return the times of a method; largest eigenvalues are computed of the first model alone."""
    return " | ".join([row["time"] for row in rows] + [""] * (len(names) - len(rows)))


def peers() -> list[str]:
    """One measurement by each method, in plain forward passes of the same run."""
    record, rows, names = measured_by_peers()
    about, auto = rows[_TRAINING][0], rows[_AUTO]
    lines = []
    for key, of_method in rows.items():
        first = of_method[0]
        products, errors = first.get("products"), first.get("errors")
        forwards = " and ".join(dict.fromkeys(f"{row['forwards']:g}" for row in of_method if "forwards" in row))
        lines.append({
            "method": key[1] if key == _TRAINING else ", ".join(key),
            "times": _times(of_method, names),
            "work": f"{products} product{'s' * (products > 1)}" if products else forwards,
            "errors": f"{median(errors):.2%}, {max(errors):.2%}" if errors else "",
            "memory": first["memory"],
            "value": _known(first.get("value"), ".4g"),
        })  # fmt: skip
    head = (
        f"method | time in plain forward passes, {' | '.join(f'{name} parameters' for name in names)} | losses "
        "evaluated | error of η_c, median and worst | peak memory beyond θ, in θ | λ at the last step"
    )
    top, rule, *lines = table(head, "{method} | {times} | {work} | {errors} | {memory} | {value}", lines)
    plain = about["plain_peak_bytes"] / about["parameter_bytes"]
    counts = " and ".join(f"{row['measurements']} ({name})" for name, row in zip(names, auto, strict=True))
    each = [row["in_plain_forwards_each"] for row in auto]
    spreads = " and ".join(f"{min(taken):.1f} to {max(taken):.1f}, {mean(taken):.1f} on average," for taken in each)
    firsts = " and ".join(f"{row['first_in_plain_forwards']:.0f}" for row in auto)
    early = ", ".join(str(one["forwards"]) for one in auto[0]["early"])
    before, after = record["environment"]["load_average"]
    return [
        top,
        rule,
        f"| plain forward pass | {'1 | ' * len(names)}1 | | {plain:.2f} | |",
        *lines,
        "",
        f"Medians over {counts} successive steps of {about['tokens']} tokens, after the warm-up. The largest "
        f"eigenvalues were computed at the last step only. Load average {before:.1f} before, {after:.1f} after.",
        "",
        f"Single measurements of the default search ({', '.join(_AUTO)}) took {spreads} plain forward "
        f"passes. The first measurement of a model starts cold and makes extra checks. It took {firsts}. During the "
        f"first {about['trained']} steps, half of them warm-up, every tenth step was measured. These searches "
        f"evaluated {early} losses ({names[0]}).",
    ]


def sampled() -> list[str]:
    """Forwards, errors and coverage of samples of micro-batches, by run and phase."""
    rows = [
        {
            **row,
            "errors": f"{100 * row['error_median']:.2g} / {100 * row['error_p90']:.2g} %",
            "within": f"{100 * row['covered']:.0f} %",
        }
        for row in latest("sample")["sample"]
    ]
    head = "run | micro-batches | phase | measurements | method | forwards | error, median / p90 | within `error`"
    line = "{run} | {micro_batches} | {phase} | {points} | {method} | {forwards_mean:.2f} | {errors} | {within}"
    return [
        *table(head, line, rows),
        "",
        "Forwards are those of the whole step, and the base losses are known from training. Errors are against the "
        "whole batch measured to 0.1 %. Steady: the loss crosses its base value with an exponent of 0.5 to 1.5.",
    ]


def peers_in_brief() -> list[str]:
    """The default search beside the published method, one exact product and the quickest package for λ_max."""
    _, rows, names = measured_by_peers()
    others = [key for key in rows if key[0] == "λ_max" and "sharpkern" not in key[1]]
    quickest = min(others, key=lambda key: rows[key][0].get("in_plain_forwards", math.inf))
    shown = {
        _AUTO: "**sharpkern** | λ_c",
        ("λ_c", "published method"): "published method, our version | λ_c",
        ("λ_dir", "double backward"): "exact Hessian-vector product | curvature along the update",
        quickest: f"{quickest[1]} | largest Hessian eigenvalue",
    }
    names = [f"{name} parameters" for name in names]
    lines = [{"label": label, "times": _times(rows[key], names), **rows[key][0]} for key, label in shown.items()]
    head = f"method | measures | forward passes, {' | '.join(names)} | extra memory, in model sizes"
    each = rows[_AUTO][0]["in_plain_forwards_each"]
    return [
        *table(head, "{label} | {times} | {memory}", lines),
        "",
        "Time is in plain forward passes of the same model and batch, median over training steps, on one CPU thread. "
        f"Forward and backward together take {' and '.join(dict.fromkeys(row['time'] for row in rows[_TRAINING]))}. "
        f"Single sharpkern measurements took {min(each):.1f} to {max(each):.1f} ({names[0]}).",
    ]


def _known(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def growing() -> list[str]:
    """One λ_c by parameters and tokens, and the power of the parameters that it grows with."""
    rows = by_tokens(latest("peers")["growth"])
    head = (
        "tokens | parameters | plain forward pass | one λ_c | in plain forward passes | losses evaluated | each loss "
        "| peak memory beyond θ, in θ"
    )
    line = "{tokens} | {size:.3g} M | {plain} | {search} | {ratio:.1f} | {forwards:g} | {loss} | {memory:.2f}"
    told = [
        {
            **row,
            **dict(zip(("plain", "search", "loss"), (_duration(row[column]) for column in FITTED), strict=True)),
            "size": row["parameters"] / 1e6,
            "ratio": row["search_seconds"] / row["plain_forward_seconds"],
            "memory": row["peak_bytes"] / row["parameter_bytes"],
        }
        for of_one in rows.values()
        for row in of_one
    ]
    plain, search, loss = (
        "; ".join(
            "{:.2f} ± {:.2f} at {} tokens".format(*exponent(of_one, column), tokens) for tokens, of_one in rows.items()
        )
        for column in FITTED
    )
    return [
        *table(head, line, told),
        "",
        "Time grows as a power of the number of parameters. The exponents (straight-line fits in logarithms, ± "
        "standard error) are:",
        "",
        f"- a plain forward pass: {plain}",
        f"- one λ_c: {search}",
        f"- one λ_c, divided by the losses it evaluated: {loss}",
    ]


# The plan that is told whole, and of the others these methods.
_WHOLE = "olmo2-7b"
_METHODS = (
    "plain forward",
    "forward and backward",
    "clone and dictionary",
    "in place, Δθ from state",
    "virtual, Δθ from state",
)


def plans() -> tuple[list[MemoryPlan], MemoryPlan]:
    """Return all memory plans, and the one that is told whole."""
    found = [MemoryPlan.from_json(plan) for plan in latest("memory")["plans"]]
    return found, next(plan for plan in found if plan.model == _WHOLE)


def memory() -> list[str]:
    """One plan whole, and a few methods of all."""
    found, whole = plans()
    names = report.columns(whole)
    of_whole = [{"label": report.label(row), "cells": " | ".join(report.cells(row, names))} for row in whole.rows]
    of_all = []
    for plan in found:
        peaks = {report.label(row): "{} ({})".format(*report.cells(row)) for row in plan.rows}
        of_all.append({"plan": plan, "peaks": " | ".join(peaks.get(method, "") for method in _METHODS)})
    less = sum(
        all(row.peak_bytes < plan["forward and backward"].peak_bytes for row in plan.rows if row.direction == "state")
        for plan in found
    )
    return [
        *table(f"{whole.model}, GiB | peak | {' | '.join(names)} | smallest card", "{label} | {cells}", of_whole),
        "",
        *table(
            f"peak on each GPU, GiB (smallest card) | GPUs | {' | '.join(_METHODS)}",
            "{plan.model} | {plan.conditions[gpus]} | {peaks}",
            of_all,
        ),
        "",
        f"In {less} of these {len(found)} plans, every measurement with Δθ from the optimizer's state peaks below "
        "forward and backward. (Forward and backward keep all activations here; nothing is recomputed.)",
    ]


def memory_in_brief() -> list[str]:
    """What training and the smallest measurement of the whole plan take, in two sentences."""
    _, plan = plans()
    least = min((row for row in plan.rows if row.direction), key=lambda row: row.peak_bytes)
    told = ["{} GiB ({} card)".format(*report.cells(row)) for row in (plan["forward and backward"], least)]
    return [
        f"OLMo 2 7B, bf16 weights, AdamW with float32 moments, one sequence of {plan.conditions['tokens']} tokens: "
        f'forward and backward peak at {told[0]}. The leanest measurement, "{report.label(least)}", peaks at {told[1]}.'
    ]


def blocks() -> list[str]:
    """λ_c of every block beside that of the whole, and how often it was the largest, in warm-up and after."""
    return [line for model in latest("blocks")["models"] for line in (*_blocks_of(model), "")][:-1]


def _blocks_of(found: Mapping[str, Any]) -> list[str]:
    phases = [{row["block"]: row for row in phase["blocks"]} for phase in found["phases"]]
    names = list(dict.fromkeys(name for phase in phases for name in phase))
    rows = []
    for name in names:
        counts = [f"{phase['limiting'].get(name, 0)} of {phase['steps']}" for phase in found["phases"]]
        cells = [
            f"{phase[name][column]:{style}}" if name in phase else ""
            for column, style in (("share_of_whole", ".2g"), ("share_of_slope", ".1%"))
            for phase in phases
        ]
        rows.append({"name": name, "cells": " | ".join([*cells, *counts])})
    first, second = found["phases"]
    head = "λ_c over that of the whole, warm-up | after | share of Δθᵀg, warm-up | after"
    return [
        *table(f"block | {head} | largest λ_c of all, warm-up | after", "`{name}` | {cells}", rows),
        "",
        f"GPT of {found['parameters'] / 1e6:.2g} M parameters, AdamW, {found['tokens']} tokens a step, "
        f"{found['warm_up']} steps of warm-up. Medians over measured steps; λ_c of the whole is "
        f"{first['lambda_c']:.3g} in the warm-up and {second['lambda_c']:.3g} after it. All blocks together took "
        f"{second['forwards_of_blocks']:g} forward passes, the whole "
        f"{median(row['forwards'] for row in found['rows']):g}.",
    ]


TABLES = {
    "blocks": blocks,
    "peers": peers,
    "growth": growing,
    "line search": line_search,
    "cost": cost,
    "kernels": kernels,
    "host": host,
    "rounding": rounding,
    "overhead": overhead,
    "sample": sampled,
    "small": small_models,
    "memory": memory,
    "overhead in brief": overhead_in_brief,
    "peers in brief": peers_in_brief,
    "memory in brief": memory_in_brief,
    "cap": trials.cap_table,
    "cap by task": trials.task_table,
    "find_lr": trials.find_table,
    "cost of the cap": trials.costs,
    "alarms": alarms.alarm_table,
}


def with_tables(text: str, tables: Mapping[str, Callable[[], list[str]]] = TABLES) -> str:
    """Markdown with every marked part made anew."""
    for name, make in tables.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = marked.sub(lambda found, make=make: found[1] + "\n".join(make()) + "\n" + found[2], text)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    report.draw(plans()[1], RESULTS / "memory.png")
    draw_growth(latest("peers"), PLOT)
    trials.draw()
    alarms.draw()
