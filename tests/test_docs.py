"""What the documentation shows runs as it is written."""

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F

import sharpkern
from sharpkern import errors
from sharpkern.measures.result import Measurement
from sharpkern.ops.registry import VARIABLE
from tests.helpers.models import GPT, MLP

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MODULES = [
    module.name
    for module in pkgutil.walk_packages(sharpkern.__path__, "sharpkern.")
    if not module.name.startswith("sharpkern.kernels")
]


def examples(module: str) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(importlib.import_module(module)) if test.examples]


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings(module: str) -> None:
    for example in examples(module):
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
        assert result.failed == 0, example.name


def test_public_functions_have_examples() -> None:
    shown = {example.name.rsplit(".", 1)[-1] for module in MODULES for example in examples(module)}
    assert {"critical_sharpness", "Monitor", "Direction", "stability_threshold"} <= shown


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Those of frameworks are the examples of their modules, and that of several ranks has a test of its own.
    own = ("init_process_group", "sharpkern.integrations")
    loop, single, mix = (block for block in PYTHON if not any(word in block for word in own))
    model = MLP()
    names = {
        "F": F,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "batches": [(torch.randn(32, 16), torch.randint(0, 10, (32,))) for _ in range(60)],
    }
    exec(loop, names)
    assert [record.step for record in names["monitor"].history] == [0, 50]
    assert (tmp_path / "sharpness.csv").exists()
    assert (tmp_path / "sharpness.png").exists()
    exec(single, names)
    assert names["m"].status == "converged"
    rows = torch.randint(0, 128, (100, 9))
    names["model"] = GPT()
    names |= {"old_heldout": rows[:4], "old_rows": rows[4:], "new_heldout": 127 - rows[:4], "new_rows": 127 - rows[4:]}
    exec(mix, names)
    assert len(names["sweep"].points) == 5 * 2 * 5
    assert all((tmp_path / name).exists() for name in ("sweep.csv", "sweep.jsonl", "sweep.png"))


def test_the_readme_has_two_commands_and_names_what_is_there() -> None:
    commands = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert len(commands) == 2
    for page in (ROOT / "README.md", ROOT / "bench" / "README.md"):
        text = page.read_text(encoding="utf-8")
        for link, heading in re.findall(r"\]\((?!http)([^)#]+)(?:#([^)]+))?\)", text):
            there = page.parent / link
            assert there.exists(), link
            titles = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
            assert not heading or heading in [title.lower().replace(" ", "-") for title in titles], heading
    for name in re.findall(r"`sharpkern\.(\w+)", README):
        assert hasattr(sharpkern, name) or name == "kernels", name


def test_figures_in_the_readme_are_those_of_the_results_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    readme = importlib.import_module("readme")
    pages = [page.read_text(encoding="utf-8") for page in readme.PAGES]
    assert [readme.with_tables(page) for page in pages] == pages
    assert all(re.search(rf"<!-- {name} -->\n[^<]", "".join(pages)) for name in readme.TABLES)


def test_every_warning_and_error_has_its_cure_in_the_readme() -> None:
    (section,) = re.findall(r"## Troubleshooting\n(.*?)\n## ", README, re.DOTALL)
    own = {name for name, value in vars(errors).items() if isinstance(value, type)} - {"SharpkernWarning"}
    assert set(re.findall(r"^\| `(\w+(?:Warning|Error))` \|", section, re.MULTILINE)) == own
    statuses = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) - own
    assert statuses <= set(get_args(get_type_hints(Measurement)["status"]))
    # Messages that it quotes are those that there are.
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "sharpkern").rglob("*.py"))
    for message in re.findall(r'^\| "(.*?)" \|', section, re.MULTILINE):
        assert message in sources, message


def test_every_environment_variable_is_in_the_readme() -> None:
    (section,) = re.findall(r"## Environment variables\n(.*?)\n## ", README, re.DOTALL)
    files = [*(ROOT / "sharpkern").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    read = re.findall(r"environ(?:\.get\(|\[)([^)\]]+)", "".join(path.read_text(encoding="utf-8") for path in files))
    names = {name.strip("\"'") if name != "VARIABLE" else VARIABLE for name in read}
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == names


def test_one_version() -> None:
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version == sharpkern.__version__


def test_the_readmes_example_of_several_ranks_runs(tmp_path: Path) -> None:
    (example,) = (block for block in PYTHON if "init_process_group" in block)
    (tmp_path / "train.py").write_text(example, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [f"step {step}" for step in range(0, 50, 10)]
    assert "λ_c" in done.stdout


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_files_that_the_pages_name_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = [name for name in re.findall(r"`([\w/]+\.py)`", text) if "/" in name]
    assert len(named) > 5
    assert [name for name in named if not ((ROOT / name).exists() or (ROOT / "sharpkern" / name).exists())] == []
    assert [to for to in re.findall(r"\]\(([^):#]+)\)", text) if not (page.parent / to).exists()] == []
