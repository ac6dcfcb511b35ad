"""Marks of data and models: numbers by which a later run knows whether they are the same ones.

A mark is of every byte, by SHA-256, which takes about a second for each gigabyte.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sharpkern.directions.names import bare_name

# Bytes that are copied from a device, made contiguous or read at a time.
_BLOCK = 2**26
# So many blocks of a file that is larger than all of them count.
_BLOCKS = 8


def fingerprint_of(data: Any) -> int:
    """Return a mark of data, of all values of the tensors in it and their order."""
    return _number(_digest(data))


def fingerprint_of_model(model: nn.Module) -> int:
    """Return a mark of a model: of its parameters and buffers with their names, what is tied, frozen, and its mode."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    tensors = []
    for full_name, tensor in named:
        name = bare_name(full_name)
        known = first.setdefault(id(tensor), name)
        tensors.append((name, tensor.requires_grad, tensor if known == name else known))
    odd = {bare_name(name) for name, module in model.named_modules() if module.training != model.training}
    return fingerprint_of((model.training, sorted(odd), tensors))


def fingerprint_of_file(path: str | os.PathLike[str]) -> int:
    """Return a mark of a file: of its size and all of its bytes, of a large one of blocks spread all over it."""
    size = os.path.getsize(path)
    found = hashlib.sha256(b"%d " % size)
    num = -(-size // _BLOCK)
    # From the first byte to the last.
    places = (
        range(0, size, _BLOCK) if num <= _BLOCKS else [i * (size - _BLOCK) // (_BLOCKS - 1) for i in range(_BLOCKS)]
    )
    with open(path, "rb") as file:
        for place in places:
            file.seek(place)
            found.update(file.read(_BLOCK))
    return _number(found.digest())


def fingerprint_of_function(function: Callable[..., Any]) -> int:
    """Return a mark of a function: of its code, its defaults, and the numbers with a point and the texts it holds.

    Whole numbers that it holds do not count: they may be counters.
    """
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if not hasattr(function, "__code__"):
        held, function = [*getattr(function, "__dict__", {}).items()], type(function).__call__
    code = getattr(function, "__code__", None)
    defaults = (getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None))
    return fingerprint_of(
        (None if code is None else list(_code(code)), defaults, [one for one in held if _is_setting(one)])
    )


def _is_setting(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_setting, value))
    return isinstance(value, (float, str))


def _code(code: CodeType) -> Iterator[Any]:
    yield from (code.co_code, code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield list(_code(constant))
        else:
            yield sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant)


def _digest(data: Any) -> bytes:
    """Return 32 bytes that no other data has."""
    if isinstance(data, Tensor):
        return _digest_of_tensor(data)
    if isinstance(data, (np.ndarray, np.generic)):
        numbers = np.asarray(data)
        if numbers.dtype.hasobject:
            return _digest((numbers.shape, numbers.ravel().tolist()))
        return _hashed(f"{numbers.dtype.str} {numbers.shape}", numbers.tobytes())
    if isinstance(data, Mapping):
        return _hashed("mapping", *(_digest(part) for key in data for part in (key, data[key])))
    if isinstance(data, (list, tuple)):
        return _hashed("sequence", *map(_digest, data))
    if data is None or isinstance(data, (bool, int, float, complex, str, bytes, range)):
        return _hashed(repr(data))
    return _hashed(f"{type(data).__qualname__} {len(data) if hasattr(data, '__len__') else ''}")


def _digest_of_tensor(tensor: Tensor) -> bytes:
    """Return a digest of a tensor's dtype, shape and values, wherever and in whatever order they lie."""
    kind = f"{tensor.dtype} {tuple(tensor.shape)}"
    if hasattr(tensor, "__tensor_flatten__"):
        # One that is made of others, such as a shard or a quantised one.
        names, _ = tensor.__tensor_flatten__()
        return _digest((kind, [(name, getattr(tensor, name)) for name in names]))
    values = tensor.detach().resolve_conj().resolve_neg()
    if values.is_quantized:
        values = values.dequantize()
    if values.layout is not torch.strided:
        values = values.to_dense()
    found = hashlib.sha256(kind.encode())
    for block in _blocks(values):
        found.update(block.cpu().contiguous().view(torch.uint8).numpy().data)
    return found.digest()


def _blocks(values: Tensor) -> Iterator[Tensor]:
    """Yield all values in their order, some at a time."""
    if values.is_meta or not values.numel():
        return
    # Rows of one that is not contiguous, so that no more than a block is copied.
    rows = values.view(-1) if values.is_contiguous() else values
    bytes_of_row = rows.numel() // len(rows) * rows.element_size()
    yield from rows.split(max(1, _BLOCK // bytes_of_row))


def _hashed(*parts: str | bytes) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        found.update(b"%d " % len(content))
        found.update(content)
    return found.digest()


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")
