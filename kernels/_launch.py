"""What every launcher shares: checks before a launch, fixed launch configurations, and the small tiles of all kernels.

Kernels run on CUDA and HIP devices. Under Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported) they
run on CPU tensors instead, which is how their numerics are tested without a GPU.
"""

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# Each step size is unrolled in the kernels; beyond this many the registers of one thread run out.
MAX_STEP_SIZES = 16

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Config(NamedTuple):
    """One launch configuration: elements per program and threads per program."""

    block: int
    threads: int


class Case(NamedTuple):
    """A row of a configuration table: what it applies to (None: anything) and the configuration."""

    architecture: str | None
    itemsize: int | None
    below: int | None
    config: Config


def choose(table: tuple[Case, ...], tensor: Tensor, size: int) -> Config:
    """Return the configuration of the first row that fits; the last row of a table fits everything.

    Args:
        table: rows in order of preference.
        tensor: the operand whose device and element size decide.
        size: the number that the rows bound from above, usually the number of elements.

    Returns:
        The configuration to launch with. It is fixed by the arguments: nothing is timed or tried.
    """
    arch = architecture(tensor.device)
    return next(
        case.config
        for case in table
        if case.architecture in {None, arch}
        and case.itemsize in {None, tensor.element_size()}
        and (case.below is None or size < case.below)
    )


@functools.cache
def architecture(device: torch.device) -> str:
    """Return the name of a device's architecture as compilers spell it, like "sm_90" or "gfx942"."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def options(config: Config, tensor: Tensor) -> dict[str, int | bool]:
    """Return the compiler options of a launch.

    Multiply and add are fused where a kernel says so and nowhere else: the default differs between Triton versions.
    """
    # CDNA (gfx9) runs 64 threads in a warp, everything else 32.
    warp = 64 if architecture(tensor.device).startswith("gfx9") else 32
    return {"num_warps": max(1, config.threads // warp), "enable_fp_fusion": False}


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which launches go to the device of ``tensor``, which need not be the current one."""
    return nullcontext() if INTERPRETED else torch.cuda.device(tensor.device)


def triton_dtype(tensor: Tensor) -> tl.dtype:
    """Return the Triton dtype of a tensor whose address travels as an integer."""
    return _TRITON_DTYPES[tensor.dtype]


def check_device(**tensors: Tensor | None) -> None:
    """Refuse tensors that are not dense CUDA tensors of one device; None is skipped.

    Raises:
        ValueError: if one is.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, reference = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.layout != torch.strided or not (tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")):
            raise ValueError(
                f"{name} must be a dense CUDA tensor, got {tensor.layout} on {tensor.device}; move it to a GPU, or use "
                "the torch implementation"
            )
        if tensor.device != reference.device:
            raise ValueError(
                f"{name} must be on the device of {first}, {reference.device}, got {tensor.device}; move it there"
            )


def check_floats(**tensors: Tensor | None) -> None:
    """Refuse tensors that are not float32, float16 or bfloat16 on one CUDA device; None is skipped.

    Raises:
        TypeError: if a dtype is another.
        ValueError: if a device is another.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}; convert it, or use the torch "
                "implementation"
            )
    check_device(**tensors)


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse an output dtype that the kernels do not write.

    Raises:
        TypeError: if it is none of float32, float16, bfloat16.
    """
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}; convert the result instead")


def check_alpha(alpha: Tensor, like: Tensor) -> int:
    """Refuse step sizes that are not a contiguous float32 vector on the device of ``like``.

    A Python float is not taken on purpose: reading step sizes from memory keeps one compiled kernel for all of them,
    and a float that passes through torch.compile would arrive as fp64.

    Args:
        alpha: signed step sizes, [K], float32.
        like: an operand of the same launch.

    Returns:
        K.

    Raises:
        TypeError: if alpha is no float32 tensor.
        ValueError: if its shape or device is another, or K is 0 or too large.
    """
    if not isinstance(alpha, Tensor) or alpha.dtype != torch.float32:
        got = alpha.dtype if isinstance(alpha, Tensor) else type(alpha).__name__
        raise TypeError(f"alpha must be a float32 tensor, got {got}; pass torch.tensor([...], device={like.device!s})")
    if alpha.device != like.device:
        raise ValueError(f"alpha must be on {like.device}, got {alpha.device}; move it there")
    if alpha.dim() != 1 or not 1 <= alpha.numel() <= MAX_STEP_SIZES or not alpha.is_contiguous():
        raise ValueError(
            f"alpha must be a contiguous vector of 1 to {MAX_STEP_SIZES} step sizes, got shape {list(alpha.shape)}; "
            "call once per part"
        )
    return alpha.numel()


def check_layout(**tensors: Tensor | None) -> None:
    """Refuse tensors that do not fill memory element by element in the order of the first; None is skipped.

    Raises:
        ValueError: if the first has gaps or overlaps, or another has different shape or strides.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, reference = next(iter(given.items()))
    if not is_dense(reference):
        raise ValueError(
            f"{first} must fill its memory without gaps, got shape {list(reference.shape)} with strides "
            f"{list(reference.stride())}; pass a contiguous copy"
        )
    for name, tensor in given.items():
        if tensor.shape != reference.shape:
            raise ValueError(
                f"{name} must have the shape of {first}, {list(reference.shape)}, got {list(tensor.shape)}; pass the "
                "tensors of one parameter"
            )
        if _steps(tensor) != _steps(reference):
            raise ValueError(
                f"{name} must have the strides of {first}, {list(reference.stride())}, got {list(tensor.stride())}; "
                f"copy it into torch.empty_like({first})"
            )


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor is a permutation of a contiguous one, so that its elements can be walked in memory."""
    expected = 1
    for stride, size in sorted(_steps(tensor)):
        if stride != expected:
            return False
        expected *= size
    return True


def check_no_overlap(name: str, out: Tensor, **inputs: Tensor | None) -> None:
    """Refuse an output that shares memory with an input: programs run in no order.

    Raises:
        ValueError: if it does.
    """
    start, end = _span(out)
    for other_name, other in inputs.items():
        if other is None:
            continue
        other_start, other_end = _span(other)
        if start < other_end and other_start < end:
            raise ValueError(f"{name} must not share memory with {other_name}, got tensors that overlap; copy one")


def stacked(like: Tensor, num: int, dtype: torch.dtype) -> Tensor:
    """Allocate ``num`` tensors of the shape and strides of a dense tensor, each starting at an aligned address.

    Args:
        like: shape, strides and device.
        num: how many.
        dtype: of the result.

    Returns:
        Tensor: [num, *shape], uninitialised.
    """
    # A start at a multiple of 16 elements keeps the stores of every slice as wide as those of the first.
    distance = -(-like.numel() // 16) * 16
    memory = torch.empty(num * distance, dtype=dtype, device=like.device)
    return memory.as_strided((num, *like.shape), (distance, *like.stride()))


def check_stacked(out: Tensor, like: Tensor, num: int) -> None:
    """Refuse an output that `stacked` could not have returned, up to the distance of its slices.

    Raises:
        ValueError: if shape or strides are others, or the slices overlap.
    """
    if out.shape != (num, *like.shape):
        raise ValueError(f"out must have shape {[num, *like.shape]}, got {list(out.shape)}; leave it out to allocate")
    if _steps(out[0]) != _steps(like) or (num > 1 and out.stride(0) < like.numel()):
        raise ValueError(
            f"each of out must have the strides of the parameter, {list(like.stride())}, and not overlap, got "
            f"{list(out.stride())}; leave it out to allocate"
        )


def _steps(tensor: Tensor) -> list[tuple[int, int]]:
    """Return (stride, size) of the dimensions that are walked: the stride of a dimension of size 1 means nothing."""
    return [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor and the one after its last."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for stride, size in _steps(tensor))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@triton.jit
def load_tile(pointers, inside, MASKED: tl.constexpr):
    """Load elements as fp32; outside the tensor they are 0. Full tiles carry no mask, which keeps loads 16 bytes."""
    if MASKED:
        return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    else:  # noqa: RET505 - Triton compiles one of the two branches, and needs the else to see that
        return tl.load(pointers).to(tl.float32)


@triton.jit
def store_tile(pointers, values, inside, MASKED: tl.constexpr):
    """Round fp32 elements to the output's dtype, to nearest even, and store them."""
    if MASKED:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside)
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty))


@triton.jit
def perturbed(w, d, alpha):
    """Return w + αd with one rounding, and w itself, its sign of zero included, where α = 0."""
    return tl.where(alpha == 0.0, w, tl.fma(d, alpha, w))
