"""Every operation of `sharpkern.ops` in plain torch: for any device and floating dtype, float64 included.

What the Triton kernels are held against, and what runs where they do not. Arithmetic is in the widest of the operands'
dtypes and at least float32, results are rounded once. Arguments and results are those of the kernels' launchers, and
what those refuse for every device is refused here before anything is written.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sharpkern import _checks

# Elements worked on at a time. On the CPU they should stay in the cache, which is up to ten times faster; elsewhere a
# launch should be worth its while.
_CPU_CHUNK = 1 << 16
_DEVICE_CHUNK = 1 << 22

_LOW_BITS = 0xFFFFFFFF

Update = Callable[..., Tensor]
"""Δθ of some elements from theirs of θ, the gradient and the optimizer's state; a new tensor."""


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Precision in which θ + αΔθ is computed: the widest of the dtypes, and at least float32."""
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def axpy_(theta: Sequence[Tensor], base: Sequence[Tensor], delta: Sequence[Tensor], alpha: Tensor) -> None:
    """Write θ ← θ₀ + αΔθ into every tensor; ``alpha`` is [1]."""
    _checks.check_lists(theta=theta, base=base, delta=delta)
    if not theta:
        return
    if _checks.check_alpha(alpha, theta[0].device) != 1:
        raise ValueError(f"alpha must hold one step size, got {alpha.numel()}; call once per step size")
    written = {f"theta[{index}]": target for index, target in enumerate(theta)}
    _checks.check_no_overlap(written, [*base, *delta, alpha])
    for target, start, move in zip(theta, base, delta, strict=True):
        form(start, move, alpha, out=target.unsqueeze(0))


def form(
    W: Tensor,
    D: Tensor,
    alpha: Tensor,
    *,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return W + α_k D, [K, *W.shape]."""
    _checks.check_alike(W=W, D=D)
    num_steps = _checks.check_alpha(alpha, W.device)
    out = _output(out, W, num_steps, dtype, (W, D, alpha))
    _checks.check_seed(seed, out.dtype)
    if seed is not None:
        _form_stochastically(W, D, alpha, seed, out)
        return out
    wide = compute_dtype(W.dtype, D.dtype)
    for formed, step in zip(out.unbind(), _numbers(alpha), strict=True):
        if W.dtype == D.dtype == out.dtype == wide:
            _add(W, D, step, out=formed)
            continue
        for rows, W_rows, D_rows in _row_chunks(formed, W, D):
            rows.copy_(_add(W_rows.to(wide), D_rows.to(wide), step))
    return out


def form_adam(
    theta: Tensor,
    grad: Tensor | None,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    alpha: Tensor | None,
    max_exp_avg_sq: Tensor | None = None,
    *,
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
) -> Tensor:
    """Return θ + α_k Δθ, Δθ = rate·(m̂/(√v̂ + ε) + γθ) with the gradient entered into m and v; without α Δθ itself.

    The order of operations is that of torch's own step.
    """
    update = _adam(beta1, beta2, correction1, correction2, eps, weight_decay, decoupled, grad_factor)
    operands = _adam_operands(theta, grad, exp_avg, exp_avg_sq, max_exp_avg_sq)
    return _form_from(update, operands, alpha, rate, dtype, out)


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
) -> Tensor:
    """Return θ + α_k Δθ, Δθ = rate·(g + γθ, through momentum); without α Δθ itself.

    The order of operations is that of torch's own step.
    """
    update = _sgd(weight_decay, momentum, dampening, nesterov, grad_factor)
    return _form_from(update, _sgd_operands(theta, grad, momentum_buffer), alpha, rate, dtype, out)


def adam_sums(
    theta: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
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
) -> Tensor:
    """Return Δθᵀg and |Δθ|², [2] float64: Δθ as `form_adam` works it out, g the gradient as it is stored."""
    _check_has_gradient(grad)
    update = _adam(beta1, beta2, correction1, correction2, eps, weight_decay, decoupled, grad_factor)
    return _sum_from(update, _adam_operands(theta, grad, exp_avg, exp_avg_sq, max_exp_avg_sq), rate)


def sgd_sums(
    theta: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    grad_factor: float = 1.0,
    rate: float = 1.0,
) -> Tensor:
    """Return Δθᵀg and |Δθ|², [2] float64: Δθ as `form_sgd` works it out, g the gradient as it is stored."""
    _check_has_gradient(grad)
    update = _sgd(weight_decay, momentum, dampening, nesterov, grad_factor)
    return _sum_from(update, _sgd_operands(theta, grad, momentum_buffer), rate)


def reduce(theta: Sequence[Tensor], delta: Sequence[Tensor], grad: Sequence[Tensor]) -> Tensor:
    """Return Δθᵀg, |Δθ|², |θ|² and |g|² of every tensor, [N, 4] float64."""
    _checks.check_lists(theta=theta, delta=delta, grad=grad)
    sums = [
        torch.stack([inner_product(d, g), inner_product(d, d), inner_product(t, t), inner_product(g, g)])
        for t, d, g in zip(theta, delta, grad, strict=True)
    ]
    return torch.stack(sums) if sums else torch.zeros(0, 4, dtype=torch.float64)


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ aᵢbᵢ accumulated in float64.

    Args:
        a: real tensor, any shape and floating dtype.
        b: tensor of the same shape and device as ``a``.

    Returns:
        0-dim float64 tensor on the device of ``a`` (float32 on Apple's mps, which has no float64); not read back, so
        that a loop over parameters waits for the device once, at its end.

    Memory:
        1 MiB on the CPU, 64 MiB elsewhere, plus a copy of an input that is not contiguous.
    """
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    result = torch.zeros((), dtype=wide, device=a.device)
    chunk = _chunk(a.device)
    for chunk_a, chunk_b in zip(torch.split(a.reshape(-1), chunk), torch.split(b.reshape(-1), chunk), strict=True):
        result += torch.dot(chunk_a.to(wide), chunk_b.to(wide))
    return result


def linear(x: Tensor, W: Tensor, D: Tensor, alpha: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return x[k] (W + α_k D)ᵀ, [K, M, N]: one weight at a time, rounded to the dtype of ``x``."""
    num_steps = _checks.check_linear(x, W, D, alpha, dtype)
    dtype = dtype or x.dtype
    wide = torch.promote_types(x.dtype, dtype)
    weight = W.new_empty((1, *W.shape), dtype=x.dtype)
    out = x.new_empty((num_steps, x.shape[1], len(W)), dtype=dtype)
    for inputs, step, result in zip(x.expand(num_steps, -1, -1), alpha.split(1), out, strict=True):
        form(W, D, step, out=weight)
        result.copy_(torch.mm(inputs.to(wide), weight[0].t().to(wide)))
    return out


def embedding(indices: Tensor, W: Tensor, D: Tensor, alpha: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return rows of W + α_k D, [K, *indices.shape, C]; an index outside the table gives a row of NaN."""
    _checks.check_alike(W=W, D=D)
    if W.dim() != 2:
        raise ValueError(f"W must be a matrix [rows, columns], got shape {list(W.shape)}; pass the embedding's weight")
    _checks.check_integers("indices", indices, W.device, "convert them")
    num_steps = _checks.check_alpha(alpha, W.device)
    dtype = dtype or W.dtype
    _checks.check_dtype(dtype)
    out = W.new_empty((num_steps, *indices.shape, W.shape[1]), dtype=dtype)
    if len(W) == 0:
        return out.fill_(math.nan)
    known = (indices >= 0) & (indices < len(W))
    rows = torch.where(known, indices, 0)
    form(F.embedding(rows, W), F.embedding(rows, D), alpha, out=out)
    return out.masked_fill_(~known.unsqueeze(-1), math.nan)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    weight_direction: Tensor | None,
    alpha: Tensor,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return RMSNorm of x[k] with weight W + α_k D, [K, ..., C]."""
    _checks.check_norm(x, alpha, dtype, weight=weight, weight_direction=weight_direction)
    dtype = dtype or x.dtype
    wide = compute_dtype(x.dtype, weight.dtype)
    x = x.to(wide)
    normal = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return (normal * _moved_vectors(weight, weight_direction, alpha, normal)).to(dtype)


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
) -> Tensor:
    """Return LayerNorm of x[k] with weight W + α_k D and bias b + α_k d, [K, ..., C]."""
    if bias is None and bias_direction is not None:
        raise ValueError("bias_direction must be None without a bias, got a tensor; pass the bias that it moves")
    vectors = {"weight": weight, "weight_direction": weight_direction, "bias": bias, "bias_direction": bias_direction}
    _checks.check_norm(x, alpha, dtype, **vectors)
    wide = compute_dtype(x.dtype, weight.dtype)
    normal = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    normal = normal * _moved_vectors(weight, weight_direction, alpha, normal)
    if bias is not None:
        normal = normal + _moved_vectors(bias, bias_direction, alpha, normal)
    return normal.to(dtype or x.dtype)


def online_cross_entropy_(
    maximum: Tensor,
    total: Tensor,
    target: Tensor,
    logits: Tensor,
    labels: Tensor,
    first: int,
    *,
    softcap: float | None = None,
) -> None:
    """Carry every token's maximum, sum of exponentials and label's logit on by one chunk of logits."""
    statistics = {"maximum": maximum, "total": total, "target": target}
    _checks.check_statistics(statistics, logits, labels, first, softcap)
    if logits.numel() == 0:
        return
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    after = torch.maximum(maximum, z.amax(-1))
    # Where every logit so far is −inf there is nothing to shift by, and −inf − (−inf) would be NaN.
    shift = torch.where(after == -math.inf, 0.0, after)
    total.mul_(torch.exp(maximum - shift)).add_(torch.exp(z - shift.unsqueeze(-1)).sum(-1))
    maximum.copy_(after)
    column = labels.long() - first
    here = (column >= 0) & (column < z.shape[-1])
    chosen = z.gather(-1, torch.where(here, column, 0).unsqueeze(-1)).squeeze(-1)
    target.copy_(torch.where(here, chosen, target))


def empty_steps(like: Tensor, num: int, dtype: torch.dtype) -> Tensor:
    """Return an empty [num, *shape], each slice with the strides of a tensor where those are dense.

    A slice starts at a multiple of 16 elements, so that a kernel's stores to it are as wide as those to the first.
    """
    strides = like.stride() if like.is_contiguous() else torch.empty_like(like, device="meta").stride()
    return like.new_empty_strided((num, *like.shape), (-(-like.numel() // 16) * 16, *strides), dtype=dtype)


def _output(
    out: Tensor | None, like: Tensor, num: int, dtype: torch.dtype | None, operands: Iterable[Tensor | None]
) -> Tensor:
    """Return ``out`` if it may be written, or a new one."""
    if out is not None:
        _checks.check_output(out, like, num, operands)
        return out
    dtype = dtype or like.dtype
    _checks.check_dtype(dtype)
    return empty_steps(like, num, dtype)


def _numbers(alpha: Tensor) -> Sequence[float | Tensor]:
    """Return the step sizes one by one; on a GPU as tensors, since reading them would make the host wait."""
    return alpha.tolist() if alpha.device.type == "cpu" else alpha.unbind()


def _add(base: Tensor, delta: Tensor, step: float | Tensor, out: Tensor | None = None) -> Tensor:
    """Return base + step·delta, and base itself, its zeros' signs included, where the step is 0."""
    if isinstance(step, Tensor):
        step = step.to(base.dtype)
        return torch.where(step == 0, base, torch.addcmul(base, delta, step), out=out)
    if step == 0:
        return base if out is None else out.copy_(base)
    return torch.add(base, delta, alpha=step, out=out)


def _adam(
    beta1: float,
    beta2: float,
    correction1: float,
    correction2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    grad_factor: float,
) -> Update:
    """Return the update of Adam and AdamW as a function of θ, g, m, v and the largest v."""
    _checks.check_corrections(correction1=correction1, correction2=correction2)
    _checks.check_numbers(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, grad_factor=grad_factor)

    def update(theta: Tensor, grad: Tensor | None, m: Tensor | None, v: Tensor | None, v_max: Tensor | None) -> Tensor:
        m = torch.zeros_like(theta) if m is None else m.clone()
        v = torch.zeros_like(theta) if v is None else v.clone()
        if grad is not None:
            if grad_factor != 1:
                grad = grad * grad_factor
            if weight_decay != 0 and not decoupled:
                grad = grad.add(theta, alpha=weight_decay)
            m = m.lerp_(grad, 1 - beta1)
            v = v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if v_max is not None:
            v = torch.maximum(v, v_max, out=v)
        denominator = v.sqrt_().div_(correction2**0.5).add_(eps)
        decay = theta.mul(weight_decay) if decoupled and weight_decay != 0 else torch.zeros_like(theta)
        return decay.addcdiv_(m, denominator, value=1 / correction1)

    return update


def _sgd(weight_decay: float, momentum: float, dampening: float, nesterov: bool, grad_factor: float) -> Update:
    """Return the update of SGD as a function of θ, g and the momentum buffer."""
    _checks.check_numbers(weight_decay=weight_decay, momentum=momentum, dampening=dampening, grad_factor=grad_factor)

    def update(theta: Tensor, grad: Tensor, stored: Tensor | None) -> Tensor:
        update = grad * grad_factor
        if weight_decay != 0:
            update.add_(theta, alpha=weight_decay)
        # The first step takes the gradient as the buffer, without dampening.
        buffer = update if stored is None else (stored * momentum).add_(update, alpha=1 - dampening)
        return update.add_(buffer, alpha=momentum) if nesterov else buffer

    return update


def _adam_operands(
    theta: Tensor,
    grad: Tensor | None,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    max_exp_avg_sq: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return what the update of Adam takes, checked."""
    _checks.check_moments(grad, exp_avg, exp_avg_sq)
    state = {"grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "max_exp_avg_sq": max_exp_avg_sq}
    _checks.check_alike(theta=theta, **{name: tensor for name, tensor in state.items() if tensor is not None})
    return theta, *state.values()


def _sgd_operands(theta: Tensor, grad: Tensor, momentum_buffer: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return what the update of SGD takes, checked."""
    buffer = {} if momentum_buffer is None else {"momentum_buffer": momentum_buffer}
    _checks.check_alike(theta=theta, grad=grad, **buffer)
    return theta, grad, momentum_buffer


def _check_has_gradient(grad: Tensor | None) -> None:
    if grad is None:
        raise TypeError("grad must be a tensor, got None; the sums over a step are taken before it, with its gradient")


def _form_from(
    update: Update,
    operands: tuple[Tensor | None, ...],
    alpha: Tensor | None,
    rate: float,
    dtype: torch.dtype | None,
    out: Tensor | None,
) -> Tensor:
    """Return operands[0] + α_k update(*operands), or the update itself, formed some rows at a time."""
    theta = operands[0]
    assert theta is not None
    num_steps = 1 if alpha is None else _checks.check_alpha(alpha, theta.device)
    out = _output(out, theta, num_steps, dtype, (*operands, alpha))
    for delta, (rows, *_), targets in _updates(update, operands, rate, out.unbind()):
        if alpha is None:
            targets[0].copy_(delta)
            continue
        for target, step in zip(targets, _numbers(alpha), strict=True):
            target.copy_(_add(rows.to(delta.dtype), delta, step))
    return out


def _sum_from(update: Update, operands: tuple[Tensor | None, ...], rate: float) -> Tensor:
    """Return Δθᵀg and |Δθ|² of update(*operands), g = operands[1], worked out some rows at a time."""
    sums = [
        torch.stack([inner_product(delta, grad), inner_product(delta, delta)])
        for delta, (_, grad, *_), _ in _updates(update, operands, rate)
    ]
    return torch.stack(sums).sum(0)


def _updates(
    update: Update, operands: tuple[Tensor | None, ...], rate: float, outputs: Sequence[Tensor] = ()
) -> Iterator[tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]]:
    """Yield rate·update(*operands) of some rows at a time, in the widest dtype, with those rows of all tensors.

    Args:
        update: takes the operands.
        operands: of one shape; None for those that are not there.
        rate: what the update is multiplied by.
        outputs: other tensors of that shape.

    Yields:
        Δθ, new and of the rows' shape; the rows of the operands that are there; those of the outputs.
    """
    given = [operand for operand in operands if operand is not None]
    _checks.check_numbers(rate=rate)
    wide = compute_dtype(*(operand.dtype for operand in given))
    for rows in _row_chunks(*given, *outputs):
        parts = iter(part.to(wide) for part in rows[: len(given)])
        delta = update(*(None if operand is None else next(parts) for operand in operands))
        yield delta.mul_(rate) if rate != 1 else delta, rows[: len(given)], rows[len(given) :]


def _moved_vectors(vector: Tensor, direction: Tensor | None, alpha: Tensor, like: Tensor) -> Tensor:
    """Return vector + α_k direction for every k, [K, 1, ..., C] in the dtype of ``like``."""
    moved = vector.to(like.dtype).expand(alpha.numel(), -1)
    if direction is not None:
        moved = torch.stack([_add(moved[0], direction.to(like.dtype), step) for step in _numbers(alpha)])
    return moved.view(alpha.numel(), *[1] * (like.dim() - 2), -1)


def _row_chunks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Views of some rows of each tensor, a chunk of elements at a time."""
    first, chunk = tensors[0], _chunk(tensors[0].device)
    if first.numel() <= chunk or first.dim() == 0:
        return [tensors]
    rows = max(1, chunk // max(1, first[0].numel()))
    return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))


def _chunk(device: torch.device) -> int:
    return _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK


def _form_stochastically(W: Tensor, D: Tensor, alpha: Tensor, seed: int, out: Tensor) -> None:
    """Round W + α_k D up or down by chance to bfloat16, one random number per element for all k, as the kernel does."""
    # Random numbers belong to addresses: elements are counted in the order in which they lie in memory.
    order = sorted(range(W.dim()), key=lambda dim: W.stride(dim), reverse=True)
    first = 0
    for W_rows, D_rows, *targets in _row_chunks(*(tensor.permute(order) for tensor in (W, D, *out))):
        offsets = torch.arange(first, first + W_rows.numel(), device=W.device).view(W_rows.shape)
        random = _scrambled((offsets & _LOW_BITS) ^ _scrambled((offsets >> 32) ^ seed)) & 0xFFFF
        for target, step in zip(targets, _numbers(alpha), strict=True):
            exact = _add(W_rows.float(), D_rows.float(), step)
            raised = ((exact.view(torch.int32) + random) & ~0xFFFF).int().view(torch.float32)
            target.copy_(torch.where(exact.isnan(), exact, raised))
        first += W_rows.numel()


def _scrambled(bits: Tensor) -> Tensor:
    """Return 32 well mixed bits for 32 different ones: the finalizer of MurmurHash3, in int64."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = ((bits ^ (bits >> shift)) * factor) & _LOW_BITS
    return bits ^ (bits >> 16)
