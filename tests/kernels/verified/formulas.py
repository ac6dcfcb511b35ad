"""What the kernels compute, in real arithmetic and in torch.

Each is written in the algebra of its kernel, because the verifier rewrites sums and products but splits few cases.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# The one number of Adam that is fixed.
ROOT_OF_CORRECTION = 2.0**-5


def moved(w: Tensor, d: Tensor, alpha: Tensor, zero: bool | None = None) -> Tensor:
    """w + αd; where it is known whether α = 0, without looking."""
    if zero:
        return w.float()
    sum_ = d.float() * alpha + w.float()
    return torch.where(alpha == 0, w.float(), sum_) if zero is None else sum_


@dataclass(frozen=True)
class Form:
    """W + α_k D."""

    dtype: torch.dtype

    def __call__(self, W: Tensor, D: Tensor, alpha: Tensor) -> Tensor:
        return moved(W[None], D[None], alpha[:, None]).to(self.dtype)


@dataclass(frozen=True)
class Axpy:
    """θ₀ + αΔθ."""

    zero: bool

    def __call__(self, base: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
        return moved(base, delta, alpha, self.zero).clone()


def _root(x: Tensor) -> Tensor:
    return torch.sqrt(torch.abs(x))


def _lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    # From the nearer end.
    return torch.where(weight < 0.5, (end - start) * weight + start, end - (end - start) * (1 - weight))


def update(rule: str, theta: Tensor, grad: Tensor, state: tuple[Tensor, ...], numbers: Tensor) -> Tensor:
    """Δθ of a rule's fullest form: decay, and Nesterov's or centered and with momentum."""
    decay, factor, rate, *own = (numbers[index] for index in range(numbers.shape[0]))
    theta, g = theta.float(), grad.float() * factor
    state = tuple(tensor.float() for tensor in state)
    if rule == "sgd":
        momentum, undamped = own
        g = theta * decay + g
        found = (g * undamped + state[0] * momentum) * momentum + g if state else g
    elif rule == "lion":
        m = g * own[1] + state[0] * own[0]
        found = theta * decay + torch.where(m > 0, 1.0, torch.where(m < 0, -1.0, 0.0))
    elif rule == "adam":
        lerp1, beta2, lerp2, inverse_correction1, _, eps = own
        v = lerp2 * g * g + state[1] * beta2
        m = _lerp(state[0], g, lerp1)
        found = theta * decay + m * inverse_correction1 / (_root(v) / ROOT_OF_CORRECTION + eps)
    else:
        alpha, lerp, eps, momentum = own
        g = theta * decay + g
        a = _lerp(state[1], g, lerp)
        v = lerp * g * g + state[0] * alpha - a * a
        found = state[2] * momentum + g / (_root(v) + eps)
    return found * rate


@dataclass(frozen=True)
class Step:
    """θ + α_k Δθ, or Δθ."""

    rule: str
    dtype: torch.dtype = torch.float32
    zero: bool | None = None

    def __call__(self, theta: Tensor, grad: Tensor, *others: Tensor) -> Tensor:
        *state, alpha, numbers = others
        change = update(self.rule, theta, grad, tuple(state), numbers)
        return moved(theta[None], change[None], alpha[:, None], self.zero).to(self.dtype)


@dataclass(frozen=True)
class Update:
    """Δθ."""

    rule: str

    def __call__(self, theta: Tensor, grad: Tensor, *others: Tensor) -> Tensor:
        *state, numbers = others
        return update(self.rule, theta, grad, tuple(state), numbers)[None]


@dataclass(frozen=True)
class WholeStep:
    """θ + αΔθ of one tensor of a model."""

    rule: str
    zero: bool | None = None

    def __call__(self, theta: Tensor, grad: Tensor, *others: Tensor) -> Tensor:
        *state, alpha, numbers = others
        return moved(theta, update(self.rule, theta, grad, tuple(state), numbers), alpha, self.zero).clone()


@dataclass(frozen=True)
class StepSums:
    """Δθᵀg and |Δθ|² of one chunk."""

    rule: str

    def __call__(self, theta: Tensor, grad: Tensor, *others: Tensor) -> Tensor:
        *state, numbers = others
        d = update(self.rule, theta, grad, tuple(state), numbers).double()
        return torch.stack([(d * grad.double()).sum(0), (d * d).sum(0)])[None]


@dataclass(frozen=True)
class PlainStepSums:
    """The same of SGD without momentum and decay."""

    def __call__(self, grad: Tensor, numbers: Tensor) -> Tensor:
        d = (grad.float() * numbers[1] * numbers[2]).double()
        return torch.stack([(d * grad.double()).sum(0), (d * d).sum(0)])[None]


@dataclass(frozen=True)
class Sums:
    """Δθᵀg, |Δθ|², |θ|² and |g|² of one chunk."""

    def __call__(self, theta: Tensor, delta: Tensor, grad: Tensor) -> Tensor:
        t, d, g = theta.double(), delta.double(), grad.double()
        return torch.stack([(d * g).sum(0), (d * d).sum(0), (t * t).sum(0), (g * g).sum(0)])[None]


@dataclass(frozen=True)
class SumsOfChunks:
    """Sums of the chunks of tensors of equally many."""

    tensors: int

    def __call__(self, partial: Tensor) -> Tensor:
        return partial.view(self.tensors, -1, partial.shape[1]).sum(1)


@dataclass(frozen=True)
class Embedding:
    """W[i] + α_k D[i], NaN where there is no row i."""

    dtype: torch.dtype

    def __call__(self, indices: Tensor, W: Tensor, D: Tensor, alpha: Tensor) -> Tensor:
        known = (indices >= 0) & (indices < W.shape[0])
        row = torch.where(known, indices, 0)
        x = moved(W[row][None], D[row][None], alpha[:, None, None])
        return torch.where(known[None, :, None], x, float("nan")).to(self.dtype)


@dataclass(frozen=True)
class Norm:
    """(x − mean) / √(mean of squares + ε) · (w + α_k d) + b + α_k e; without a bias, no mean is taken off."""

    eps: float
    dtype: torch.dtype

    def __call__(self, x: Tensor, weight: Tensor, weight_direction: Tensor, *others: Tensor) -> Tensor:
        *biases, alpha = others
        x = x.float().view(alpha.shape[0], -1, x.shape[1])
        if biases:
            x = x - x.sum(-1, keepdim=True) / x.shape[-1]
        scale = 1.0 / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + self.eps)
        y = x * scale * moved(weight[None, None], weight_direction[None, None], alpha[:, None, None])
        if biases:
            y = y + moved(biases[0][None, None], biases[1][None, None], alpha[:, None, None])
        return y.to(self.dtype)


@dataclass(frozen=True)
class OnlineCrossEntropy:
    """The largest logit so far, and the sum of exponentials of the logits so far less it."""

    def __call__(self, maximum: Tensor, total: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        largest = logits.amax(-1)
        after = torch.where(maximum > largest, maximum, largest)
        return after, total * torch.exp(maximum - after) + torch.exp(logits - after[:, None]).sum(-1)


@dataclass(frozen=True)
class OnlineCrossEntropyAtLabel:
    """The same, and the logit of the label."""

    def __call__(self, maximum: Tensor, total: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return *OnlineCrossEntropy()(maximum, total, logits), logits.gather(1, labels[:, None])[:, 0]


@dataclass(frozen=True)
class Linear:
    """x_k (W + α_k D)ᵀ."""

    dtype: torch.dtype
    zero: bool | None = None

    def __call__(self, x: Tensor, W: Tensor, D: Tensor, alpha: Tensor) -> Tensor:
        return torch.stack([x[k].float() @ self._formed(W, D, alpha[k]).t() for k in range(alpha.shape[0])]).to(
            self.dtype
        )

    def _formed(self, W: Tensor, D: Tensor, alpha: Tensor) -> Tensor:
        if self.zero is not None:
            return moved(W, D, alpha, self.zero)
        return W.float() + alpha * torch.where(alpha == 0, 0.0, D.float())


@dataclass(frozen=True)
class SumOfParts:
    """Sums of the parts of columns."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __call__(self, parts: Tensor) -> Tensor:
        return parts.sum(0).view(self.shape).to(self.dtype)
