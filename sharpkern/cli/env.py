"""``sharpkern env``: a bug report begun, as Markdown, with versions and devices. Neither host name nor paths."""

import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
import typer

import sharpkern
from sharpkern.ops.registry import VARIABLE

HELP = "Print a bug report to fill in, as Markdown: what to tell, and versions and devices."

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


_TEMPLATE = """\
### What I did

<!-- The smallest code or command that shows it, with the model's and the optimizer's sizes -->

### What I saw, and what I expected

<!-- The whole error with its traceback, the warnings, or print(measurement) with its probes -->

### Where

{facts}"""


def command() -> None:
    """Print the report."""
    typer.echo(_TEMPLATE.format(facts="\n".join(f"- {name}: {value}" for name, value in report())))


def report() -> Iterator[tuple[str, str]]:
    """List what the machine and the installation are."""
    yield "sharpkern", sharpkern.__version__
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "system", f"{platform.system()} {platform.machine()}"
    for package in _PACKAGES:
        yield package, _version_of(package) or "not installed"
    yield "torch built for", _backend()
    yield VARIABLE, os.environ.get(VARIABLE) or "not set"
    # Triton builds what launches its kernels when they are first called.
    yield "C compiler", _compiler() or "not found, without which Triton launches nothing; set CC, or install gcc"
    yield "Python.h", "found" if _has_headers() else "not found, without which Triton launches nothing"
    yield "CPU threads", f"{torch.get_num_threads()} of {os.cpu_count()}"
    yield from _devices()


def _compiler() -> str | None:
    """Return the name of the C compiler that Triton would take, without its folder."""
    named = os.environ.get("CC")
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, ("clang", "gcc", "cc"))), None)
    return None if found is None else os.path.basename(found)


def _has_headers() -> bool:
    """Whether the header files of Python are there."""
    return os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))


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
