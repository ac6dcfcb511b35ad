"""What launchers accept: every operand is checked before a launch, since a kernel cannot complain."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ._launch import runs_on

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# Each step size is unrolled in the kernels; beyond this many the registers of one thread run out.
MAX_STEP_SIZES = 16


def check_device(**tensors: Tensor | None) -> None:
    """Refuse tensors that are not dense CUDA tensors of one device, and those without memory; None is skipped."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, reference = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.layout != torch.strided or not runs_on(tensor.device):
            raise ValueError(
                f"{name} must be a dense CUDA tensor, got {tensor.layout} on {tensor.device}; move it to a GPU, or use "
                "the torch implementation"
            )
        if tensor.device != reference.device:
            raise ValueError(
                f"{name} must be on the device of {first}, {reference.device}, got {tensor.device}; move it there"
            )
    for name, tensor in given.items():
        if tensor.numel() and not tensor.data_ptr():
            raise ValueError(
                f"{name} must have its elements in memory, got a {type(tensor).__name__} at address 0; pass the local "
                "tensor, or gather what a sharded module has freed"
            )


def check_floats(**tensors: Tensor | None) -> None:
    """Refuse tensors that are not float32, float16 or bfloat16 on one CUDA device; None is skipped."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}; convert it, or use the torch "
                "implementation"
            )
    check_device(**tensors)


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse an output dtype that the kernels do not write."""
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}; convert the result instead")


def check_alpha(alpha: Tensor, like: Tensor) -> int:
    """Refuse step sizes that are not a contiguous float32 vector on the device of ``like``.

    A Python float is not taken on purpose: reading step sizes from memory keeps one compiled kernel for all of them,
    and a float that passes through torch.compile would arrive as fp64.
    """
    if not isinstance(alpha, Tensor) or alpha.dtype != torch.float32:
        got = alpha.dtype if isinstance(alpha, Tensor) else type(alpha).__name__
        raise TypeError(
            f"alpha must be a float32 tensor, got {got}; pass torch.tensor([...], device={str(like.device)!r})"
        )
    if alpha.device != like.device:
        raise ValueError(f"alpha must be on {like.device}, got {alpha.device}; move it there")
    if alpha.dim() != 1 or not 1 <= alpha.numel() <= MAX_STEP_SIZES or not alpha.is_contiguous():
        remedy = "call once per part" if alpha.numel() else "pass one step size at least"
        raise ValueError(
            f"alpha must be a contiguous vector of 1 to {MAX_STEP_SIZES} step sizes, got shape {list(alpha.shape)}; "
            f"{remedy}"
        )
    return alpha.numel()


def check_numbers(numbers: Sequence[float], names: Sequence[str]) -> None:
    """Refuse hyperparameters that are not finite Python numbers."""
    for name, number in zip(names, numbers, strict=True):
        if isinstance(number, (int, float)) and math.isfinite(number):
            continue
        if not isinstance(number, (int, float)):
            raise TypeError(f"{name} must be a Python number, got {type(number).__name__}; read it once with float()")
        raise ValueError(f"{name} must be finite, got {number}; look at the optimizer's group and the loss scale")


def check_layout(**tensors: Tensor | None) -> None:
    """Refuse tensors that do not fill memory element by element in the order of the first; None is skipped."""
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


def check_rows(**tables: Tensor) -> None:
    """Refuse tables that differ in shape, or whose rows are not each in one piece."""
    first, reference = next(iter(tables.items()))
    for name, table in tables.items():
        if table.dim() != 2 or table.shape != reference.shape or (table.shape[1] > 1 and table.stride(1) != 1):
            raise ValueError(
                f"{name} must be a matrix of the shape of {first}, {list(reference.shape)}, with the elements of a row "
                f"next to each other, got shape {list(table.shape)} with strides {list(table.stride())}; pass a "
                "contiguous copy"
            )


def check_lists(**lists: Sequence[Tensor]) -> None:
    """Refuse lists of operands, one tensor per parameter and role, that one launch could not walk."""
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
        raise ValueError(f"all tensors must be on one device, got {', '.join(map(str, devices))}; call once per device")


def are_alike(tensors: Iterable[Tensor | None], device: torch.device) -> bool:
    """Return whether tensors pass every check of dtype, device and layout, which is quickly told of contiguous ones."""
    shape = None
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS or tensor.layout is not torch.strided or not tensor.is_contiguous():
            return False
        if shape is None:
            shape = tensor.shape
        if tensor.shape != shape or tensor.device != device or not (tensor.data_ptr() or tensor.numel() == 0):
            return False
    return runs_on(device)


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
    """Refuse outputs that share memory with an input or with each other: programs run in no order. None is skipped."""
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


def check_output(
    out: Tensor | None, like: Tensor, num: int, dtype: torch.dtype | None, operands: Iterable[Tensor | None]
) -> torch.dtype:
    """The dtype of an output of ``num`` tensors of the shape and strides of a dense one, if it may be written."""
    if out is None:
        dtype = dtype or like.dtype
        check_dtype(dtype)
        return dtype
    check_floats(parameter=like, out=out)
    if out.shape != (num, *like.shape):
        raise ValueError(f"out must have shape {[num, *like.shape]}, got {list(out.shape)}; leave it out to allocate")
    if _steps(out[0]) != _steps(like) or (num > 1 and out.stride(0) < like.numel()):
        raise ValueError(
            f"each slice of out must have the parameter's strides, {list(like.stride())}, and not overlap the next, "
            f"got {list(out.stride())}; leave it out to allocate"
        )
    check_no_overlap([out], operands)
    return out.dtype


def empty_steps(like: Tensor, num: int, dtype: torch.dtype) -> Tensor:
    """Return an empty [num, *shape], each slice with the strides of a dense tensor.

    A start at a multiple of 16 elements keeps the stores of every slice as wide as those of the first.
    """
    distance = -(-like.numel() // 16) * 16
    memory = torch.empty(num * distance, dtype=dtype, device=like.device)
    return memory.as_strided((num, *like.shape), (distance, *like.stride()))


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
