"""Weights at one or several step sizes, or sums over Δθ, with Δθ worked out of an optimizer's state."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpkern.ops import validation
from sharpkern.ops.arithmetic import add_step, compute_dtype, empty_steps, output, row_chunks, step_sizes
from sharpkern.ops.reductions import inner_product
from sharpkern.ops.registry import Backend, operation
from sharpkern.ops.rules import RULES, Rule

# What the numbers of every rule begin with.
SHARED_NUMBERS = ("weight_decay", "grad_factor", "rate")


def _formed(
    rule: str,
    theta: Tensor,
    grad: Tensor | None,
    state: object,
    alpha: Tensor | None,
    numbers: object,
    dtype: torch.dtype | None = None,
    **_: object,
) -> Tensor:
    return empty_steps(theta, 1 if alpha is None else alpha.numel(), dtype or theta.dtype)


@operation("optimizer_steps", fake=_formed, stepped=(4,))
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
    backend: Backend = "auto",
) -> Tensor:
    """Return θ + α_k Δθ, Δθ the update that an optimizer's next step would make; nothing of its state is written.

    Args:
        rule: the optimizer's rule, a name in `sharpkern.ops.rules.RULES`.
        theta: the parameter or its master, any shape and floating dtype.
        grad: the gradient that the optimizer has not seen yet, the shape of ``theta``; None if the state holds it.
        state: tensors of that shape in the order of the rule's names; None for those that are not there (yet).
        alpha: signed steps, [K]; None for Δθ itself, K = 1.
        numbers: weight decay γ, the factor of the gradient before all else (one over the loss scale, negative to
            maximize), the factor of Δθ (the group's learning rate over that of the reference group), and those of the
            rule.
        decoupled: whether γ decays the weights directly, instead of entering the gradient.
        flag: the rule's own: nesterov of SGD, centered of RMSprop.
        dtype: of the result; that of ``theta`` by default. Ignored when ``out`` is given.
        out: written and returned if given, [K, *theta.shape]. With one step it may be an operand itself, by torch.
        backend: see `sharpkern.ops`.

    Returns:
        Tensor: [K, *theta.shape]. Where α_k = 0 slice k is θ, bit for bit, if the dtype is that of ``theta``.

    Raises:
        TypeError: if a dtype does not fit, or there is no gradient where the rule needs one.
        ValueError: if a shape or device does not fit, ``out`` overlaps itself or another operand, a number is not
            finite, there is no such rule, or a part of what it takes is missing.

    Memory:
        The result; with the torch backend a few chunks of at most 32 MiB.

    Determinism:
        Elementwise; the same bits on every run.
    """
    checked_rule(rule, theta, grad, state, numbers)
    num_steps = 1 if alpha is None else validation.check_alpha(alpha, theta.device)
    out = output(out, theta, num_steps, dtype, (theta, grad, *state, alpha))
    return _form_into(out, rule, theta, grad, state, alpha, numbers, decoupled, flag)


def _form_into(
    out: Tensor,
    rule: str,
    theta: Tensor,
    grad: Tensor | None,
    state: Sequence[Tensor | None],
    alpha: Tensor | None,
    numbers: Sequence[float],
    decoupled: bool,
    flag: bool,
) -> Tensor:
    """Write θ + α_k Δθ by torch, and return it; operands are checked before."""
    operands = (theta, grad, *state)
    for delta, (rows, *_), targets in _updates(RULES[rule], operands, numbers, decoupled, flag, out.unbind()):
        if alpha is None:
            targets[0].copy_(delta)
            continue
        for target, step in zip(targets, step_sizes(alpha), strict=True):
            target.copy_(add_step(rows.to(delta.dtype), delta, step))
    return out


@operation("whole_steps", mutates=("written",))
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
    backend: Backend = "auto",
) -> None:
    """Write θ + αΔθ of all parameters that take the same step: a launch or two on a GPU.

    Args:
        rule: as `form_step` takes it, and all that follows.
        written: outputs, tensor by tensor the shape of ``theta``, any floating dtype.
        theta: parameters or their masters, on one device.
        grad: gradients, tensor by tensor; None where the state holds them.
        state: the state tensors of the first parameter by the rule's names, then those of the second, and so on.
        alpha: one signed step, [1]; None for Δθ itself.
        numbers: those of all rules, and those of this one.
        decoupled: whether γ decays the weights directly.
        flag: the rule's own.
        backend: see `sharpkern.ops`.

    Raises:
        TypeError: what `form_step` raises.
        ValueError: what `form_step` raises, or if the lists do not belong together.

    Memory:
        On a GPU 64 bytes per tensor and 8 per 4 Ki elements (16 Ki in models above 4 M).

    Determinism:
        Elementwise; the same bits on every run, and those of `form_step`.
    """
    steps = list(_each(rule, theta, grad, state, numbers, written))
    if alpha is not None and theta and validation.check_alpha(alpha, theta[0].device) != 1:
        raise ValueError(f"alpha must hold one step size, got {alpha.numel()}; call once per step size")
    read = [tensor for tensor in (*theta, *grad, *state, alpha) if tensor is not None]
    validation.check_no_overlap({f"written[{index}]": target for index, target in enumerate(written)}, read)
    for (weight, gradient, own), target in zip(steps, written, strict=True):
        _form_into(target.unsqueeze(0), rule, weight, gradient, own, alpha, numbers, decoupled, flag)


@operation(
    "whole_steps",
    fake=lambda rule, theta, *_, **__: torch.empty(
        len(theta), 2, dtype=torch.float64, device=theta[0].device if theta else None
    ),
)
def sum_steps(
    rule: str,
    theta: Sequence[Tensor],
    grad: Sequence[Tensor],
    state: Sequence[Tensor | None],
    numbers: Sequence[float],
    *,
    decoupled: bool = False,
    flag: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Return Δθᵀg and |Δθ|² of all parameters that take the same step: a launch or two on a GPU, and one to add up.

    Args:
        rule: as `form_steps_` takes it, and all that follows.
        theta: read for its decay only.
        grad: g, tensor by tensor. It enters the update multiplied by its factor, and the sum as it is.
        state: the state tensors of the first parameter by the rule's names, then those of the second, and so on.
        numbers: those of all rules, and those of this one.
        decoupled: whether γ decays the weights directly.
        flag: the rule's own.
        backend: see `sharpkern.ops`.

    Returns:
        Tensor: [N, 2] float64 on the device, one row per tensor in this order.

    Raises:
        TypeError: what `step_sums` raises.
        ValueError: what `step_sums` raises, or if the lists do not belong together.

    Memory:
        On a GPU 64 bytes per tensor and 24 per 4 Ki elements (16 Ki in models above 4 M); with the torch backend see
        `step_sums`.

    Determinism:
        Fixed order of additions; the same bits on every run.
    """
    sums = [
        step_sums(rule, weight, gradient, own, numbers, decoupled=decoupled, flag=flag, backend="torch")
        for weight, gradient, own in _each(rule, theta, grad, state, numbers, theta)
    ]
    return torch.stack(sums) if sums else torch.zeros(0, 2, dtype=torch.float64)


def _each(
    rule: str,
    theta: Sequence[Tensor],
    grad: Sequence[Tensor | None],
    state: Sequence[Tensor | None],
    numbers: Sequence[float],
    written: Sequence[Tensor],
) -> Iterator[tuple[Tensor, Any, Sequence[Tensor | None]]]:
    """Yield θ, g and the state of each parameter, once they are known to belong together."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}; use a step on a copy for others")
    num_state = len(RULES[rule].state)
    if len({len(written), len(theta), len(grad)}) != 1 or len(state) != num_state * len(theta):
        raise ValueError(
            f"written, theta, grad and state must have one tensor, and {num_state} of the state, for each parameter, "
            f"got {len(written)}, {len(theta)}, {len(grad)} and {len(state)}; pass None for what is not there"
        )
    for index, (target, weight, gradient) in enumerate(zip(written, theta, grad, strict=True)):
        own = state[index * num_state : (index + 1) * num_state]
        checked_rule(rule, weight, gradient, own, numbers)
        validation.check_alike(theta=weight, written=target)
        validation.check_place("theta", weight, theta[0].device)
        yield weight, gradient, own


@operation("whole_steps", fake=lambda rule, theta, *_, **__: theta.new_empty(2, dtype=torch.float64))
def step_sums(
    rule: str,
    theta: Tensor,
    grad: Tensor | None,
    state: Sequence[Tensor | None],
    numbers: Sequence[float],
    *,
    decoupled: bool = False,
    flag: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Return Δθᵀg and |Δθ|², Δθ the update that an optimizer's next step would make: the state is read once.

    Args:
        rule: as `form_step` takes it, and all that follows.
        theta: read for its decay only.
        grad: g. It enters the update multiplied by its factor, and the sum as it is.
        state: by the rule's names.
        numbers: those of all rules, and those of this one.
        decoupled: whether γ decays the weights directly.
        flag: the rule's own.
        backend: see `sharpkern.ops`.

    Returns:
        Tensor: [2] float64 on the device, summed in float64 over Δθ in float32 or wider.

    Raises:
        TypeError: if a dtype does not fit, or there is no gradient.
        ValueError: what `form_step` raises.

    Memory:
        On a GPU at most 16 bytes per 8 Ki elements (2 Ki in tensors below 4 M); with the torch backend a few chunks of
        at most 32 MiB.

    Determinism:
        Fixed order of additions; the same bits on every run.
    """
    if grad is None:
        raise TypeError("grad must be a tensor, got None; the sums over a step are taken before it, with its gradient")
    found = checked_rule(rule, theta, grad, state, numbers)
    sums = [
        torch.stack([inner_product(delta, g), inner_product(delta, delta)])
        for delta, (_, g, *_), _ in _updates(found, (theta, grad, *state), numbers, decoupled, flag)
    ]
    return torch.stack(sums).sum(0)


def checked_rule(
    name: str, theta: Tensor, grad: Tensor | None, state: Sequence[Tensor | None], numbers: Sequence[float]
) -> Rule:
    """Return the rule, if the update of a parameter follows from what is given."""
    rule = RULES.get(name)
    if rule is None:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {name!r}; use a step on a copy for others")
    names = (*SHARED_NUMBERS, *rule.numbers)
    if len(state) != len(rule.state) or len(numbers) != len(names):
        raise ValueError(
            f"state and numbers must be {', '.join(rule.state)} and {', '.join(names)}, got {len(state)} and "
            f"{len(numbers)} of them; pass None for what is not there yet"
        )
    given = {part: tensor for part, tensor in zip(rule.state, state, strict=True) if tensor is not None}
    here = [part in given for part in rule.together]
    if here and (any(here) != all(here) or (not any(here) and grad is None)):
        raise ValueError(
            f"{' and '.join(rule.together)} must both be given or, with a gradient, both be None, got "
            f"{' and '.join(map(str, here))} with gradient {grad is not None}; pass the optimizer's state"
        )
    if grad is not None or not here:
        given = {"grad": grad, **given}  # type: ignore[dict-item]  # what is None is refused by its name
    validation.check_alike(theta=theta, **given)
    validation.check_numbers(names, numbers)
    return rule


def _updates(
    rule: Rule,
    operands: tuple[Tensor | None, ...],
    numbers: Sequence[float],
    decoupled: bool,
    flag: bool,
    outputs: Sequence[Tensor] = (),
) -> Iterator[tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]]:
    """Yield Δθ of some rows at a time in the widest dtype, and those rows of the operands that are there and outputs.

    Δθ may be the rows of an operand themselves.
    """
    given = [operand for operand in operands if operand is not None]
    wide = compute_dtype(*(operand.dtype for operand in given))
    for rows in row_chunks(*given, *outputs):
        parts = iter(part.to(wide) for part in rows[: len(given)])
        # By no name of its own: what was widened goes when the update is there.
        delta = update_of(
            rule,
            *(None if operand is None else next(parts) for operand in operands),
            numbers=numbers,
            decoupled=decoupled,
            flag=flag,
        )
        yield delta, rows[: len(given)], rows[len(given) :]


def update_of(
    rule: Rule,
    theta: Tensor | None,
    grad: Tensor | None,
    *state: Tensor | None,
    numbers: Sequence[float],
    decoupled: bool,
    flag: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Return Δθ of operands of one dtype; in ``out``, where one is given and the rule has a use for it."""
    assert theta is not None
    weight_decay, grad_factor, rate, *own = numbers
    if grad is not None:
        if grad_factor != 1:
            grad = grad * grad_factor
        if weight_decay != 0 and not decoupled:
            grad = grad.add(theta, alpha=weight_decay)
    decays = decoupled and weight_decay != 0
    delta = rule.update(grad, state, own, flag, torch.mul(theta, weight_decay, out=out) if decays else None)
    return delta * rate if rate != 1 else delta
