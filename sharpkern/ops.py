"""Every operation as torch sees it: one schema, a fake for compilers and memory plans, a Triton and a torch backend.

``backend="auto"`` takes the Triton kernel on CUDA and HIP devices where it takes the operands, and plain torch
everywhere else. ``"triton"`` and ``"torch"`` are used or raise. Triton is imported inside the first call that needs it.

Step sizes come as a tensor ``alpha`` [K] of signed steps (−η along an update): float32, or float64 with operands of
float64. Results have K in front. No operation is differentiable, none reads a tensor back to the host on a GPU, and
none is timed or tuned while it runs.

Both backends refuse, before anything is written, operands that are not dense and floating on one device, shapes that do
not belong together, and outputs that overlap themselves or other operands. The kernels have limits of their own, beyond
which "auto" goes to torch: 1 to 16 step sizes, rows of norms up to 16384, chunks of logits up to 4096 columns, float32,
float16 and bfloat16, operands of one parameter with equal strides and no gaps, no output in the place of an operand.

Triton's interpreter (``TRITON_INTERPRET=1``) runs the kernels on CPU tensors, for their logic: it truncates what it
stores to bfloat16, where a GPU rounds to nearest.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpkern._library import Backend
from sharpkern._library import has_kernels as has_kernels
from sharpkern._schemas import operations as _ops


def _vector(alpha: Tensor) -> Tensor:
    """Return the step sizes if they are a tensor: torch would print the whole schema instead."""
    if not isinstance(alpha, Tensor):
        raise TypeError(f"alpha must be a tensor, got {type(alpha).__name__}; pass torch.tensor([...]) on the device")
    return alpha


def _into(operation: Any, dtype: torch.dtype | None, out: Tensor | None, *operands: Any, **options: Any) -> Tensor:
    """Run an operation that allocates its result in a dtype, or its variant that writes a given one."""
    if out is None:
        result: Tensor = operation(*operands, **options, dtype=dtype)
        return result
    operation.out(*operands, **options, out=out)
    return out


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
        backend: see the module.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape or device does not fit, or an output overlaps itself or another operand.

    Memory:
        On a GPU 32 bytes per tensor and 8 per 64 Ki elements.

    Determinism:
        Elementwise; rounded once, and θ₀ bit for bit where α = 0 and the dtypes agree.
    """
    _ops.axpy_(list(theta), list(base), list(delta), _vector(alpha), backend=backend)


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
        backend: see the module.

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
    alpha = _vector(alpha)
    return _into(_ops.form, dtype, out, W, D, alpha, seed=seed, backend=backend)


def form_adam(
    theta: Tensor,
    grad: Tensor | None,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    alpha: Tensor | None,
    *,
    max_exp_avg_sq: Tensor | None = None,
    beta1: float,
    beta2: float,
    correction1: float,
    correction2: float,
    eps: float,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    grad_factor: float = 1.0,
    rate: float = 1.0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return θ + α_k Δθ, Δθ the update that the next Adam or AdamW step would make, from the optimizer's state.

    Δθ = rate·(m̂/(√v̂ + ε) + γθ) with the gradient entered into m and v on the way; nothing of the state is written.

    Args:
        theta: the parameter or its master, any shape and floating dtype.
        grad: the gradient that the optimizer has not seen yet, the shape of ``theta``; None if the state holds it.
        exp_avg: m, likewise; None before the first step.
        exp_avg_sq: v, likewise.
        alpha: signed steps, [K]; None for Δθ itself, K = 1.
        max_exp_avg_sq: the largest v so far, for amsgrad.
        beta1: β₁.
        beta2: β₂.
        correction1: 1 − β₁ᵗ of the step about to be taken.
        correction2: 1 − β₂ᵗ.
        eps: ε.
        weight_decay: γ.
        decoupled: AdamW's decay of θ; False for Adam's, which enters the gradient.
        grad_factor: what the gradient is multiplied by first: one over the loss scale, negative to maximize.
        rate: what Δθ is multiplied by: the group's learning rate over that of the reference group.
        dtype: of the result; that of ``theta`` by default. Ignored when ``out`` is given.
        out: written and returned if given, [K, *theta.shape]. With one step it may be an operand itself, by torch.
        backend: see the module.

    Returns:
        Tensor: [K, *theta.shape].

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape or device does not fit, ``out`` overlaps itself or another operand, a number is not
            finite or a correction not positive, or one moment alone, or neither moments nor gradient, are given.

    Memory:
        The result; with the torch backend a few chunks of at most 32 MiB.

    Determinism:
        Elementwise; the same bits on every run.
    """
    operands = (theta, grad, exp_avg, exp_avg_sq, None if alpha is None else _vector(alpha))
    options = {
        "max_exp_avg_sq": max_exp_avg_sq,
        "beta1": beta1,
        "beta2": beta2,
        "correction1": correction1,
        "correction2": correction2,
        "eps": eps,
        "weight_decay": weight_decay,
        "decoupled": decoupled,
        "grad_factor": grad_factor,
        "rate": rate,
        "backend": backend,
    }
    return _into(_ops.form_adam, dtype, out, *operands, **options)


def form_sgd(
    theta: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    alpha: Tensor | None,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    grad_factor: float = 1.0,
    rate: float = 1.0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return θ + α_k Δθ, Δθ the update that the next SGD step would make, from the momentum buffer.

    Δθ = rate·(g + γθ, through momentum where there is any); nothing of the state is written.

    Args:
        theta: the parameter or its master, any shape and floating dtype.
        grad: the gradient, the shape of ``theta``.
        momentum_buffer: the buffer before the step, likewise; None without momentum and before the first step.
        alpha: signed steps, [K]; None for Δθ itself, K = 1.
        weight_decay: γ.
        momentum: μ.
        dampening: τ.
        nesterov: whether the optimizer looks ahead.
        grad_factor: what the gradient is multiplied by first: one over the loss scale, negative to maximize.
        rate: what Δθ is multiplied by: the group's learning rate over that of the reference group.
        dtype: of the result; that of ``theta`` by default. Ignored when ``out`` is given.
        out: written and returned if given, [K, *theta.shape]. With one step it may be an operand itself, by torch.
        backend: see the module.

    Returns:
        Tensor: [K, *theta.shape].

    Raises:
        TypeError: if a dtype does not fit, or there is no gradient.
        ValueError: if a shape or device does not fit, ``out`` overlaps itself or another operand, or a number is not
            finite.

    Memory:
        The result; with the torch backend a few chunks of at most 32 MiB.

    Determinism:
        Elementwise; the same bits on every run.
    """
    operands = (theta, grad, momentum_buffer, None if alpha is None else _vector(alpha))
    options = {
        "weight_decay": weight_decay,
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "grad_factor": grad_factor,
        "rate": rate,
        "backend": backend,
    }
    return _into(_ops.form_sgd, dtype, out, *operands, **options)


def adam_sums(
    theta: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    *,
    max_exp_avg_sq: Tensor | None = None,
    backend: Backend = "auto",
    **numbers: float,
) -> Tensor:
    """Return Δθᵀg and |Δθ|², Δθ the update that the next Adam or AdamW step would make: the state is read once.

    Args:
        theta: the parameter or its master, any shape and floating dtype.
        grad: the gradient that the optimizer has not seen yet, the shape of ``theta``. It enters the update multiplied
            by ``grad_factor``, and the sum as it is.
        exp_avg: m, likewise; None before the first step.
        exp_avg_sq: v, likewise.
        max_exp_avg_sq: the largest v so far, for amsgrad.
        backend: see the module.
        **numbers: hyperparameters, as `form_adam` takes them.

    Returns:
        Tensor: [2] float64 on the device, summed in float64 over Δθ in float32 or wider.

    Raises:
        TypeError: if a dtype does not fit, or there is no gradient.
        ValueError: if a shape or device does not fit, a number is not finite or a correction not positive, or one
            moment alone is given.

    Memory:
        On a GPU at most 16 bytes per 8 Ki elements (2 Ki in tensors below 4 M); with the torch backend a few chunks of
        at most 32 MiB.

    Determinism:
        Fixed order of additions; the same bits on every run.
    """
    state = (theta, grad, exp_avg, exp_avg_sq)
    sums: Tensor = _ops.adam_sums(*state, max_exp_avg_sq=max_exp_avg_sq, backend=backend, **numbers)
    return sums


def sgd_sums(
    theta: Tensor, grad: Tensor, momentum_buffer: Tensor | None, *, backend: Backend = "auto", **numbers: float
) -> Tensor:
    """Return Δθᵀg and |Δθ|², Δθ the update that the next SGD step would make: the state is read once.

    Args:
        theta: the parameter or its master, any shape and floating dtype.
        grad: the gradient, the shape of ``theta``. It enters the update multiplied by ``grad_factor``, and the sum as
            it is.
        momentum_buffer: the buffer before the step, likewise; None without momentum and before the first step.
        backend: see the module.
        **numbers: hyperparameters, as `form_sgd` takes them.

    Returns:
        Tensor: [2] float64 on the device, summed in float64 over Δθ in float32 or wider.

    Raises:
        TypeError: if a dtype does not fit, or there is no gradient.
        ValueError: if a shape or device does not fit, or a number is not finite.

    Memory:
        As `adam_sums`.

    Determinism:
        As `adam_sums`.
    """
    sums: Tensor = _ops.sgd_sums(theta, grad, momentum_buffer, backend=backend, **numbers)
    return sums


def reduce(
    theta: Sequence[Tensor], delta: Sequence[Tensor], grad: Sequence[Tensor], *, backend: Backend = "auto"
) -> Tensor:
    """Return Δθᵀg, |Δθ|², |θ|² and |g|² of every tensor of a model, accumulated in float64.

    Args:
        theta: parameters, any shape and floating dtype, all on one device.
        delta: Δθ, tensor by tensor the shape of ``theta``.
        grad: g, likewise.
        backend: see the module.

    Returns:
        Tensor: [N, 4] float64 on the device, one row per tensor in this order; the model's sums are ``.sum(0)``.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if the lists differ in length, or a shape or device does not fit.

    Memory:
        On a GPU 32 bytes per 64 Ki elements and tables of the same size; with the torch backend see
        `reference.inner_product`.

    Determinism:
        Fixed order of additions; the same bits on every run.
    """
    sums: Tensor = _ops.reduce(list(theta), list(delta), list(grad), backend=backend)
    return sums


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
        backend: see the module.

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
    y: Tensor = _ops.linear(x, W, D, _vector(alpha), dtype=dtype, backend=backend)
    return y


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
        backend: see the module.

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
    rows: Tensor = _ops.embedding(indices, W, D, _vector(alpha), dtype=dtype, backend=backend)
    return rows


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
        backend: see the module.

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
    y: Tensor = _ops.rms_norm(x, weight, weight_direction, _vector(alpha), eps=eps, dtype=dtype, backend=backend)
    return y


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
        backend: see the module.

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
    vectors = (weight, weight_direction, bias, bias_direction)
    y: Tensor = _ops.layer_norm(x, *vectors, _vector(alpha), eps=eps, dtype=dtype, backend=backend)
    return y


def online_cross_entropy_(
    maximum: Tensor,
    total: Tensor,
    target: Tensor,
    logits: Tensor,
    labels: Tensor,
    first: int,
    *,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> None:
    """Carry every token's softmax statistics on by one chunk of the vocabulary.

    Args:
        maximum: largest logit so far, [T] float32 (float64 by torch alone), −inf at the start; written.
        total: Σ exp(logit − maximum) so far, likewise, 0 at the start; written.
        target: logit of the label, likewise, NaN until its chunk comes by; written.
        logits: of this chunk, [T, v], likewise; nothing happens where v is 0.
        labels: [T], int64 or int32.
        first: which entry of the vocabulary the chunk begins with.
        softcap: c of the cap c·tanh(z/c) on the logits, positive and finite, or None.
        backend: see the module.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape, device or number does not fit, or a written tensor overlaps itself or another.

    Memory:
        None on a GPU; with the torch backend up to two more of the chunk.

    Determinism:
        The same bits on every run with the same chunks.
    """
    _ops.online_cross_entropy_(maximum, total, target, logits, labels, first, softcap=softcap, backend=backend)
