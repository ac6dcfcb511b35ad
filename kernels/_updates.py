"""The update of one tile that an optimizer's next step makes: what the kernels that form weights or sums from it share.

Each update reads its hyperparameters from device memory, in the order in which the function beside it returns them.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import load_tile
from ._operands import check_numbers


@triton.jit
def adam_update(
    theta,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    numbers,
    offsets,
    inside,
    DECAYED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return Δθ from tiles of θ and g and pointers to the moments.

    θ is None where no decay reads it. An absent moment is zero, an absent gradient is in the moments already.
    """
    lerp1 = tl.load(numbers)
    beta2 = tl.load(numbers + 1)
    lerp2 = tl.load(numbers + 2)
    inverse_correction1 = tl.load(numbers + 3)
    root_correction2 = tl.load(numbers + 4)
    eps = tl.load(numbers + 5)
    weight_decay = tl.load(numbers + 6)
    grad_factor = tl.load(numbers + 7)
    rate = tl.load(numbers + 8)

    if grad is not None:
        g = grad * grad_factor
        if DECAYED and not DECOUPLED:
            g = tl.fma(theta, weight_decay, g)
    if exp_avg is None:
        m = tl.zeros_like(g)
        v = tl.zeros_like(g)
    else:
        m = load_tile(exp_avg + offsets, inside, MASKED)
        v = load_tile(exp_avg_sq + offsets, inside, MASKED)
    if grad is not None:
        # As torch.lerp, from the nearer end: β₁ = 0 gives g itself.
        m = tl.where(lerp1 < 0.5, tl.fma(g - m, lerp1, m), g - (g - m) * (1.0 - lerp1))
        v = tl.fma(lerp2 * g, g, v * beta2)
    if max_exp_avg_sq is not None:
        v = tl.maximum(v, load_tile(max_exp_avg_sq + offsets, inside, MASKED), propagate_nan=tl.PropagateNan.ALL)
    update = tl.div_rn(m * inverse_correction1, tl.div_rn(tl.sqrt_rn(v), root_correction2) + eps)
    if DECAYED and DECOUPLED:
        update = tl.fma(theta, weight_decay, update)
    return update * rate


def adam_numbers(
    *,
    beta1: float,
    beta2: float,
    correction1: float,
    correction2: float,
    eps: float,
    weight_decay: float,
    grad_factor: float,
    rate: float,
) -> tuple[float, ...]:
    """Return the hyperparameters of `adam_update` in its order.

    Raises:
        TypeError: if one is no Python number.
        ValueError: if one is not finite, or a correction not positive.
    """
    check_numbers(correction1=correction1, correction2=correction2)
    for name, correction in (("correction1", correction1), ("correction2", correction2)):
        if correction <= 0:
            raise ValueError(f"{name} must be positive, got {correction}; count steps from 1")
    check_numbers(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, grad_factor=grad_factor, rate=rate)
    return 1 - beta1, beta2, 1 - beta2, 1 / correction1, correction2**0.5, eps, weight_decay, grad_factor, rate


def check_moments(grad: Tensor | None, exp_avg: Tensor | None, exp_avg_sq: Tensor | None) -> None:
    """Refuse a state of Adam from which no update follows.

    Raises:
        ValueError: if one moment, or everything, is missing.
    """
    if (exp_avg is None) != (exp_avg_sq is None) or (exp_avg is None and grad is None):
        raise ValueError(
            f"exp_avg and exp_avg_sq must both be given or, with a gradient, both be None, got {exp_avg is not None} "
            f"and {exp_avg_sq is not None} with gradient {grad is not None}; pass the optimizer's state"
        )


@triton.jit
def sgd_update(
    theta,
    grad,
    momentum_buffer,
    numbers,
    offsets,
    inside,
    DECAYED: tl.constexpr,
    NESTEROV: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return Δθ from tiles of θ and g and a pointer to the buffer; without one this is the first step.

    θ is None where no decay reads it.
    """
    weight_decay = tl.load(numbers)
    momentum = tl.load(numbers + 1)
    undamped = tl.load(numbers + 2)
    grad_factor = tl.load(numbers + 3)
    rate = tl.load(numbers + 4)

    u = grad * grad_factor
    if DECAYED:
        u = tl.fma(theta, weight_decay, u)
    update = u
    if momentum_buffer is not None:
        update = tl.fma(u, undamped, load_tile(momentum_buffer + offsets, inside, MASKED) * momentum)
    if NESTEROV:
        update = tl.fma(update, momentum, u)
    return update * rate


def sgd_numbers(
    *, weight_decay: float, momentum: float, dampening: float, grad_factor: float, rate: float
) -> tuple[float, ...]:
    """Return the hyperparameters of `sgd_update` in its order.

    Raises:
        TypeError: if one is no Python number.
        ValueError: if one is not finite.
    """
    check_numbers(weight_decay=weight_decay, momentum=momentum, dampening=dampening, grad_factor=grad_factor, rate=rate)
    return weight_decay, momentum, 1 - dampening, grad_factor, rate
