"""Which way to take K step sizes through a linear layer is quickest, and whether the virtual engine takes it.

    python bench/linear_table.py [PATH]

Reads the section "linear" of a file of `sharpkern bench`: of each architecture the last sitting that has it, and of
each number of tokens the median over shapes. Ends with code 1 where the way that `choose` of the engine takes for a
full pass of the batched engine is more than a tenth slower than the quickest.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ledger
import torch

from sharpkern.bench.report import Summary, summaries
from sharpkern.engines.batched.engine import NUM_PARALLEL
from sharpkern.engines.virtual.linear import choose

RESULTS = ledger.RESULTS / "bench.json"
# Slower than the quickest way by more than this is a wrong choice; less is noise, or not worth a row of the table.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Line:
    """What was measured on one architecture, and the way that an engine takes there."""

    architecture: str  # of the GPU, such as "sm_90", or of the CPU
    summary: Summary
    chosen: str

    @property
    def behind(self) -> float:
        """By what share the chosen way is slower than the quickest one; 1 where it did not come to be timed."""
        shares = self.summary.shares
        return 1 - shares.get(self.chosen, 0.0) / shares[self.summary.best]

    @property
    def agrees(self) -> bool:
        """Whether the choice is right. It is made for full passes: others are rare, and not held against it."""
        return self.summary.at_once != NUM_PARALLEL or self.behind <= TOLERANCE

    def __str__(self) -> str:
        one = self.summary
        shares = ", ".join(f"{way} {share:.2f}" for way, share in sorted(one.shares.items(), key=lambda x: -x[1]))
        verdict = "agrees" if self.agrees else f"DISAGREES, {self.behind:.0%} slower"
        taken = f"takes {self.chosen}: {verdict}" if one.at_once == NUM_PARALLEL else ""
        return f"{self.architecture:8} {one.dtype:9} K={one.at_once} M={one.tokens:<5} {shares:44} {taken}"


def lines(sittings: list[dict[str, Any]]) -> list[Line]:
    """Return a line for everything that was measured, full sittings alone, later ones in the place of earlier ones."""
    found: dict[str, list[Line]] = {}
    for sitting in sittings:
        environment = sitting["environment"]
        device = torch.device("cpu" if environment["gpu"] is None else "cuda")
        architecture = environment.get("architecture") or environment["machine"]
        cases = sitting["sections"].get("linear", {"cases": {}})["cases"]
        measured = summaries({name: case.get("rows", []) for name, case in cases.items()})
        if measured and not sitting["quick"]:
            found[architecture] = [
                Line(architecture, one, choose(device, getattr(torch, one.dtype), one.tokens)) for one in measured
            ]
    return [line for of_one in found.values() for line in of_one]


def main(path: Path = RESULTS) -> int:
    """Print the table and return the exit code."""
    table = lines(json.loads(path.read_text(encoding="utf-8")))
    print("Speed per step size over that of the bare product, median over shapes; K step sizes at once, M tokens each")
    print(*table, sep="\n")
    wrong = sum(not line.agrees for line in table)
    said = f"{wrong} of {len(table)} lines disagree with engines/virtual/linear.py"
    print(said if table else "Nothing was measured yet")
    return int(wrong > 0 or not table)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
