"""``sharpkern env``: what a bug report needs to know of the machine, as Markdown. Neither host name nor paths."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
import typer

import sharpkern

HELP = "Print versions and devices, as Markdown that pastes into a bug report."

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "scipy",
    "matplotlib",
    "scikit-learn",
    "transformers",
    "accelerate",
    "lightning",
)


def command() -> None:
    """Print the report."""
    typer.echo("\n".join(f"- {name}: {value}" for name, value in report()))


def report() -> Iterator[tuple[str, str]]:
    """List what the machine and the installation are.

    Yields:
        Pairs of a name and its value.
    """
    yield "sharpkern", sharpkern.__version__
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "system", f"{platform.system()} {platform.machine()}"
    for package in _PACKAGES:
        yield package, _version_of(package) or "not installed"
    yield "torch built for", _backend()
    yield "CPU threads", f"{torch.get_num_threads()} of {os.cpu_count()}"
    yield from _devices()


def _version_of(package: str) -> str | None:
    """Return the installed version of a distribution, None if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _backend() -> str:
    """Return the accelerator toolkit torch was built with."""
    if torch.version.hip:
        return f"HIP {torch.version.hip}"
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return "CPU only"


def _devices() -> Iterator[tuple[str, str]]:
    """List the accelerators torch sees."""
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"device {index}", f"{device.name}, {device.total_memory / 2**30:.1f} GiB"
    if torch.backends.mps.is_available():
        yield "device", "Apple MPS"
