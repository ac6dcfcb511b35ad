"""Weights perturbed along an optimizer's next update, or two sums over it, straight from the optimizer's state.

out[k] = θ + α_k Δθ,   or   Δθᵀg and |Δθ|²,   Δθ = r·(rule(fg, state) + γθ)

Δθ is never stored, and no state is written: what the step would update is updated in registers. The rule of each
optimizer is a tile of kernels/rules/. f undoes a loss scale or turns a gradient round, r is the group's share of the
learning rate. L2 decay enters the rule's gradient, f·g + γθ, and decoupled decay the update. The order of operations is
that of torch's own step. g in the sum is the gradient as it is stored.

Bytes per element for K step sizes, bf16 weights and gradients: 12 + 2K with two fp32 moments, 6 + 2K with a bf16
buffer. The sums read the same in one pass and write nothing; products and sums are fp64, every program sums some tiles,
and the programs' sums are added in a fixed order and without atomic additions.

Source: Kalra et al. 2026, Def. 2.1 (θ − ηΔθ at every probe) and 2.2 (what Δθᵀg is for).
"""

import functools
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._accepts import check_alpha, check_floats, check_layout, check_numbers, check_output, empty_steps
from ._launch import (
    STREAMING,
    Case,
    Config,
    Launcher,
    choose,
    device_numbers,
    grid,
    load_tile,
    on_device,
    options,
    store_steps,
)

# What the numbers of every rule begin with.
_SHARED = ("weight_decay", "grad_factor", "rate")

# Of the sums. Blocks are those of 16-bit operands, half as long where all are fp32: a thread takes 16 bytes of the
# narrowest.
_CONFIGS = (
    # Small tensors: more programs, so that all multiprocessors have some.
    Case(None, None, 1 << 22, Config(block=512, threads=64)),
    Case(None, None, None, Config(block=2048, threads=256)),
)

# Tiles that one program sums, so that its two sums over all threads are a small part of its work.
_TILES = 8


@triton.jit
def _update(
    w,
    g,
    state,
    numbers,
    offsets,
    inside,
    RULE: tl.constexpr,
    DECAYED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    FLAG: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return Δθ from tiles of θ and g and pointers to the state; θ is None where nothing reads it."""
    weight_decay = tl.load(numbers)
    grad_factor = tl.load(numbers + 1)
    rate = tl.load(numbers + 2)
    if g is not None:
        g = g * grad_factor
        if DECAYED and not DECOUPLED:
            g = tl.fma(w, weight_decay, g)
    update = RULE(g, state, numbers + 3, offsets, inside, FLAG, MASKED)
    if DECAYED and DECOUPLED:
        update = tl.fma(w, weight_decay, update)
    return update * rate


@triton.jit
def _form_tile(
    out,
    out_stride,
    theta,
    grad,
    state,
    alpha,
    numbers,
    n,
    offsets,
    RULE: tl.constexpr,
    K: tl.constexpr,
    DECAYED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    FLAG: tl.constexpr,
    MASKED: tl.constexpr,
):
    inside = offsets < n
    w = None
    if theta is not None:
        w = load_tile(theta + offsets, inside, MASKED)
    g = None
    if grad is not None:
        g = load_tile(grad + offsets, inside, MASKED)
    update = _update(w, g, state, numbers, offsets, inside, RULE, DECAYED, DECOUPLED, FLAG, MASKED)
    store_steps(out + offsets, out_stride, w, update, alpha, inside, K, MASKED)


@triton.jit
def _form_step_kernel(
    out,
    out_stride,
    theta,
    grad,
    state,
    alpha,
    numbers,
    n,
    RULE: tl.constexpr,
    K: tl.constexpr,
    DECAYED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    FLAG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    # fmt: off
    if start + BLOCK <= n:
        _form_tile(
            out, out_stride, theta, grad, state, alpha, numbers, n, offsets, RULE, K, DECAYED, DECOUPLED, FLAG,
            MASKED=False,
        )
    else:
        _form_tile(
            out, out_stride, theta, grad, state, alpha, numbers, n, offsets, RULE, K, DECAYED, DECOUPLED, FLAG,
            MASKED=True,
        )
    # fmt: on


@triton.jit
def _sum_tile(
    dg,
    dd,
    theta,
    grad,
    state,
    numbers,
    n,
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
    inside = offsets < n
    w = None
    if theta is not None:
        w = load_tile(theta + offsets, inside, MASKED)
    g = load_tile(grad + offsets, inside, MASKED)
    update = _update(w, g, state, numbers, offsets, inside, RULE, DECAYED, DECOUPLED, FLAG, MASKED)
    if MASKED:
        # Where nothing is, and ε is zero, the update is 0 / 0.
        update = tl.where(inside, update, 0.0)
    d = tl.reshape(update.to(tl.float64), [BLOCK // LANE, LANE])
    g = tl.reshape(g.to(tl.float64), [BLOCK // LANE, LANE])
    return dg + tl.sum(d * g, axis=1), dd + tl.sum(d * d, axis=1)


@triton.jit
def _step_sums_kernel(
    partial,
    theta,
    grad,
    state,
    numbers,
    n,
    RULE: tl.constexpr,
    DECAYED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    FLAG: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    start = pid * (TILES * BLOCK)
    num = tl.minimum(n - start, TILES * BLOCK).to(tl.int32)
    dg = tl.zeros([BLOCK // LANE], tl.float64)
    dd = tl.zeros([BLOCK // LANE], tl.float64)
    # The last tile of a tensor is the only one that needs a mask, and the mask would narrow the loads of the others.
    full = num // BLOCK * BLOCK
    # fmt: off
    for first in range(0, full, BLOCK):
        offsets = start + first + tl.arange(0, BLOCK)
        dg, dd = _sum_tile(
            dg, dd, theta, grad, state, numbers, n, offsets, RULE, DECAYED, DECOUPLED, FLAG, BLOCK, LANE, MASKED=False,
        )
    if full < num:
        offsets = start + full + tl.arange(0, BLOCK)
        dg, dd = _sum_tile(
            dg, dd, theta, grad, state, numbers, n, offsets, RULE, DECAYED, DECOUPLED, FLAG, BLOCK, LANE, MASKED=True,
        )
    # fmt: on
    tl.store(partial + 2 * pid, tl.sum(dg))
    tl.store(partial + 2 * pid + 1, tl.sum(dd))


@Launcher
def form_step(
    rule: str,
    theta: Tensor,
    grad: Tensor | None,
    state: Sequence[Tensor | None],
    alpha: Tensor | None,
    numbers: Sequence[float],
    *,
    decoupled: bool = False,
    flag: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Callable[[], Tensor]:
    """Launch `sharpkern.ops.form_step`."""
    tile = _rule(rule)
    _check(tile, theta, grad, state, numbers)
    num_steps = 1 if alpha is None else check_alpha(alpha, theta)
    dtype = check_output(out, theta, num_steps, dtype, [theta, grad, *state, alpha])
    n = theta.numel()
    config = choose(STREAMING, theta.device, dtype.itemsize, n)
    programs = grid(triton.cdiv(n, config.block), config)
    decayed = numbers[0] != 0

    def launch() -> Tensor:
        result = empty_steps(theta, num_steps, dtype) if out is None else out
        if n == 0:
            return result
        with on_device(theta):
            _form_step_kernel[programs](
                result,
                result.stride(0),
                None if alpha is None and not decayed else theta,
                grad,
                tuple(state),
                alpha,
                device_numbers(*numbers, like=theta),
                n,
                RULE=tile.update,
                K=num_steps,
                DECAYED=decayed,
                DECOUPLED=decoupled,
                FLAG=flag,
                BLOCK=config.block,
                **options(config, theta),
            )
        torch.autograd.graph.increment_version(result)
        return result

    return launch


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
    tile = _rule(rule)
    _check(tile, theta, grad, state, numbers)
    n = theta.numel()
    decayed = numbers[0] != 0
    read = [tensor for tensor in (theta if decayed else None, grad, *state) if tensor is not None]
    lane = 16 // min(tensor.element_size() for tensor in read)
    config = choose(_CONFIGS, theta.device, theta.element_size(), n)
    block = config.threads * lane
    programs = grid(triton.cdiv(n, _TILES * block), config)

    def launch() -> Tensor:
        if n == 0:
            return torch.zeros(2, dtype=torch.float64, device=theta.device)
        partial = torch.empty(*programs, 2, dtype=torch.float64, device=theta.device)
        with on_device(theta):
            _step_sums_kernel[programs](
                partial,
                theta if decayed else None,
                grad,
                tuple(state),
                device_numbers(*numbers, like=theta),
                n,
                RULE=tile.update,
                DECAYED=decayed,
                DECOUPLED=decoupled,
                FLAG=flag,
                TILES=_TILES,
                BLOCK=block,
                LANE=lane,
                **options(config, theta),
            )
            return partial.sum(0)

    return launch


@functools.cache
def _rule(name: str) -> ModuleType:
    """Return the file of a rule."""
    try:
        return import_module(f".rules.{name}", __package__)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"rule must be the name of a file of kernels/rules, got {name!r}; use another backend"
        ) from error


def _check(
    rule: ModuleType, theta: Tensor, grad: Tensor | None, state: Sequence[Tensor | None], numbers: Sequence[float]
) -> None:
    """Refuse operands from which the rule's update of one parameter does not follow."""
    names = (*_SHARED, *rule.NUMBERS)
    if len(state) != len(rule.STATE) or len(numbers) != len(names):
        raise ValueError(
            f"state and numbers must be {', '.join(rule.STATE)} and {', '.join(names)}, got {len(state)} and "
            f"{len(numbers)} of them; pass None for what is not there yet"
        )
    given = dict(zip(rule.STATE, state, strict=True))
    here = [given[name] is not None for name in rule.TOGETHER]
    if here and (any(here) != all(here) or (not any(here) and grad is None)):
        raise ValueError(
            f"{' and '.join(rule.TOGETHER)} must both be given or, with a gradient, both be None, got "
            f"{' and '.join(map(str, here))} with gradient {grad is not None}; pass the optimizer's state"
        )
    if grad is None and not here:
        raise TypeError("grad must be a tensor, got None; pass the one of the parameter")
    check_numbers(numbers, names)
    check_floats(theta=theta, grad=grad, **given)
    check_layout(theta=theta, grad=grad, **given)
