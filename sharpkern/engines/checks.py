"""What has been found out about a model and a closure, so that it is found out once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn


@dataclass
class Checks:
    """Findings that hold for every measurement of one model by one closure's code.

    Attributes:
        repeatable: the closure gives the same loss twice at θ.
        base_agrees: a base loss that was handed in was the closure's, which draws no random numbers.
        agrees: engines whose loss was confirmed by the storage oracle.
        unsupported: why an engine cannot be used, by its name.
        num_measurements: measurements made so far.
    """

    repeatable: bool = False
    base_agrees: bool = False
    agrees: set[str] = field(default_factory=set)
    unsupported: dict[str, str] = field(default_factory=dict)
    num_measurements: int = 0


_known: WeakKeyDictionary[nn.Module, dict[Any, Checks]] = WeakKeyDictionary()


def checks_of(model: nn.Module, loss_fn: Callable[[], object]) -> Checks:
    """The findings about ``model`` and the code of ``loss_fn``; a new closure over the next batch has the same code."""
    function = getattr(loss_fn, "func", loss_fn)
    code = getattr(getattr(function, "__func__", function), "__code__", type(function))
    return _known.setdefault(model, {}).setdefault((code, model.training), Checks())
