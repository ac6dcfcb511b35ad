"""Sums over whole models, in float64."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sharpkern.ops import registry, validation
from sharpkern.ops.arithmetic import chunk_size
from sharpkern.ops.registry import Backend, operation


@operation(
    "reduce",
    fake=lambda theta, *_, **__: torch.empty(
        len(theta), 4, dtype=torch.float64, device=theta[0].device if theta else None
    ),
)
def reduce(
    theta: Sequence[Tensor], delta: Sequence[Tensor], grad: Sequence[Tensor], *, backend: Backend = "auto"
) -> Tensor:
    """Return Δθᵀg, |Δθ|², |θ|² and |g|² of every tensor of a model, accumulated in float64.

    Args:
        theta: parameters, any shape and floating dtype, all on one device.
        delta: Δθ, tensor by tensor the shape of ``theta``.
        grad: g, likewise.
        backend: see `sharpkern.ops`.

    Returns:
        Tensor: [N, 4] float64 on the device, one row per tensor in this order; the model's sums are ``.sum(0)``.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if the lists differ in length, or a shape or device does not fit.

    Memory:
        On a GPU 32 bytes per 64 Ki elements and tables of the same size; with the torch backend see `inner_product`.

    Determinism:
        Fixed order of additions; the same bits on every run.
    """
    validation.check_lists(theta=theta, delta=delta, grad=grad)
    sums = [
        torch.stack([inner_product(d, g), inner_product(d, d), inner_product(t, t), inner_product(g, g)])
        for t, d, g in zip(theta, delta, grad, strict=True)
    ]
    return torch.stack(sums) if sums else torch.zeros(0, 4, dtype=torch.float64)


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ aᵢbᵢ accumulated in float64."""
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    result = torch.zeros((), dtype=wide, device=a.device)
    size = chunk_size(a.device)
    for chunk_a, chunk_b in zip(torch.split(a.reshape(-1), size), torch.split(b.reshape(-1), size), strict=True):
        result += torch.dot(chunk_a.to(wide), chunk_b.to(wide))
    return result


def slopes_and_norms(delta: Sequence[Tensor], grad: Sequence[Tensor]) -> list[Tensor]:
    """Return Δθᵀg and |Δθ|² of every tensor: on a GPU in one pass over all of them."""
    result: list[Tensor] = [torch.empty(0)] * len(delta)
    # A pair that lies in memory in two ways is not for the kernel, which would refuse the others with it.
    kinds = [(d.device, d.stride() == g.stride()) for d, g in zip(delta, grad, strict=True)]
    for device, alike in dict.fromkeys(kinds):
        here = [i for i, kind in enumerate(kinds) if kind == (device, alike)]
        if registry.has_kernels(device) and alike:
            mine = [delta[i] for i in here]
            sums: Iterable[Tensor] = reduce(mine, mine, [grad[i] for i in here])[:, :2]
        else:
            sums = (torch.stack([inner_product(delta[i], t) for t in (grad[i], delta[i])]) for i in here)
        for i, one in zip(here, sums, strict=True):
            result[i] = one
    return result


def to_host(tensors: Sequence[Tensor]) -> list[float]:
    """Return the values of 0-dim tensors, read back once per device."""
    result = [0.0] * len(tensors)
    for device in {tensor.device for tensor in tensors}:
        here = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        for i, value in zip(here, torch.stack([tensors[i] for i in here]).tolist(), strict=True):
            result[i] = value
    return result


def columns_to_host(rows: Sequence[Tensor]) -> list[list[float]]:
    """Return the values of tensors [2] by column, read back once per device."""
    result = [[0.0, 0.0]] * len(rows)
    for device in {row.device for row in rows}:
        here = [i for i, row in enumerate(rows) if row.device == device]
        for i, values in zip(here, torch.stack([rows[i] for i in here]).tolist(), strict=True):
            result[i] = values
    return [[row[column] for row in result] for column in range(2)]


def total(terms: Iterable[Tensor]) -> float:
    """Return the sum of 0-dim tensors, read back once per device."""
    return sum(to_host(list(terms)), 0.0)
