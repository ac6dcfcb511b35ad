"""How every launcher launches: fixed configurations, tables for whole models, and the small tiles of all kernels.

Kernels run on CUDA and HIP devices. Under Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported) they
run on CPU tensors instead, which is how their numerics are tested without a GPU.
"""

import functools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def runs_on(device: torch.device) -> bool:
    """Return whether kernels run on a device."""
    return device.type == ("cpu" if INTERPRETED else "cuda")


class Config(NamedTuple):
    """One launch configuration: elements per program and threads per program."""

    block: int
    threads: int


class Case(NamedTuple):
    """A row of a configuration table: what it applies to (None: anything) and the configuration."""

    architecture: str | None
    itemsize: int | None
    below: int | None
    config: Config


def choose(table: tuple[Case, ...], tensor: Tensor, size: int) -> Config:
    """Return the configuration of the first row that fits; the last row of a table fits everything.

    Args:
        table: rows in order of preference.
        tensor: the operand whose device and element size decide.
        size: the number that the rows bound from above, usually the number of elements.

    Returns:
        The configuration to launch with. It is fixed by the arguments: nothing is timed or tried.
    """
    arch = architecture(tensor.device)
    return next(
        case.config
        for case in table
        if case.architecture in {None, arch}
        and case.itemsize in {None, tensor.element_size()}
        and (case.below is None or size < case.below)
    )


@functools.cache
def architecture(device: torch.device) -> str:
    """Return the name of a device's architecture as compilers spell it, like "sm_90" or "gfx942"."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def options(config: Config, tensor: Tensor) -> dict[str, int | bool]:
    """Return the compiler options of a launch.

    Multiply and add are fused where a kernel says so and nowhere else: the default differs between Triton versions.
    """
    # CDNA (gfx9) runs 64 threads in a warp, everything else 32.
    warp = 64 if architecture(tensor.device).startswith("gfx9") else 32
    return {"num_warps": max(1, config.threads // warp), "enable_fp_fusion": False}


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which launches go to the device of ``tensor``, which need not be the current one."""
    return nullcontext() if INTERPRETED else torch.cuda.device(tensor.device)


class Batch(NamedTuple):
    """Tensors that one launch walks together: equal dtypes in each role, equal alignment.

    Attributes:
        dtypes: the Triton dtype of each role.
        aligned: whether every address is a multiple of 16 bytes.
        rows: [tensors, roles + 1] int64, the addresses of one row of operands and its number of elements.
        chunks: [chunks, 2] int32, which row, and which part of it.
    """

    dtypes: tuple[tl.dtype, ...]
    aligned: bool
    rows: Tensor
    chunks: Tensor


def batches(chunk: int, *roles: Sequence[Tensor]) -> list[Batch]:
    """Group the operands of a whole model into as few launches as their dtypes and alignments allow.

    Args:
        chunk: elements that one program walks.
        roles: one list of tensors per role, equally long; tensors at the same index have equally many elements.

    Returns:
        The groups, in order of first appearance; tensors without elements are left out.

    Memory:
        The tables of the 16 most recent groups stay on the device: 8 (roles + 1) bytes per tensor and 8 per chunk.
    """
    groups: dict[tuple[tuple[tl.dtype, ...], bool], list[tuple[int, ...]]] = {}
    for operands in zip(*roles, strict=True):
        addresses = [tensor.data_ptr() for tensor in operands]
        key = tuple(_TRITON_DTYPES[tensor.dtype] for tensor in operands), not any(address % 16 for address in addresses)
        if operands[0].numel():
            groups.setdefault(key, []).append((*addresses, operands[0].numel()))
    if not groups:
        return []
    device = roles[0][0].device
    # Tables of another stream may still be on their way to the device.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return [Batch(*key, *_tables(tuple(rows), chunk, device, stream)) for key, rows in groups.items()]


@functools.lru_cache(maxsize=16)
def _tables(rows: tuple[tuple[int, ...], ...], chunk: int, device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """Build the tables of `Batch`. They depend on the arguments alone, so a later call may have the same ones."""
    table = torch.tensor(rows, dtype=torch.int64)
    counts = -(-table[:, -1] // chunk)
    row = torch.repeat_interleave(torch.arange(len(rows)), counts)
    part = torch.arange(row.numel()) - (counts.cumsum(0) - counts)[row]
    return table.to(device), torch.stack([row, part], dim=1).to(torch.int32).to(device)


@triton.jit
def operand(row, role: tl.constexpr, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer to element ``start`` of one operand of a row of `Batch.rows`."""
    pointer = tl.load(row + role).to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_tile(pointers, inside, MASKED: tl.constexpr):
    """Load elements as fp32; outside the tensor they are 0. Full tiles carry no mask, which keeps loads 16 bytes."""
    if MASKED:
        return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    else:  # noqa: RET505 - Triton compiles one of the two branches, and needs the else to see that
        return tl.load(pointers).to(tl.float32)


@triton.jit
def store_tile(pointers, values, inside, MASKED: tl.constexpr):
    """Round fp32 elements to the output's dtype, to nearest even, and store them."""
    if MASKED:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside)
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty))


@triton.jit
def perturbed(w, d, alpha):
    """Return w + αd with one rounding, and w itself, its sign of zero included, where α = 0."""
    return tl.where(alpha == 0.0, w, tl.fma(d, alpha, w))
