"""What the torch backend refuses before anything is written: torch would broadcast, truncate, or fail half-way.

Operations run once per weight and probe: what fits passes in a microsecond, and is named only where it does not.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_DENSE = torch.strided
_NAMES = "float32, float16, bfloat16 or float64"


def check_alike(**tensors: Tensor) -> None:
    """Refuse operands that are not dense floating tensors of one shape and device."""
    if not _alike(tensors.values()):
        check_floats(**tensors)
        check_shapes(**tensors)


def check_floats(**tensors: Tensor | None) -> None:
    """Refuse operands that are not dense floating tensors on one device."""
    device = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {tensor}; pass the one of the parameter")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be {_NAMES}, got {tensor.dtype}; convert it with .to()")
        if device is None:
            device = tensor.device
        check_place(name, tensor, device)


def check_integers(name: str, tensor: Tensor, device: torch.device, remedy: str) -> None:
    """Refuse indices that are not a dense int64 or int32 tensor on a device."""
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {tensor.dtype}; {remedy}")
    check_place(name, tensor, device)


def check_shapes(**tensors: Tensor) -> None:
    """Refuse tensors of other shapes than the first: torch would broadcast them."""
    first, reference = next(iter(tensors.items()))
    shape = reference.shape
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have the shape of {first}, {list(shape)}, got {list(tensor.shape)}; pass the tensors of "
                "one parameter"
            )


def check_lists(**lists: Sequence[Tensor]) -> None:
    """Refuse lists of operands, one tensor per parameter and role, that do not belong together."""
    lengths = [len(tensors) for tensors in lists.values()]
    if len(set(lengths)) != 1:
        raise ValueError(f"{', '.join(lists)} must be equally long, got {lengths}; pass one of each per parameter")
    devices = {}
    for index, operands in enumerate(zip(*lists.values(), strict=True)):
        if not _alike(operands):
            check_alike(**{f"{role}[{index}]": tensor for role, tensor in zip(lists, operands, strict=True)})
        devices[operands[0].device] = index
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(map(str, devices))}; call once per device")


def check_alpha(alpha: Tensor, device: torch.device) -> int:
    """Refuse step sizes that are not a vector on a device."""
    if not isinstance(alpha, Tensor) or alpha.dtype not in (torch.float32, torch.float64):
        got = alpha.dtype if isinstance(alpha, Tensor) else type(alpha).__name__
        raise TypeError(
            f"alpha must be a float32 or float64 tensor, got {got}; pass torch.tensor([...], device={str(device)!r})"
        )
    if alpha.dim() != 1:
        raise ValueError(
            f"alpha must be a vector of step sizes, got shape {list(alpha.shape)}; reshape it with .reshape(-1)"
        )
    num: int = alpha.numel()
    if num == 0:
        raise ValueError("alpha must hold one step size at least, got shape [0]; pass torch.zeros(1) for no step")
    check_place("alpha", alpha, device)
    return num


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse an output dtype that is no floating one."""
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be {_NAMES}, got {dtype}; convert the result instead")


def check_output(out: Tensor, like: Tensor, num: int, operands: Iterable[Tensor | None]) -> None:
    """Refuse a tensor to be written that has no room for the result, or that is read meanwhile."""
    if out.dtype not in FLOATS:
        raise TypeError(f"out must be {_NAMES}, got {out.dtype}; leave it out to allocate")
    if out.shape != (num, *like.shape):
        raise ValueError(f"out must have shape {[num, *like.shape]}, got {list(out.shape)}; leave it out to allocate")
    check_place("out", out, like.device)
    _check_apart_from_itself("out", out)
    start, end = _span(out)
    for operand in operands:
        if operand is None or operand.data_ptr() >= end or _span(operand)[1] <= start:
            continue
        if not _is_at(operand, out, num) and _share(operand, out):
            raise _overlap()


def check_no_overlap(outputs: Mapping[str, Tensor], inputs: Iterable[Tensor]) -> None:
    """Refuse outputs that share memory with themselves, with each other or with an input."""
    for name, tensor in outputs.items():
        _check_apart_from_itself(name, tensor)
    spans = [(*_span(tensor), True, tensor) for tensor in outputs.values()]
    spans += [(*_span(tensor), False, tensor) for tensor in inputs]
    # In the order of their starts, a tensor meets those before it that have not ended.
    open_spans: list[tuple[int, bool, Tensor]] = []
    for start, end, is_output, tensor in sorted(spans, key=lambda span: span[0]):
        open_spans = [span for span in open_spans if span[0] > start]
        for _, is_output_too, other in open_spans:
            if (is_output or is_output_too) and end > start and _share(other, tensor):
                raise _overlap()
        open_spans.append((end, is_output, tensor))


def check_seed(seed: int | None, dtype: torch.dtype) -> None:
    """Refuse stochastic rounding where it is not defined."""
    if seed is None:
        return
    if dtype != torch.bfloat16:
        raise TypeError(f"seed must be None unless the result is bfloat16, got a result of {dtype}; leave it out")
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed must be in [0, 2**31), got {seed}; reduce it modulo 2**31")


def check_numbers(names: Iterable[str], numbers: Iterable[float]) -> None:
    """Refuse hyperparameters that are not finite."""
    for name, number in zip(names, numbers, strict=True):
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite, got {number}; look at the optimizer's group and the loss scale")


def _alike(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors are dense and floating, of one shape and device."""
    shape = device = None
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS or tensor.layout is not _DENSE:
            return False
        if device is None:
            shape, device = tensor.shape, tensor.device
        elif tensor.shape != shape or tensor.device != device:
            return False
    return True


def check_place(name: str, tensor: Tensor, device: torch.device) -> None:
    """Refuse a tensor without strides, or on another device."""
    if tensor.layout is not _DENSE:
        raise ValueError(f"{name} must be a dense tensor, got {tensor.layout}; convert it with .to_dense()")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} as the other operands, got {tensor.device}; move it there")


def _check_apart_from_itself(name: str, tensor: Tensor) -> None:
    """Refuse a tensor to be written of which two elements are one in memory, as an expanded one's are."""
    if tensor.is_contiguous():
        return
    last = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= last:
            raise ValueError(
                f"{name} must have memory for each of its elements, got shape {list(tensor.shape)} with strides "
                f"{list(tensor.stride())}; pass a contiguous copy"
            )
        last += (size - 1) * stride


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor and the one after its last."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum((size - 1) * stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _is_at(operand: Tensor, out: Tensor, num: int) -> bool:
    """Whether an output is an operand, element by element: each is read before it is written."""
    return (
        num == 1
        and operand.dtype == out.dtype
        and operand.data_ptr() == out.data_ptr()
        and operand.stride() == out.stride()[1:]
    )


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether tensors whose spans meet have an element in common for certain; columns of one matrix have none."""
    a, b = sorted((a, b), key=Tensor.data_ptr)
    (first, _), (start, end) = _span(a), _span(b)
    return start == first or _fills(a) or (_fills(b) and _span(a)[1] <= end)


def _fills(tensor: Tensor) -> bool:
    """Whether a tensor takes up all of its span."""
    start, end = _span(tensor)
    return end - start <= tensor.nbytes


def _overlap() -> ValueError:
    return ValueError("an output must not share memory with another operand, got tensors that overlap; copy one")
