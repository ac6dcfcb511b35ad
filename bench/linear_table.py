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

# The checkout, also where the package is not installed.
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from sharpkern.bench.report import Summary, summaries
from sharpkern.engines.batched.engine import NUM_PARALLEL
from sharpkern.engines.virtual.linear import choose

RESULTS = Path(__file__).parent / "results" / "bench.json"
# Slower than the quickest way by more than this is a wrong choice; less is noise, or not worth a row of the table.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Line:
    """One architecture, dtype, number of tokens and number of step sizes.

    Attributes:
        architecture: of the GPU, such as "sm_90", or of the CPU.
        summary: what was measured.
        chosen: the way that an engine takes.
    """

    architecture: str
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
        summary = self.summary
        ways = sorted(summary.shares, key=lambda way: -summary.shares[way])
        shares = ", ".join(f"{way} {summary.shares[way]:.2f}" for way in ways)
        verdict = "agrees" if self.agrees else f"DISAGREES, {self.behind:.0%} slower"
        taken = f"takes {self.chosen}: {verdict}" if summary.at_once == NUM_PARALLEL else ""
        return f"{self.architecture:8} {summary.dtype:9} K={summary.at_once} M={summary.tokens:<5} {shares:44} {taken}"


def lines(sittings: list[dict[str, Any]]) -> list[Line]:
    """Return a line for everything that was measured, full sittings alone, later ones in the place of earlier ones."""
    found: dict[str, list[Line]] = {}
    for sitting in sittings:
        environment = sitting["environment"]
        device = "cpu" if environment["gpu"] is None else "cuda"
        architecture = environment.get("architecture") or environment["machine"]
        cases = sitting["sections"].get("linear", {"cases": {}})["cases"]
        measured = summaries({name: case.get("rows", []) for name, case in cases.items()})
        if measured and not sitting["quick"]:
            found[architecture] = [Line(architecture, summary, _chosen(device, summary)) for summary in measured]
    return [line for of_one in found.values() for line in of_one]


def _chosen(device: str, summary: Summary) -> str:
    return choose(torch.device(device), getattr(torch, summary.dtype), summary.tokens)


def main(path: Path = RESULTS) -> int:
    """Print the table and return the exit code."""
    table = lines(json.loads(path.read_text(encoding="utf-8")))
    print("Speed per step size over that of the bare product, median over shapes; K step sizes at once, M tokens each")
    for line in table:
        print(line)
    wrong = sum(not line.agrees for line in table)
    print(
        f"{wrong} of {len(table)} lines disagree with engines/virtual/linear.py"
        if table
        else "Nothing was measured yet"
    )
    return int(wrong > 0 or not table)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
