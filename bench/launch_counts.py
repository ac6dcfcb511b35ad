"""Write what measuring takes of the host on a GPU to bench/results/launches.json: ``python -m bench.launch_counts``.

Needs no GPU, but a C compiler and the header files of Python, as Triton does.
"""

import json

import torch

from tests.helpers.fake_gpu import FakeGPU, missing
from tests.helpers.launch_counts import TABLE, counts


def main() -> None:
    """Count, and write the table."""
    if (reason := missing()) is not None:
        raise SystemExit(f"there can be no GPU that computes nothing here: {reason}")
    torch.set_num_threads(1)
    found = counts(FakeGPU())
    TABLE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, row in found.items():
        print(f"{name:32}", row)


if __name__ == "__main__":
    main()
