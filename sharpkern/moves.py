"""How one parameter moves: θ + αΔθ, with Δθ in memory, or worked out of an optimizer's state wherever it is needed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sharpkern import ops
from sharpkern.reference import compute_dtype


class Move(ABC):
    """θ + αΔθ for any α. Every operand has the shape of θ, and the formula is elementwise.

    Attributes:
        base: θ: the parameter, or the full-precision copy that it is the rounding of.
    """

    base: Tensor

    @property
    @abstractmethod
    def operands(self) -> tuple[Tensor, ...]:
        """Every tensor that is read, ``base`` first."""

    @abstractmethod
    def map(self, change: Callable[[Tensor], Tensor]) -> "Move":
        """Return the move of a part: ``change`` is a view or a gather, applied to every operand."""

    @abstractmethod
    def at(self, base: Tensor) -> "Move":
        """Return the move from a copy of θ."""

    @abstractmethod
    def form(self, alpha: Tensor, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return θ + α_k Δθ, [K, *shape]; see `ops.form`."""

    @abstractmethod
    def update(self) -> Tensor:
        """Return Δθ, which must not be written."""

    @property
    def wide(self) -> torch.dtype:
        """Precision in which θ + αΔθ is computed before it is rounded."""
        return compute_dtype(*(operand.dtype for operand in self.operands))


@dataclass(frozen=True, eq=False)
class Stored(Move):
    """A move whose Δθ is in memory.

    Attributes:
        base: θ.
        delta: Δθ.
    """

    base: Tensor
    delta: Tensor

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """θ, and what Δθ is or is worked out of."""
        return self.base, self.delta

    def map(self, change: Callable[[Tensor], Tensor]) -> "Stored":
        """Return the move of a part."""
        return Stored(change(self.base), change(self.delta))

    def at(self, base: Tensor) -> "Stored":
        """Return the move from a copy of θ."""
        return Stored(base, self.delta)

    def form(self, alpha: Tensor, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return θ + α_k Δθ, [K, *shape]."""
        return ops.form(self.base, self.delta, alpha, dtype=dtype, out=out)

    def update(self) -> Tensor:
        """Return Δθ itself."""
        return self.delta


@dataclass(frozen=True, eq=False)
class OptimizerStep(Move):
    """The move that an optimizer's next step makes, as a formula of its state: no memory, and true until it changes.

    Attributes:
        formula: forms θ + α_k Δθ, or Δθ where α is None, from the state and the numbers.
        sums: Δθᵀg and |Δθ|², [2] float64, from the same.
        base: θ.
        state: gradient and state tensors as both take them, None for those that are not there yet.
        numbers: hyperparameters of both by name.
    """

    formula: Callable[..., Tensor]
    sums: Callable[..., Tensor]
    base: Tensor
    state: tuple[Tensor | None, ...]
    numbers: Mapping[str, float | bool]

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """θ, and what Δθ is or is worked out of."""
        return self.base, *(tensor for tensor in self.state if tensor is not None)

    def map(self, change: Callable[[Tensor], Tensor]) -> "OptimizerStep":
        """Return the move of a part."""
        state = tuple(None if tensor is None else change(tensor) for tensor in self.state)
        return replace(self, base=change(self.base), state=state)

    def at(self, base: Tensor) -> "OptimizerStep":
        """Return the move from a copy of θ."""
        return replace(self, base=base)

    def form(self, alpha: Tensor, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return θ + α_k Δθ, [K, *shape]."""
        return self.formula(self.base, *self.state, alpha, dtype=dtype, out=out, **self.numbers)

    def update(self) -> Tensor:
        """Return Δθ, a new tensor in the widest dtype of parameter and state."""
        dtype = self.base.dtype
        for tensor in self.state[1:]:
            # The gradient is entered in the precision of parameter and state.
            dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
        return self.formula(self.base, *self.state, None, dtype=dtype, **self.numbers)[0]

    def slope_and_norm(self) -> Tensor:
        """Return Δθᵀg and |Δθ|², [2] float64 on the device, g being the gradient as it is stored."""
        return self.sums(self.base, *self.state, **self.numbers)
