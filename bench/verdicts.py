"""The table of what is proved about the compiled kernels, from bench/results/verified.json."""

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The checkout, also where the package is not installed.
sys.path.insert(0, str(Path(__file__).parent.parent))

from ledger import RESULTS, table

from tests.kernels.verified.edits import REASONS

# What the verifier says, in the terms of these kernels.
_SAID = {
    "conflicting_accesses_unordered": "lanes of a warp store one sum to one address, which counts as a race",
    "dynamic_address_overlap_unresolved": "addresses come from a table in memory",
    "control_predicate_not_static": "a branch depends on what lies in memory",
    "async_copy_source_control_not_static": "the size of a copy depends on α",
    "unsupported_ptx_instruction": "the verifier does not know wgmma",
    "expression_form_unsupported": "equality: the verifier does not know an operation",
    "unsupported_operation": "equality: the verifier does not know redux.sync",
    "allocation_alias_relation_unknown": "where the logit of the label lies",
    "input_access_validity_not_proven": "equality: whether the logit of the label is inside",
    "not_proven": "equality: no proof found",
}


def proofs() -> list[str]:
    """Verdicts on every case with the newest Triton, by architecture where these differ."""
    by_version = json.loads((RESULTS / "verified.json").read_text(encoding="utf-8"))
    version = max(by_version, key=lambda name: tuple(map(int, name.split("."))))
    stored = by_version[version]
    rows = []
    for name, by_architecture in stored["cases"].items():
        best = {arch: row["edited"] or row["as_it_is"] for arch, row in by_architecture.items()}
        first = next(iter(by_architecture.values()))
        rows.append({
            "case": name,
            "kernel": first["kernel"],
            "plain": _word({arch: row["as_it_is"] for arch, row in by_architecture.items()}),
            "edits": " ".join(first["edits"]),
            "edited": _word(best) if first["edits"] else "",
            "missing": "; ".join(dict.fromkeys(filter(None, (*map(_reason, best.values()), first["unasked"])))),
        })  # fmt: skip
    plain = [row["as_it_is"] for of_case in stored["cases"].values() for row in of_case.values()]
    best_of_all = [row["edited"] or row["as_it_is"] for of_case in stored["cases"].values() for row in of_case.values()]
    seconds = sum(verdict["seconds"] for verdict in plain)
    seconds += sum(
        row["edited"]["seconds"] for of_case in stored["cases"].values() for row in of_case.values() if row["edited"]
    )
    found = [row["proved"] != "equal" for row in stored["planted"].values()]
    return [
        f"Triton {version}, {stored['verifier']}, {', '.join(first_of(stored['cases']))}. Of {len(plain)} verdicts on "
        f"PTX as it is, {_counts(plain)}. With the edits where there are some, {_counts(best_of_all)}. The verifier "
        f"found {sum(found)} of {len(found)} planted faults; the other one is a read out of bounds. It took "
        f"{seconds / 60:.0f} minutes in all, on a busy machine.",
        "",
        *table(
            "case | kernel | PTX as it is | edits | edited PTX | what is missing",
            "{case} | `{kernel}` | {plain} | {edits} | {edited} | {missing}",
            rows,
        ),
        "",
        "Edits, and why they may be made:",
        "",
        *(f"- {letter}: {reason}." for letter, reason in REASONS.items()),
    ]


def first_of(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the architectures, in the order of their numbers."""
    return sorted(next(iter(cases.values())), key=lambda arch: int(arch.partition("_")[2]))


def _word(verdicts: Mapping[str, Mapping[str, Any]]) -> str:
    words = {arch: verdicts[arch]["proved"] for arch in first_of({"": verdicts})}
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    return ", ".join(f"{word} ({arch})" for arch, word in words.items())


def _reason(verdict: Mapping[str, Any]) -> str:
    code = verdict["reason"].partition(":")[0]
    return _SAID.get(code, code)


def _counts(verdicts: list[Mapping[str, Any]]) -> str:
    counts = Counter(verdict["proved"] for verdict in verdicts)
    return ", ".join(f"{counts[word]} are {word}" for word in ("equal", "safe", "unproved"))
