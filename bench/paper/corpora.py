"""English and code that ship with Python, as bytes, apart for training and for measuring."""

import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

# Of the standard library's modules in alphabetical order: about as much as there is of English.
_CODE_BYTES = 500_000


def english() -> str:
    """Return Python's help topics."""
    return "\n".join(topics.values())


def code() -> str:
    """Return modules of the standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    modules, size = [], 0
    for path in sorted(folder.glob("*.py")):
        if size < _CODE_BYTES:
            modules.append(path.read_text(encoding="utf-8"))
            size += len(modules[-1])
    return "\n".join(modules)


def byte_rows(words: str, length: int) -> Tensor:
    """Cut a text into rows of bytes."""
    data = torch.frombuffer(bytearray(words, "utf-8"), dtype=torch.uint8).long()
    return data[: len(data) // length * length].view(-1, length)


def apart(rows: Tensor, every: int = 10) -> tuple[Tensor, Tensor]:
    """Return rows to train on, and every so many-th to measure on."""
    measured = torch.arange(len(rows)) % every == every - 1
    return rows[~measured], rows[measured]
