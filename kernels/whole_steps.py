"""Steps of an optimizer for all tensors of a model that take the same one: weights in a launch or two, or two sums.

out = θ + αΔθ,   or   Δθᵀg and |Δθ|²,   Δθ = r·(rule(fg, state) + γθ)

For tensors that are too small to be worth a launch of their own, and where there is memory for all of them: the update
is that of `optimizer_steps`, the tables those of `axpy`. g in the sum is the gradient as it is stored. Sums read what
forming reads and write nothing: products and sums are fp64, every program sums a chunk, and the sums of chunks are
added in a fixed order and without atomic additions.

Source: Kalra et al. 2026, Def. 2.1 (θ − ηΔθ at every probe) and 2.2 (what Δθᵀg is for).
"""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._accepts import are_alike, check_alpha, check_device, check_lists, check_no_overlap
from ._launch import (
    Again,
    Case,
    Config,
    Launcher,
    are_aligned,
    choose,
    device_numbers,
    grid,
    lane,
    load_tile,
    on_device,
    options,
    store_steps,
)
from ._steps import MAX_STATE, check_step, rule_of, update_tile
from ._tables import chunk_of, operand, sums_of_chunks, tables

# Blocks are those of 16-bit operands, half as long where all are fp32: a thread takes 16 bytes of the narrowest.
_CONFIGS = (
    # Small tensors: more programs, so that all multiprocessors have some.
    Case(None, None, 1 << 22, Config(block=512, threads=64)),
    Case(None, None, None, Config(block=2048, threads=256)),
)

# Blocks that one program walks: 16 Ki elements with the large configuration.
_TILES = 8


@triton.jit
def _form_tile(
    out,
    theta,
    grad,
    first,
    second,
    third,
    alpha,
    numbers,
    num,
    offsets,
    RULE: tl.constexpr,
    DECAYED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    FLAG: tl.constexpr,
    MASKED: tl.constexpr,
):
    inside = offsets < num
    w = None
    if theta is not None:
        w = load_tile(theta + offsets, inside, MASKED)
    g = None
    if grad is not None:
        g = load_tile(grad + offsets, inside, MASKED)
    update = update_tile(w, g, first, second, third, numbers, offsets, inside, RULE, DECAYED, DECOUPLED, FLAG, MASKED)
    store_steps(out + offsets, 0, w, update, alpha, inside, 1, MASKED)


@triton.jit
def _form_steps_kernel(
    rows,
    chunks,
    alpha,
    numbers,
    DTYPES: tl.constexpr,
    ALIGNED: tl.constexpr,
    RULE: tl.constexpr,
    DECAYED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    FLAG: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row, start, num = chunk_of(pid, rows, chunks, 6, CHUNK)
    out = operand(row, 0, start, DTYPES[0], ALIGNED)
    theta = operand(row, 1, start, DTYPES[1], ALIGNED)
    grad = operand(row, 2, start, DTYPES[2], ALIGNED)
    first = operand(row, 3, start, DTYPES[3], ALIGNED)
    second = operand(row, 4, start, DTYPES[4], ALIGNED)
    third = operand(row, 5, start, DTYPES[5], ALIGNED)

    # The last tile of a tensor is the only one that needs a mask, and the mask would narrow the loads of the others.
    full = num // BLOCK * BLOCK
    # fmt: off
    for begin in range(0, full, BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        _form_tile(
            out, theta, grad, first, second, third, alpha, numbers, num, offsets, RULE, DECAYED, DECOUPLED, FLAG,
            MASKED=False
        )
    if full < num:
        offsets = full + tl.arange(0, BLOCK)
        _form_tile(
            out, theta, grad, first, second, third, alpha, numbers, num, offsets, RULE, DECAYED, DECOUPLED, FLAG,
            MASKED=True
        )
    # fmt: on


@triton.jit
def _sum_tile(
    dg,
    dd,
    theta,
    grad,
    first,
    second,
    third,
    numbers,
    num,
    offsets,
    RULE: tl.constexpr,
    DECAYED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    FLAG: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return the sums with those of one more tile added, each over LANE neighbours, which one thread holds."""
    inside = offsets < num
    w = None
    if theta is not None:
        w = load_tile(theta + offsets, inside, MASKED)
    g = load_tile(grad + offsets, inside, MASKED)
    update = update_tile(w, g, first, second, third, numbers, offsets, inside, RULE, DECAYED, DECOUPLED, FLAG, MASKED)
    if MASKED:
        # Where nothing is, and ε is zero, the update is 0 / 0.
        update = tl.where(inside, update, 0.0)
    d = tl.reshape(update.to(tl.float64), [BLOCK // LANE, LANE])
    g = tl.reshape(g.to(tl.float64), [BLOCK // LANE, LANE])
    return dg + tl.sum(d * g, axis=1), dd + tl.sum(d * d, axis=1)


@triton.jit
def _step_sums_kernel(
    partial,
    rows,
    chunks,
    numbers,
    DTYPES: tl.constexpr,
    ALIGNED: tl.constexpr,
    RULE: tl.constexpr,
    DECAYED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    FLAG: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row, start, num = chunk_of(pid, rows, chunks, 6, CHUNK)
    theta = operand(row, 1, start, DTYPES[1], ALIGNED)
    grad = operand(row, 2, start, DTYPES[2], ALIGNED)
    first = operand(row, 3, start, DTYPES[3], ALIGNED)
    second = operand(row, 4, start, DTYPES[4], ALIGNED)
    third = operand(row, 5, start, DTYPES[5], ALIGNED)

    dg = tl.zeros([BLOCK // LANE], tl.float64)
    dd = tl.zeros([BLOCK // LANE], tl.float64)
    full = num // BLOCK * BLOCK
    # fmt: off
    for begin in range(0, full, BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        dg, dd = _sum_tile(
            dg, dd, theta, grad, first, second, third, numbers, num, offsets, RULE, DECAYED, DECOUPLED, FLAG, BLOCK,
            LANE, MASKED=False,
        )
    if full < num:
        offsets = full + tl.arange(0, BLOCK)
        dg, dd = _sum_tile(
            dg, dd, theta, grad, first, second, third, numbers, num, offsets, RULE, DECAYED, DECOUPLED, FLAG, BLOCK,
            LANE, MASKED=True,
        )
    # fmt: on
    # In the order of the lists, whatever launch this is.
    partial += 2 * (tl.load(row + 7) + start // CHUNK)
    tl.store(partial, tl.sum(dg))
    tl.store(partial + 1, tl.sum(dd))


@Launcher
def form_steps_(
    rule: str,
    written: Sequence[Tensor],
    theta: Sequence[Tensor],
    grad: Sequence[Tensor | None],
    state: Sequence[Tensor | None],
    alpha: Tensor | None,
    numbers: Sequence[float],
    *,
    decoupled: bool = False,
    flag: bool = False,
) -> Callable[..., None]:
    """Launch `sharpkern.ops.form_steps_`; tables of 64 bytes per tensor and 8 per chunk are kept for the next call."""
    tile = rule_of(rule)
    roles = _checked(tile, written, theta, grad, state, numbers)
    if not theta:
        return lambda **_: None
    if alpha is not None and check_alpha(alpha, theta[0]) != 1:
        raise ValueError(f"alpha must hold one step size, got {alpha.numel()}; call once per step size")
    check_no_overlap(written, [*theta, *grad, *state, alpha])
    decayed = numbers[0] != 0
    if alpha is None and not decayed:
        roles[1] = [None] * len(theta)
    config = choose(_CONFIGS, theta[0].device, theta[0].element_size(), sum(map(torch.numel, theta)))
    chunk = _TILES * config.block
    found = tables(chunk, *roles)
    constants = (tile.update, decayed, decoupled, flag)
    launches = [
        (Again(_form_steps_kernel, grid(len(batch.chunks), config), options(config, theta[0])), batch)
        for batch in found.batches
    ]
    in_memory = device_numbers(*numbers, like=theta[0])

    def launch(alpha: Tensor | None = alpha) -> None:
        with on_device(theta[0]):
            for again, batch in launches:
                again(
                    found.rows,
                    batch.chunks,
                    alpha,
                    in_memory,
                    batch.dtypes,
                    batch.aligned,
                    *constants,
                    chunk,
                    config.threads * lane(batch.dtypes[0]),
                    aligned=are_aligned(alpha),
                )
        # Autograd does not see a kernel write: without this a backward through the old values would pass unnoticed.
        torch.autograd.graph.increment_version(written)

    return launch


@Launcher
def sum_steps(
    rule: str,
    theta: Sequence[Tensor],
    grad: Sequence[Tensor],
    state: Sequence[Tensor | None],
    numbers: Sequence[float],
    *,
    decoupled: bool = False,
    flag: bool = False,
) -> Callable[[], Tensor]:
    """Launch `sharpkern.ops.sum_steps`; tables of about the size of the sums of chunks are kept for the next call."""
    return _sums(rule, theta, grad, state, numbers, decoupled, flag)


@Launcher
def step_sums(
    rule: str,
    theta: Tensor,
    grad: Tensor | None,
    state: Sequence[Tensor | None],
    numbers: Sequence[float],
    *,
    decoupled: bool = False,
    flag: bool = False,
) -> Callable[[], Tensor]:
    """Launch `sharpkern.ops.step_sums`."""
    if grad is None:
        raise TypeError("grad must be a tensor, got None; the sums over a step are taken before it, with its gradient")
    check_step(rule_of(rule), theta, grad, state, numbers)
    launch = _sums(rule, [theta], [grad], state, numbers, decoupled, flag)
    return lambda: launch()[0]


def _sums(
    rule: str,
    theta: Sequence[Tensor],
    grad: Sequence[Tensor],
    state: Sequence[Tensor | None],
    numbers: Sequence[float],
    decoupled: bool,
    flag: bool,
) -> Callable[[], Tensor]:
    tile = rule_of(rule)
    _, *roles = _checked(tile, theta, theta, grad, state, numbers)
    if not theta:
        return lambda: torch.zeros(0, 2, dtype=torch.float64)
    decayed = numbers[0] != 0
    config = choose(_CONFIGS, theta[0].device, theta[0].element_size(), sum(map(torch.numel, theta)))
    chunk = _TILES * config.block
    # Of the output the sums have no use; where θ is not read either, one kernel does for weights of all dtypes.
    nothing = [None] * len(theta)
    found = tables(chunk, grad, roles[0] if decayed else nothing, *roles[1:])
    programs = [grid(len(batch.chunks), config) for batch in found.batches]

    def launch() -> Tensor:
        partial = torch.empty(found.num_chunks, 2, dtype=torch.float64, device=theta[0].device)
        with on_device(theta[0]):
            for batch, size in zip(found.batches, programs, strict=True):
                width = lane(*(dtype for dtype in batch.dtypes if dtype is not None))
                _step_sums_kernel[size](
                    partial,
                    found.rows,
                    batch.chunks,
                    device_numbers(*numbers, like=theta[0]),
                    DTYPES=batch.dtypes,
                    ALIGNED=batch.aligned,
                    RULE=tile.update,
                    DECAYED=decayed,
                    DECOUPLED=decoupled,
                    FLAG=flag,
                    CHUNK=chunk,
                    BLOCK=config.threads * width,
                    LANE=width,
                    **options(config, theta[0]),
                )
        return sums_of_chunks(partial, found, chunk)

    return launch


def _checked(
    tile: ModuleType,
    written: Sequence[Tensor],
    theta: Sequence[Tensor],
    grad: Sequence[Tensor | None],
    state: Sequence[Tensor | None],
    numbers: Sequence[float],
) -> list[Sequence[Tensor | None]]:
    """Refuse operands from which the updates do not follow, and return them by their role in the tables."""
    num_state = len(tile.STATE)
    lengths = [len(written), len(theta), len(grad), len(state) / num_state]
    if len(set(lengths)) != 1:
        raise ValueError(
            f"written, theta, grad and state must have one tensor, and {num_state} of the state, for each parameter, "
            f"got {len(written)}, {len(theta)}, {len(grad)} and {len(state)}; pass None for what is not there"
        )
    columns = [state[role::num_state] for role in range(num_state)]
    first: list[bool] = []
    for index, (to, weight, gradient, *own) in enumerate(zip(written, theta, grad, *columns, strict=True)):
        # Numbers and presence of the first are those of all, or are looked at closely.
        there = [tensor is not None for tensor in (gradient, *own)]
        first = first or there
        if index == 0 or there != first or not are_alike((to, weight, gradient, *own), theta[0].device):
            check_step(tile, weight, gradient, own, numbers)
            check_lists(written=[to], theta=[weight])
            check_device(**{"theta[0]": theta[0], f"theta[{index}]": weight})
    nothing = [None] * len(theta)
    return [written, theta, grad, *columns, *[nothing] * (MAX_STATE - num_state)]
