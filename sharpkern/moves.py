"""How one parameter moves: θ + αΔθ, with Δθ in memory, or worked out of an optimizer's state wherever it is needed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sharpkern import ops
from sharpkern.reference import compute_dtype
from sharpkern.sums import slopes_and_norms

# Elements of Δθ that exist at a time while the sums over a step are taken.
_CHUNK = 1 << 24


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
        base: θ.
        state: gradient and state tensors as the formula takes them, None for those that are not there yet.
        numbers: hyperparameters of the formula by name.
    """

    formula: Callable[..., Tensor]
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
        """Return Δθᵀg and |Δθ|², [2] float64 on the device, g being the gradient as it is stored.

        Memory:
            64 MiB of Δθ at a time.
        """
        sums = [slopes_and_norms([part.update()], [part.operands[1]])[0] for part in self._parts()]
        return torch.stack(sums).sum(0) if sums else self.base.new_zeros(2, dtype=torch.float64)

    def _parts(self) -> Iterator["OptimizerStep"]:
        """Yield the move some rows at a time."""
        if self.base.numel() <= _CHUNK or self.base.dim() == 0:
            yield self
            return
        rows = max(1, _CHUNK // max(1, self.base[0].numel()))
        for first in range(0, len(self.base), rows):
            yield self.map(lambda tensor, first=first: tensor[first : first + rows])  # type: ignore[misc]
