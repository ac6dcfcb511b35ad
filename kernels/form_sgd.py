"""Weights perturbed along the SGD update, straight from the momentum buffer: no Δθ is ever stored.

out[k] = θ + α_k Δθ, for a gradient that the optimizer has not seen yet:

    u = g + γθ,   b = μb + (1 − τ)u (the first step: b = u),   Δθ = u + μb with Nesterov's momentum, b without

The buffer is updated in registers and never written. With bf16 operands and momentum 6 + 2K bytes move per element for
K step sizes. The order of operations is that of torch's own step.

Source: the update rule that torch.optim.SGD documents; Kalra et al. 2026, Def. 2.1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Case, Config, choose, load_tile, on_device, options, perturbed, store_tile
from ._operands import check_alpha, check_floats, check_layout, check_scalars, output

_CONFIGS = (
    Case(None, None, 1 << 18, Config(block=512, threads=64)),
    Case(None, None, None, Config(block=2048, threads=256)),
)

_NUM_SCALARS = 3


@triton.jit
def _form_sgd_tile(
    out,
    out_stride,
    theta,
    grad,
    momentum_buffer,
    alpha,
    scalars,
    n,
    offsets,
    K: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    MASKED: tl.constexpr,
):
    weight_decay = tl.load(scalars)
    momentum = tl.load(scalars + 1)
    undamped = tl.load(scalars + 2)

    inside = offsets < n
    w = load_tile(theta + offsets, inside, MASKED)
    update = load_tile(grad + offsets, inside, MASKED)
    if MAXIMIZE:
        update = -update
    update = tl.fma(w, weight_decay, update)
    buffer = update
    if momentum_buffer is not None:
        buffer = tl.fma(update, undamped, load_tile(momentum_buffer + offsets, inside, MASKED) * momentum)
    if NESTEROV:
        buffer = tl.fma(buffer, momentum, update)
    out += offsets
    for k in tl.static_range(K):
        store_tile(out, perturbed(w, buffer, tl.load(alpha + k)), inside, MASKED)
        out += out_stride


@triton.jit
def _form_sgd_kernel(
    out,
    out_stride,
    theta,
    grad,
    momentum_buffer,
    alpha,
    scalars,
    n,
    K: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    # fmt: off
    if start + BLOCK <= n:
        _form_sgd_tile(
            out, out_stride, theta, grad, momentum_buffer, alpha, scalars, n, offsets, K, NESTEROV, MAXIMIZE,
            MASKED=False,
        )
    else:
        _form_sgd_tile(
            out, out_stride, theta, grad, momentum_buffer, alpha, scalars, n, offsets, K, NESTEROV, MAXIMIZE,
            MASKED=True,
        )
    # fmt: on


def sgd_scalars(
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the hyperparameters of one parameter group as `form_sgd` reads them.

    Args:
        weight_decay: γ.
        momentum: μ.
        dampening: τ.
        device: where the kernel will run.

    Returns:
        Tensor: [3] float32.
    """
    return torch.tensor([weight_decay, momentum, 1 - dampening], dtype=torch.float32, device=device)


def form_sgd(
    theta: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    alpha: Tensor,
    scalars: Tensor,
    *,
    nesterov: bool = False,
    maximize: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return θ + α_k Δθ for K step sizes, Δθ the SGD update that the next step would make.

    Args:
        theta: the parameter or its master, any shape and size, float32, float16 or bfloat16, CUDA, without gaps.
        grad: g, shape and strides of ``theta``, any of the three dtypes.
        momentum_buffer: b before the step, likewise; None without momentum and before the first step.
        alpha: signed step sizes (−η along the update), [K] float32, K ≤ 16.
        scalars: hyperparameters from `sgd_scalars`, [3] float32 on the device.
        nesterov: whether the optimizer looks ahead.
        maximize: whether the optimizer ascends.
        dtype: of the result, that of ``theta`` by default; ignored when ``out`` is given.
        out: written and returned if given, [K, *theta.shape], each slice with the strides of ``theta``.

    Returns:
        Tensor: [K, *theta.shape]. Where α_k = 0, slice k is θ, bit for bit, if the dtype is that of ``theta``.

    Raises:
        TypeError: if a dtype is none of the three.
        ValueError: if a device, shape or stride does not fit, or ``out`` overlaps an operand.

    Memory:
        Allocates the result, if ``out`` is None. The state is read and never written.

    Determinism:
        Elementwise; the same bits on every run.
    """
    operands = {"theta": theta, "grad": grad, "momentum_buffer": momentum_buffer}
    check_floats(**operands)
    check_layout(**operands)
    check_scalars(scalars, _NUM_SCALARS, "sgd_scalars", theta)
    num_steps = check_alpha(alpha, theta)
    out = output(out, theta, num_steps, dtype, [*operands.values(), alpha, scalars])
    n = theta.numel()
    if n == 0:
        return out
    config = choose(_CONFIGS, out, n)
    with on_device(theta):
        _form_sgd_kernel[(triton.cdiv(n, config.block),)](
            out,
            out.stride(0),
            *operands.values(),
            alpha,
            scalars,
            n,
            K=num_steps,
            NESTEROV=nesterov,
            MAXIMIZE=maximize,
            BLOCK=config.block,
            **options(config, theta),
        )
    torch.autograd.graph.increment_version(out)
    return out
