"""The committed verdicts, by Triton version, case and architecture, and what they are verdicts on."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from tests.helpers.compiled import compile_launch, fingerprint_of
from tests.kernels.verified.cases import CASES, code_of, question
from tests.kernels.verified.planted import FAULTS
from tests.kernels.verified.verifier import verdict

TABLE = Path(__file__).parents[3] / "bench" / "results" / "verified.json"

# Where faults are planted.
PLANTED_IN = "sm_100"

VERIFIER = "sentryward 0.1.1"


def committed() -> dict[str, Any] | None:
    """The verdicts with this version of Triton, None where there are none."""
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found.get(triton.__version__)


def source_of(name: str, architecture: str) -> str:
    """A mark of the kernel's source and of all that its PTX depends on."""
    return fingerprint_of(CASES[name].launch(architecture), architecture)


def code_mark_of(name: str, architecture: str) -> str:
    """A mark of the PTX as it is."""
    ptx = compile_launch(CASES[name].launch(architecture), architecture).asm["ptx"]
    return hashlib.sha256(code_of(ptx).encode()).hexdigest()


def verdicts(name: str, architecture: str) -> dict[str, Any]:
    """The verdict on a case as it is, and with its edits if it has any."""
    case = CASES[name]
    edited = asdict(verdict(question(case, architecture, edited=True))) if case.all_edits else None
    as_it_is = asdict(verdict(question(case, architecture, edited=False)))
    return {"as_it_is": as_it_is, "edits": case.letters, "edited": edited}


def found(name: str, architecture: str) -> dict[str, Any]:
    """A row of the record."""
    return {
        "kernel": CASES[name].launch(architecture).kernel.__name__,
        "unasked": CASES[name].unasked,
        **verdicts(name, architecture),
        "source": source_of(name, architecture),
        "code": code_mark_of(name, architecture),
    }


def found_fault(name: str) -> dict[str, Any]:
    """What the verifier says of a planted fault."""
    return asdict(verdict(FAULTS[name].question(PLANTED_IN)))


def said(row: dict[str, Any]) -> dict[str, Any]:
    """What a row says, without the time it took."""
    kept = {}
    for part in ("as_it_is", "edited"):
        kept[part] = row[part] and {"proved": row[part]["proved"], "reason": row[part]["reason"]}
    return {**kept, "edits": row["edits"]}
