"""Tables of where the tensors of a whole model are, and the launches that walk them in chunks.

A program walks one chunk of one tensor; which one, it reads from a table. So one launch covers every tensor of equal
dtypes and alignment, and a whole model takes one to three.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, grid, on_device, options, stream_of

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# Of the sums of chunks.
_SUM_CONFIG = Config(block=1024, threads=128)


class Batch(NamedTuple):
    """Tensors that one launch walks together: equal dtypes in each role, equal alignment.

    Attributes:
        dtypes: the Triton dtype of each role, None where it is not there.
        aligned: whether every address is a multiple of 16 bytes.
        chunks: [chunks, 2] int32, which row of `Tables.rows`, and which part of it.
    """

    dtypes: tuple[tl.dtype | None, ...]
    aligned: bool
    chunks: Tensor


class Tables(NamedTuple):
    """Where the tensors of a whole model are, for kernels that walk them in chunks.

    Attributes:
        rows: [tensors, roles + 2] int64: an address for each role, 0 where it is not there, the number of elements, and
            the number of chunks in all rows before.
        batches: one for each launch, in order of first appearance; tensors without elements are in none.
        num_chunks: in all rows.
    """

    rows: Tensor
    batches: tuple[Batch, ...]
    num_chunks: int


def tables(chunk: int, *roles: Sequence[Tensor | None]) -> Tables:
    """Group the operands of a whole model into as few launches as their dtypes and alignments allow.

    The first role is there for every tensor.
    """
    operands = tuple(
        (
            tuple(None if tensor is None else tensor.dtype for tensor in row),
            tuple(0 if tensor is None else tensor.data_ptr() for tensor in row),
            row[0].numel(),
        )
        for row in zip(*roles, strict=True)
        if row[0] is not None
    )
    assert roles[0][0] is not None
    device = roles[0][0].device
    return _tables(operands, chunk, device, stream_of(device))


@functools.lru_cache(maxsize=16)
def _tables(
    operands: tuple[tuple[tuple[torch.dtype | None, ...], tuple[int, ...], int], ...],
    chunk: int,
    device: torch.device,
    stream: int,
) -> Tables:
    """Build tables. They depend on the arguments alone: for a later call with equal ones they are right as well."""
    # The default device may be another, and copies of what is built there would wait for it.
    with torch.device("cpu"):
        nums = [-(-numel // chunk) for *_, numel in operands]
        counts = torch.tensor(nums)
        before = counts.cumsum(0) - counts
        rows = torch.tensor([(*addresses, numel) for _, addresses, numel in operands])
        groups: dict[tuple[tuple[torch.dtype | None, ...], bool], list[int]] = {}
        for index, (dtypes, addresses, numel) in enumerate(operands):
            if numel:
                groups.setdefault((dtypes, not any(address % 16 for address in addresses)), []).append(index)
        batches = []
        for (dtypes, aligned), members in groups.items():
            row = torch.tensor(members).repeat_interleave(counts[members])
            first = counts[members].cumsum(0) - counts[members]
            part = torch.arange(row.numel()) - first.repeat_interleave(counts[members])
            chunks = torch.stack([row, part], dim=1).to(torch.int32).to(device)
            kinds = tuple(None if dtype is None else _TRITON_DTYPES[dtype] for dtype in dtypes)
            batches.append(Batch(kinds, aligned, chunks))
        return Tables(torch.cat([rows, before[:, None]], dim=1).to(device), tuple(batches), sum(nums))


def sums_of_chunks(partial: Tensor, found: Tables, chunk: int) -> Tensor:
    """Return the sums of each tensor, [tensors, width] float64, from those of its chunks, [chunks, width].

    In a fixed order, so that a second run gives the same bits.
    """
    num, width = len(found.rows), partial.shape[1]
    sums = torch.empty(num, width, dtype=torch.float64, device=partial.device)
    with on_device(partial):
        _sums_of_chunks_kernel[grid(width * num, _SUM_CONFIG)](
            sums,
            partial,
            found.rows,
            WIDTH=width,
            ROLES=found.rows.shape[1] - 2,
            CHUNK=chunk,
            BLOCK=_SUM_CONFIG.block,
            **options(_SUM_CONFIG, partial),
        )
    return sums


@triton.jit
def chunk_of(pid, rows, chunks, ROLES: tl.constexpr, CHUNK: tl.constexpr):
    """Return what program ``pid`` walks: a row of `Tables.rows`, its first element there, and how many."""
    row = rows + (ROLES + 2) * tl.load(chunks + 2 * pid)
    start = tl.load(chunks + 2 * pid + 1).to(tl.int64) * CHUNK
    num = tl.minimum(tl.load(row + ROLES) - start, CHUNK).to(tl.int32)
    return row, start, num


@triton.jit  # noqa: RET503 - that nothing is returned is None, which not every Triton returns by name
def operand(row, role: tl.constexpr, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer to element ``start`` of one operand of a row of `Tables.rows`; None where it is not there."""
    if DTYPE is not None:
        pointer = tl.load(row + role).to(tl.pointer_type(DTYPE)) + start
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        return pointer


@triton.jit
def _sums_of_chunks_kernel(
    sums, partial, rows, WIDTH: tl.constexpr, ROLES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    pid = tl.program_id(0).to(tl.int64)
    row = rows + (ROLES + 2) * (pid // WIDTH)
    num = tl.cdiv(tl.load(row + ROLES), CHUNK).to(tl.int32)
    partial += WIDTH * tl.load(row + ROLES + 1) + pid % WIDTH
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, num, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        total += tl.load(partial + WIDTH * offsets, mask=offsets < num, other=0.0)
    tl.store(sums + pid, tl.sum(total))
