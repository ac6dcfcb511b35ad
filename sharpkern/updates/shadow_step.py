"""The update of any optimizer, with no formula for it: one step on a copy of everything that it holds."""

import contextlib
import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from sharpkern.randomness import note_streams
from sharpkern.updates.slots import Slot


def shadow_step(optimizer: torch.optim.Optimizer, slots: Sequence[Slot]) -> list[Tensor]:
    """Return θ − θ′ of every parameter, θ′ being what the next step would make of it.

    The optimizer is copied with its state, its parameters replaced by stand-ins, and the step of its class runs on the
    copy. Hooks stay behind, and so does a ``step`` patched onto the instance, as learning-rate schedulers do. In 16
    bits θ − θ′ would be lost to rounding: such parameters, their gradients and state are widened to float32.

    Args:
        optimizer: the optimizer, left as it is.
        slots: its parameters.

    Returns:
        One new tensor for each slot: its shape and device, in the dtype of the master or of the stand-in. In float32
        the difference carries a relative error of about 1e-7·|θ|/|θ − θ′|.

    Raises:
        TypeError: if the step needs a closure, or cannot run on a copy.

    Memory:
        A copy of parameters, gradients and state, and what the step itself allocates; of these the result, one tensor
        per parameter, is kept.

    Determinism:
        Random numbers are those that the real step will draw, and the streams are put back.
    """
    kind = type(optimizer)
    parameters = list(inspect.signature(kind.step).parameters.values())[1:]
    if any(p.default is p.empty and p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD} for p in parameters):
        raise TypeError(
            f"optimizer must step without a closure, got {kind.__name__}, whose step needs one; "
            "take the direction around a real step with Direction.between(before, after, lr)"
        )
    try:
        stand_ins = [_stand_in(slot) for slot in slots]
        shadow = _copy_of(optimizer, slots, stand_ins)
        with _random_streams_kept(stand_ins), _global_step_hooks_off(), torch.no_grad():
            kind.step(shadow)
            return [
                # Into the stand-in's own memory, which nothing else needs any more.
                after.detach().neg_().add_(slot.theta)
                for slot, after in zip(slots, _after(shadow, stand_ins), strict=True)
            ]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise TypeError(
            f"optimizer must be able to step on a copy of itself, got {kind.__name__}, which fails with "
            f"{type(error).__name__}: {error}; take the direction around a real step with "
            "Direction.between(before, after, lr)"
        ) from error


def _stand_in(slot: Slot) -> nn.Parameter:
    """Return a parameter of the same value and gradient that the step may write."""
    theta = slot.theta
    dtype = torch.promote_types(theta.dtype, torch.float32)
    stand_in = nn.Parameter(theta.to(dtype, copy=True), requires_grad=slot.held.requires_grad)
    if slot.held.grad is not None:
        stand_in.grad = slot.gradient().to(dtype, copy=True)
    return stand_in


def _copy_of(
    optimizer: torch.optim.Optimizer, slots: Sequence[Slot], stand_ins: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return a copy of the optimizer that holds the stand-ins wherever the optimizer holds its parameters."""
    shadow: torch.optim.Optimizer = object.__new__(type(optimizer))
    memo: dict[int, Any] = {id(optimizer): shadow}
    memo.update({id(slot.held): stand_in for slot, stand_in in zip(slots, stand_ins, strict=True)})
    for slot, stand_in in zip(slots, stand_ins, strict=True):
        # Marks that some optimizers read, such as muP's shapes.
        stand_in.__dict__.update(copy.deepcopy(slot.held.__dict__, memo))
    # The gradients' scale is already gone from the stand-ins.
    left_behind = {"step", "grad_scale", "found_inf"}
    for name, value in optimizer.__dict__.items():
        if name.endswith("_hooks"):
            shadow.__dict__[name] = OrderedDict()
        elif name not in left_behind:
            shadow.__dict__[name] = copy.deepcopy(value, memo)
    for slot, stand_in in zip(slots, stand_ins, strict=True):
        if stand_in.dtype != slot.held.dtype and stand_in in shadow.state:
            _widen(shadow.state[stand_in], slot.held.dtype, stand_in.dtype)
    return shadow


def _widen(state: dict[str, Any], narrow: torch.dtype, wide: torch.dtype) -> None:
    """Cast the state tensors of the parameter's own dtype to that of its stand-in."""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dtype is narrow:
            state[name] = value.to(wide)


def _after(shadow: torch.optim.Optimizer, stand_ins: Sequence[nn.Parameter]) -> Iterator[Tensor]:
    """Yield what the step left in the master copy that the optimizer keeps, or else in the stand-in."""
    for stand_in in stand_ins:
        yield shadow.state.get(stand_in, {}).get("master_param", stand_in)


@contextlib.contextmanager
def _random_streams_kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put the streams of Python, NumPy and torch back to where they were."""
    with contextlib.ExitStack() as streams:
        for undo in note_streams(tensor.device for tensor in tensors):
            streams.callback(undo)
        yield


@contextlib.contextmanager
def _global_step_hooks_off() -> Iterator[None]:
    """Keep the step hooks registered for all optimizers from running on the copy."""
    registries: tuple[MutableMapping[int, Any], ...] = (
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    kept = [dict(registry) for registry in registries]
    for registry in registries:
        registry.clear()
    try:
        yield
    finally:
        for registry, hooks in zip(registries, kept, strict=True):
            registry.update(hooks)
