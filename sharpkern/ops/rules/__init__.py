"""The next step of an optimizer as a formula of its state: one file per rule, its tile in kernels/rules/.

Each follows the order of operations of the optimizer's own step, so that θ − ηΔθ is what the step writes: bit for bit,
or up to a few units in the last place where the optimizer divides after the learning rate has entered. What all rules
share is in `sharpkern.ops.optimizer_steps`: loss scale, decay, rate.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Reading(NamedTuple):
    """What a rule needs of one parameter of an optimizer.

    Attributes:
        state: tensors in the order of `Rule.state`, None for those that are not there yet or play no part.
        numbers: in the order of `Rule.numbers`.
        weight_decay: γ.
        decoupled: whether γ decays the weights directly, instead of entering the gradient.
        flag: the rule's own.
    """

    state: tuple[Tensor | None, ...]
    numbers: tuple[float, ...]
    weight_decay: float = 0.0
    decoupled: bool = False
    flag: bool = False


@dataclass(frozen=True)
class Rule:
    """One optimizer's update per unit learning rate.

    Attributes:
        name: of the file.
        optimizers: full names of the classes whose step it is; a subclass may do anything in its step.
        state: names of the state tensors that it reads.
        numbers: names of the numbers that it takes beside those that all rules share.
        read: takes the optimizer, a group, the state of a parameter of it, or an empty mapping before the first step,
            and how many steps that has taken.
        update: takes the gradient, scaled and with L2 decay, the state, the numbers and the flag, none of which it
            writes, and a tensor that the update is to be added to, which it may write; or None.
        together: names of the state that is there as a whole or not at all; where it is, there may be no gradient.
        covers: whether an optimizer of one of the classes is set up as the rule has it.
    """

    name: str
    optimizers: tuple[str, ...]
    state: tuple[str, ...]
    numbers: tuple[str, ...]
    read: Callable[[Any, Mapping[str, Any], Mapping[str, Any], float], Reading]
    update: Callable[[Tensor | None, Sequence[Tensor | None], Sequence[float], bool, Tensor | None], Tensor]
    together: tuple[str, ...] = ()
    covers: Callable[[Any], bool] = lambda _: True


RULES: dict[str, Rule] = {}
"""By name; filled by the files beside this one, which `sharpkern.ops` imports."""


def rule_of(optimizer: torch.optim.Optimizer) -> Rule | None:
    """Return the rule that an optimizer's step follows exactly, None where no rule is known to."""
    kind = type(optimizer)
    full_name = f"{kind.__module__}.{kind.__qualname__}"
    return next((rule for rule in RULES.values() if full_name in rule.optimizers and rule.covers(optimizer)), None)
