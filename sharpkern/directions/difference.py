"""Δθ from two sets of weights, matched by identity or by name."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sharpkern.directions.names import NameTable
from sharpkern.directions.optimizer_state import check_parameter
from sharpkern.distributed.sharding import is_sharded, reshard

Weights = nn.Module | Mapping[str, Tensor] | Mapping[nn.Parameter, Tensor]


class Displacement(NamedTuple):
    """The displacement of one entry.

    Attributes:
        name: its name, or "" where it goes by its parameter only.
        parameter: the parameter it belongs to, or None where neither side holds it.
        tensor: (before − after)/lr, on the parameter's device.
    """

    name: str
    parameter: nn.Parameter | None
    tensor: Tensor


class _Side:
    """One set of weights: its floating-point entries, found by parameter or by name."""

    def __init__(self, role: str, weights: Weights) -> None:
        if not isinstance(weights, nn.Module | Mapping):
            raise TypeError(
                f"{role} must be a module or a mapping of names or parameters to tensors, got "
                f"{type(weights).__name__}; pass model.state_dict() with its tensors cloned"
            )
        self.role = role
        self.is_module = isinstance(weights, nn.Module)
        entries: Mapping[str | nn.Parameter, object] = weights  # type: ignore[assignment]
        if isinstance(weights, nn.Module):
            reshard(weights)
            # Buffers too, so that those in a state_dict on the other side find their match before they are dropped.
            entries = dict(weights.named_parameters(remove_duplicate=False))
            entries.update(weights.named_buffers(remove_duplicate=False))
        self.entries = {
            key: value
            for key, value in entries.items()
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        }
        if not self.entries:
            raise ValueError(
                f"{role} must hold floating-point tensors, got none; pass the weights themselves, "
                "not the checkpoint around them"
            )
        self._named = NameTable({key: value for key, value in self.entries.items() if isinstance(key, str)})
        self._owned = {
            id(parameter): value for key, value in self.entries.items() if (parameter := _owner(key, value)) is not None
        }

    def find(self, key: str | nn.Parameter, parameter: nn.Parameter | None) -> Tensor:
        """Return this side's value of an entry of the other side."""
        if parameter is not None and id(parameter) in self._owned:
            return self._owned[id(parameter)]
        if not isinstance(key, str):
            raise ValueError(
                f"{self.role} must hold the parameter of shape {list(key.shape)} that the other side has, got no such "
                "entry; key both sides by parameters, or both by names"
            )
        found = self._named.find(key)
        if found is None:
            raise ValueError(
                f"{self.role} must hold '{key}' like the other side, got no such name, only "
                f"{self._named.close_to(key)}; pass the same set of weights on both sides, keyed alike"
            )
        return found


def displacements(before: Weights, after: Weights, lr: float) -> list[Displacement]:
    """Return (before − after)/lr of every entry that both sides hold."""
    sides = _Side("before", before), _Side("after", after)
    leading, other = sides if not sides[0].is_module or sides[1].is_module else sides[::-1]
    found: dict[int | str, Displacement] = {}
    for key, value in leading.entries.items():
        matched = other.find(key, _owner(key, value))
        old, new = (value, matched) if leading is sides[0] else (matched, value)
        parameter = next((p for p in (_owner(key, old), _owner(key, new)) if p is not None), None)
        name = key if isinstance(key, str) else ""
        if id(parameter) not in found:
            moved = _difference(name, parameter, old.detach(), new.detach(), lr)
            if moved is not None:
                found[name if parameter is None else id(parameter)] = Displacement(name, parameter, moved)
    if not other.is_module:
        for key, value in other.entries.items():
            leading.find(key, _owner(key, value))
    owned = [one for one in found.values() if one.parameter is not None]
    return owned or list(found.values())


def _owner(key: str | nn.Parameter, value: Tensor) -> nn.Parameter | None:
    """Return the parameter of an entry, which its key or its value may be."""
    return next((one for one in (key, value) if isinstance(one, nn.Parameter)), None)


def _difference(name: str, parameter: nn.Parameter | None, before: Tensor, after: Tensor, lr: float) -> Tensor | None:
    """Return (before − after)/lr in the wider dtype of the two, or None for a complex buffer that did not move."""
    label = f"'{name}'" if name else "a parameter"
    if before.shape != after.shape:
        raise ValueError(
            f"{label} must have one shape before and after, got {list(before.shape)} and {list(after.shape)}; "
            "pass two states of the same model"
        )
    if parameter is None and before.is_complex() and torch.equal(before, after):
        return None
    check_parameter(label, before if parameter is None else parameter)
    if is_sharded(before) != is_sharded(after):
        raise ValueError(
            f"{label} must be a DTensor before and after or on neither side, got {type(before).__name__} and "
            f"{type(after).__name__}; take both from the sharded model, or both from full state_dicts"
        )
    device = before.device if parameter is None else parameter.device
    dtype = torch.promote_types(before.dtype, after.dtype)
    # Divided before it is rounded back to 16 bits, not after.
    wide = torch.promote_types(dtype, torch.float32)
    return before.to(device, wide, copy=True).sub_(after.to(device, wide)).div_(lr).to(dtype)
