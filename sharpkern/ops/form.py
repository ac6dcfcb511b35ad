"""Weights at one or several step sizes: θ + αΔθ, with Δθ in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sharpkern.ops import validation
from sharpkern.ops.arithmetic import add_step, compute_dtype, empty_steps, output, row_chunks, step_sizes
from sharpkern.ops.registry import Backend, operation

_LOW_BITS = 0xFFFFFFFF


@operation("axpy", mutates=("theta",))
def axpy_(
    theta: Sequence[Tensor],
    base: Sequence[Tensor],
    delta: Sequence[Tensor],
    alpha: Tensor,
    *,
    backend: Backend = "auto",
) -> None:
    """Write θ ← θ₀ + αΔθ into all tensors of a model: one to three launches on a GPU.

    Args:
        theta: written; dense tensors of any shape on one device.
        base: θ₀, tensor by tensor the shape of ``theta``, any floating dtype; none of them may be written.
        delta: Δθ, likewise.
        alpha: one signed step, [1].
        backend: see `sharpkern.ops`.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape or device does not fit, or an output overlaps itself or another operand.

    Memory:
        On a GPU 32 bytes per tensor and 8 per 64 Ki elements.

    Determinism:
        Elementwise; rounded once, and θ₀ bit for bit where α = 0 and the dtypes agree.
    """
    validation.check_lists(theta=theta, base=base, delta=delta)
    if not theta:
        return
    if validation.check_alpha(alpha, theta[0].device) != 1:
        raise ValueError(f"alpha must hold one step size, got {alpha.numel()}; call once per step size")
    written = {f"theta[{index}]": target for index, target in enumerate(theta)}
    validation.check_no_overlap(written, [*base, *delta, alpha])
    for target, start, move in zip(theta, base, delta, strict=True):
        form_into(target.unsqueeze(0), start, move, alpha)


@operation(
    "form", fake=lambda W, D, alpha, dtype=None, **_: empty_steps(W, alpha.numel(), dtype or W.dtype), stepped=(2,)
)
def form(
    W: Tensor,
    D: Tensor,
    alpha: Tensor,
    *,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return W + α_k D, computed in float32 or wider and rounded once; W and D are read once on a GPU.

    Args:
        W: the parameter, any shape and floating dtype.
        D: the direction, the shape of ``W``, any floating dtype.
        alpha: signed steps, [K].
        dtype: of the result; that of ``W`` by default. Ignored when ``out`` is given.
        seed: rounds stochastically to bfloat16, 0 ≤ seed < 2³¹, with the same random numbers for every k.
        out: written and returned if given, [K, *W.shape]. With one step it may be W or D itself, by torch.
        backend: see `sharpkern.ops`.

    Returns:
        Tensor: [K, *W.shape], each slice with the strides of ``W`` where those are dense. Where α_k = 0 slice k is W,
        bit for bit, if the dtype is that of ``W``.

    Raises:
        TypeError: if a dtype does not fit, or a seed is given for a result that is not bfloat16.
        ValueError: if a shape, device or seed does not fit, or ``out`` overlaps itself or another operand.

    Memory:
        The result; where torch has to widen a dtype on the way, 0.5 MiB on the CPU and 32 MiB elsewhere.

    Determinism:
        Elementwise; the same bits on every run.
    """
    validation.check_alike(W=W, D=D)
    num_steps = validation.check_alpha(alpha, W.device)
    out = output(out, W, num_steps, dtype, (W, D, alpha))
    validation.check_seed(seed, out.dtype)
    if seed is None:
        return form_into(out, W, D, alpha)
    _form_stochastically(W, D, alpha, seed, out)
    return out


def form_into(out: Tensor, W: Tensor, D: Tensor, alpha: Tensor) -> Tensor:
    """Write W + α_k D by torch, and return it; operands are checked before."""
    wide = compute_dtype(W.dtype, D.dtype)
    for formed, step in zip(out.unbind(), step_sizes(alpha), strict=True):
        if W.dtype == D.dtype == out.dtype == wide:
            add_step(W, D, step, out=formed)
            continue
        for rows, W_rows, D_rows in row_chunks(formed, W, D):
            rows.copy_(add_step(W_rows.to(wide), D_rows.to(wide), step))
    return out


def _form_stochastically(W: Tensor, D: Tensor, alpha: Tensor, seed: int, out: Tensor) -> None:
    """Round W + α_k D up or down by chance to bfloat16, one random number per element for all k, as the kernel does."""
    # Random numbers belong to addresses: elements are counted in the order in which they lie in memory.
    order = sorted(range(W.dim()), key=lambda dim: W.stride(dim), reverse=True)
    first = 0
    for W_rows, D_rows, *targets in row_chunks(*(tensor.permute(order) for tensor in (W, D, *out))):
        offsets = torch.arange(first, first + W_rows.numel(), device=W.device).view(W_rows.shape)
        random = _scrambled((offsets & _LOW_BITS) ^ _scrambled((offsets >> 32) ^ seed)) & 0xFFFF
        for target, step in zip(targets, step_sizes(alpha), strict=True):
            exact = add_step(W_rows.float(), D_rows.float(), step)
            raised = ((exact.view(torch.int32) + random) & ~0xFFFF).int().view(torch.float32)
            target.copy_(torch.where(exact.isnan(), exact, raised))
        first += W_rows.numel()


def _scrambled(bits: Tensor) -> Tensor:
    """Return 32 well mixed bits for 32 different ones: the finalizer of MurmurHash3, in int64."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = ((bits ^ (bits >> shift)) * factor) & _LOW_BITS
    return bits ^ (bits >> 16)
