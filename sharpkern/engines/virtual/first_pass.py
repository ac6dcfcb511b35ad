"""A mode that looks on in the first pass of a measurement: what it finds out holds for the others as well."""

from typing import Any

from torch import nn

from sharpkern.engines.evaluation.closure import Closure
from sharpkern.engines.virtual.mode import VirtualParameters

# In eval mode they compute in another way, with other roundings, where no mode looks on.
_TWO_WAYS = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


class FirstPass:
    """A context that is a mode without parameters in the first pass, and nothing in the others unless they need it.

    Passes start from the same state. The mode takes losses to float32 and notes the precision of products.

    Attributes:
        mode: what looks on.
    """

    def __init__(self, model: nn.Module, closure: Closure, *, may_repoint: bool = False) -> None:
        self.mode = VirtualParameters((), closure.precision, closure.guard, may_repoint=may_repoint)
        self._always = any(isinstance(module, _TWO_WAYS) and not module.training for module in model.modules())
        self._is_needed = True
        self._entered = False

    def __enter__(self) -> None:
        self._entered = self._is_needed
        if self._entered:
            self.mode.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        if self._entered:
            self.mode.__exit__(*exception)  # type: ignore[no-untyped-call]
        self._is_needed = self._always or self.mode.is_needed
