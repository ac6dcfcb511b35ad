"""How one parameter moves: θ + αΔθ, with Δθ in memory, or worked out of an optimizer's state wherever it is needed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sharpkern import ops
from sharpkern.ops import registry
from sharpkern.ops.arithmetic import compute_dtype
from sharpkern.ops.registry import Backend


class ParamUpdate(ABC):
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
    def map(self, change: Callable[[Tensor], Tensor]) -> "ParamUpdate":
        """Return the update of a part: ``change`` is a view or a gather, applied to every operand."""

    @abstractmethod
    def at(self, base: Tensor) -> "ParamUpdate":
        """Return the update from a copy of θ."""

    @abstractmethod
    def form(self, alpha: Tensor, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return θ + α_k Δθ, [K, *shape]; see `ops.form`."""

    @abstractmethod
    def update(self, backend: Backend = "auto") -> Tensor:
        """Return Δθ, which must not be written; see `ops` for who works it out."""

    @abstractmethod
    def prepared(self, alpha: Tensor, dtype: torch.dtype) -> Callable[..., Tensor] | None:
        """Return what launches `form` with any step ``alpha`` like this one into ``out``, or None; see `registry`."""

    @cached_property
    def wide(self) -> torch.dtype:
        """Precision in which θ + αΔθ is computed before it is rounded."""
        return compute_dtype(*(operand.dtype for operand in self.operands))

    def rows(self, chosen: slice) -> "ParamUpdate":
        """Return the update of some rows, the same one at every call: launches are prepared for it once."""
        if chosen == slice(0, len(self.base)):
            return self
        key = (chosen.start, chosen.stop)
        if key not in self._rows:
            self._rows[key] = self.map(lambda tensor: tensor[chosen])
        return self._rows[key]

    @cached_property
    def _rows(self) -> dict[tuple[int, int], "ParamUpdate"]:
        return {}

    @cached_property
    def launches(self) -> dict[Hashable, Callable[..., Tensor] | None]:
        """What `prepared` has returned, for who keeps it; by whatever it depends on."""
        return {}


@dataclass(frozen=True, eq=False)
class StoredUpdate(ParamUpdate):
    """An update whose Δθ is in memory.

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

    def map(self, change: Callable[[Tensor], Tensor]) -> "StoredUpdate":
        """Return the update of a part."""
        return StoredUpdate(change(self.base), change(self.delta))

    def at(self, base: Tensor) -> "StoredUpdate":
        """Return the update from a copy of θ."""
        return StoredUpdate(base, self.delta)

    def form(self, alpha: Tensor, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return θ + α_k Δθ, [K, *shape]."""
        return ops.form(self.base, self.delta, alpha, dtype=dtype, out=out)

    def prepared(self, alpha: Tensor, dtype: torch.dtype) -> Callable[..., Tensor] | None:
        """Return what launches `form`."""
        return registry.prepared("form", self.base, self.delta, alpha, dtype=dtype)

    def update(self, backend: Backend = "auto") -> Tensor:
        """Return Δθ itself."""
        return self.delta


@dataclass(frozen=True, eq=False)
class LazyUpdate(ParamUpdate):
    """The update that an optimizer's next step makes, as a formula of its state: no memory, true until that changes.

    Attributes:
        rule: name of the formula, in `sharpkern.ops.rules.RULES`.
        base: θ.
        grad: the gradient.
        state: state tensors by the rule's names, None for those that are not there yet.
        numbers: those of all rules and of this one, as `ops.form_step` takes them.
        decoupled: likewise.
        flag: likewise.
    """

    rule: str
    base: Tensor
    grad: Tensor
    state: tuple[Tensor | None, ...]
    numbers: tuple[float, ...]
    decoupled: bool = False
    flag: bool = False

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """θ, and what Δθ is or is worked out of."""
        return self.base, self.grad, *(tensor for tensor in self.state if tensor is not None)

    def map(self, change: Callable[[Tensor], Tensor]) -> "LazyUpdate":
        """Return the update of a part."""
        state = tuple(None if tensor is None else change(tensor) for tensor in self.state)
        return replace(self, base=change(self.base), grad=change(self.grad), state=state)

    def at(self, base: Tensor) -> "LazyUpdate":
        """Return the update from a copy of θ."""
        return replace(self, base=base)

    def form(
        self, alpha: Tensor | None, *, dtype: torch.dtype, out: Tensor | None = None, backend: Backend = "auto"
    ) -> Tensor:
        """Return θ + α_k Δθ, [K, *shape], or Δθ where there is no α."""
        return ops.form_step(
            self.rule,
            self.base,
            self.grad,
            self.state,
            alpha,
            self.numbers,
            decoupled=self.decoupled,
            flag=self.flag,
            dtype=dtype,
            out=out,
            backend=backend,
        )

    def prepared(self, alpha: Tensor, dtype: torch.dtype) -> Callable[..., Tensor] | None:
        """Return what launches `form`."""
        numbers, options = self.numbers, {"decoupled": self.decoupled, "flag": self.flag, "dtype": dtype}
        return registry.prepared("form_step", self.rule, self.base, self.grad, self.state, alpha, numbers, **options)

    def update(self, backend: Backend = "auto", dtype: torch.dtype | None = None) -> Tensor:
        """Return Δθ, a new tensor; by default in the widest dtype of parameter and state."""
        return self.form(None, dtype=dtype or self.dtype, backend=backend)[0]

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of parameter and state."""
        dtype = self.base.dtype
        for tensor in self.state:
            # The gradient is entered in the precision of parameter and state.
            dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
        return dtype

    def slope_and_norm(self) -> Tensor:
        """Return Δθᵀg and |Δθ|², [2] float64 on the device, g being the gradient as it is stored."""
        return ops.step_sums(
            self.rule, self.base, self.grad, self.state, self.numbers, decoupled=self.decoupled, flag=self.flag
        )
