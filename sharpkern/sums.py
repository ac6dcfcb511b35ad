"""Sums over whole models, in float64 and read back once."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sharpkern import ops
from sharpkern.reference import inner_product


def slopes_and_norms(delta: Sequence[Tensor], grad: Sequence[Tensor]) -> list[Tensor]:
    """Return Δθᵀg and |Δθ|² of every tensor: on a GPU in one pass over all of them.

    Args:
        delta: Δθ, any shapes and devices.
        grad: g, tensor by tensor the shape and device of ``delta``.

    Returns:
        One [2] float64 tensor for each, on its device; not read back.

    Memory:
        See `ops.reduce`.
    """
    result: list[Tensor] = [torch.empty(0)] * len(delta)
    # A pair that lies in memory in two ways is not for the kernel, which would refuse the others with it.
    kinds = [(d.device, d.stride() == g.stride()) for d, g in zip(delta, grad, strict=True)]
    for device, alike in dict.fromkeys(kinds):
        here = [i for i, kind in enumerate(kinds) if kind == (device, alike)]
        if ops.has_kernels(device) and alike:
            mine = [delta[i] for i in here]
            sums: Iterable[Tensor] = ops.reduce(mine, mine, [grad[i] for i in here])[:, :2]
        else:
            sums = (torch.stack([inner_product(delta[i], t) for t in (grad[i], delta[i])]) for i in here)
        for i, one in zip(here, sums, strict=True):
            result[i] = one
    return result


def read(tensors: Sequence[Tensor]) -> list[float]:
    """Return the values of 0-dim tensors, read back once per device."""
    result = [0.0] * len(tensors)
    for device in {tensor.device for tensor in tensors}:
        here = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        for i, value in zip(here, torch.stack([tensors[i] for i in here]).tolist(), strict=True):
            result[i] = value
    return result


def total(terms: Iterable[Tensor]) -> float:
    """Return the sum of 0-dim tensors, read back once per device.

    Args:
        terms: 0-dim tensors, on any devices.

    Returns:
        Their sum; 0.0 where there are none.
    """
    return sum(read(list(terms)), 0.0)
