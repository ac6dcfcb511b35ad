"""Tensor operations of the engines: θ + αΔθ, computed in float32 or wider and rounded once."""

import torch
from torch import Tensor

# Elements that are widened at a time when 16-bit weights are formed: 4 MB of fp32.
_CHUNK = 1 << 20


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Precision in which θ + αΔθ is computed: the widest of the dtypes, and at least float32."""
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


@torch.no_grad()
def form(
    base: Tensor, delta: Tensor, alpha: float, *, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """θ + αΔθ, computed in float32 or wider and rounded once.

    Args:
        base: θ, any shape, floating dtype.
        delta: Δθ, the shape of ``base``, floating dtype.
        alpha: signed step (−η for a step along the update direction).
        dtype: of the result; that of ``base`` by default. Ignored when ``out`` is given.
        out: written and returned if given, the shape of ``base``.

    Returns:
        Tensor: θ + αΔθ, the strides of ``base`` where those are dense.

    Memory: the result, and 4 MB where a dtype has to be widened on the way.
    """
    if out is None:
        out = torch.empty_like(base, dtype=dtype or base.dtype)
    wide = compute_dtype(base.dtype, delta.dtype)
    if base.dtype == delta.dtype == out.dtype == wide:
        return torch.add(base, delta, alpha=alpha, out=out)
    for rows, (base_rows, delta_rows) in _row_chunks(out, base, delta):
        rows.copy_(base_rows.to(wide).add(delta_rows.to(wide), alpha=alpha))
    return out


def _row_chunks(out: Tensor, *others: Tensor) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """Views of some rows of each tensor, about `_CHUNK` elements at a time."""
    if out.numel() <= _CHUNK or out.dim() == 0:
        return [(out, others)]
    rows = max(1, _CHUNK // max(1, out[0].numel()))
    parts = zip(*(tensor.split(rows) for tensor in (out, *others)), strict=True)
    return [(first, tuple(rest)) for first, *rest in parts]
