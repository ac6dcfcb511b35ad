"""Weights perturbed along an optimizer's next update, straight from the optimizer's state.

out[k] = θ + α_k Δθ,   Δθ = r·(rule(fg, state) + γθ)

Δθ is never stored, and no state is written: what the step would update is updated in registers. The rule of each
optimizer is a tile of kernels/rules/.

Bytes per element for K step sizes, bf16 weights and gradients: 12 + 2K with two fp32 moments, 6 + 2K with a bf16
buffer.

Source: Kalra et al. 2026, Def. 2.1 (θ − ηΔθ at every probe).
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._accepts import check_alpha, check_output, empty_steps
from ._launch import (
    STREAMING,
    Again,
    Launcher,
    are_aligned,
    choose,
    device_numbers,
    grid,
    load_tile,
    on_device,
    options,
    store_steps,
)
from ._steps import MAX_STATE, check_step, rule_of, update_tile


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
    update = update_tile(
        w, g, state[0], state[1], state[2], numbers, offsets, inside, RULE, DECAYED, DECOUPLED, FLAG, MASKED
    )
    store_steps(out + offsets, out_stride, w, update, alpha, inside, K, MASKED)


@triton.jit(do_not_specialize=["n"])
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
) -> Callable[..., Tensor]:
    """Launch `sharpkern.ops.form_step`."""
    tile = rule_of(rule)
    check_step(tile, theta, grad, state, numbers)
    num_steps = 1 if alpha is None else check_alpha(alpha, theta)
    dtype = check_output(out, theta, num_steps, dtype, [theta, grad, *state, alpha])
    n = theta.numel()
    config = choose(STREAMING, theta.device, dtype.itemsize, n)
    again = Again(_form_step_kernel, grid(triton.cdiv(n, config.block), config), options(config, theta))
    decayed = numbers[0] != 0
    read = None if alpha is None and not decayed else theta
    padded = (*state, *[None] * (MAX_STATE - len(state)))
    in_memory = device_numbers(*numbers, like=theta)

    def launch(alpha: Tensor | None = alpha, out: Tensor | None = out) -> Tensor:
        result = empty_steps(theta, num_steps, dtype) if out is None else out
        if n == 0:
            return result
        stride = 0 if num_steps == 1 else result.stride(0)
        with on_device(theta):
            again(
                result,
                stride,
                read,
                grad,
                padded,
                alpha,
                in_memory,
                n,
                tile.update,
                num_steps,
                decayed,
                decoupled,
                flag,
                config.block,
                aligned=are_aligned(result, alpha),
            )
        torch.autograd.graph.increment_version(result)
        return result

    return launch
