"""Matrix products whose result is wider than their factors: 16-bit factors, fp32 accumulation, no rounding between."""

import torch
from torch import Tensor

from sharpkern.tensors.fake import device_kind

# Products of 16-bit matrices with an fp32 result: torch 2.8 and later, with CUDA.
_IN_TORCH = torch.version.hip is None and "dtype_out" in torch.ops.aten.mm.overloads()


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a matrix product takes a tensor: autocast's where that is on, else its own."""
    device = tensor.device.type
    if tensor.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of factors of a dtype are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulates_in_fp32(device: torch.device) -> bool:
    """Whether a product of 16-bit factors can be had in fp32 without widening them first."""
    return device_kind(device) == "cuda" and _IN_TORCH


def matmul_operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor of `mixed_matmul`: rounded to the product's dtype, and widened again where torch cannot on the way."""
    tensor = tensor.to(dtype)
    return tensor if accumulates_in_fp32(tensor.device) else tensor.to(accumulator_dtype(dtype))


def mixed_matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write a·b in the dtype of ``out``, and return it; matrices, or as many of each one behind the other.

    Outputs given by name also keep autocast away from the product.
    """
    multiply = torch.mm if a.dim() == 2 else torch.bmm
    if a.dtype == out.dtype:
        return multiply(a, b, out=out)
    return multiply(a, b, out_dtype=out.dtype, out=out)
