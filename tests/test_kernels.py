"""The kernels without a GPU: their numerics under Triton's interpreter, and what their launchers refuse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is a Linux package")

ROOT = Path(__file__).parents[1]


def test_numerics_under_the_interpreter():
    # Triton decides on its import whether to interpret: the numerics need a process of their own.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr}"
