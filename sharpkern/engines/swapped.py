"""The engine that swaps memory: parameters hold θ − ηΔθ in memory of its own during a pass, and θ is only read.

A mode looks on in the first pass alone, so that small models are not slowed down by it, and forming all weights takes
one call per tensor.
Tensors made before that share memory with a parameter go on reading θ: `may_swap` refuses those in sight, and the
storage oracle finds the others.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sharpkern.engines.evaluation.closure import Closure
from sharpkern.engines.evaluation.compiled import Eagerly
from sharpkern.engines.evaluation.guard import Guard
from sharpkern.engines.tracked import Step, TrackedParam, is_plain_sum
from sharpkern.engines.virtual.audit import oracle_loss
from sharpkern.engines.virtual.first_pass import FirstPass
from sharpkern.tensors.storage import overlapping, overlaps_itself


class Memory:
    """Memory for θ + αΔθ of every parameter that moves; engines of several closures may take turns in it."""

    def __init__(self, pairs: Sequence[TrackedParam]) -> None:
        self._pairs = pairs
        self._thetas = [pair.weight.detach() for pair in pairs]
        self._formed = [torch.empty_like(theta) for theta in self._thetas]
        # The step that they were formed for.
        self._formed_for: float | None = None
        self._versions: list[int] = []
        self._moves = [pair.move.at(theta) for pair, theta in zip(pairs, self._thetas, strict=True)]
        # What small models take longer to ask for each of their tensors than to add them.
        self._sums = [
            move if is_plain_sum(move, formed.dtype) else None
            for move, formed in zip(self._moves, self._formed, strict=True)
        ]

    def swap(self, alpha: float) -> None:
        """Give every parameter memory that holds θ + αΔθ."""
        step, is_new = Step(alpha), alpha != self._formed_for
        self._formed_for = None
        with torch.no_grad():
            for pair, move, plain, formed in zip(self._pairs, self._moves, self._sums, self._formed, strict=True):
                if is_new and plain is not None:
                    torch.add(plain.base, plain.delta, alpha=step.number(formed.dtype), out=formed)
                elif is_new:
                    step.form(move, dtype=formed.dtype, out=formed)
                pair.weight.data = formed
        self._formed_for, self._versions = alpha, [pair.weight._version for pair in self._pairs]
        # An enclosing autocast may hold casts of the former weights.
        torch.clear_autocast_cache()

    def swap_back(self) -> None:
        """Give every parameter its own memory again, between passes."""
        if self._versions != [pair.weight._version for pair in self._pairs]:
            # A closure has written what was formed, as an embedding with max_norm does.
            self._formed_for = None
        for pair, theta in zip(self._pairs, self._thetas, strict=True):
            pair.weight.data = theta
        torch.clear_autocast_cache()


class SwappedEngine:
    """Evaluates losses at θ − ηΔθ by giving parameters other memory for the length of a pass.

    Attributes:
        memory: that the parameters are given.
    """

    name = "swapped"
    writes = False

    def __init__(
        self, model: nn.Module, pairs: Sequence[TrackedParam], closure: Closure, memory: Memory | None = None
    ) -> None:
        self._pairs = pairs
        self._closure = closure
        self._watch = FirstPass(model, closure)
        self.memory = memory or Memory(pairs)

    @property
    def rounded(self) -> set[int]:
        """Indices of the pairs whose θ + αΔθ is rounded to the weight's dtype: all of them."""
        return {pair.owner for pair in self._pairs}

    def losses(self, step_sizes: Sequence[float]) -> list[float]:
        """Losses at θ − ηΔθ for each step size η."""
        return [self._loss(eta) for eta in step_sizes]

    def oracle_loss(self, eta: float) -> float:
        """The loss at θ − ηΔθ by the storage oracle."""
        return oracle_loss(self._pairs, self._closure, eta)

    def close(self) -> None:
        """Give every parameter its own memory again. May be called again after an interrupt."""
        self._watch.mode.ended = True
        self.memory.swap_back()

    def _loss(self, eta: float) -> float:
        modes: list[Any] = [_Swapped(self.memory, -eta)] if eta else []
        return self._closure(Eagerly(*modes, self._watch))


class _Swapped:
    """The context of a pass with other weights."""

    def __init__(self, memory: Memory, alpha: float) -> None:
        self._memory, self._alpha = memory, alpha

    def __enter__(self) -> None:
        self._memory.swap(self._alpha)

    def __exit__(self, *exception: Any) -> None:
        self._memory.swap_back()


def may_swap(model: nn.Module, pairs: Sequence[TrackedParam], guard: Guard) -> bool:
    """Whether each parameter that moves has memory to itself, and nothing in sight keeps the address of it."""
    if (
        torch.is_inference_mode_enabled()
        or guard.aliases
        or any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    ):
        return False
    everything = {id(p): p for p in (*guard.parameters, *(pair.weight for pair in pairs))}
    return all(map(_is_plain, pairs)) and not overlapping(list(everything.values()))


def _is_plain(pair: TrackedParam) -> bool:
    """Whether nothing is to be had by other engines: in 16 bits they keep more of a step, or need no memory."""
    weight = pair.weight
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.dtype in (torch.float32, torch.float64)
        and pair.move.base is weight is pair.parameter
        # CUDA graphs hold addresses.
        and weight.device.type == "cpu"
        and weight.layout is torch.strided
        and not weight.is_inference()
        and not overlaps_itself(weight)
    )
