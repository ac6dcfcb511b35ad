"""How an operation is registered with torch, and which backend runs it.

An operation is one function: its signature is the schema, its docstring the documentation, its body what plain torch
does. Beside it, kernels/ may have a launcher of the same name, which is looked for at the first call that needs it.
"""

import functools
import importlib
import inspect
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sharpkern.errors import KernelWarning, warn

Backend = Literal["auto", "triton", "torch"]
BACKENDS = typing.get_args(Backend)

# Takes the place of "auto" where it is set: a way out of a broken Triton installation.
VARIABLE = "SHARPKERN_BACKEND"

# Kernels are checked with this Triton and newer ones.
OLDEST_TRITON = (3, 6)

_LIBRARY = torch.library.Library("sharpkern", "DEF")

# The file of each operation's kernel, and operations of whose refusals a warning was given.
_KERNELS: dict[str, str] = {}
_told: set[str] = set()

_P = ParamSpec("_P")
_R = TypeVar("_R")


def has_kernels(device: torch.device) -> bool:
    """Whether kernels are made for a device: CUDA, and HIP, which torch calls by the same name."""
    return device.type == "cuda"


def operation(
    kernel: str,
    *,
    fake: Callable[..., Tensor | None] = lambda *_, **__: None,
    stepped: Sequence[int] = (),
    mutates: Sequence[str] = (),
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Register a function as an operation of torch, ``torch.ops.sharpkern.<its name>``, and return what calls it.

    Its keyword ``backend`` says who runs it, and the body never sees it. Where it has a keyword ``out``, a second
    overload writes that instead of allocating a result in ``dtype``.
    """

    def register(body: Callable[_P, _R]) -> Callable[_P, _R]:
        name, signature = getattr(body, "__name__"), inspect.signature(body)  # noqa: B009 - callables need no name
        parameters = dict(signature.parameters)
        parameters["backend"] = parameters["backend"].replace(annotation=str)
        out = parameters.pop("out", None)
        _define(name, signature.replace(parameters=list(parameters.values())), mutates, kernel, body, fake)
        packet = getattr(torch.ops.sharpkern, name)
        if out is not None:
            parameters = {**parameters, "out": out.replace(annotation=Tensor, default=inspect.Parameter.empty)}
            del parameters["dtype"]
            written = signature.replace(parameters=list(parameters.values()), return_annotation=None)
            _define(f"{name}.out", written, (*mutates, "out"), kernel, body, lambda *_, **__: None)
        into = packet.out if out is not None else None
        if stepped:
            rule = _vmap_rule(packet.default, stepped)
            torch.library.register_vmap(f"sharpkern::{name}", rule, lib=_LIBRARY)
        return _caller(body, packet.default, into, list(parameters).index("alpha") if "alpha" in parameters else None)

    return register


def _define(
    full_name: str,
    signature: inspect.Signature,
    mutates: Sequence[str],
    kernel: str,
    body: Callable[..., Any],
    fake: Callable[..., Tensor | None],
) -> None:
    """Register one overload."""

    def prototype() -> None:
        """Stands for a function of the signature."""

    # Older torch knows sequences by the names of typing alone.
    parameters = [p.replace(annotation=_spelled(p.annotation)) for p in signature.parameters.values()]
    prototype.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    schema = torch.library.infer_schema(prototype, mutates_args=mutates)
    returns = signature.return_annotation is not None
    _LIBRARY.define(f"{full_name}{schema}")
    _LIBRARY.impl(full_name, _implementation(body, kernel, returns=returns), "CompositeExplicitAutograd")
    # No operation is differentiable: results of parameters belong to no graph, instead of to one that cannot be walked.
    _LIBRARY.impl(full_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"sharpkern::{full_name}", _on_one_device(fake), lib=_LIBRARY)


def _spelled(annotation: Any) -> Any:
    if typing.get_origin(annotation) is Sequence:
        return typing.Sequence[typing.get_args(annotation)[0]]  # type: ignore[misc]
    return annotation


def _caller(
    body: Callable[_P, _R], run: Callable[..., Any], into: Callable[..., Any] | None, alpha_at: int | None
) -> Callable[_P, _R]:
    """Return what users call: the overload that is asked for, with a word on step sizes that are no tensor.

    Of those torch would print the whole schema instead.
    """

    @functools.wraps(body)
    def call(*operands: Any, **options: Any) -> Any:
        if alpha_at is not None:
            alpha = operands[alpha_at] if alpha_at < len(operands) else options.get("alpha")
            if alpha is not None and not isinstance(alpha, Tensor):
                got = type(alpha).__name__
                raise TypeError(f"alpha must be a tensor, got {got}; pass torch.tensor([...]) on the device")
        if into is not None:
            out = options.pop("out", None)
            if out is not None:
                options.pop("dtype", None)
                into(*operands, **options, out=out)
                return out
        return run(*operands, **options)

    return call


def _implementation(body: Callable[..., Any], kernel: str, *, returns: bool) -> Callable[..., Any]:
    name = body.__name__

    _KERNELS[name] = kernel

    @torch.no_grad()
    def run(*operands: Any, backend: str = "auto", **options: Any) -> Any:
        launch = _launch(name, operands, options, backend)
        result = body(*operands, **options) if launch is None else launch()
        return result if returns else None

    return run


def prepared(name: str, *operands: Any, **options: Any) -> Callable[..., Any] | None:
    """Return what launches an operation's kernel on operands that are checked once; None where plain torch computes it.

    The launch takes other step sizes and outputs than those of the first call, ``alpha`` and ``out``, as long as these
    have the same shapes, dtypes and strides. It holds the operands, whose memory must stay where it is.
    """
    return _launch(name, operands, options, "auto")


def _launch(name: str, operands: Sequence[Any], options: Mapping[str, Any], backend: str) -> Callable[..., Any] | None:
    """Return the launch of an operation, None where plain torch computes it."""
    chosen = os.environ.get(VARIABLE) or "auto" if backend == "auto" else backend
    if chosen not in BACKENDS:
        source = "backend" if backend != "auto" else VARIABLE
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {chosen!r}; leave it out for auto")
    device = _device_of(operands)
    on_kernels = device is not None and has_kernels(device)
    if chosen == "triton" and backend == "auto" and not on_kernels:
        raise ValueError(f"{VARIABLE}=triton needs tensors on a GPU, got {name} on {device}; unset it")
    launch: Callable[..., Any] | None = None
    if chosen == "triton":
        launch = _launcher(name, _KERNELS[name]).accept(*operands, **options)
    elif chosen == "auto" and on_kernels and _kernels_work(device):
        try:
            launch = _launcher(name, _KERNELS[name]).accept(*operands, **options)
        except (TypeError, ValueError) as refusal:
            # Not for a kernel: float64, a layout with gaps, a row too long.
            _tell(name, refusal, operands, device)
    return launch


def _tell(name: str, refusal: Exception, operands: Sequence[Any], device: torch.device | None) -> None:
    """Say once for an operation that its kernel does not take what it is given, unless nobody would expect that."""
    if name in _told or any(isinstance(leaf, Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(operands)):
        return
    _told.add(name)
    warn(
        f"{name} is computed by plain torch on {device}, slower and with more memory, where its kernel does not take "
        f"the operands ({refusal}); this is said once",
        KernelWarning,
    )


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


def _launcher(name: str, kernel: str) -> Any:
    """Return a launcher: ``accept`` raises what a kernel does not take, or returns the launch."""
    try:
        module = importlib.import_module(f"sharpkern.kernels.{kernel}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"backend='triton' needs {error.name}, which is not installed; install it, or leave backend out"
        ) from error
    return getattr(module, name)


def _device_of(operands: Sequence[Any]) -> torch.device | None:
    """The device of the first tensor among the operands, which the others have to share."""
    for operand in operands:
        if isinstance(operand, Tensor):
            return operand.device
        if isinstance(operand, (list, tuple)) and operand:
            return _device_of(operand)
    return None


@functools.cache
def _kernels_work(device: torch.device) -> bool:
    """Whether Triton compiles and runs a kernel right on a device, tried once and said once if not."""
    W = torch.linspace(-1, 1, 1000, dtype=torch.float32, device=device)
    alpha = torch.full((1,), -0.5, dtype=torch.float32, device=device)
    try:
        if _triton_version() < OLDEST_TRITON:
            raise RuntimeError(f"it is older than {'.'.join(map(str, OLDEST_TRITON))}")
        formed = _launcher("form", "form").accept(W, W.flip(0), alpha)()
        if torch.allclose(formed[0], W + alpha * W.flip(0), atol=1e-6):
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


def _vmap_rule(run: Callable[..., Tensor], stepped: Sequence[int]) -> Callable[..., tuple[Tensor, int]]:
    def rule(info: Any, in_dims: Sequence[Any], *operands: Any, **options: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        batched = {i for i, dim in enumerate(in_dims) if any(leaf is not None for leaf in tree_leaves(dim))}
        if batched <= set(stepped):
            merged = list(operands)
            for i in stepped:
                operand = operands[i]
                each = operand.movedim(in_dims[i], 0) if i in batched else operand.expand(size, *operand.shape)
                merged[i] = each.flatten(0, 1)
            return run(*merged, **options).unflatten(0, (size, -1)), 0
        results = [run(*_selected(operands, in_dims, b), **options) for b in range(size)]
        return torch.stack(results), 0

    return rule


def _selected(operands: Any, dims: Any, index: int) -> Any:
    """Return operands, lists among them too, with one slice of those that are batched."""
    if isinstance(operands, (list, tuple)) and isinstance(dims, (list, tuple)):
        return [_selected(operand, dim, index) for operand, dim in zip(operands, dims, strict=True)]
    return operands if dims is None else operands.select(dims, index)
