"""Write what a static verifier proves of kernels to bench/results/verified.json: ``python -m bench.verified_table``.

Needs no GPU, but the extra ``verify``. Words behind the command are parts of the names of cases; all others stay as
they are. Verdicts with other versions of Triton stay.
"""

import json
import sys
from importlib.metadata import version
from typing import Any

import triton

from tests.kernels.verified.cases import ARCHITECTURES, CASES
from tests.kernels.verified.planted import FAULTS
from tests.kernels.verified.record import TABLE, VERIFIER, found, found_fault


def main(words: list[str]) -> None:
    """Verify, and write the table after every case."""
    if (installed := f"sentryward {version('sentryward')}") != VERIFIER:
        raise SystemExit(f"the verifier must be {VERIFIER}, got {installed}; install the extra verify")
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    stored = table.setdefault(triton.__version__, {"verifier": VERIFIER, "cases": {}, "planted": {}})
    for part, names in (("cases", CASES), ("planted", FAULTS)):
        stored[part] = {name: row for name, row in stored[part].items() if name in names}
    for name in CASES:
        if not words or any(word in name for word in words):
            stored["cases"][name] = {arch: found(name, arch) for arch in ARCHITECTURES}
            _write(table)
            for arch, row in stored["cases"][name].items():
                print(f"{name:46} {arch:7}", *(_shown(row[part]) for part in ("as_it_is", "edited")), flush=True)
    for name in FAULTS:
        if not words or any(word in name for word in words):
            stored["planted"][name] = found_fault(name)
            _write(table)
            print(f"{name:54}", _shown(stored["planted"][name]), flush=True)


def _write(table: dict[str, Any]) -> None:
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _shown(verdict: dict[str, Any] | None) -> str:
    return "" if verdict is None else "{proved:9} {seconds:5} s {reason:.40}".format(**verdict)


if __name__ == "__main__":
    main(sys.argv[1:])
