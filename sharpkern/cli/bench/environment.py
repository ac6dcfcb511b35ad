"""What a figure depends on: devices, versions and sources. Neither host name nor paths.

``python -m sharpkern.cli.bench.environment`` prints it as JSON: the bench looks from a process of its own, so that a
GPU that does not answer hangs that process, and the bench itself never holds memory on the device.
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
from sharpkern.cli.bench.record import Json

_PACKAGE = Path(sharpkern.__file__).parent


def look() -> Json:
    """Return what the figures of this process would depend on.

    Returns:
        Names and values; those that cannot be known are None.
    """
    return {
        "date": time.strftime("%Y-%m-%d"),
        "sharpkern": sharpkern.__version__,
        "source": _source_digest(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _dirty(),
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
    """Return what another process sees.

    Args:
        limit: seconds that it may take.

    Returns:
        As `look`.

    Raises:
        RuntimeError: if the process fails or does not end in time.
    """
    command = [sys.executable, "-m", __name__]
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
        names = ("gpu", "architecture", "driver", "gpu_memory", "multiprocessors", "l2_bytes")
        return dict.fromkeys(names)
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
    kernels = _PACKAGE / "kernels" if (_PACKAGE / "kernels").is_dir() else _PACKAGE.parent / "kernels"
    for folder in (_PACKAGE, kernels):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _dirty() -> bool | None:
    status = _git("status", "--porcelain")
    return None if status is None else bool(status)


def _git(*arguments: str) -> str | None:
    """Return what git says of the checkout that this package lies in, None where there is none."""
    if not (_PACKAGE.parent / ".git").exists():
        return None
    return _said("git", "-C", str(_PACKAGE.parent), *arguments)


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


if __name__ == "__main__":
    print(json.dumps(look()))
