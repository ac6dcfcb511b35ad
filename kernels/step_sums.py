"""Δθᵀg and |Δθ|² of the step that Adam, AdamW or SGD would take, straight from the optimizer's state.

Δθ is worked out as form_adam.py and form_sgd.py do, in fp32, and summed before any rounding; g is the gradient as it is
stored. One pass over the state and nothing in memory: 12 bytes per element with bf16 weights and gradients and fp32
moments, 6 with bf16 momentum, 2 less each without weight decay. Products and sums are fp64. Every program sums some
tiles, and the programs' sums are added in a fixed order and without atomic additions.

Source: the update rules that torch.optim documents; Kalra et al. 2026, Def. 2.2 (what Δθᵀg is for).
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Case, Config, choose, device_numbers, grid, load_tile, on_device, options
from ._operands import check_floats, check_layout
from ._updates import adam_numbers, adam_update, check_moments, sgd_numbers, sgd_update

# Blocks are those of 16-bit operands, half as long where all are fp32: a thread takes 16 bytes of the narrowest.
_CONFIGS = (
    # Small tensors: more programs, so that all multiprocessors have some.
    Case(None, None, 1 << 22, Config(block=512, threads=64)),
    Case(None, None, None, Config(block=2048, threads=256)),
)

# Tiles that one program walks, so that its two sums over all threads are a small part of its work.
_TILES = 8


@triton.jit
def _add_tile(dg, dd, update, g, inside, BLOCK: tl.constexpr, LANE: tl.constexpr, MASKED: tl.constexpr):
    """Return the sums with those of one more tile added, each over LANE neighbours, which one thread holds."""
    if MASKED:
        # Where nothing is, and ε is zero, the update is 0 / 0.
        update = tl.where(inside, update, 0.0)
    d = tl.reshape(update.to(tl.float64), [BLOCK // LANE, LANE])
    g = tl.reshape(g.to(tl.float64), [BLOCK // LANE, LANE])
    return dg + tl.sum(d * g, axis=1), dd + tl.sum(d * d, axis=1)


@triton.jit
def _add_adam_tile(
    dg,
    dd,
    theta,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    numbers,
    n,
    offsets,
    DECAYED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    MASKED: tl.constexpr,
):
    inside = offsets < n
    w = None
    if theta is not None:
        w = load_tile(theta + offsets, inside, MASKED)
    g = load_tile(grad + offsets, inside, MASKED)
    update = adam_update(
        w, g, exp_avg, exp_avg_sq, max_exp_avg_sq, numbers, offsets, inside, DECAYED, DECOUPLED, MASKED
    )
    return _add_tile(dg, dd, update, g, inside, BLOCK, LANE, MASKED)


@triton.jit
def _adam_sums_kernel(
    partial,
    theta,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    numbers,
    n,
    DECAYED: tl.constexpr,
    DECOUPLED: tl.constexpr,
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
        dg, dd = _add_adam_tile(
            dg, dd, theta, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, numbers, n, offsets,
            DECAYED, DECOUPLED, BLOCK, LANE, MASKED=False,
        )
    if full < num:
        offsets = start + full + tl.arange(0, BLOCK)
        dg, dd = _add_adam_tile(
            dg, dd, theta, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, numbers, n, offsets,
            DECAYED, DECOUPLED, BLOCK, LANE, MASKED=True,
        )
    # fmt: on
    tl.store(partial + 2 * pid, tl.sum(dg))
    tl.store(partial + 2 * pid + 1, tl.sum(dd))


@triton.jit
def _add_sgd_tile(
    dg,
    dd,
    theta,
    grad,
    momentum_buffer,
    numbers,
    n,
    offsets,
    DECAYED: tl.constexpr,
    NESTEROV: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    MASKED: tl.constexpr,
):
    inside = offsets < n
    w = None
    if theta is not None:
        w = load_tile(theta + offsets, inside, MASKED)
    g = load_tile(grad + offsets, inside, MASKED)
    update = sgd_update(w, g, momentum_buffer, numbers, offsets, inside, DECAYED, NESTEROV, MASKED)
    return _add_tile(dg, dd, update, g, inside, BLOCK, LANE, MASKED)


@triton.jit
def _sgd_sums_kernel(
    partial,
    theta,
    grad,
    momentum_buffer,
    numbers,
    n,
    DECAYED: tl.constexpr,
    NESTEROV: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    start = pid * (TILES * BLOCK)
    num = tl.minimum(n - start, TILES * BLOCK).to(tl.int32)
    dg = tl.zeros([BLOCK // LANE], tl.float64)
    dd = tl.zeros([BLOCK // LANE], tl.float64)
    full = num // BLOCK * BLOCK
    # fmt: off
    for first in range(0, full, BLOCK):
        offsets = start + first + tl.arange(0, BLOCK)
        dg, dd = _add_sgd_tile(
            dg, dd, theta, grad, momentum_buffer, numbers, n, offsets, DECAYED, NESTEROV, BLOCK, LANE, MASKED=False,
        )
    if full < num:
        offsets = start + full + tl.arange(0, BLOCK)
        dg, dd = _add_sgd_tile(
            dg, dd, theta, grad, momentum_buffer, numbers, n, offsets, DECAYED, NESTEROV, BLOCK, LANE, MASKED=True,
        )
    # fmt: on
    tl.store(partial + 2 * pid, tl.sum(dg))
    tl.store(partial + 2 * pid + 1, tl.sum(dd))


def adam_sums(
    theta: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    *,
    max_exp_avg_sq: Tensor | None = None,
    beta1: float,
    beta2: float,
    correction1: float,
    correction2: float,
    eps: float,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    grad_factor: float = 1.0,
    rate: float = 1.0,
) -> Tensor:
    """Return Δθᵀg and |Δθ|² of the Adam or AdamW update that the next step would make.

    Args:
        theta: the parameter or its master, any shape and size, float32, float16 or bfloat16, CUDA, without gaps; read
            for its decay only.
        grad: g, shape and strides of ``theta``, any of the three dtypes.
        exp_avg: m, likewise; None before the first step.
        exp_avg_sq: v, likewise; None together with ``exp_avg``.
        max_exp_avg_sq: the largest v so far, for amsgrad.
        beta1: β₁.
        beta2: β₂.
        correction1: 1 − β₁ᵗ, t the number of the step that the moments will belong to.
        correction2: 1 − β₂ᵗ.
        eps: ε.
        weight_decay: γ.
        decoupled: AdamW's weight decay; False for Adam's L2 decay.
        grad_factor: f, multiplies the g that enters the update, not the one in the sum.
        rate: r, multiplies Δθ.

    Returns:
        Tensor: [2] float64 on the device; zeros for a tensor without elements.

    Raises:
        TypeError: if there is no gradient, a dtype is none of the three, or a hyperparameter no Python number.
        ValueError: if a device, shape or stride does not fit, a hyperparameter is not finite or a correction not
            positive, or only one moment is given.

    Memory:
        At most 16 bytes per 8 Ki elements (2 Ki in tensors below 4 M), and no Δθ. The state is read and never written.

    Determinism:
        Fixed order of additions; the same bits on every run on the same architecture.
    """
    check_moments(grad, exp_avg, exp_avg_sq)
    numbers = adam_numbers(
        beta1=beta1,
        beta2=beta2,
        correction1=correction1,
        correction2=correction2,
        eps=eps,
        weight_decay=weight_decay,
        grad_factor=grad_factor,
        rate=rate,
    )
    operands = {
        "theta": theta,
        "grad": grad,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "max_exp_avg_sq": max_exp_avg_sq,
    }
    return _sums(_adam_sums_kernel, operands, numbers, DECAYED=weight_decay != 0, DECOUPLED=decoupled)


def sgd_sums(
    theta: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    grad_factor: float = 1.0,
    rate: float = 1.0,
) -> Tensor:
    """Return Δθᵀg and |Δθ|² of the SGD update that the next step would make.

    Args:
        theta: the parameter or its master, any shape and size, float32, float16 or bfloat16, CUDA, without gaps; read
            for its decay only.
        grad: g, shape and strides of ``theta``, any of the three dtypes.
        momentum_buffer: b before the step, likewise; None without momentum and before the first step.
        weight_decay: γ.
        momentum: μ.
        dampening: τ.
        nesterov: whether the optimizer looks ahead.
        grad_factor: f, multiplies the g that enters the update, not the one in the sum.
        rate: r, multiplies Δθ.

    Returns:
        Tensor: [2] float64 on the device; zeros for a tensor without elements.

    Raises:
        TypeError: if there is no gradient, a dtype is none of the three, or a hyperparameter no Python number.
        ValueError: if a device, shape or stride does not fit, or a hyperparameter is not finite.

    Memory:
        As `adam_sums`.

    Determinism:
        As `adam_sums`.
    """
    numbers = sgd_numbers(
        weight_decay=weight_decay, momentum=momentum, dampening=dampening, grad_factor=grad_factor, rate=rate
    )
    operands = {"theta": theta, "grad": grad, "momentum_buffer": momentum_buffer}
    return _sums(_sgd_sums_kernel, operands, numbers, DECAYED=weight_decay != 0, NESTEROV=nesterov)


def _sums(
    kernel: Any, operands: Mapping[str, Tensor | None], numbers: tuple[float, ...], *, DECAYED: bool, **flags: bool
) -> Tensor:
    """Check the operands of one parameter, launch a kernel on them, and add what its programs return.

    Args:
        kernel: takes [programs, 2] float64 to write, the operands, the numbers and how many elements there are.
        operands: by name, in the kernel's order, the parameter first.
        numbers: hyperparameters in the kernel's order.
        DECAYED: whether the parameter is read.
        **flags: what else the kernel is compiled for.

    Returns:
        Tensor: [2] float64.

    Raises:
        TypeError: if there is no gradient, or what `check_floats` refuses.
        ValueError: what `check_floats`, `check_layout` and `grid` refuse.
    """
    if operands["grad"] is None:
        raise TypeError("grad must be a tensor, got None; the sums over a step are taken before it, with its gradient")
    check_floats(**operands)
    check_layout(**operands)
    theta, *state = operands.values()
    assert theta is not None
    n = theta.numel()
    if n == 0:
        return torch.zeros(2, dtype=torch.float64, device=theta.device)
    read = (theta if DECAYED else None, *state)
    lane = 16 // min(tensor.element_size() for tensor in read if tensor is not None)
    config = choose(_CONFIGS, theta, n)
    block = config.threads * lane
    programs = grid(triton.cdiv(n, _TILES * block), config)
    partial = torch.empty(*programs, 2, dtype=torch.float64, device=theta.device)
    with on_device(theta):
        kernel[programs](
            partial,
            *read,
            device_numbers(*numbers, like=theta),
            n,
            DECAYED=DECAYED,
            **flags,
            TILES=_TILES,
            BLOCK=block,
            LANE=lane,
            **options(config, theta),
        )
        return partial.sum(0)
