"""The direction of a step that an optimizer has really taken, measured at the weights that the step started from."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.optim import Optimizer

from sharpkern._undo import Trace, alone, undone
from sharpkern.directions.direction import Direction
from sharpkern.directions.parts import BETWEEN, Optimizers, Place, check_steps, members_of, parts_of
from sharpkern.distributed.sharding import local
from sharpkern.errors import NoUpdateError, RetainedWarning, warn
from sharpkern.monitoring.lr_cap import is_called_from
from sharpkern.ops.reductions import to_host

# Root mean square of what rounding to the nearest adds to x, over eps·|x|, for x of any binary digits.
_ROUNDING = 0.21
_MOST_ROUNDING = 0.1


class AroundStep:
    """Measures around the steps of optimizers, for loops that let nobody in between gradient and step.

    A framework that hands ``optimizer.step`` a closure with forward pass, backward pass and clipping in it is such a
    loop. The weights θ are copied when the closure has run, just before the optimizer writes them. When it has, to θ′,
    Δθ = (θ − θ′)/lr is the direction, whatever the optimizer; θ is measured, and θ′ put back bit for bit. The hooks are
    those of every torch optimizer; ``step`` itself, parameters and ``.grad`` stay the objects that they are.

    The difference carries the rounding of the weights to their dtype, about 0.2·eps·|θ| beside |θ − θ′|: little of
    float32 weights, and all of 16-bit ones where a step moves them by less than their last place. From a tenth on a
    `RetainedWarning` tells of it, once.

    Args:
        optimizer: any torch optimizer that moves parameters of the model, or a container whose step takes those of
            several, or a list of those that each step once between one backward pass and the next, in any order. Δθ is
            then that of all, from the first one's step to the last one's.
        is_due: asked before each step whether it is to be measured.
        measure: called after a step that was due, and handed the function that makes its direction, as
            `sharpkern.Monitor` takes it. From the call of that function until ``measure`` returns or raises the
            parameters hold θ. It raises `NoUpdateError` where nothing moved, or not to finite weights, or where not all
            optimizers have stepped: ``measure`` is then called when the next step begins.
        before: called in every step instead, when its gradient is complete and the first optimizer is about to write
            the weights; nothing is copied and ``measure`` is not called.

    Raises:
        TypeError: if the optimizer's step runs no hooks, or is not one step from one gradient.

    Memory: a copy of the parameters, from just before the update until the end of the measurement, and then Δθ.

    Examples:
        >>> import torch, sharpkern
        >>> from sharpkern.integrations.around_step import AroundStep
        >>> _ = torch.manual_seed(0)
        >>> model, x, y = torch.nn.Linear(4, 1), torch.randn(8, 4), torch.randn(8, 1)
        >>> loss_fn = lambda: torch.nn.functional.mse_loss(model(x), y)
        >>> optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
        >>> monitor = sharpkern.Monitor(model, optimizer)
        >>> around = AroundStep(optimizer, lambda: True, lambda direction: monitor(loss_fn, direction=direction))
        >>> for step in range(3):
        ...     optimizer.zero_grad()
        ...     loss_fn().backward()
        ...     optimizer.step()
        >>> [record.measurement.status for record in monitor.history]
        ['converged', 'converged', 'converged']
    """

    def __init__(
        self,
        optimizer: Optimizers,
        is_due: Callable[[], bool],
        measure: Callable[[Callable[[], Direction]], object],
        before: Callable[[], object] | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._is_due = is_due
        self._measure = measure
        self._at_start = before
        self._step: FrameType | None = None
        self._round: _Round | None = None
        self._has_warned = False
        check_steps(parts_of(optimizer))
        self._hooked = list(_hooked(optimizer))
        self._handles = [
            handle
            for one in self._hooked
            for handle in (one.register_step_pre_hook(self._before), one.register_step_post_hook(self._after))
        ]

    def remove(self) -> None:
        """Take the hooks off the optimizers, and let go of what was kept."""
        for handle in self._handles:
            handle.remove()
        self._step = self._round = None

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        step = sys._getframe(1)
        if self._step is not None and is_called_from(step, self._step):
            # The step of a base class, which has the same hooks, and is a part of this one.
            return None
        if self._step is not None:
            # What a step that raised has left goes with it.
            self._round = None
        self._step = step
        current = self._round
        if current is None or not current.takes(optimizer):
            self._round = None
            if current is not None and current.start is not None:
                self._tell_broken(len(current.begun))
            is_due = self._at_start is not None or self._is_due()
            current = self._round = _Round(is_due, _versions(self._optimizer))
        current.begun.append(optimizer)
        if not current.is_due:
            return None
        # A fused step takes the loss scale out of the gradients by itself, at some time.
        current.is_scaled |= getattr(optimizer, "grad_scale", None) is not None
        itself, *others = args
        if not any(map(callable, (*others, *kwargs.values()))):
            self._begin(current)
            return None

        def noted(value: Any) -> Any:
            return self._noting(current, value) if callable(value) else value

        return (itself, *map(noted, others)), {name: noted(value) for name, value in kwargs.items()}

    def _noting(self, current: "_Round", closure: Callable[..., Any]) -> Callable[..., Any]:
        """The closure, after whose first call the weights are those that the steps start from."""

        def noting(*args: Any, **kwargs: Any) -> Any:
            if not current.is_begun and _versions(self._optimizer) != current.versions:
                # Told when the step is done: here it may have taken the weights elsewhere.
                current.moves_first = True
            result = closure(*args, **kwargs)
            self._begin(current)
            return result

        return noting

    def _begin(self, current: "_Round") -> None:
        if current.is_begun:
            return
        current.is_begun = True
        if self._at_start is None:
            current.start = _Start(self._optimizer)
        else:
            self._at_start()

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = self._round
        if sys._getframe(1) is not self._step or current is None:
            return
        self._step = None
        current.num_nodes = _num_nodes()
        if len(current.begun) < len(self._hooked):
            return
        self._round = None
        start = current.start
        if start is None:
            return
        if current.moves_first:
            raise TypeError(
                f"optimizer must call its closure at the weights that its step starts from, got "
                f"{type(current.begun[0]).__name__}, which moves them before; take the direction by hand: {BETWEEN}"
            )

        def go_back() -> Direction:
            direction = start.go_back(has_slope=not current.is_scaled)
            self._warn(start.rounding(direction))
            return direction

        with alone:
            trace = Trace()
            trace.add(start.return_)
            undone(lambda: self._measure(go_back), trace)

    def _tell_broken(self, num_stepped: int) -> None:
        def none() -> Direction:
            raise NoUpdateError(
                f"all {len(self._hooked)} optimizers must step once between one backward pass and the next, got "
                f"{num_stepped} that did; pass those that step together"
            )

        self._measure(none)

    def _warn(self, rounding: float) -> None:
        if rounding > _MOST_ROUNDING and not self._has_warned:
            self._has_warned = True
            warn(
                f"rounding to the weights' dtype is about {rounding:.2g} times what the step has moved them by, and so "
                "much is the direction off; train with float32 weights, or measure before the step with "
                "Direction.from_optimizer",
                RetainedWarning,
            )


@dataclass(eq=False)
class _Round:
    """One step of each optimizer, all from one gradient.

    Attributes:
        is_due: whether it is to be measured.
        versions: of the weights, when the first step was called.
        begun: the optimizers whose step was called.
        is_begun: whether the first of them had its gradient complete.
        start: where it starts, if it is measured.
        num_nodes: of autograd's graph, when the last step was done.
        is_scaled: whether gradients are multiplied by a loss scale.
        moves_first: whether weights moved before there was a gradient.
    """

    is_due: bool
    versions: list[int]
    begun: list[Optimizer] = field(default_factory=list)
    is_begun: bool = False
    start: "_Start | None" = None
    num_nodes: int = 0
    is_scaled: bool = False
    moves_first: bool = False

    def takes(self, optimizer: Optimizer) -> bool:
        """Whether a step belongs to it: the first of its optimizer, and of the gradient that the others had."""
        if any(one is optimizer for one in self.begun):
            return False
        # A forward pass since then may be of the next step, or only of what is logged: the gradients tell.
        return _num_nodes() == self.num_nodes or (self.start is not None and self.start.has_gradients_of(optimizer))


class _Start:
    """Where a step starts: the weights, the learning rate, and which gradients there are."""

    @torch.no_grad()
    def __init__(self, optimizer: Optimizers) -> None:
        places = _places(optimizer)
        parameters = [place.parameter for place in places]
        # Θ at first; once it was exchanged with the parameters, θ′.
        self._values: dict[nn.Parameter, Tensor] = {
            parameter: parameter.detach().clone()
            for parameter in parameters
            if parameter.requires_grad or parameter.grad is not None
        }
        self._num_exchanged = 0
        self._halfway: tuple[nn.Parameter, Tensor] | None = None
        rates = [place.lr() for place in places if place.parameter.grad is not None]
        self._lr = next((lr for lr in rates if lr > 0), None)
        self._climbing = {place.parameter for place in places if place.climbs}
        self._gradients = {p: (p.grad, p.grad._version) for p in parameters if p.grad is not None}

    def has_gradients_of(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer's gradients are what they were."""
        return all(self._is_same(place.parameter) for place in _places(optimizer))

    def _is_same(self, parameter: nn.Parameter) -> bool:
        gradient, version = self._gradients.get(parameter, (None, 0))
        return parameter.grad is gradient and (gradient is None or gradient._version == version)

    @torch.no_grad()
    def go_back(self, *, has_slope: bool) -> Direction:
        """Return the direction of the steps that were taken, and make the parameters θ."""
        if self._lr is None:
            raise NoUpdateError(
                "the step must have a gradient and a positive learning rate in one group, got none; measure when the "
                "schedule has started, and check that the loss depends on the optimizer's parameters"
            )
        after = {parameter: parameter.detach() for parameter in self._values}
        try:
            direction = Direction.between(self._values, after, self._lr)
        except NoUpdateError:
            # A run that overflows goes on, and so does what looks on.
            if any(not torch.equal(local(value), local(after[p])) for p, value in self._values.items()):
                raise
            raise NoUpdateError(
                "the step must move some parameter, got the same weights before and after it; check the gradients"
            ) from None
        direction = dataclasses.replace(direction, slope=self._slope(direction) if has_slope else None)
        for parameter, value in self._values.items():
            self._halfway = parameter, parameter.detach().clone()
            _write(parameter, value)
            value.copy_(self._halfway[1])
            self._num_exchanged += 1
        self._halfway = None
        return direction

    @torch.no_grad()
    def return_(self) -> None:
        """Make the parameters θ′ again, however far `go_back` has come. May be called again after an interrupt."""
        # In the opposite order: parameters may share memory, and the first of them has noted what all of it was.
        if self._halfway is not None:
            _write(*self._halfway)
        for parameter, value in reversed(list(islice(self._values.items(), self._num_exchanged))):
            _write(parameter, value)

    @torch.no_grad()
    def rounding(self, direction: Direction) -> float:
        """About how large the rounding of this rank's weights is beside what they were moved by."""
        assert direction.lr is not None
        pairs = list(zip(direction.parameters, direction.tensors, strict=True))
        norms = to_host([_norm(tensor) for p, delta in pairs for tensor in (local(p), delta)])
        rounded = math.hypot(*(torch.finfo(p.dtype).eps * norm for (p, _), norm in zip(pairs, norms[::2], strict=True)))
        moved = direction.lr * math.hypot(*norms[1::2])
        # What moved may all be on other ranks.
        return _ROUNDING * rounded / moved if moved > 0 else 0.0

    def _slope(self, direction: Direction) -> float | None:
        """Δθᵀg, g being the gradient of what falls.

        None where the gradients are no longer what they were or all zero, or not everything that moved has one.
        """
        gradients = {parameter: gradient for parameter, (gradient, _) in self._gradients.items()}
        # Some optimizers use them as their scratch paper.
        written = any(gradient._version != version for gradient, version in self._gradients.values())
        sparse = any(gradient.layout is not torch.strided for gradient in gradients.values())
        if written or sparse or any(p not in gradients for p, _ in direction.moves()):
            return None
        climbs = {p in self._climbing for p, _ in direction.moves()}
        if len(climbs) > 1:
            return None
        slope = direction.slope_of(gradients) * (-1 if climbs == {True} else 1)
        return slope if math.isfinite(slope) and slope != 0 else None


def _hooked(optimizers: Any) -> Iterator[Optimizer]:
    """Yield the optimizers whose hooks run at the steps: of a container that has them its own."""
    if isinstance(optimizers, Optimizer) and getattr(type(optimizers).step, "hooked", False):
        yield optimizers
        return
    members = members_of(optimizers)
    if members is None:
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer whose step runs its hooks, got {type(optimizers).__name__}; "
            f"take the direction by hand: {BETWEEN}"
        )
    for member in members:
        yield from _hooked(member)


def _num_nodes() -> int:
    """Return how many nodes autograd has made in this thread: it grows with every forward pass that has gradients."""
    return torch._C._autograd._get_sequence_nr()


def _places(optimizer: Optimizers) -> list[Place]:
    return [place for part in parts_of(optimizer) for place in part.places()]


def _versions(optimizer: Optimizers) -> list[int]:
    return [place.parameter._version for place in _places(optimizer)]


def _write(parameter: Tensor, value: Tensor) -> None:
    # What the step has left in it is put back: autograd has nothing to complain of afterwards.
    with _unsafe_preserve_version_counter(parameter):
        parameter.copy_(value)


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
    return norm
