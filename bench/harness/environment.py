"""What a figure depends on: devices, versions and sources. Neither host name nor paths.

The bench looks from another process: a GPU that does not answer hangs that one, and the bench itself never holds memory
on the device.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import sharpkern

from .timing import Json

_PACKAGE = Path(sharpkern.__file__).parent
# Folders of the package that a checkout has outside of it.
_MAPPED = {"kernels": "kernels", "bench": "bench/harness"}


def look() -> Json:
    """Return what the figures of this process depend on, by name; None for what cannot be known."""
    status = _git("status", "--porcelain")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "sharpkern": sharpkern.__version__,
        "source": _source_digest(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        **_gpu(),
    }


def look_from_outside(limit: float) -> Json:
    """Return what another process sees in ``limit`` seconds; RuntimeError if it fails or takes longer."""
    command = [sys.executable, "-c", f"import json, {__name__} as here; print(json.dumps(here.look()))"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, check=True, env=child_environment()
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the GPU did not answer in {limit:.0f} s; see whether nvidia-smi does") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"looking at the machine failed:\n{error.stderr}") from error
    seen: Json = json.loads(done.stdout.splitlines()[-1])
    return seen


def child_environment() -> dict[str, str]:
    """Return the environment variables of a process that imports what this one can."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _gpu() -> Json:
    if not torch.cuda.is_available():
        return dict.fromkeys(("gpu", "architecture", "driver", "gpu_memory", "multiprocessors", "l2_bytes"))
    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "architecture": device.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{device.major}{device.minor}",
        "driver": _said("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"),
        "gpu_memory": device.total_memory,
        "multiprocessors": device.multi_processor_count,
        "l2_bytes": getattr(device, "L2_cache_size", None),
    }


def _source_digest() -> str:
    """Return a digest of the package's sources, which tells trees apart also where there is no git."""
    digest = hashlib.sha256()
    mapped = [_PACKAGE.parent / place for name, place in _MAPPED.items() if not (_PACKAGE / name).is_dir()]
    for folder in (_PACKAGE, *mapped):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str | None:
    """Return what git says of the checkout that this package lies in, None where there is none."""
    checkout = _PACKAGE.parent
    return _said("git", "-C", str(checkout), *arguments) if (checkout / ".git").exists() else None


def _said(*command: str) -> str | None:
    """Return what a command prints, None if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
