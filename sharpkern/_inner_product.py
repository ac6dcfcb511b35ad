"""Inner products of parameter-sized tensors, accumulated in float64 without a float64 copy of either."""

from collections.abc import Iterable

import torch
from torch import Tensor

_CHUNK = 1 << 22  # elements widened at a time: two buffers of 32 MiB


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ aᵢbᵢ accumulated in float64.

    Args:
        a: real tensor, any shape and floating dtype.
        b: tensor of the same shape and device as ``a``.

    Returns:
        0-dim float64 tensor on the device of ``a`` (float32 on Apple's mps, which has no float64); not read back, so
        that a loop over parameters waits for the device once, at its end.

    Memory:
        64 MiB at most, plus a copy of an input that is not contiguous.
    """
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    total = torch.zeros((), dtype=wide, device=a.device)
    for chunk_a, chunk_b in zip(torch.split(a.reshape(-1), _CHUNK), torch.split(b.reshape(-1), _CHUNK), strict=True):
        total += torch.dot(chunk_a.to(wide), chunk_b.to(wide))
    return total


def total(terms: Iterable[Tensor]) -> float:
    """Return the sum of 0-dim tensors, read back once per device.

    Args:
        terms: 0-dim tensors, on any devices.

    Returns:
        Their sum; 0.0 where there are none.
    """
    sums: dict[torch.device, Tensor] = {}
    for term in terms:
        sums[term.device] = sums[term.device] + term if term.device in sums else term
    return sum(float(one) for one in sums.values())
