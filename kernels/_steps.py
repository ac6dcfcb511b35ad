"""What every kernel of optimizer steps shares: the update on a tile, the rule of a name, and what is accepted.

Δθ = r·(rule(fg, state) + γθ)

f undoes a loss scale or turns a gradient round, r is the group's share of the learning rate. L2 decay enters the rule's
gradient, f·g + γθ, and decoupled decay the update. The order of operations is that of torch's own step.
"""

import functools
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import triton
import triton.language as tl
from torch import Tensor

from ._accepts import check_floats, check_layout, check_numbers

# State tensors of a rule at most.
MAX_STATE = 3

# What the numbers of every rule begin with.
_SHARED = ("weight_decay", "grad_factor", "rate")


@triton.jit
def update_tile(
    w,
    g,
    first,
    second,
    third,
    numbers,
    offsets,
    inside,
    RULE: tl.constexpr,
    DECAYED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    FLAG: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return Δθ from tiles of θ and g and pointers to the state; θ is None where nothing reads it.

    Of the state there are as many tensors as the rule has, and None for the others: a tuple may not hold None here.
    """
    weight_decay = tl.load(numbers)
    grad_factor = tl.load(numbers + 1)
    rate = tl.load(numbers + 2)
    if g is not None:
        g = g * grad_factor
        if DECAYED and not DECOUPLED:
            g = tl.fma(w, weight_decay, g)
    update = RULE(g, first, second, third, numbers + 3, offsets, inside, FLAG, MASKED)
    if DECAYED and DECOUPLED:
        update = tl.fma(w, weight_decay, update)
    return update * rate


@functools.cache
def rule_of(name: str) -> ModuleType:
    """Return the file of a rule."""
    try:
        return import_module(f".rules.{name}", __package__)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"rule must be the name of a file of kernels/rules, got {name!r}; use another backend"
        ) from error


def check_step(
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
