"""The results ledger: files of `results/` to which every run adds a record, with all that its figures depend on.

What was recorded once is never changed. ``python bench/readme.py`` makes the tables and plots of README and docs from
the last full record of each file.
"""

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sharpkern

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


class Sitting:
    """One run of a benchmark, from its start to its record."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        # The sources are those of the start, whatever is edited meanwhile.
        self._environment = environment()
        self._started = time.perf_counter()
        self._load = os.getloadavg()[0]

    def record(self, **results: Any) -> dict[str, Any]:
        """Return the record."""
        conditions = {
            **self._environment,
            "load_average": [self._load, os.getloadavg()[0]],
            "seconds": time.perf_counter() - self._started,
            **results.pop("environment", {}),
        }
        return {"environment": conditions, "quick": self.quick, **results}


def environment() -> dict[str, Any]:
    """Return versions and conditions, without anything that names the machine."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()

    return {
        "date": time.strftime("%Y-%m-%d"),
        "sharpkern": sharpkern.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
    }


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a record to the list in a file; those that are there stay, also if this is interrupted."""
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".new")
    written.write_text(json.dumps([*records, record], indent=1) + "\n", encoding="utf-8")
    written.replace(path)


def latest(name: str) -> dict[str, Any]:
    """Return the last full record of a file."""
    records = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    record: dict[str, Any] = [record for record in records if not record["quick"]][-1]
    return record
