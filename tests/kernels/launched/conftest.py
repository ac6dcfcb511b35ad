"""Triton's launch path on a GPU that computes nothing, in a process that tests/ops/test_launches.py starts."""

import os
from collections.abc import Iterator

import pytest

# Once it is there, it is the device of Triton in this process.
IS_FAKE = os.environ.get("SHARPKERN_FAKE_GPU") == "1"

collect_ignore_glob = [] if IS_FAKE else ["test_*.py"]


@pytest.fixture(autouse=True)
def _poisoned() -> None:
    """Unlike under the interpreter, what a kernel does not write is what plain torch fills in."""


@pytest.fixture(scope="session")
def gpu() -> Iterator[object]:
    from tests.helpers.fake_gpu import FakeGPU, missing

    if (reason := missing()) is not None:
        pytest.skip(reason)
    return FakeGPU()
