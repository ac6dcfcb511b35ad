"""Updates of many parameters by a few calls, on devices with kernels."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor

from sharpkern import ops
from sharpkern.ops import registry
from sharpkern.ops.arithmetic import compute_dtype
from sharpkern.ops.update import LazyUpdate, ParamUpdate, StoredUpdate


def kind_of(move: ParamUpdate) -> Hashable:
    """What moves have in common that one call forms."""
    if isinstance(move, LazyUpdate):
        return move.rule, move.numbers, move.decoupled, move.flag
    return StoredUpdate


def sums_of_steps(steps: Sequence[LazyUpdate]) -> list[Tensor]:
    """Return Δθᵀg and |Δθ|², [2] float64, of every step."""
    result: list[Tensor] = [torch.empty(0)] * len(steps)
    for members in _alike(steps):
        if len(members) == 1:
            result[members[0]] = steps[members[0]].slope_and_norm()
            continue
        mine = [steps[i] for i in members]
        sums = ops.sum_steps(
            mine[0].rule,
            [step.base for step in mine],
            [step.grad for step in mine],
            [tensor for step in mine for tensor in step.state],
            mine[0].numbers,
            decoupled=mine[0].decoupled,
            flag=mine[0].flag,
        )
        for i, one in zip(members, sums.unbind(), strict=True):
            result[i] = one
    return result


def updates_of(steps: Sequence[LazyUpdate], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Return Δθ of every step, each in a dtype."""
    result = [torch.empty_like(step.base, dtype=dtype) for step, dtype in zip(steps, dtypes, strict=True)]
    for members in _alike(steps):
        launch = None
        if _is_for_a_kernel(steps[members[0]]):
            launch = prepared_together([steps[i] for i in members], [result[i] for i in members], None)
        if launch is not None:
            launch()
            continue
        for i in members:
            steps[i].form(None, dtype=dtypes[i], out=result[i].unsqueeze(0))
    return result


def _alike(steps: Sequence[LazyUpdate]) -> Iterable[list[int]]:
    """Return the numbers of the steps that one launch can take; one by one those that no kernel can."""
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for i, step in enumerate(steps):
        alike[(step.base.device, kind_of(step)) if _is_for_a_kernel(step) else i].append(i)
    return alike.values()


def _is_for_a_kernel(step: LazyUpdate) -> bool:
    """Whether operands lie in memory in one way: the kernel would refuse all steps for one that does not."""
    operands = step.operands
    return (
        registry.has_kernels(step.base.device)
        and compute_dtype(*[operand.dtype for operand in operands]) == torch.float32
        and len({operand.stride() for operand in operands}) == 1
    )


def prepared_together(
    moves: Sequence[ParamUpdate], written: Sequence[Tensor], alpha: Tensor | None
) -> Callable[..., object] | None:
    """Return what launches θ + αΔθ of moves of one kind into tensors, or None; see `registry.prepared`."""
    bases = [move.base for move in moves]
    if isinstance(moves[0], LazyUpdate):
        lazy = [move for move in moves if isinstance(move, LazyUpdate)]
        grads, state = [move.grad for move in lazy], [tensor for move in lazy for tensor in move.state]
        options = {"decoupled": lazy[0].decoupled, "flag": lazy[0].flag}
        operands = (lazy[0].rule, written, bases, grads, state, alpha, lazy[0].numbers)
        return registry.prepared("form_steps_", *operands, **options)
    deltas = [move.delta for move in moves if isinstance(move, StoredUpdate)]
    return registry.prepared("axpy_", written, bases, deltas, alpha)
