"""Weights perturbed along the SGD update, straight from the momentum buffer: no Δθ is ever stored.

out[k] = θ + α_k Δθ, for a gradient that the optimizer has not seen yet:

    u = fg + γθ,   b = μb + (1 − τ)u (the first step: b = u),   Δθ = r (u + μb) with Nesterov's momentum, r b without

f undoes a loss scale or turns a gradient round, r is the group's share of the learning rate. The buffer is updated in
registers and never written. With bf16 operands and momentum 6 + 2K bytes move per element for K step sizes. The order
of operations is that of torch's own step.

Source: the update rule that torch.optim.SGD documents; Kalra et al. 2026, Def. 2.1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import STREAMING, choose, device_numbers, grid, load_tile, on_device, options, store_steps
from ._operands import check_step
from ._updates import sgd_numbers, sgd_update


@triton.jit
def _form_sgd_tile(
    out,
    out_stride,
    theta,
    grad,
    momentum_buffer,
    alpha,
    numbers,
    n,
    offsets,
    K: tl.constexpr,
    DECAYED: tl.constexpr,
    NESTEROV: tl.constexpr,
    MASKED: tl.constexpr,
):
    inside = offsets < n
    w = None
    if theta is not None:
        w = load_tile(theta + offsets, inside, MASKED)
    g = load_tile(grad + offsets, inside, MASKED)
    update = sgd_update(w, g, momentum_buffer, numbers, offsets, inside, DECAYED, NESTEROV, MASKED)
    store_steps(out + offsets, out_stride, w, update, alpha, inside, K, MASKED)


@triton.jit
def _form_sgd_kernel(
    out,
    out_stride,
    theta,
    grad,
    momentum_buffer,
    alpha,
    numbers,
    n,
    K: tl.constexpr,
    DECAYED: tl.constexpr,
    NESTEROV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    # fmt: off
    if start + BLOCK <= n:
        _form_sgd_tile(
            out, out_stride, theta, grad, momentum_buffer, alpha, numbers, n, offsets, K, DECAYED, NESTEROV,
            MASKED=False,
        )
    else:
        _form_sgd_tile(
            out, out_stride, theta, grad, momentum_buffer, alpha, numbers, n, offsets, K, DECAYED, NESTEROV,
            MASKED=True,
        )
    # fmt: on


def form_sgd(
    theta: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    alpha: Tensor | None,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    grad_factor: float = 1.0,
    rate: float = 1.0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return θ + α_k Δθ for K step sizes, Δθ the SGD update that the next step would make; or Δθ itself.

    Args:
        theta: the parameter or its master, any shape and size, float32, float16 or bfloat16, CUDA, without gaps.
        grad: g, shape and strides of ``theta``, any of the three dtypes.
        momentum_buffer: b before the step, likewise; None without momentum and before the first step.
        alpha: signed step sizes (−η along the update), [K] float32, K ≤ 16; None for Δθ.
        weight_decay: γ.
        momentum: μ.
        dampening: τ.
        nesterov: whether the optimizer looks ahead.
        grad_factor: f, multiplies g before anything else: 1 / loss scale, its negative where the optimizer ascends.
        rate: r, multiplies Δθ: the group's learning rate over the one that α is in units of.
        dtype: of the result, that of ``theta`` by default; ignored when ``out`` is given.
        out: written and returned if given, [K, *theta.shape], each slice with the strides of ``theta``.

    Returns:
        Tensor: [K, *theta.shape]. Where α_k = 0, slice k is θ, bit for bit, if the dtype is that of ``theta``.
        Δθ, [1, *theta.shape], without ``alpha``; θ is then read for its decay only.

    Raises:
        TypeError: if a dtype is none of the three, or a hyperparameter no Python number.
        ValueError: if a device, shape or stride does not fit, ``out`` overlaps an operand, or a hyperparameter is not
            finite.

    Memory:
        Allocates the result, if ``out`` is None. The state is read and never written.

    Determinism:
        Elementwise; the same bits on every run.
    """
    numbers = sgd_numbers(
        weight_decay=weight_decay, momentum=momentum, dampening=dampening, grad_factor=grad_factor, rate=rate
    )
    operands = {"theta": theta, "grad": grad, "momentum_buffer": momentum_buffer}
    out, num_steps = check_step(operands, alpha, dtype, out)
    n = theta.numel()
    if n == 0:
        return out
    config = choose(STREAMING, out, n)
    with on_device(theta):
        _form_sgd_kernel[grid(triton.cdiv(n, config.block), config)](
            out,
            out.stride(0),
            None if alpha is None and weight_decay == 0 else theta,
            grad,
            momentum_buffer,
            alpha,
            device_numbers(*numbers, like=theta),
            n,
            K=num_steps,
            DECAYED=weight_decay != 0,
            NESTEROV=nesterov,
            BLOCK=config.block,
            **options(config, theta),
        )
    torch.autograd.graph.increment_version(out)
    return out
