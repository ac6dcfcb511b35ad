"""Write what the compiler makes of every kernel to bench/results/static.json: ``python -m bench.static_table``.

Needs no GPU. Facts of other Triton versions in the file stay. For another version, here the oldest that is tested, in
an environment of its own (pip may say that torch asks for a newer one, which matters to torch.compile alone)::

    python -m venv .venv-triton36
    .venv-triton36/bin/pip install torch numpy pytest pytest-benchmark
    .venv-triton36/bin/pip install triton==3.6.0
    .venv-triton36/bin/python -m bench.static_table
    .venv-triton36/bin/python -m pytest tests/ops/test_compile_only.py
    TRITON_INTERPRET=1 .venv-triton36/bin/python -m pytest tests/kernels
"""

import json
from typing import Any

import triton

from tests.helpers.compiled import TARGETS
from tests.helpers.launches import CASES, TABLE, case_facts


def main() -> None:
    """Compile every case for every architecture and write the table."""
    table: dict[str, Any] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table[triton.__version__] = {
        name: {arch: [facts.to_json() for facts in case_facts(name, arch)] for arch in TARGETS} for name in CASES
    }
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    for name, by_architecture in table[triton.__version__].items():
        for arch, kernels in by_architecture.items():
            for row in kernels:
                facts = "{registers:4} registers {shared:5} B shared {spills} spills {instructions:5}".format(**row)
                print(f"{name:34} {arch:8} {row['kernel']:28} {facts} instructions")


if __name__ == "__main__":
    main()
