"""Numerics of the kernels under Triton's interpreter, in a process that tests/ops/test_kernels.py starts."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The interpreter is chosen when triton is imported, which the rest of the suite does without it.
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    from tests.helpers import triton_shim

    triton_shim.install()


@pytest.fixture(autouse=True)
def _poisoned():
    """Fill memory that torch leaves uninitialised with NaN: what a kernel does not write shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def first_program(monkeypatch):
    """Start the grids that follow at a later program: a full grid up to there would take days."""
    from triton.runtime.interpreter import InterpreterBuilder

    stock = InterpreterBuilder.create_get_program_id

    def start_at(first: int) -> None:
        def program_id(self, axis):
            handle = stock(self, axis)
            handle.data = handle.data + handle.data.dtype.type(first)
            return handle

        monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", program_id)

    return start_at
