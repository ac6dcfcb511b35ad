"""What README and guides show runs as it is written, and what they name is there."""

import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
import typer

import sharpkern
from sharpkern import errors
from sharpkern.cli import app
from sharpkern.engines.virtual.linear import FEW_TOKENS
from sharpkern.measures.result import Measurement
from sharpkern.memory.cards import USABLE
from sharpkern.ops.registry import VARIABLE
from tests.helpers.models import MLP

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
GUIDES = [README, *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [
    *GUIDES,
    ROOT / "docs" / "examples" / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "bench" / "README.md",
    ROOT / "bench" / "paper" / "README.md",
]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
# Python, and what it prints where a block of text follows.
EXAMPLE = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
RUN_HERE = [page for page in GUIDES if EXAMPLE.search(TEXTS[page])]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "docs" / "examples").glob("*.py"))}
# These are run by several processes.
OF_RANKS = {name: EXAMPLES.pop(name) for name in ("deepspeed_zero", "fsdp2", "pipeline")}
# What Lightning recommends for larger data.
LIGHTNING = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.* is deprecated",
    "ignore:.*does not have many workers",
    "ignore:.*number of training batches .* is smaller than the logging interval",
    "ignore:.*`tensorboardX` has been removed as a dependency",
)
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


def test_the_reference_has_every_public_name_and_no_other() -> None:
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(listed) == len(set(listed))
    in_errors = {name for name in sharpkern._HOME if sharpkern._HOME[name] == "errors"}
    own = {name for name in listed if name.count(".") == 1}
    assert own == {f"sharpkern.{name}" for name in sharpkern._HOME.keys() - in_errors} | {
        "sharpkern.ops",
        "sharpkern.errors",
    }
    assert {name for name in listed if callable(pkgutil.resolve_name(name))} == {*listed} - {
        "sharpkern.ops",
        "sharpkern.errors",
    }


def test_public_functions_have_examples() -> None:
    shown = {example.name.rsplit(".", 1)[-1] for module in MODULES for example in examples(module)}
    assert {"critical_sharpness", "Monitor", "Direction", "stability_threshold"} <= shown


@pytest.fixture
def _settings_forgotten() -> Iterator[None]:
    """Accelerate leaves its settings behind, for all of the process."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def given(page: Path) -> dict[str, Any]:
    """What the reader has where a page shows a few lines and no whole script: README on frameworks."""
    names: dict[str, Any] = {"__name__": "example"}
    if page == README:
        accelerate, transformers = (importlib.import_module(name) for name in ("accelerate", "transformers"))
        batch = torch.rand(32, 64), torch.randint(10, (32,))
        names |= {
            "args": transformers.TrainingArguments("output", report_to="none", use_cpu=True),
            "data": [{"input": row} for row in batch[0]],
            "accelerator": accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2),
            "loader": [batch] * 4,
            "compute_loss": lambda batch: F.cross_entropy(names["model"](batch[0]), batch[1]),
        }
    return names


@LIGHTNING
@pytest.mark.usefixtures("_settings_forgotten")
@pytest.mark.parametrize("page", RUN_HERE, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = given(page)
    for code, printed in EXAMPLE.findall(TEXTS[page]):
        capsys.readouterr()
        exec(code, names)
        if printed:
            assert_alike(capsys.readouterr().out, printed)
        assert all((tmp_path / name).exists() for name in re.findall(r'(?:to_csv|plot)\("(.*?)"\)', code))


def assert_alike(said: str, shown: str) -> None:
    """The words are the same, and the numbers nearly so: those of another machine have other last digits."""
    assert NUMBER.sub("#", said) == NUMBER.sub("#", shown)
    found, expected = ([float(number) for number in NUMBER.findall(text)] for text in (said, shown))
    assert found == pytest.approx(expected, rel=0.3)


def test_numbers_that_differ_by_half_are_not_alike() -> None:
    assert_alike("η_c 1.1e-02 = 3 × lr", "η_c 0.01 = 3.2 × lr")
    for said in ("η_c 0.015 = 3 × lr", "η_c 0.01 = 3.2 × η"):
        with pytest.raises(AssertionError):
            assert_alike(said, "η_c 0.01 = 3.2 × lr")


def test_the_readme_is_short_and_has_two_commands() -> None:
    text = TEXTS[README]
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 2000
    demo, tests = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    assert "sharpkern demo" in demo
    assert "pytest" in tests


@pytest.mark.parametrize("mistake", ["after the step", "before clipping"])
def test_which_of_the_usual_mistakes_is_told(mistake: str) -> None:
    """Those of another loss have their tests in tests/measures/test_trained_loss.py."""
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = sharpkern.Monitor(model, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(12):
            x, y = torch.randn(32, 16), torch.randint(10, (32,))
            loss_fn = lambda x=x, y=y: F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss = loss_fn()
            loss.backward()
            if mistake == "before clipping":
                monitor(loss_fn, loss=loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            if mistake == "after the step":
                monitor(loss_fn, loss=loss)
    told = [warning.category for warning in caught]
    assert told == ([sharpkern.SlopeMismatchWarning] if mistake == "after the step" else [])


def anchor(title: str) -> str:
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    for link in re.findall(r"\]\((?!http)(.+?)\)", text):
        to, _, heading = link.partition("#")
        there = page.parent / to if to else page
        assert there.exists(), link
        titles = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        assert not heading or heading in map(anchor, titles), link
    roots = (ROOT, ROOT / "sharpkern", page.parent)
    for name in re.findall(r"`((?:\w+/)+\w+\.\w+|(?:tests|bench|docs|kernels|sharpkern)/[\w/]*)`", text):
        assert any((root / name).exists() for root in roots), name
    for name in re.findall(r"`sharpkern\.(\w+)", text):
        assert hasattr(sharpkern, name) or importlib.util.find_spec(f"sharpkern.{name}"), name


def test_the_index_lists_all_guides() -> None:
    listed = re.findall(r"^\| \[.*?\]\((\w[^/\s]*\.md)\)", TEXTS[ROOT / "docs" / "index.md"], re.MULTILINE)
    assert {*listed, "index.md"} == {page.name for page in GUIDES if page != README}
    assert len(set(listed)) == len(listed)


def test_commands_that_the_pages_show_have_these_options() -> None:
    commands: Any = typer.main.get_command(app)
    for page, text in TEXTS.items():
        blocks = "".join(re.findall(r"```(?:ba)?sh\n(.*?)```", text, re.DOTALL))
        shown = [shlex.split(line, comments=True) for line in re.findall(r"^sharpkern (.*)$", blocks, re.MULTILINE)]
        for name, *words in shown:
            known = {option for parameter in commands.commands[name].params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= known, (page.name, name)
        if page == README:
            assert {name for name, *_ in shown} == set(commands.commands)


def test_figures_of_the_pages_are_those_of_the_results_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    readme = importlib.import_module("readme")
    pages = [page.read_text(encoding="utf-8") for page in readme.PAGES]
    assert [readme.with_tables(page) for page in pages] == pages
    for name in readme.TABLES:
        assert re.search(rf"<!-- {name} -->\n[^<]", "".join(pages)), name


def test_numbers_of_the_code_are_those_of_the_guides() -> None:
    text = TEXTS[ROOT / "docs" / "engines.md"]
    assert f"on a CPU below {FEW_TOKENS['cpu']} tokens per step size; on a GPU below {FEW_TOKENS['cuda']} |" in text
    memory = TEXTS[ROOT / "docs" / "memory.md"]
    assert f"{1 - USABLE / 2**30:.0%}".replace("%", " % of a card") in memory
    assert f"80 GB count as {80 * USABLE / 2**30:.1f} GiB" in memory


def section(page: Path, title: str) -> str:
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXTS[page], re.MULTILINE | re.DOTALL)
    return str(found)


def test_every_warning_and_error_has_its_cure() -> None:
    told = section(TROUBLESHOOTING, "Warnings") + section(TROUBLESHOOTING, "Errors")
    own = {name for name, value in vars(errors).items() if isinstance(value, type)} - {"SharpkernWarning"}
    assert set(re.findall(r"^\| `(\w+(?:Warning|Error))` \|", told, re.MULTILINE)) == own
    statuses = set(get_args(get_type_hints(Measurement)["status"]))
    for page, title in ((TROUBLESHOOTING, "Status"), (ROOT / "docs" / "reading.md", "Status")):
        shown = set(re.findall(r"^\| `(\w+)` \|", section(page, title), re.MULTILINE))
        assert len(shown) > 2
        assert shown <= statuses
    # Messages that it quotes are those that there are.
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "sharpkern").rglob("*.py"))
    messages = re.findall(r'^\| "(.*?)" \|', told, re.MULTILINE)
    assert messages
    for message in messages:
        assert message in sources, message


def test_every_environment_variable_is_told() -> None:
    told = section(TROUBLESHOOTING, "Environment variables")
    files = [*(ROOT / "sharpkern").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    read = re.findall(r"environ(?:\.get\(|\[)([^)\]]+)", "".join(path.read_text(encoding="utf-8") for path in files))
    names = {name.strip("\"'") if name != "VARIABLE" else VARIABLE for name in read}
    assert set(re.findall(r"^\| `(\w+)` \|", told, re.MULTILINE)) == names


def test_one_version() -> None:
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version == sharpkern.__version__


@pytest.mark.long
@pytest.mark.parametrize("name", OF_RANKS)
def test_an_example_of_several_ranks_runs(name: str, tmp_path: Path) -> None:
    if name == "deepspeed_zero":
        pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(OF_RANKS[name])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    # DeepSpeed tells of itself too.
    steps = [line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("step ")]
    assert steps == [f"step {step}" for step in range(0, 50, 10)]
    assert "λ_c" in done.stdout


@LIGHTNING
@pytest.mark.usefixtures("_settings_forgotten")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in {"data_mix", "nanogpt"})) for name in EXAMPLES]
)
def test_an_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(EXAMPLES[name]), run_name="__main__")
    if "sweep" in names:
        assert len(names["sweep"].table) == 2 * 5
        assert "SweetSpot(" in capsys.readouterr().out
        return
    callback = names.get("callback")
    monitors = names.get("monitors", {"": callback.monitor if callback else names.get("monitor")}).values()
    for monitor in monitors:
        assert len(monitor.history) >= 2
        assert not monitor.skipped
        assert {record.measurement.status for record in monitor.history} <= {"converged", "unbounded"}
    assert any(record.measurement.status == "converged" for monitor in monitors for record in monitor.history)
