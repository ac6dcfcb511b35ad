"""Launches on a GPU that computes nothing, in a process whose libcuda is a stub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("triton", reason="triton is a Linux package")


@pytest.mark.long
@pytest.mark.parametrize("file", ["test_launchers", "test_engines_launched", "test_counts", "test_precompile"])
def test_launches(file: str) -> None:
    from tests.helpers.fake_gpu import missing

    if (reason := missing()) is not None:
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", f"tests/kernels/launched/{file}.py", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "SHARPKERN_FAKE_GPU": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr}"
