"""What every launcher shares: checks before a launch, fixed launch configurations, and the small tiles of all kernels.

Kernels run on CUDA and HIP devices. Under Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported) they
run on CPU tensors instead, which is how their numerics are tested without a GPU.
"""

import functools
import os
from collections.abc import Iterable, Sequence
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


def check_scalars(scalars: Tensor, num: int, maker: str, like: Tensor) -> None:
    """Refuse hyperparameters that are not ``num`` float32 numbers on the device of ``like``, as ``maker`` returns them.

    Raises:
        ValueError: if they are not.
    """
    if scalars.dtype != torch.float32 or scalars.shape != (num,) or scalars.device != like.device:
        raise ValueError(
            f"scalars must be {num} float32 numbers on {like.device}, got {list(scalars.shape)} of {scalars.dtype} on "
            f"{scalars.device}; make them with {maker}"
        )


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
        if tensor.stride() != reference.stride() and _steps(tensor) != _steps(reference):
            raise ValueError(
                f"{name} must have the strides of {first}, {list(reference.stride())}, got {list(tensor.stride())}; "
                f"copy it into torch.empty_like({first})"
            )


def check_lists(**lists: Sequence[Tensor]) -> None:
    """Refuse lists of operands, one tensor per parameter and role, that one launch could not walk.

    Raises:
        ValueError: if they differ in length, or what `check_layout` and `check_device` refuse.
        TypeError: what `check_floats` refuses.
    """
    lengths = [len(tensors) for tensors in lists.values()]
    if len(set(lengths)) != 1:
        raise ValueError(f"{', '.join(lists)} must be equally long, got {lengths}; pass one of each per parameter")
    devices = {}
    for index, operands in enumerate(zip(*lists.values(), strict=True)):
        named = {f"{role}[{index}]": tensor for role, tensor in zip(lists, operands, strict=True)}
        check_floats(**named)
        check_layout(**named)
        devices[operands[0].device] = index
    if len(devices) > 1:
        raise ValueError(
            f"all tensors must be on one device, got {', '.join(map(str, devices))}; call once per device"
        )


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor is a permutation of a contiguous one, so that its elements can be walked in memory."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(_steps(tensor)):
        if stride != expected:
            return False
        expected *= size
    return True


def check_no_overlap(outputs: Sequence[Tensor], inputs: Iterable[Tensor | None]) -> None:
    """Refuse outputs that share memory with an input or with each other: programs run in no order. None is skipped.

    Raises:
        ValueError: if one does.
    """
    spans = [(*_span(tensor), True) for tensor in outputs]
    spans += [(*_span(tensor), False) for tensor in inputs if tensor is not None]
    written = read = 0
    for start, end, is_output in sorted(spans):
        if start < max(written, read if is_output else 0):
            raise ValueError("an output must not share memory with another operand, got tensors that overlap; copy one")
        if is_output:
            written = max(written, end)
        else:
            read = max(read, end)


def output(
    out: Tensor | None, like: Tensor, num: int, dtype: torch.dtype | None, operands: Iterable[Tensor | None]
) -> Tensor:
    """Return the output of a kernel that writes ``num`` tensors of the shape and strides of a dense tensor.

    Args:
        out: checked and returned if given.
        like: shape, strides, device, and the dtype where ``dtype`` is None.
        num: how many.
        dtype: of the output, if it is to be allocated.
        operands: what the output must not share memory with.

    Returns:
        Tensor: [num, *shape]; if allocated, each slice starts at an aligned address.

    Raises:
        TypeError: if the dtype is none of float32, float16, bfloat16.
        ValueError: if shape or strides of ``out`` are others, or it overlaps an operand or itself.
    """
    if out is None:
        dtype = dtype or like.dtype
        check_dtype(dtype)
        # A start at a multiple of 16 elements keeps the stores of every slice as wide as those of the first.
        distance = -(-like.numel() // 16) * 16
        memory = torch.empty(num * distance, dtype=dtype, device=like.device)
        return memory.as_strided((num, *like.shape), (distance, *like.stride()))
    check_floats(W=like, out=out)
    if out.shape != (num, *like.shape):
        raise ValueError(f"out must have shape {[num, *like.shape]}, got {list(out.shape)}; leave it out to allocate")
    if _steps(out[0]) != _steps(like) or (num > 1 and out.stride(0) < like.numel()):
        raise ValueError(
            f"each slice of out must have the parameter's strides, {list(like.stride())}, and not overlap the next, "
            f"got {list(out.stride())}; leave it out to allocate"
        )
    check_no_overlap([out], operands)
    return out


def _steps(tensor: Tensor) -> list[tuple[int, int]]:
    """Return (stride, size) of the dimensions that are walked: the stride of a dimension of size 1 means nothing."""
    return [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor and the one after its last."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum((size - 1) * stride for stride, size in _steps(tensor))
    return start, start + (last + 1) * tensor.element_size()


class Batch(NamedTuple):
    """Tensors that one launch walks together: equal dtypes in each role, equal alignment.

    Attributes:
        dtypes: the Triton dtype of each role.
        aligned: whether every address is a multiple of 16 bytes.
        rows: [tensors, roles + 1] int64, the addresses of one row of operands and its number of elements.
        chunks: [chunks, 2] int32, which row, and which part of it.
    """

    dtypes: tuple[tl.dtype, ...]
    aligned: bool
    rows: Tensor
    chunks: Tensor


def batches(chunk: int, *roles: Sequence[Tensor]) -> list[Batch]:
    """Group the operands of a whole model into as few launches as their dtypes and alignments allow.

    Args:
        chunk: elements that one program walks.
        roles: one list of tensors per role, equally long; tensors at the same index have equally many elements.

    Returns:
        The groups, in order of first appearance; tensors without elements are left out.

    Memory:
        The tables of the 16 most recent groups stay on the device: 8 (roles + 1) bytes per tensor and 8 per chunk.
    """
    groups: dict[tuple[tuple[tl.dtype, ...], bool], list[tuple[int, ...]]] = {}
    for operands in zip(*roles, strict=True):
        addresses = [tensor.data_ptr() for tensor in operands]
        key = tuple(_TRITON_DTYPES[tensor.dtype] for tensor in operands), not any(address % 16 for address in addresses)
        if operands[0].numel():
            groups.setdefault(key, []).append((*addresses, operands[0].numel()))
    if not groups:
        return []
    device = roles[0][0].device
    # Tables of another stream may still be on their way to the device.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return [Batch(*key, *_tables(tuple(rows), chunk, device, stream)) for key, rows in groups.items()]


@functools.lru_cache(maxsize=16)
def _tables(rows: tuple[tuple[int, ...], ...], chunk: int, device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """Build the tables of `Batch`. They depend on the arguments alone, so a later call may have the same ones."""
    table = torch.tensor(rows, dtype=torch.int64)
    counts = -(-table[:, -1] // chunk)
    row = torch.repeat_interleave(torch.arange(len(rows)), counts)
    part = torch.arange(row.numel()) - (counts.cumsum(0) - counts)[row]
    return table.to(device), torch.stack([row, part], dim=1).to(torch.int32).to(device)


@triton.jit
def operand(row, role: tl.constexpr, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer to element ``start`` of one operand of a row of `Batch.rows`."""
    pointer = tl.load(row + role).to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


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
