"""CIFAR-10 from its files for Python, which are pickles: read by an unpickler that knows arrays and nothing else."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_REMEDY = "unpack cifar-10-python.tar.gz and name the folder that holds cifar-10-batches-py"


def cifar10(folder: Path, num_images: int) -> tuple[Tensor, Tensor]:
    """Read the first images of the training set."""
    inside = folder / "cifar-10-batches-py"
    folder = inside if inside.is_dir() else folder
    pixels, labels = [], []
    for i in range(1, 6):
        if len(labels) < num_images:
            more_pixels, more_labels = _read(folder / f"data_batch_{i}")
            pixels.append(more_pixels)
            labels += more_labels
    inputs = torch.from_numpy(np.concatenate(pixels)[:num_images]).float().view(-1, 3, 32 * 32)
    inputs = (inputs - inputs.mean((0, 2), keepdim=True)) / inputs.std((0, 2), keepdim=True)
    return inputs.flatten(1), torch.tensor(labels[:num_images])


def _read(path: Path) -> tuple[Any, list[int]]:
    """Return pixels, uint8 [n, 3072], and n labels of one file."""
    # A broken pickle may raise almost anything.
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        pixels, labels = content[b"data"], content[b"labels"]
        right = pixels.dtype == np.uint8 and pixels.shape == (len(labels), 3072) and {*labels} <= {*range(10)}
    except Exception as error:
        raise ValueError(f"{path} must be a file of CIFAR-10, got one that fails ({error}); {_REMEDY}") from error
    if not right:
        raise ValueError(f"{path} must hold pixels, uint8 [n, 3072], and n labels of 0 to 9, got others; {_REMEDY}")
    return pixels, labels


def _dtype(name: bytes, align: int, copy: int) -> Any:
    """Make a dtype as pickles of Python 2 ask for it: with numbers, of which newer NumPy warns."""
    return np.dtype(name, align=bool(align), copy=bool(copy))


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
}


class _Unpickler(pickle.Unpickler):
    """Loads what CIFAR-10's files are made of; whatever else a pickle asks for could run code."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        """Return one of the three functions that make an array."""
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _KNOWN[module, name]
