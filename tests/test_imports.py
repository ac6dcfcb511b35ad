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

ANYWHERE = {"errors", "_support", "_undo", "tensors"}
BELOW_MEASURES = {"distributed", "search", "ops", "directions", "engines"}
# docs/architecture.md: which rooms each may import, beside those that every room may. The command line is outermost.
LAW = {
    "errors": set(),
    "_support": set(),
    "_undo": set(),
    "tensors": set(),
    "distributed": set(),
    "search": set(),
    "ops": {"kernels"},
    "directions": {"ops", "distributed"},
    "engines": {"ops", "distributed"},
    "measures": BELOW_MEASURES,
    "monitoring": {"measures", *BELOW_MEASURES},
    "mixtures": {"measures", *BELOW_MEASURES},
    "memory": {"measures", *BELOW_MEASURES},
    "integrations": {"monitoring", "measures", *BELOW_MEASURES},
    "cli": {"integrations", "mixtures", "monitoring", "memory", "bench", "measures", *BELOW_MEASURES},
}
# What nothing but the standard library and torch may be imported by.
ALONE = {"errors", "_undo", "search"}


def imports(path: Path) -> Iterator[str]:
    """Full names that a file imports, inside functions too, but not for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            if (node.module or "").startswith("sharpkern"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(package: Path) -> dict[str, Path]:
    """Every file of the package but its __init__.py, by the name it is imported by."""
    files = (
        path.relative_to(package.parent)
        for path in package.rglob("*.py")
        if path.parent != package or path.stem != "__init__"
    )
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): package.parent / path for path in files}


def arrows(package: Path) -> dict[str, set[str]]:
    """For every file of the package, which others it imports; of a package that hands on names, the name's own file."""
    known = modules(package)
    found = {}
    for name, path in known.items():
        others = {other for other in imports(path) if other in known} - {name}
        packages = {other.rpartition(".")[0] for other in others}
        found[name] = others - packages
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def between_rooms(package: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {room(name): set() for name in modules(package)}
    for name, path in modules(package).items():
        others = {room(other) for other in imports(path) if other.startswith("sharpkern.")}
        found[room(name)] |= {other for other in others if other in LAW or other in {"kernels", "bench"}} - {room(name)}
    return found


def circles(graph: dict[str, set[str]]) -> set[str]:
    """What is left when those are taken away, again and again, that nothing leads on from."""
    left = dict(graph)
    while ends := [name for name, others in left.items() if not others & left.keys()]:
        for name in ends:
            del left[name]
    return set(left)


def against_the_law(package: Path) -> list[str]:
    return [
        f"{own} → {other}"
        for own, others in sorted(between_rooms(package).items())
        for other in sorted(others - LAW.get(own, set()) - (set() if own in ALONE else ANYWHERE))
    ]


def test_rooms_import_what_the_law_lets_them() -> None:
    assert between_rooms(PACKAGE).keys() == LAW.keys(), "give the new room a line in LAW and in docs/architecture.md"
    assert against_the_law(PACKAGE) == []


def test_there_are_few_rooms_on_few_floors_and_no_circles() -> None:
    rooms = between_rooms(PACKAGE)
    assert len(rooms) <= 20
    assert circles(rooms) == set()
    assert circles(arrows(PACKAGE)) == set()

    def floor(name: str) -> int:
        return 1 + max(map(floor, rooms[name] & rooms.keys()), default=0)

    assert max(map(floor, rooms)) <= 10


def test_wrong_arrows_and_circles_are_found(tmp_path: Path) -> None:
    for name, text in {
        "sharpkern/engines/planted.py": (
            "def f():\n    from sharpkern.monitoring import monitor\nimport sharpkern.directions"
        ),
        "sharpkern/monitoring/monitor.py": "from sharpkern.engines import planted",
        "sharpkern/monitoring/__init__.py": "",
        "sharpkern/search/curve.py": "from sharpkern.errors import warn",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    package = tmp_path / "sharpkern"
    assert against_the_law(package) == ["engines → directions", "engines → monitoring", "search → errors"]
    assert circles(between_rooms(package)) == {"engines", "monitoring"}
    assert circles(arrows(package)) == {"sharpkern.engines.planted", "sharpkern.monitoring.monitor"}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: path.name)
def test_kernels_import_torch_triton_and_what_all_launchers_share(path: Path) -> None:
    standard = sys.stdlib_module_names
    names = {name.split(".")[0] if not name.startswith(".") else name for name in imports(path)}
    shared = {".._launch"} if path.parent.name == "rules" else {"._launch", "._accepts", "._tables", "._steps"}
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
    found = {line.split("::")[0].rpartition("/")[2] for line in listed.splitlines() if "::" in line}
    marked = {path.name for path in ROOT.glob("tests/**/test_*.py") if "pytest.mark.gpu" in path.read_text("utf-8")}
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
