"""Verdicts on compiled kernels, which cannot be made while Triton interprets."""

import os

import pytest

collect_ignore_glob = ["test_*.py"] if os.environ.get("TRITON_INTERPRET") == "1" else []


@pytest.fixture(autouse=True)
def _poisoned() -> None:
    """Nothing is launched."""


@pytest.fixture
def verifier() -> None:
    """The verifier of the committed verdicts, or the test is skipped."""
    reason = "the verifier is not installed; run: pip install -c constraints.txt -e '.[verify]'"
    pytest.importorskip("sentryward", reason=reason)
