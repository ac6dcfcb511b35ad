"""The pairs (θ, Δθ) an engine works on, and the buffer that formed weights share."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from sharpkern import ops
from sharpkern.distributed.sharding import local
from sharpkern.ops.arithmetic import add_step
from sharpkern.ops.update import ParamUpdate, StoredUpdate
from sharpkern.tensors.storage import overlapping, storage_pointer


def stream_of(device: torch.device) -> int:
    """The stream that a device works on: a closure may use several at once, and what one made another must not read."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class Step:
    """A signed step α as the tensors that operations take: one per device and dtype, made once.

    Attributes:
        is_several: α stands for several step sizes, each of which gives a result of its own.
    """

    def __init__(self, alpha: float | Tensor) -> None:
        self._alpha = alpha
        self.is_several = isinstance(alpha, Tensor)
        self._tensors: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
        self._numbers: dict[torch.dtype, float] = {}

    def __bool__(self) -> bool:
        return self.is_several or bool(self._alpha != 0)

    def of(self, move: ParamUpdate) -> Tensor:
        """α as a move takes it, [1]."""
        return self.on(move.base.device, torch.float64 if move.wide == torch.float64 else torch.float32)

    def form(self, move: ParamUpdate, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """θ + αΔθ for this one α; the caller has gradients off."""
        if not self.is_several and is_plain_sum(move, dtype):
            # The way of `ops.form` without an operation's checks, of which small tensors take longer than of the sum.
            return add_step(move.base, move.delta, self.number(dtype), out)
        if out is not None and not self.is_several and move.wide == torch.float32:
            alpha = self.on(out.device)
            launch = _prepared(move, alpha, dtype, into=True)
            if launch is not None:
                return launch(alpha=alpha, out=out)
        return move.form(self.of(move), dtype=dtype, out=None if out is None else out.unsqueeze(0))[0]

    def number(self, dtype: torch.dtype) -> float:
        """α as an operation reads it off its tensor."""
        if dtype not in self._numbers:
            self._numbers[dtype] = self.on(torch.device("cpu"), dtype).item()
        return self._numbers[dtype]

    def on(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """α on a device, [1]."""
        key = (device, dtype, stream_of(device))
        if key not in self._tensors:
            if isinstance(self._alpha, Tensor):
                tensor = self._alpha.to(device, dtype).unsqueeze(0)
            else:
                tensor = torch.full((1,), self._alpha, dtype=dtype, device=device)
            self._tensors[key] = tensor
        return self._tensors[key]


def formed(move: ParamUpdate, alpha: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """θ + α_k Δθ, [K, *shape], as `ParamUpdate.form` gives it; ``out`` is contiguous."""
    if move.base.is_contiguous() and alpha.dtype == torch.float32:
        launch = _prepared(move, alpha, dtype, into=out is not None)
        if launch is not None:
            return launch(alpha=alpha, out=out)
    return move.form(alpha, dtype=dtype, out=out)


def _prepared(move: ParamUpdate, alpha: Tensor, dtype: torch.dtype, *, into: bool) -> Callable[..., Tensor] | None:
    """What launches θ + α_k Δθ, prepared for the first step sizes of that number, or None.

    Into memory that is given results follow each other more closely than in new memory.
    """
    device = move.base.device
    if not ops.has_kernels(device):
        return None
    key = (dtype, alpha.shape[0], into, stream_of(device))
    if key not in move.launches:
        move.launches[key] = move.prepared(alpha, dtype)
    return move.launches[key]


def is_plain_sum(move: ParamUpdate, dtype: torch.dtype) -> TypeGuard[StoredUpdate]:
    """Whether θ + αΔθ is one call of torch on the CPU: Δθ in memory, and one dtype, in which the sum is computed."""
    if not isinstance(move, StoredUpdate):
        return False
    base, delta = move.base, move.delta
    return (
        type(base) in (Tensor, nn.Parameter)
        and type(delta) is Tensor
        and base.device.type == delta.device.type == "cpu"
        and base.dtype == delta.dtype == dtype
        and dtype in (torch.float32, torch.float64)
    )


@dataclass(frozen=True, eq=False)
class TrackedParam:
    """A parameter, or a view of one, and how it moves.

    Attributes:
        weight: what the model holds, of a DTensor this rank's shard; recognised by identity.
        move: θ + αΔθ, from ``weight`` itself or from its full-precision master.
        owner: index of the parameter.
        parameter: the parameter itself.
        memory: ``owner`` of the first parameter that it shares memory with: its own, where it has that to itself.
    """

    weight: Tensor
    move: ParamUpdate
    owner: int
    parameter: Tensor
    memory: int

    def view(self, func: Callable[[Tensor], Tensor]) -> "TrackedParam":
        """The pair of a part: ``func`` is a view or a gather."""
        weight = func(self.weight)
        move = self.move.map(lambda tensor: weight if tensor is self.weight else func(tensor))
        return TrackedParam(weight, move, self.owner, self.parameter, self.memory)

    def rows(self, chosen: slice) -> "TrackedParam":
        """The pair of some rows."""
        return TrackedParam(self.weight[chosen], self.move.rows(chosen), self.owner, self.parameter, self.memory)

    def form(self, step: Step, *, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """θ + αΔθ in the weight's dtype, or in ``dtype``.

        Where autograd is on, the result belongs to the graph of the weight: a closure may differentiate by parameters.
        """
        dtype = dtype or self.weight.dtype
        if out is None and self.move.base.requires_grad and torch.is_grad_enabled():
            wide = self.move.wide
            alpha = step.on(self.move.base.device, wide).squeeze(0)
            return (self.move.base.to(wide) + alpha * self.move.update().to(wide)).to(dtype)
        if not step and out is None and ops.has_kernels(self.move.base.device):
            return self.move.base.detach().to(dtype, copy=True)
        if not torch.is_grad_enabled():
            return step.form(self.move, dtype=dtype, out=out)
        with torch.no_grad():
            return step.form(self.move, dtype=dtype, out=out)


def track(moves: Iterable[tuple[Tensor, ParamUpdate]]) -> list[TrackedParam]:
    """Pairs of the parameters that move."""
    moving = [(local(parameter), move, parameter) for parameter, move in moves]
    first = list(range(len(moving)))
    for group in overlapping([weight for weight, *_ in moving]):
        for index in group:
            first[index] = group[0]
    return [TrackedParam(weight, move, owner, p, first[owner]) for owner, (weight, move, p) in enumerate(moving)]


class Scratch:
    """One buffer per dtype, device and stream that formed weights take turns in; it grows to the largest of them.

    What was made in inference mode must not be written outside of it: it has buffers of its own.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device, int, bool], Tensor] = {}
        self._taken: dict[tuple[Any, ...], Tensor] = {}

    def take(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of the shape of ``like``, with its strides where they are dense; the contents are undefined."""
        key = (dtype, like.device, stream_of(like.device), torch.is_inference_mode_enabled())
        taken = self._taken.get((key, like.shape, like.stride()))
        if taken is None:
            taken = self._taken[key, like.shape, like.stride()] = self._take(like, key)
        return taken

    def _take(self, like: Tensor, key: tuple[torch.dtype, torch.device, int, bool]) -> Tensor:
        dtype = key[0]
        if key in self._buffers and self._buffers[key].numel() < like.numel():
            # The smaller buffer goes before the larger one comes.
            self._taken = {taken: view for taken, view in self._taken.items() if taken[0] != key}
            del self._buffers[key]
        if key not in self._buffers:
            self._buffers[key] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        flat = self._buffers[key][: like.numel()]
        dense = torch.empty_like(like, device="meta")
        return flat.as_strided(dense.size(), dense.stride())

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in one of the buffers."""
        pointer = storage_pointer(tensor)
        return any(pointer == storage_pointer(buffer) for buffer in self._buffers.values())
