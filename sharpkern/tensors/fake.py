"""Fake tensors have shapes and no values: what runs on them is counted for another machine, and costs nothing here.

Code that reads values has to leave that out for them, and code that goes other ways on other devices asks here which.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_PLAIN = (Tensor, nn.Parameter, FakeTensor)
_planned: str | None = None


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no values."""
    return isinstance(tensor, FakeTensor)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is one of torch's own, or stands for one, and no subclass."""
    return type(tensor) in _PLAIN


def device_kind(device: torch.device) -> str:
    """The type of device whose ways are gone: the tensor's own, or the one that is planned for."""
    return _planned or device.type


@contextmanager
def pretend_device(kind: str) -> Iterator[None]:
    """Go the ways of another type of device; fake tensors for "cuda" could not lie there without a build for CUDA."""
    global _planned
    before, _planned = _planned, kind
    try:
        yield
    finally:
        _planned = before
