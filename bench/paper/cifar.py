"""CIFAR-10 from its files for Python, which are pickles: read by an unpickler that knows arrays and nothing else."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
_NUM_PIXELS = 3 * 32 * 32
_REMEDY = "unpack cifar-10-python.tar.gz and name the folder that holds cifar-10-batches-py"


def cifar10(folder: Path, num_images: int) -> tuple[Tensor, Tensor]:
    """Read the first images of the training set."""
    inside = folder / "cifar-10-batches-py"
    folder = inside if inside.is_dir() else folder
    pixels, labels, found = [], [], 0
    for name in _BATCHES:
        if found < num_images:
            batch_pixels, batch_labels = _read(folder / name)
            pixels.append(batch_pixels)
            labels.append(batch_labels)
            found += len(batch_labels)
    if found < num_images:
        raise ValueError(f"the files in {folder} must hold {num_images} images, got {found}; {_REMEDY}")
    inputs = torch.cat(pixels)[:num_images].float().view(num_images, 3, -1)
    inputs = (inputs - inputs.mean((0, 2), keepdim=True)) / inputs.std((0, 2), keepdim=True)
    return inputs.flatten(1), torch.cat(labels)[:num_images]


def _read(path: Path) -> tuple[Tensor, Tensor]:
    """Return pixels, uint8 [n, 3072], and labels, int64 [n], of one file."""
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
    except FileNotFoundError:
        raise ValueError(f"{path} must be a file of CIFAR-10, got none; {_REMEDY}") from None
    # A broken pickle may raise almost anything.
    except Exception as error:
        raise ValueError(f"{path} must be a pickle of CIFAR-10, got one that fails ({error}); {_REMEDY}") from error
    pixels, labels = (content.get(key) for key in (b"data", b"labels")) if isinstance(content, dict) else (None, None)
    if (
        not isinstance(pixels, np.ndarray)
        or not isinstance(labels, list)
        or pixels.dtype != np.uint8
        or pixels.shape != (len(labels), _NUM_PIXELS)
        or not all(isinstance(label, int) and 0 <= label < 10 for label in labels)
    ):
        raise ValueError(f"{path} must hold pixels, uint8 [n, 3072], and n labels of 0 to 9, got others; {_REMEDY}")
    # A copy, since an array that was read from a pickle cannot be written, which torch warns of.
    return torch.from_numpy(pixels.copy()), torch.tensor(labels)


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
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None
