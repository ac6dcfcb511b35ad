"""Putting tensors of a direction on the parameters of a model, found by name or identity."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sharpkern.directions.names import NameTable
from sharpkern.directions.optimizer_state import check_parameter
from sharpkern.distributed.sharding import is_sharded, reshard


def checked_module(model: nn.Module) -> nn.Module:
    """Return ``model`` if it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; pass the module that is trained")
    return model


def placed(
    named: Iterable[tuple[str | nn.Parameter, Tensor]], model: nn.Module
) -> list[tuple[str, nn.Parameter, Tensor]]:
    """Find the parameter of each tensor."""
    reshard(checked_module(model))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    table = NameTable(parameters)
    found: dict[int, tuple[str, nn.Parameter, Tensor]] = {}
    for key, tensor in named:
        if isinstance(key, str):
            parameter, name = table.find(key), key
            if parameter is None:
                raise ValueError(
                    f"direction must name parameters of the model, got '{key}'; the closest it has: "
                    f"{table.close_to(key)}"
                )
        elif isinstance(key, nn.Parameter):
            if id(key) not in name_of:
                raise ValueError(
                    f"direction must be for the model's own parameters, got another of shape {list(key.shape)}; "
                    "take the keys from model.parameters()"
                )
            parameter, name = key, name_of[id(key)]
        else:
            raise TypeError(
                f"direction must be keyed by names or parameters, got {type(key).__name__}; "
                "take the keys from model.named_parameters()"
            )
        _, _, first = found.setdefault(id(parameter), (name, parameter, tensor))
        if first is not tensor and not torch.equal(first, tensor):
            raise ValueError(
                f"direction for '{name}' must be given once, got two different tensors for it and "
                f"'{found[id(parameter)][0]}', which share one parameter; pass their sum or one of them"
            )
    return list(found.values())


def check_fit(name: str, parameter: nn.Parameter, tensor: Tensor) -> None:
    """Refuse a tensor that a parameter cannot move by."""
    check_parameter(f"'{name}'", parameter)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(
            f"direction for '{name}' must be a real floating-point tensor, got {got}; "
            f"convert it with .to({parameter.dtype})"
        )
    if tensor.shape != parameter.shape:
        transposed = tensor.ndim == 2 and tensor.T.shape == parameter.shape
        raise ValueError(
            f"direction for '{name}' must have the parameter's shape {list(parameter.shape)}, got "
            f"{list(tensor.shape)}; {'pass it transposed' if transposed else 'check which parameter it is for'}"
        )
    if is_sharded(tensor) != is_sharded(parameter):
        raise ValueError(
            f"direction for '{name}' must be a DTensor where the parameter is one, got {type(tensor).__name__} for "
            f"{type(parameter).__name__}; use torch.distributed.tensor.distribute_tensor(tensor, "
            "parameter.device_mesh, parameter.placements), or its full_tensor()"
        )
    if tensor.device != parameter.device:
        raise ValueError(
            f"direction for '{name}' must be on the parameter's device {parameter.device}, got {tensor.device}; "
            "move it there with .to(parameter.device)"
        )
    if tensor.layout is not torch.strided:
        raise ValueError(f"direction for '{name}' must be dense, got {tensor.layout}; call .to_dense()")
