"""Language-model head and cross-entropy without the logits: the vocabulary goes by in chunks of 4096 rows.

loss = Σ_t (log Σ_v exp z_tv − z_t,label) / number of labels,   z = hidden Wᵀ

One matrix product gives a chunk of logits in fp32, and each token's maximum, sum of exponentials and label's logit are
carried on by it. Chunks combine in a fixed order, tokens add up in fp64. What would take 4 bytes per token and entry of
the vocabulary takes 4 per token and row of a chunk.

Source: Milakov and Gimelshein 2018 (online normaliser of softmax).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from sharpkern.ops.matmul import accumulator_dtype, matmul_operand, mixed_matmul, product_dtype
from sharpkern.ops.online_cross_entropy import online_cross_entropy_
from sharpkern.ops.registry import Backend
from sharpkern.tensors.fake import is_fake

VOCABULARY_CHUNK = 4096

Rows = Callable[[slice], Tensor]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return the cross-entropy of ``hidden @ weight.T`` with the labels, without ever holding the logits.

    For closures and training loops alike: differentiable once, by ``hidden`` and ``weight``. Under autocast the product
    is in autocast's dtype. Logits of 16-bit matrices are kept in fp32 and not rounded to 16 bits.

    Args:
        hidden: last hidden states, [..., C], float32, float16, bfloat16 or float64.
        weight: of the head, [V, C], dtype and device of ``hidden``.
        labels: [...], int64 or int32, already shifted.
        ignore_index: label of tokens that do not count.
        reduction: "mean" over the tokens that count, or "sum".
        softcap: c of the cap c·tanh(z/c) on the logits, positive and finite, or None.
        backend: of the softmax statistics, "auto", "triton" or "torch"; see `sharpkern.ops`.

    Returns:
        Tensor: 0-dim, float32 (float64 for float64 operands). NaN where no token counts and the mean is asked for, and,
        on a GPU, where a label that counts is outside [0, V).

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape, device, label, reduction or softcap does not fit.

    The backward pass raises a RuntimeError where a second derivative is asked for, by ``create_graph=True``.

    Memory:
        One fp32 chunk of logits, 4096 values per token (three with the torch backend, which forms exponentials). The
        backward pass computes the chunks anew: one or, with a softcap, two of them, a copy in 16 bits where the product
        is, two fp32 copies of ``hidden``'s size and the gradients. 16-bit products need their factors in fp32 besides
        where torch cannot widen on the way: on the CPU, with HIP, and before torch 2.8.

    Determinism:
        The same bits on every run if the matrix product gives them.

    Examples:
        >>> import torch, sharpkern
        >>> hidden, weight = torch.randn(2, 5, 8), torch.randn(100, 8)
        >>> labels = torch.randint(100, (2, 5))
        >>> loss = sharpkern.linear_cross_entropy(hidden, weight, labels)
        >>> stock = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())
        >>> torch.allclose(loss, stock)
        True
    """
    if has_torch_function((hidden, weight, labels)):
        return handle_torch_function(
            linear_cross_entropy,
            (hidden, weight, labels),
            hidden,
            weight,
            labels,
            ignore_index=ignore_index,
            reduction=reduction,
            softcap=softcap,
            backend=backend,
        )
    check_operands(hidden, weight, labels, reduction, softcap)
    task = _Task(labels.reshape(-1).contiguous(), product_dtype(hidden), ignore_index, reduction, softcap, backend)
    return _LinearCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), weight, task)  # type: ignore[no-any-return, no-untyped-call]


@torch.no_grad()
def cross_entropy_of_rows(
    hidden: Tensor,
    vocabulary: int,
    rows: Rows,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    backend: Backend = "auto",
    height: int | None = None,
) -> Tensor:
    """`linear_cross_entropy` of a weight that exists one chunk of ``height`` rows at a time. Not differentiable.

    Factors are not checked here: see `check_operands`.
    """
    labels = labels.expand(hidden.shape[:-1]).contiguous()
    task = _Task(labels, hidden.dtype, ignore_index, reduction, softcap, backend, height)
    return _loss(_statistics(hidden, vocabulary, rows, task), task)


@dataclass(frozen=True)
class _Task:
    """What is computed of the logits: the arguments of `linear_cross_entropy` besides the factors."""

    labels: Tensor
    dtype: torch.dtype
    ignore_index: int
    reduction: str
    softcap: float | None
    backend: Backend
    height: int | None = None

    @property
    def counted(self) -> Tensor:
        """Which tokens count, [T] bool."""
        return self.labels != self.ignore_index

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of logits and statistics."""
        return accumulator_dtype(self.dtype)


@dataclass(frozen=True)
class _Statistics:
    """Of each token's logits: their maximum, Σ exp(logit − maximum), and the label's logit; [T]."""

    maximum: Tensor
    total: Tensor
    target: Tensor


class _LinearCrossEntropy(torch.autograd.Function):
    """Backward goes over the chunks a second time: (softmax − one-hot) of one chunk, and its part of both gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, task: _Task) -> Tensor:
        statistics = _statistics(hidden, len(weight), lambda rows: weight[rows].to(task.dtype), task)
        ctx.save_for_backward(hidden, weight, statistics.maximum, statistics.total)
        ctx.task = task
        return _loss(statistics, task)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # The gradient would count as constant, without a word.
            raise RuntimeError(
                "linear_cross_entropy must be differentiated once only, got create_graph=True; for second derivatives "
                "take torch.nn.functional.cross_entropy of the logits"
            )
        hidden, weight, maximum, total = ctx.saved_tensors
        task: _Task = ctx.task
        states = matmul_operand(hidden, task.dtype)
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.zeros_like(hidden, dtype=task.accumulator) if wants_hidden else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        num_counted = task.counted.sum() if task.reduction == "mean" else 1
        scale = torch.where(task.counted, grad.to(task.accumulator) / num_counted, 0.0).unsqueeze(-1)
        for rows, logits in _chunks(hidden, len(weight), task):
            chunk = matmul_operand(weight[rows], task.dtype)
            mixed_matmul(states, chunk.t(), logits)
            slope = _cap(logits, task.softcap)
            _softmax_minus_one_hot(logits, maximum, total, task.labels - rows.start)
            logits.mul_(scale)
            if slope is not None:
                logits.mul_(slope)
            slopes = matmul_operand(logits, task.dtype)
            if grad_hidden is not None:
                grad_hidden.add_(mixed_matmul(slopes, chunk, torch.empty_like(grad_hidden)))
            if grad_weight is not None:
                part = torch.empty(chunk.shape, dtype=task.accumulator, device=chunk.device)
                grad_weight[rows] = mixed_matmul(slopes.t(), states, part)
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None


def _statistics(hidden: Tensor, vocabulary: int, rows: Rows, task: _Task) -> _Statistics:
    _check_range(task, vocabulary)
    # A label that no chunk contains leaves NaN.
    maximum, total, target = (
        torch.full((task.labels.numel(),), start, dtype=task.accumulator, device=hidden.device)
        for start in (-torch.inf, 0.0, torch.nan)
    )
    states = matmul_operand(hidden, task.dtype)
    for chosen, logits in _chunks(hidden, vocabulary, task):
        mixed_matmul(states, matmul_operand(rows(chosen), task.dtype).mT, logits)
        online_cross_entropy_(
            maximum,
            total,
            target,
            logits.flatten(0, -2),
            task.labels.flatten(),
            chosen.start,
            softcap=task.softcap,
            backend=task.backend,
        )
    return _Statistics(maximum, total, target)


def _loss(statistics: _Statistics, task: _Task) -> Tensor:
    # Apple's mps has no float64.
    wide = torch.float32 if task.labels.device.type == "mps" else torch.float64
    maximum, total, target = (part.to(wide) for part in (statistics.maximum, statistics.total, statistics.target))
    losses = (maximum + total.log() - target).view(task.labels.shape)
    loss = torch.where(task.counted, losses, 0.0).sum(-1)
    if task.reduction == "mean":
        loss = loss / task.counted.sum(-1)
    return loss.to(task.accumulator)


def _chunks(hidden: Tensor, vocabulary: int, task: _Task) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the vocabulary, each with memory for its logits; all take turns in one buffer."""
    # All step sizes together have as many logits as one would have.
    height = min(task.height or max(1, VOCABULARY_CHUNK // math.prod(hidden.shape[:-2])), vocabulary)
    # Rows of a ragged last chunk keep their distance, so that each starts at an aligned address.
    memory = torch.empty(*hidden.shape[:-1], height, dtype=task.accumulator, device=hidden.device)
    for first in range(0, vocabulary, height):
        chosen = slice(first, min(first + height, vocabulary))
        yield chosen, memory[..., : chosen.stop - first]


def _cap(logits: Tensor, softcap: float | None) -> Tensor | None:
    """Cap the logits z in place, and return the derivative 1 − tanh²(z/c); None without a cap."""
    if softcap is None:
        return None
    bent = logits.div_(softcap).tanh_()
    slope = 1 - bent.square()
    logits.mul_(softcap)
    return slope


def _softmax_minus_one_hot(logits: Tensor, maximum: Tensor, total: Tensor, columns: Tensor) -> None:
    """Turn one chunk of logits into the derivative of each token's loss by them, in place."""
    logits.sub_(maximum.unsqueeze(-1)).exp_().div_(total.unsqueeze(-1))
    here = (columns >= 0) & (columns < logits.shape[1])
    index = torch.where(here, columns, 0).long().unsqueeze(-1)
    logits.scatter_(1, index, logits.gather(1, index) - here.unsqueeze(-1).to(logits.dtype))


def check_operands(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str, softcap: float | None) -> None:
    """Refuse what `linear_cross_entropy` cannot take."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}; pass a torch.Tensor")
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in _FLOATS:
            raise TypeError(
                f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}; convert it with .to()"
            )
    if weight.dim() != 2 or len(weight) == 0:
        raise ValueError(
            f"weight must be a matrix [vocabulary, hidden size], got shape {list(weight.shape)}; pass lm_head.weight"
        )
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must have shape [..., {weight.shape[1]}], the width of weight, got {list(hidden.shape)}; "
            "pass the last hidden states, before the head"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must have shape {list(hidden.shape[:-1])}, one per token of hidden, got {list(labels.shape)}; "
            "shift them: hidden[:, :-1] predicts tokens[:, 1:]"
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}; class probabilities are not supported")
    for name, tensor in (("weight", weight), ("labels", labels)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device}, as hidden is, got {tensor.device}; move it there")
    if product_dtype(hidden) != product_dtype(weight):
        raise TypeError(
            f"weight must be {hidden.dtype}, as hidden is, got {weight.dtype}; convert one of them, or use autocast"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}; leave it out for 'mean'")
    if softcap is not None and not 0 < softcap < math.inf:
        rule = "finite" if softcap == math.inf else "positive"
        raise ValueError(f"softcap must be {rule}, got {softcap}; leave it out for none")


def _check_range(task: _Task, vocabulary: int) -> None:
    """Refuse labels outside the vocabulary where looking costs no wait for a device."""
    if task.labels.device.type != "cpu" or is_fake(task.labels):
        return
    wrong = task.labels[task.counted & ((task.labels < 0) | (task.labels >= vocabulary))]
    if len(wrong):
        raise ValueError(
            f"labels must be in [0, {vocabulary}) or ignore_index {task.ignore_index}, got {int(wrong[0])}; set those "
            "that do not count to ignore_index"
        )
