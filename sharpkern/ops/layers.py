"""Layers whose weights are formed on the way: linear, embedding, RMSNorm, LayerNorm."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sharpkern.ops import validation
from sharpkern.ops.arithmetic import add_step, compute_dtype, step_sizes
from sharpkern.ops.form import form_into
from sharpkern.ops.registry import Backend, operation


@operation(
    "linear",
    fake=lambda x, W, D, alpha, dtype=None, **_: x.new_empty(
        (alpha.numel(), x.shape[1], W.shape[0]), dtype=dtype or x.dtype
    ),
)
def linear(
    x: Tensor,
    W: Tensor,
    D: Tensor,
    alpha: Tensor,
    *,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return x[k] (W + α_k D)ᵀ: each perturbed weight is rounded once to the dtype of ``x``, as a layer would hold it.

    Args:
        x: one input per step, [K, M, C], or one for all of them, [1, M, C].
        W: the weight, [N, C].
        D: the direction, [N, C].
        alpha: signed steps, [K].
        dtype: of the result; that of ``x`` by default. float32 returns what 16 bits would round away at the end.
        backend: see `sharpkern.ops`.

    Returns:
        Tensor: [K, M, N], contiguous.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape or device does not fit.

    Memory:
        The result; on a GPU up to 34 MB of sums in float32, with the torch backend one formed weight.

    Determinism:
        Fixed order of additions on a GPU; with the torch backend as far as torch's own product.
    """
    validation.check_floats(x=x, W=W, D=D)
    validation.check_shapes(W=W, D=D)
    num_steps = validation.check_alpha(alpha, x.device)
    dtype = dtype or x.dtype
    validation.check_dtype(dtype)
    if W.dim() != 2:
        raise ValueError(f"W must be a matrix [outputs, inputs], got shape {list(W.shape)}; pass the layer's weight")
    if x.dim() != 3 or x.shape[0] not in (1, num_steps) or x.shape[2] != W.shape[1]:
        raise ValueError(
            f"x must have shape [{num_steps} or 1, M, {W.shape[1]}], one input per step size or one for all, got "
            f"{list(x.shape)}; flatten the dimensions between"
        )
    wide = torch.promote_types(x.dtype, dtype)
    weight = W.new_empty((1, *W.shape), dtype=x.dtype)
    out = x.new_empty((num_steps, x.shape[1], len(W)), dtype=dtype)
    for inputs, step, result in zip(x.expand(num_steps, -1, -1), alpha.split(1), out, strict=True):
        form_into(weight, W, D, step)
        result.copy_(torch.mm(inputs.to(wide), weight[0].t().to(wide)))
    return out


@operation(
    "embedding",
    fake=lambda indices, W, D, alpha, dtype=None, **_: W.new_empty(
        (alpha.numel(), *indices.shape, W.shape[1]), dtype=dtype or W.dtype
    ),
    stepped=(3,),
)
def embedding(
    indices: Tensor,
    W: Tensor,
    D: Tensor,
    alpha: Tensor,
    *,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return rows of W + α_k D; only the rows that occur are read.

    Args:
        indices: rows to take, any shape, int64 or int32.
        W: the table, [V, C]; V may be 0.
        D: the direction, [V, C].
        alpha: signed steps, [K].
        dtype: of the result; that of ``W`` by default.
        backend: see `sharpkern.ops`.

    Returns:
        Tensor: [K, *indices.shape, C]. An index outside [0, V) gives a row of NaN: no device is stopped.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape or device does not fit.

    Memory:
        The result; with the torch backend also the rows of W and D.

    Determinism:
        Elementwise; the same bits on every run.
    """
    validation.check_alike(W=W, D=D)
    if W.dim() != 2:
        raise ValueError(f"W must be a matrix [rows, columns], got shape {list(W.shape)}; pass the embedding's weight")
    validation.check_integers("indices", indices, W.device, "convert them")
    num_steps = validation.check_alpha(alpha, W.device)
    dtype = dtype or W.dtype
    validation.check_dtype(dtype)
    out = W.new_empty((num_steps, *indices.shape, W.shape[1]), dtype=dtype)
    if len(W) == 0:
        return out.fill_(math.nan)
    known = (indices >= 0) & (indices < len(W))
    rows = torch.where(known, indices, 0)
    form_into(out, F.embedding(rows, W), F.embedding(rows, D), alpha)
    return out.masked_fill_(~known.unsqueeze(-1), math.nan)


def _like_inputs(x: Tensor, *_: object, dtype: torch.dtype | None = None, **__: object) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


@operation("norm", fake=_like_inputs, stepped=(0, 3))
def rms_norm(
    x: Tensor,
    weight: Tensor,
    weight_direction: Tensor | None,
    alpha: Tensor,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return RMSNorm of x[k] with weight W + α_k D, which is never rounded to 16 bits.

    Args:
        x: one input per step, [K, ..., C].
        weight: W, [C].
        weight_direction: D, [C]; None if the weight does not move.
        alpha: signed steps, [K].
        eps: added to the mean of squares.
        dtype: of the result; that of ``x`` by default.
        backend: see `sharpkern.ops`.

    Returns:
        Tensor: [K, ..., C].

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape or device does not fit.

    Memory:
        The result; with the torch backend ``x`` in float32 twice.

    Determinism:
        Fixed order of additions; the same bits on every run.
    """
    _check_norm(x, alpha, dtype, weight=weight, weight_direction=weight_direction)
    dtype = dtype or x.dtype
    x = x.to(compute_dtype(x.dtype, weight.dtype))
    normal = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return (normal * _moved(weight, weight_direction, alpha, normal)).to(dtype)


@operation("norm", fake=_like_inputs, stepped=(0, 5))
def layer_norm(
    x: Tensor,
    weight: Tensor,
    weight_direction: Tensor | None,
    bias: Tensor | None,
    bias_direction: Tensor | None,
    alpha: Tensor,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return LayerNorm of x[k] with weight W + α_k D and bias b + α_k d, which are never rounded to 16 bits.

    Args:
        x: one input per step, [K, ..., C].
        weight: W, [C].
        weight_direction: D, [C]; None if the weight does not move.
        bias: b, [C]; None if there is none.
        bias_direction: d, [C]; None if the bias does not move or there is none.
        alpha: signed steps, [K].
        eps: added to the variance.
        dtype: of the result; that of ``x`` by default.
        backend: see `sharpkern.ops`.

    Returns:
        Tensor: [K, ..., C].

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape or device does not fit.

    Memory:
        The result; with the torch backend ``x`` in float32 twice.

    Determinism:
        Fixed order of additions; the same bits on every run.
    """
    if bias is None and bias_direction is not None:
        raise ValueError("bias_direction must be None without a bias, got a tensor; pass the bias that it moves")
    vectors = {"weight": weight, "weight_direction": weight_direction, "bias": bias, "bias_direction": bias_direction}
    _check_norm(x, alpha, dtype, **vectors)
    wide = compute_dtype(x.dtype, weight.dtype)
    normal = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    normal = normal * _moved(weight, weight_direction, alpha, normal)
    if bias is not None:
        normal = normal + _moved(bias, bias_direction, alpha, normal)
    return normal.to(dtype or x.dtype)


def _check_norm(x: Tensor, alpha: Tensor, dtype: torch.dtype | None, **vectors: Tensor | None) -> None:
    """Refuse operands of a norm that do not fit each other."""
    given = {name: vector for name, vector in vectors.items() if vector is not None}
    validation.check_floats(x=x, **given)
    num_steps = validation.check_alpha(alpha, x.device)
    validation.check_dtype(dtype or x.dtype)
    if x.dim() < 2 or x.shape[0] != num_steps:
        raise ValueError(
            f"x must have shape [{num_steps}, ..., C] with one input per step size, got {list(x.shape)}; expand it if "
            "the inputs are equal"
        )
    for name, vector in given.items():
        if vector.shape != x.shape[-1:]:
            raise ValueError(
                f"{name} must be a vector of the length of x's rows, {x.shape[-1]}, got shape {list(vector.shape)}; "
                "norms over several dimensions take them flattened"
            )


def _moved(vector: Tensor, direction: Tensor | None, alpha: Tensor, like: Tensor) -> Tensor:
    """Return vector + α_k direction for every k, [K, 1, ..., C] in the dtype of ``like``."""
    moved = vector.to(like.dtype).expand(alpha.numel(), -1)
    if direction is not None:
        moved = torch.stack([add_step(moved[0], direction.to(like.dtype), step) for step in step_sizes(alpha)])
    return moved.view(alpha.numel(), *[1] * (like.dim() - 2), -1)
