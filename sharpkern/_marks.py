"""Marks of data and models: numbers by which a later run knows whether they are the same ones."""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def mark_of(data: Any) -> int:
    """Return a mark of data, of all values of the tensors in it.

    Args:
        data: tensors, numbers, texts, and mappings and lists of these. Of anything else, such as a Dataset or a
            function, only type and length count.

    Returns:
        A number below 2³².
    """
    if isinstance(data, Tensor):
        content = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return zlib.crc32(content, zlib.crc32(repr((data.shape, data.dtype)).encode()))
    if isinstance(data, Mapping):
        data = [[key, data[key]] for key in data]
    if isinstance(data, (list, tuple)):
        return zlib.crc32(repr([mark_of(part) for part in data]).encode())
    if data is None or isinstance(data, (bool, int, float, str, bytes)):
        return zlib.crc32(repr(data).encode())
    return zlib.crc32(f"{type(data).__qualname__} {len(data) if hasattr(data, '__len__') else ''}".encode())


def mark_of_model(model: nn.Module) -> int:
    """Return a mark of a model's mode, parameters and buffers: of the sum of the bytes of each.

    Args:
        model: any; tensors are added up where they are, and nothing but the sums is copied.

    Returns:
        A number below 2³², the same on every machine.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.layout is torch.strided and not t.is_meta]
    sums = [int(tensor.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64)) for tensor in tensors]
    return zlib.crc32(repr((model.training, sums)).encode())
