"""Every operation of `sharpkern.ops` as its formula in plain torch, whole tensors at a time.

In float64 it is what results are checked against; in their own dtype it is the line of torch, eager and compiled, that
a sweep draws. It shares no code with the package.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _moved(base: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    """Return θ + α_k Δθ with K in front, in float32 or wider."""
    return _wide(base) + alpha.view(-1, *[1] * base.dim()) * _wide(delta)


def axpy_(theta: Sequence[Tensor], base: Sequence[Tensor], delta: Sequence[Tensor], alpha: Tensor) -> None:
    """θ ← θ₀ + αΔθ."""
    for out, one, other in zip(theta, base, delta, strict=True):
        out.copy_(_moved(one, other, alpha)[0])


def form(W: Tensor, D: Tensor, alpha: Tensor, *, dtype: torch.dtype | None = None, seed: int | None = None) -> Tensor:
    """W + α_k D, rounded to nearest with a seed too."""
    return _moved(W, D, alpha).to(dtype or W.dtype)


def adam_update(
    theta: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    beta1: float,
    beta2: float,
    correction1: float,
    correction2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    grad_factor: float = 1.0,
    rate: float = 1.0,
    max_exp_avg_sq: Tensor | None = None,
) -> Tensor:
    """Δθ = rate·(m̂/(√v̂ + ε) + γθ)."""
    theta, grad, m, v = (_wide(tensor) for tensor in (theta, grad, exp_avg, exp_avg_sq))
    grad = grad_factor * grad + (0.0 if decoupled else weight_decay) * theta
    m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad * grad
    v = v if max_exp_avg_sq is None else torch.maximum(v, _wide(max_exp_avg_sq))
    step: Tensor = m / correction1 / (v.sqrt() / correction2**0.5 + eps)
    return rate * (step + (weight_decay if decoupled else 0.0) * theta)


def sgd_update(
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
    """Δθ = rate·(g + γθ, through momentum)."""
    grad = grad_factor * _wide(grad) + weight_decay * _wide(theta)
    buffer = grad if momentum_buffer is None else momentum * _wide(momentum_buffer) + (1 - dampening) * grad
    return rate * (grad + momentum * buffer if nesterov else buffer)


def _formed(update: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def formed(theta: Tensor, *operands: Any, dtype: torch.dtype | None = None, **numbers: Any) -> Tensor:
        *state, alpha = operands
        delta = update(theta, *state, **numbers)
        return (delta[None] if alpha is None else _moved(theta, delta, alpha)).to(dtype or theta.dtype)

    return formed


def _summed(update: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def summed(theta: Tensor, grad: Tensor, *state: Any, **numbers: Any) -> Tensor:
        delta = update(theta, grad, *state, **numbers).double()
        return torch.stack([(delta * grad).sum(), (delta * delta).sum()])

    return summed


def _updates(
    rule: str,
    theta: Sequence[Tensor],
    grad: Sequence[Tensor],
    state: Sequence[Tensor | None],
    numbers: Sequence[float],
    decoupled: bool,
    flag: bool,
) -> Iterator[Tensor]:
    """Yield Δθ of every parameter; state and numbers are those of `sharpkern.ops.form_steps_`."""
    shared: dict[str, Any] = dict(zip(("weight_decay", "grad_factor", "rate"), numbers, strict=False))
    own, width = numbers[3:], len(state) // len(theta)
    for i, (one, g) in enumerate(zip(theta, grad, strict=True)):
        mine: Sequence[Any] = state[i * width : (i + 1) * width]
        if rule == "sgd":
            yield sgd_update(one, g, *mine, momentum=own[0], dampening=1 - own[1], nesterov=flag, **shared)
            continue
        lerp1, beta2, _, inverse_correction1, root_correction2, eps = own
        shared |= {"correction1": 1 / inverse_correction1, "correction2": root_correction2**2, "decoupled": decoupled}
        shared |= {"beta1": 1 - lerp1, "beta2": beta2, "eps": eps, "max_exp_avg_sq": mine[2]}
        yield adam_update(one, g, mine[0], mine[1], **shared)


def form_steps_(
    rule: str,
    written: Sequence[Tensor],
    theta: Sequence[Tensor],
    grad: Sequence[Tensor],
    state: Sequence[Tensor | None],
    alpha: Tensor | None,
    numbers: Sequence[float],
    *,
    decoupled: bool = False,
    flag: bool = False,
) -> None:
    """θ + αΔθ of every parameter, or Δθ."""
    deltas = _updates(rule, theta, grad, state, numbers, decoupled, flag)
    for out, one, delta in zip(written, theta, deltas, strict=True):
        out.copy_(delta if alpha is None else _moved(one, delta, alpha)[0])


def sum_steps(
    rule: str,
    theta: Sequence[Tensor],
    grad: Sequence[Tensor],
    state: Sequence[Tensor | None],
    numbers: Sequence[float],
    *,
    decoupled: bool = False,
    flag: bool = False,
) -> Tensor:
    """Δθᵀg and |Δθ|² of every parameter."""
    deltas = (delta.double() for delta in _updates(rule, theta, grad, state, numbers, decoupled, flag))
    return torch.stack([torch.stack([(d * g).sum(), (d * d).sum()]) for d, g in zip(deltas, grad, strict=True)])


def reduce(theta: Sequence[Tensor], delta: Sequence[Tensor], grad: Sequence[Tensor]) -> Tensor:
    """Δθᵀg, |Δθ|², |θ|², |g|² of every tensor."""
    wide = [[tensor.double() for tensor in tensors] for tensors in zip(theta, delta, grad, strict=True)]
    return torch.stack([torch.stack([(d * g).sum(), (d * d).sum(), (t * t).sum(), (g * g).sum()]) for t, d, g in wide])


def linear(x: Tensor, W: Tensor, D: Tensor, alpha: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """x[k] (W + α_k D)ᵀ, weights rounded to the dtype of ``x``."""
    dtype = dtype or x.dtype
    weight = _moved(W, D, alpha).to(x.dtype)
    wide = torch.promote_types(x.dtype, dtype)
    return torch.matmul(x.to(wide), weight.mT.to(wide)).to(dtype)


def embedding(indices: Tensor, W: Tensor, D: Tensor, alpha: Tensor) -> Tensor:
    """Rows of W + α_k D."""
    return form(W[indices], D[indices], alpha)


def rms_norm(x: Tensor, weight: Tensor, direction: Tensor, alpha: Tensor, *, eps: float) -> Tensor:
    """x[k]/√(mean x[k]² + ε) · (W + α_k D)."""
    wide = _wide(x)
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * _rows(weight, direction, alpha)).to(x.dtype)


def layer_norm(
    x: Tensor, weight: Tensor, direction: Tensor, bias: Tensor, bias_direction: Tensor, alpha: Tensor, *, eps: float
) -> Tensor:
    """(x[k] − mean)/√(var + ε) · (W + α_k D) + b + α_k d."""
    normal = F.layer_norm(_wide(x), x.shape[-1:], eps=eps)
    return (normal * _rows(weight, direction, alpha) + _rows(bias, bias_direction, alpha)).to(x.dtype)


def _rows(vector: Tensor, direction: Tensor, alpha: Tensor) -> Tensor:
    return _moved(vector, direction, alpha).unsqueeze(1)


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
    """Maximum, Σ exp(logit − maximum) and label's logit, carried on by a chunk that holds a finite logit per row."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    after = torch.maximum(maximum, z.amax(-1))
    total.copy_(total * torch.exp(maximum - after) + torch.exp(z - after[:, None]).sum(-1))
    maximum.copy_(after)
    column = labels.long() - first
    here = (column >= 0) & (column < z.shape[-1])
    target.copy_(torch.where(here, z.gather(-1, torch.where(here, column, 0)[:, None])[:, 0], target))


FORMULAS: dict[str, Callable[..., Any]] = {
    "axpy_": axpy_,
    "form": form,
    "form_adam": _formed(adam_update),
    "form_sgd": _formed(sgd_update),
    "adam_sums": _summed(adam_update),
    "sgd_sums": _summed(sgd_update),
    "form_steps_": form_steps_,
    "sum_steps": sum_steps,
    "reduce": reduce,
    "linear": linear,
    "embedding": embedding,
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "online_cross_entropy_": online_cross_entropy_,
}
