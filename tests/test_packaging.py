"""What gets installed, and that our kernels/ and Hugging Face's package of that name live together."""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is needed to build, so that building leaves the checkout alone."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("sharpkern", "kernels", "bench/harness"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def install(source: Path, folder: Path, *options: str) -> Path:
    """Install into an environment that sees this one's packages, and return its interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=source)
    python = folder / "bin" / "python"
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "tests.pth").write_text(sysconfig.get_path("purelib"))
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation")
    installed = run(*pip, "--force-reinstall", "-q", *options, source, cwd=source)
    assert installed.returncode == 0, installed.stderr
    return python


def test_the_wheel_holds_one_top_level_package(source: Path, tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q")
    built = run(*pip, "-w", tmp_path, source, cwd=source)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (top_level,) = [archive.read(name) for name in names if name.endswith("top_level.txt")]
    assert top_level.split() == [b"sharpkern"]
    kernels = {f"sharpkern/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    harness = {f"sharpkern/bench/{path.name}" for path in (ROOT / "bench" / "harness").glob("*.py")}
    assert min(len(kernels), len(harness)) > 1
    assert kernels | harness <= set(names)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "sharpkern").rglob("*.py")}
    assert modules <= set(names)
    assert "sharpkern/py.typed" in names
    assert not [name for name in names if name.startswith(("kernels", "tests", "bench"))]


def test_a_source_distribution_is_whole_and_builds_the_same_wheel(source: Path, tmp_path: Path) -> None:
    for name in ("tests", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for name in ("MANIFEST.in", "CHANGELOG.md", "constraints.txt"):
        shutil.copy(ROOT / name, source)
    program = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    built = run(sys.executable, "-c", program, tmp_path, cwd=source)
    assert built.returncode == 0, built.stderr
    (packed,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    expected = (
        "tests/conftest.py",
        "tests/helpers/stub_cuda.c",
        "docs/mkdocs.yml",
        "kernels/form.py",
        "constraints.txt",
    )
    assert not [name for name in expected if not (unpacked / name).exists()]
    names = []
    for number, folder in enumerate((source, unpacked)):
        pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q")
        built = run(*pip, "-w", tmp_path / str(number), folder, cwd=folder)
        assert built.returncode == 0, built.stderr
        (wheel,) = (tmp_path / str(number)).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names.append(sorted(archive.namelist()))
            (metadata,) = [archive.read(name).decode() for name in names[-1] if name.endswith("/METADATA")]
    assert names[0] == names[1]
    assert any(name.endswith("licenses/LICENSE") for name in names[1])
    assert "License-Expression: MIT" in metadata
    assert "Project-URL: Paper, https://arxiv.org/abs/2601.16979" in metadata


@pytest.mark.parametrize("options", [pytest.param((), marks=pytest.mark.long), ("-e",)], ids=["plain", "editable"])
def test_installed_kernels_are_found(source: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    python = install(source, tmp_path / "venv", *options)
    program = (
        "import sharpkern, sharpkern.bench.cases, sharpkern.kernels.rules.adam, sharpkern.kernels.form as form; "
        "print(form.__file__)"
    )
    found = run(python, "-c", program, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    expected = source / "kernels" if options else tmp_path / "venv"
    assert Path(found.stdout.strip()).is_relative_to(expected)
    command = run(tmp_path / "venv" / "bin" / "sharpkern", "--version", cwd=tmp_path)
    assert command.stdout.split() == ["sharpkern", "0.1.0"]


# From a checkout, with the checkout first on sys.path: as python -c, notebooks and python -m pytest have it.
TOGETHER = (
    "import kernels; assert hasattr(kernels, 'get_kernel'), kernels; "
    "from transformers import GPT2LMHeadModel; "
    "import sharpkern, sharpkern.kernels.form"
)


@pytest.mark.long
def test_transformers_imports_from_the_repository_root() -> None:
    both = run(sys.executable, "-c", TOGETHER, cwd=ROOT)
    assert both.returncode == 0, both.stderr


def test_an_init_file_in_kernels_would_break_transformers(tmp_path: Path) -> None:
    """The check above can fail."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    broken = run(sys.executable, "-c", TOGETHER, cwd=tmp_path)
    assert broken.returncode != 0
    assert not (ROOT / "kernels" / "__init__.py").exists()
