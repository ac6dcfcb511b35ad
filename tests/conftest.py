"""What every test starts from: one thread, and the same random numbers. What a machine need not have."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

# Packages that only some tests need. A machine that is lent with a GPU rarely has them, and must run the others.
OPTIONAL = set("accelerate hessian_eigenthings hypothesis lightning matplotlib pandas peft PIL scipy sklearn".split())
OPTIONAL |= {"lion_pytorch", "torchao", "transformers"}


class _TestFile(pytest.Module):
    """A test file, skipped where an optional package is missing that it imports."""

    def collect(self) -> Iterator[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            missing = str(getattr(error.__cause__, "name", "")).partition(".")[0]
            if missing not in OPTIONAL:
                raise
            pytest.skip(f"{missing} is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    return _TestFile.from_parent(parent, path=module_path)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Several processes (-n of pytest-xdist) share the tests file by file, in the files' own order.

    What a fixture makes for a file is then made once; by default files with few tests come last, and some of these
    take the longest.
    """
    if config.getoption("dist", "no") == "load":
        config.option.dist, config.option.loadscopereorder = "loadfile", False


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_swapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models too are measured by the engines that larger ones are."""
    monkeypatch.setattr("sharpkern.engines.session.may_swap", lambda *_: False)
