"""The kernels without a GPU: their numerics under Triton's interpreter, and what their launchers refuse."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is a Linux package")

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "kernels").rglob("*.py"))


# In parts, so that several processes may share them.
NUMERICS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "kernels").glob("test_*.py"))
PARTS = {"one": (NUMERICS[::2], "not long"), "two": (NUMERICS[1::2], "not long"), "long": (NUMERICS, "long")}


@pytest.mark.parametrize("part", ["one", "two", pytest.param("long", marks=pytest.mark.long)])
def test_numerics_under_the_interpreter(part):
    # Triton decides on its import whether to interpret: the numerics need a process of their own.
    files, marked = PARTS[part]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-q", "-m", marked, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr}"


def test_cpu_tensors_are_refused_with_the_remedy():
    # Triton would launch on the address of a CPU tensor and fault on the device, or worse, not fault.
    from sharpkern.kernels.form import form

    weight = torch.zeros(4)
    with pytest.raises(ValueError, match=r"W must be a dense CUDA tensor, got torch\.strided on cpu; move it to"):
        form(weight, weight, torch.zeros(1))


def test_an_older_triton_is_refused_at_import():
    program = """
import triton
triton.__version__ = "3.5.1"
import sharpkern.kernels.form
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ImportError: sharpkern.kernels needs Triton 3.6 or newer, got 3.5.1; install a newer one" in done.stderr


@pytest.mark.parametrize("architecture", ["sm_75", "gfx1100"])
def test_a_linear_layer_is_refused_where_its_tiles_do_not_fit_the_registers(architecture):
    from sharpkern.kernels.linear import linear

    from tests.helpers.compiled import launches_of

    x, W = torch.zeros(1, 2, 32), torch.zeros(16, 32)
    with pytest.raises(ValueError, match=rf"linear must run on a GPU whose .* fit, got {architecture}"):
        launches_of(lambda: linear(x, W, W, torch.zeros(1)), architecture)


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_grids_have_one_axis_and_64_bit_program_ids(path):
    # The other axes end at 65535, and a 32-bit product of program and block wraps around silently.
    ids = [call for call in calls(path) if ast.unparse(call.func) == "tl.program_id"]
    widened = [ast.unparse(call) for call in calls(path) if "program_id(0).to" in ast.unparse(call.func)]
    assert [ast.unparse(call) for call in ids] == ["tl.program_id(0)"] * len(widened)
    assert widened == ["tl.program_id(0).to(tl.int64)"] * len(widened)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_is_tuned_on_the_users_weights(path):
    # Autotuning a kernel that writes its input applies the update once per trial.
    assert "autotune" not in {node.attr for node in ast.walk(ast.parse(path.read_text())) if hasattr(node, "attr")}
