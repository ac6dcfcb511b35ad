"""How an operation is registered with torch, and which backend runs it."""

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sharpkern import reference
from sharpkern.errors import KernelWarning, warn

Backend = Literal["auto", "triton", "torch"]
BACKENDS = ("auto", "triton", "torch")

# Takes the place of "auto" where it is set: a way out of a broken Triton installation.
VARIABLE = "SHARPKERN_BACKEND"

# Kernels are checked with this Triton and newer ones.
OLDEST_TRITON = (3, 6)

_LIBRARY = torch.library.Library("sharpkern", "DEF")


def has_kernels(device: torch.device) -> bool:
    """Whether kernels are made for a device: CUDA, and HIP, which torch calls by the same name."""
    return device.type == "cuda"


def define(
    schema: str, kernel: str, fake: Callable[..., Tensor | None] = lambda *_, **__: None, stepped: Sequence[int] = ()
) -> None:
    """Register an operation with torch.

    Args:
        schema: as torch.library takes it, ``backend`` left out.
        kernel: file of kernels/ whose launcher has the operation's name; `reference` has a function of that name too.
        fake: allocates the result, without values.
        stepped: positions of the arguments that have K step sizes in front, if torch.func.vmap may batch those.
    """
    arguments, result = schema.rsplit(") -> ", 1)
    keywords = "" if "*" in arguments else ", *"
    full_name = arguments.split("(", 1)[0]
    name = full_name.split(".")[0]
    _LIBRARY.define(f"{arguments}{keywords}, str backend='auto') -> {result}")
    _LIBRARY.impl(full_name, _implementation(name, kernel, returns=result != "()"), "CompositeExplicitAutograd")
    # No operation is differentiable: results of parameters belong to no graph, instead of to one that cannot be walked.
    _LIBRARY.impl(full_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"sharpkern::{full_name}", _on_one_device(fake), lib=_LIBRARY)
    if stepped:
        operation = getattr(torch.ops.sharpkern, name)
        torch.library.register_vmap(f"sharpkern::{full_name}", _vmap_rule(operation, stepped), lib=_LIBRARY)


def _implementation(name: str, kernel: str, *, returns: bool) -> Callable[..., Tensor | None]:
    in_torch = getattr(reference, name)

    @torch.no_grad()
    def run(*operands: Any, backend: str = "auto", **options: Any) -> Tensor | None:
        chosen = os.environ.get(VARIABLE) or "auto" if backend == "auto" else backend
        if chosen not in BACKENDS:
            source = "backend" if backend != "auto" else VARIABLE
            raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {chosen!r}; leave it out for auto")
        device = _device_of(operands)
        on_kernels = device is not None and has_kernels(device)
        if chosen == "triton" and backend == "auto" and not on_kernels:
            raise ValueError(f"{VARIABLE}=triton needs tensors on a GPU, got {name} on {device}; unset it")
        result = None
        if chosen == "triton":
            result = _launcher(name, kernel)(*operands, **options)
        elif chosen == "torch" or not on_kernels or not _kernels_work(device):
            result = in_torch(*operands, **options)
        else:
            try:
                result = _launcher(name, kernel)(*operands, **options)
            except (TypeError, ValueError) as error:
                if not _is_refusal(error):
                    raise
                result = in_torch(*operands, **options)
        return result if returns else None

    return run


def _on_one_device(fake: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """The fake of operands that share a device: torch takes it for real ones too where one of them is on meta."""

    def run(*operands: Any, **options: Any) -> Tensor | None:
        leaves = tree_leaves((operands, options))
        devices = dict.fromkeys(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        if len(devices) > 1:
            raise ValueError(
                f"all operands must be on one device, got {', '.join(map(str, devices))}; move them to one device"
            )
        return fake(*operands, **options)

    return run


def _launcher(name: str, kernel: str) -> Callable[..., Tensor | None]:
    try:
        module = importlib.import_module(f"sharpkern.kernels.{kernel}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"backend='triton' needs {error.name}, which is not installed; install it, or leave backend out"
        ) from error
    launcher: Callable[..., Tensor | None] = getattr(module, name)
    return launcher


def _device_of(operands: Sequence[Any]) -> torch.device | None:
    """The device of the first tensor among the operands, which the others have to share."""
    for operand in operands:
        if isinstance(operand, Tensor):
            return operand.device
        if isinstance(operand, (list, tuple)) and operand:
            return _device_of(operand)
    return None


def _is_refusal(error: Exception) -> bool:
    """Whether a launcher's own checks raised it, before the launch: float64, a layout with gaps, a row too long."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals["__name__"].startswith("sharpkern.kernels.")


@functools.cache
def _kernels_work(device: torch.device) -> bool:
    """Whether Triton compiles and runs a kernel right on a device, tried once and said once if not."""
    W = torch.linspace(-1, 1, 1000, dtype=torch.float32, device=device)
    alpha = torch.full((1,), -0.5, dtype=torch.float32, device=device)
    try:
        if _triton_version() < OLDEST_TRITON:
            raise RuntimeError(f"it is older than {'.'.join(map(str, OLDEST_TRITON))}")
        formed = _launcher("form", "form")(W, W.flip(0), alpha)
        assert formed is not None
        if torch.allclose(formed, reference.form(W, W.flip(0), alpha), atol=1e-6):
            return True
        reason = "a kernel gave wrong numbers"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    warn(
        f"computing with plain torch on {device}, slower and with more memory, since Triton does not work there "
        f"({reason}); set {VARIABLE}=torch to choose this, or =triton to see the error",
        KernelWarning,
    )
    return False


def _triton_version() -> tuple[int, ...]:
    # Not that of the distribution, which has other names for ROCm and in nightly builds.
    triton = importlib.import_module("triton")
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def _vmap_rule(operation: Callable[..., Tensor], stepped: Sequence[int]) -> Callable[..., tuple[Tensor, int]]:
    def rule(info: Any, in_dims: Sequence[Any], *operands: Any, **options: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        batched = {i for i, dim in enumerate(in_dims) if dim is not None}
        if batched <= set(stepped):
            merged = list(operands)
            for i in stepped:
                operand = operands[i]
                each = operand.movedim(in_dims[i], 0) if i in batched else operand.expand(size, *operand.shape)
                merged[i] = each.flatten(0, 1)
            return operation(*merged, **options).unflatten(0, (size, -1)), 0
        results = [
            operation(
                *(operand.select(in_dims[i], b) if i in batched else operand for i, operand in enumerate(operands)),
                **options,
            )
            for b in range(size)
        ]
        return torch.stack(results), 0

    return rule
