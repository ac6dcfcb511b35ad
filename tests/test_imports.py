"""Which room may import which, and what importing the package costs."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sharpkern
from tests import conftest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sharpkern"

# From the outermost room inwards: a module imports its own room and rooms further in, never outwards.
ROOMS = {
    "command line and frameworks": ["cli", "bench", "integrations"],
    "loop": ["monitor", "mixture", "sweep", "_marks", "mixture_plot", "plot", "memory"],
    "quantities": [
        "critical",
        "accumulate",
        "_run",
        "relative",
        "directional",
        "hessian",
        "thresholds",
        "_hvp",
    ],
    "results": ["measurement"],
    "parts": ["search", "_acceptance", "_curve", "_strategies", "_differences", "direction", "updates", "engines"],
    "ground": [
        "linear",
        "overlaps",
        "shards",
        "fakes",
        "ops",
        "randomness",
        "_undo",
        "errors",
        "_checkout",
        "_extras",
        "_files",
        "_journal",
        "_logs",
        "_mix",
        "_progress",
    ],
}
LEVEL = {module: level for level, modules in enumerate(ROOMS.values()) for module in modules}
# Within "parts", the search, the directions and the engines know nothing of each other, with one exception.
PARTS = {
    "search": {"search", "_acceptance", "_curve", "_strategies", "_differences"},
    "direction": {"direction", "updates"},
    "engines": {"engines"},
}


def imports(path: Path) -> Iterator[str]:
    """Full names that a file imports, inside functions too, but not for type checking only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            if node.module == "sharpkern":
                yield from (f"sharpkern.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    return module.split(".")[1]


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def wrong_arrows(path: Path) -> list[str]:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    arrows = []
    for name in imports(path):
        if not name.startswith("sharpkern.") or room(name) not in LEVEL:
            continue
        other = room(name)
        outward = LEVEL[other] < LEVEL[own]
        family = next((members for members in PARTS.values() if own in members), None)
        sideways = family is not None and any(other in members for members in PARTS.values()) and other not in family
        if outward or sideways:
            arrows.append(f"{own} → {other}")
    return arrows


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_inwards(path: Path) -> None:
    assert path.relative_to(PACKAGE).parts[0].removesuffix(".py") in LEVEL, "give the new module a room above"
    # The checks after a search read its result.
    allowed = ["engines → search"] if path.name == "verify.py" else []
    assert [arrow for arrow in wrong_arrows(path) if arrow not in allowed] == []


def test_a_wrong_arrow_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    planted = tmp_path / "engines" / "planted.py"
    planted.parent.mkdir()
    planted.write_text(
        "def f():\n    from sharpkern.monitor import Monitor\nimport sharpkern.direction\n", encoding="utf-8"
    )
    assert wrong_arrows(planted) == ["engines → direction", "engines → monitor"]


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: path.name)
def test_kernels_import_torch_triton_and_what_all_launchers_share(path: Path) -> None:
    standard = sys.stdlib_module_names
    names = {name.split(".")[0] if not name.startswith(".") else name for name in imports(path)}
    shared = {".._launch"} if path.parent.name == "rules" else {"._launch", "._accepts"}
    assert names - standard <= {"torch", "triton", *shared}


def python(program: str, **environment: str) -> str:
    command, env = [sys.executable, "-c", program], {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


BLOCK = "import sys\nfor name in {names}: sys.modules[name] = None\n"


def test_the_package_works_with_triton_and_every_extra_absent() -> None:
    absent = ["triton", "matplotlib", "scipy", "sklearn", "transformers", "rich", "typer"]
    program = """
import torch, sharpkern
model = torch.nn.Linear(3, 1)
loss_fn = lambda: model(torch.ones(2, 3)).square().mean()
loss_fn().backward()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
print(sharpkern.critical_sharpness(model, loss_fn, sharpkern.Direction.from_optimizer(optimizer)).status)
"""
    assert python(BLOCK.format(names=absent) + program).strip() == "converged"


def test_the_block_can_fail() -> None:
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        python(BLOCK.format(names=["triton"]) + "import triton")


def test_gpu_tests_run_where_optional_packages_are_absent() -> None:
    options = "-m gpu --collect-only -q --assert=plain -p no:cacheprovider"
    collect = f"import pytest; sys.exit(pytest.main({options.split()}))"
    # Nor are pytest's plugins there.
    listed = python(BLOCK.format(names=conftest.OPTIONAL) + collect, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    found = {line.split("::")[0].removeprefix("tests/") for line in listed.splitlines() if "::" in line}
    marked = {path.name for path in ROOT.glob("tests/test_*.py") if "pytest.mark.gpu" in path.read_text("utf-8")}
    # What device maps are tested with on a GPU is accelerate's.
    assert found == marked - {"test_device_maps.py", Path(__file__).name} != set()


def test_the_search_imports_no_torch() -> None:
    program = """
import importlib.util, sys, types
package = types.ModuleType("sharpkern"); package.__path__ = ["sharpkern"]; sys.modules["sharpkern"] = package
import sharpkern.search
print("torch" in sys.modules, round(sharpkern.search.find_critical_lr(lambda eta: eta * eta - eta).critical_lr, 6))
"""
    assert python(program).split() == ["False", "1.0"]


def test_importing_costs_next_to_nothing_on_top_of_torch() -> None:
    program = """
import time, torch
start = time.perf_counter()
import sharpkern
print(time.perf_counter() - start)
"""
    # Another process may be in the way now and then.
    assert any(float(python(program)) < 0.1 for _ in range(3))


def test_importing_loads_nothing_heavy() -> None:
    heavy = "{'triton', 'scipy', 'matplotlib', 'sklearn', 'transformers', 'typer', 'rich', 'torch._dynamo'}"
    program = f"""
import torch, sys
before = set(sys.modules)
import sharpkern
names = [getattr(sharpkern, name) for name in dir(sharpkern)]
print(({heavy} & set(sys.modules)) - before)
"""
    assert python(program).strip() == "set()"


def test_what_is_loaded_when_asked_for_is_what_type_checkers_see() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (declared,) = [node.body for node in tree.body if isinstance(node, ast.If)]
    seen = {node.names[0].name: node.module for node in declared if isinstance(node, ast.ImportFrom)}
    homes = {name: f"sharpkern.{home}" for name, home in sharpkern._HOME.items()}
    assert seen == homes | {"ops": "sharpkern"}
    assert all(getattr(sharpkern, name).__module__ == home for name, home in homes.items())
    assert set(seen) <= set(dir(sharpkern))
    with pytest.raises(AttributeError, match="module 'sharpkern' has no attribute 'critical_sharpnes'"):
        _ = sharpkern.critical_sharpnes
