"""What the torch bodies of the operations share: precision, chunks, outputs, one step.

Arithmetic is in the widest of the operands' dtypes and at least float32, and results are rounded once.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sharpkern.ops import validation

# Elements worked on at a time. On the CPU they should stay in the cache, which is up to ten times faster; elsewhere a
# launch should be worth its while.
CPU_CHUNK = 1 << 16
DEVICE_CHUNK = 1 << 22


@lru_cache(maxsize=256)
def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Precision in which θ + αΔθ is computed: the widest of the dtypes, and at least float32."""
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def empty_steps(like: Tensor, num: int, dtype: torch.dtype) -> Tensor:
    """Return an empty [num, *shape], each slice with the strides of a tensor where those are dense.

    A slice starts at a multiple of 16 elements, so that a kernel's stores to it are as wide as those to the first.
    """
    strides = like.stride() if like.is_contiguous() else torch.empty_like(like, device="meta").stride()
    return like.new_empty_strided((num, *like.shape), (-(-like.numel() // 16) * 16, *strides), dtype=dtype)


def output(
    out: Tensor | None, like: Tensor, num: int, dtype: torch.dtype | None, operands: Iterable[Tensor | None]
) -> Tensor:
    """Return ``out`` if it may be written, or a new one."""
    if out is not None:
        validation.check_output(out, like, num, operands)
        return out
    dtype = dtype or like.dtype
    validation.check_dtype(dtype)
    return empty_steps(like, num, dtype)


def step_sizes(alpha: Tensor) -> Sequence[float | Tensor]:
    """Return the step sizes one by one; on a GPU as tensors, since reading them would make the host wait."""
    return alpha.tolist() if alpha.device.type == "cpu" else alpha.unbind()


def add_step(base: Tensor, delta: Tensor, step: float | Tensor, out: Tensor | None = None) -> Tensor:
    """Return base + step·delta, and base itself, its zeros' signs included, where the step is 0."""
    if isinstance(step, Tensor):
        step = step.to(base.dtype)
        return torch.where(step == 0, base, torch.addcmul(base, delta, step), out=out)
    if step == 0:
        return base if out is None else out.copy_(base)
    return torch.add(base, delta, alpha=step, out=out)


def row_chunks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Views of some rows of each tensor, a chunk of elements at a time."""
    first, size = tensors[0], chunk_size(tensors[0].device)
    if first.numel() <= size or first.dim() == 0:
        return [tensors]
    rows = max(1, size // max(1, first[0].numel()))
    return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))


def chunk_size(device: torch.device) -> int:
    """Elements of a chunk."""
    return CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK
