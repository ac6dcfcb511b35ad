"""Δθ of a whole model by plain torch on a CPU, with its slope and norm, in blocks that stay in the cache.

Small tensors are laid side by side, so that a block takes the same few calls of torch however many tensors it is of.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sharpkern.ops.arithmetic import CPU_CHUNK
from sharpkern.ops.optimizer_steps import checked_rule, update_of
from sharpkern.ops.reductions import slopes_and_norms
from sharpkern.ops.update import LazyUpdate

# Small tensors share a block up to this part of the whole.
_SHARE = 16
# Sums that float32 can be trusted with.
_LEAST, _MOST = 1e-20, 1e30
# The number of a step, where a part of it begins, and that part of each of its operands that are there.
Piece = tuple[int, int, list[Tensor]]


@torch.no_grad()
def updates_with_sums(steps: Sequence[LazyUpdate]) -> list[tuple[Tensor, Tensor | None]]:
    """Return Δθ of every step, and Δθᵀg and |Δθ|², [2] float64, or None where they are not worked out by the way."""
    result: list[tuple[Tensor, Tensor | None]] = [(torch.empty(0), None)] * len(steps)
    alike: dict[object, list[int]] = defaultdict(list)
    for i, step in enumerate(steps):
        if _is_plain(step):
            there = tuple(tensor is not None for tensor in step.state)
            alike[step.rule, step.numbers, step.decoupled, step.flag, step.base.dtype, there].append(i)
        else:
            result[i] = step.update(), None
    for members in alike.values():
        for i, found in zip(members, _together([steps[i] for i in members]), strict=True):
            result[i] = found
    return result


def _is_plain(step: LazyUpdate) -> bool:
    """Whether all operands lie alike in the memory of a CPU, in one dtype that the step is computed in."""
    dtype = step.base.dtype
    return dtype in (torch.float32, torch.float64) and all(
        tensor.is_cpu and tensor.dtype == dtype and tensor.is_contiguous() for tensor in step.operands
    )


def _together(steps: Sequence[LazyUpdate]) -> list[tuple[Tensor, Tensor]]:
    """Return the results of steps of one rule with the same numbers."""
    first = steps[0]
    rule = checked_rule(first.rule, first.base, first.grad, first.state, first.numbers)
    # Large ones are written block by block, small ones lie beside each other in one that is kept.
    deltas = [torch.empty_like(step.base) if _is_large(step) else step.base for step in steps]
    numbers: list[int] = []
    sums: list[Tensor] = []
    for block in _blocks(steps):
        i, start, pieces = block[0]
        roles = zip(*(pieces for *_, pieces in block), strict=True)
        parts = iter(pieces if len(block) == 1 else [torch.cat(role) for role in roles])
        operands = [None if tensor is None else next(parts) for tensor in (first.base, first.grad, *first.state)]
        grad = operands[1]
        assert grad is not None
        out = deltas[i].view(-1)[start : start + CPU_CHUNK] if _is_large(steps[i]) else torch.empty_like(grad)
        delta = update_of(rule, *operands, numbers=first.numbers, decoupled=first.decoupled, flag=first.flag, out=out)
        if delta is not out:
            out.copy_(delta)
        del delta
        sizes = [len(pieces[0]) for *_, pieces in block]
        # torch adds pairwise, which keeps the digits of the dtype.
        sums += [part.sum() for product in (out * grad, out * out) for part in _parts(product, sizes)]
        numbers += [2 * i + which for which in (0, 1) for i, *_ in block]
        for (i, *_), part in zip(block, _parts(out, sizes), strict=True):
            if not _is_large(steps[i]):
                deltas[i] = part.view(steps[i].base.shape)
    totals = torch.zeros(2 * len(steps), dtype=torch.float64)
    totals = totals.index_add_(0, torch.tensor(numbers), torch.stack(sums).double()).view(-1, 2)
    # Of these, products may have left the range of float32.
    kept = totals.abs()
    for i in (~((kept > _LEAST) & (kept < _MOST)).all(1)).nonzero().flatten().tolist():
        totals[i] = slopes_and_norms([deltas[i]], [steps[i].grad])[0]
    return list(zip(deltas, totals.unbind(), strict=True))


def _parts(block: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    return (block,) if len(sizes) == 1 else block.split_with_sizes(sizes)


def _is_large(step: LazyUpdate) -> bool:
    return step.base.numel() > CPU_CHUNK


def _blocks(steps: Sequence[LazyUpdate]) -> Iterator[list[Piece]]:
    """Yield what is worked on at a time: a piece of one large tensor, or several small ones."""
    block: list[Piece] = []
    # What is copied side by side takes several times a block, which is to be little beside Δθ.
    most = min(CPU_CHUNK, sum(step.base.numel() for step in steps) // _SHARE)
    room = most
    for i, step in enumerate(steps):
        operands = [tensor.view(-1) for tensor in step.operands]
        size = len(operands[0])
        if _is_large(step):
            for start in range(0, size, CPU_CHUNK):
                yield [(i, start, [operand[start : start + CPU_CHUNK] for operand in operands])]
            continue
        if size > room and block:
            yield block
            block, room = [], most
        block.append((i, 0, operands))
        room -= size
    if block:
        yield block
