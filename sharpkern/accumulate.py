"""Directions from batches alone, where no training loop holds a gradient: of a checkpoint, or of a mix of data."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from sharpkern._hvp import check_loss
from sharpkern.direction import Direction
from sharpkern.engines.guards import preserved
from sharpkern.updates.placement import checked_module

LossFn = Callable[[], Tensor]


def gradient_direction(model: nn.Module, losses: Iterable[LossFn]) -> Direction:
    """Return the mean gradient of some batches, the update of plain gradient descent; the model stays as it is.

    Args:
        model: whose parameters with ``requires_grad`` move.
        losses: one closure per batch, each returning the scalar loss of the model's current parameters with its graph.
            They are called once, in order, from the random state at entry on.

    Returns:
        The direction, with |g|² as its slope, which is Δθᵀg of the mean loss of all batches.

    Raises:
        TypeError: if ``model`` is no module, or a closure returns no tensor.
        ValueError: if there is no closure, or a loss that depends on no parameter.

    Memory:
        One gradient, which the direction keeps, and one batch's forward and backward pass.

    Determinism:
        As deterministic as the model's backward pass.

    Source:
        Kalra et al. 2026, arXiv 2601.16979.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> gradient_direction(model, [lambda: 2 * model.weight.sum(), lambda: 4 * model.weight.sum()]).tensors
        (tensor([[3., 3.]]),)
    """
    with preserved(checked_module(model), grad=True):
        num_batches = len(list(_backward(model, losses)))
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= num_batches
        return Direction.from_gradients(model)


def adamw_direction(
    model: nn.Module,
    losses: Iterable[LossFn],
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> Direction:
    """Return AdamW's update with moments accumulated over some batches while the model stays as it is.

    The moments start from zero and their bias is corrected, as in training, so that a few batches are enough for the
    first one; with a single batch the update is nearly the gradient's sign.

    Args:
        model: whose parameters with ``requires_grad`` move.
        losses: one closure per batch, as for `gradient_direction`.
        betas: decay of the first and the second moment; the defaults are those of language model training.
        eps: added to the root of the second moment.
        weight_decay: γ, decoupled.

    Returns:
        The direction, per unit learning rate. It has no slope, since no single batch's gradient belongs to it.

    Raises:
        TypeError: if ``model`` is no module, or a closure returns no tensor.
        ValueError: if there is no closure, a loss that depends on no parameter, or a setting that AdamW refuses.

    Memory:
        Both moments in float32, the gradient, and one batch's forward and backward pass; one tensor of each
        parameter's size, in float32, stays with the direction.

    Determinism:
        As deterministic as the model's backward pass.

    Source:
        Loshchilov & Hutter 2019, arXiv 1711.05101; Kalra et al. 2026, arXiv 2601.16979.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> adamw_direction(model, [lambda: 2 * model.weight.sum()] * 3, weight_decay=0.0)
        Direction(1 tensors, 2 elements, |Δθ| = 1.41)
    """
    beta1, beta2 = betas
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}; leave them out for (0.9, 0.95)")
    moments: dict[nn.Parameter, _Moments] = {}
    with preserved(checked_module(model), grad=True):
        for _ in _backward(model, losses):
            for parameter in model.parameters():
                if parameter.grad is not None:
                    moments.setdefault(parameter, _Moments(parameter)).enter(parameter.grad, beta1, beta2)
                    parameter.grad = None
        with torch.no_grad():
            updates = {p: one.update(beta1, beta2, eps).add_(p, alpha=weight_decay) for p, one in moments.items()}
    return Direction.from_tensors(updates, model)


class _Moments:
    """Running means of one parameter's gradient and of its square, from zero on."""

    def __init__(self, parameter: Tensor) -> None:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        self._first, self._second = (torch.zeros_like(parameter, dtype=dtype, requires_grad=False) for _ in range(2))
        self._count = 0

    @torch.no_grad()
    def enter(self, gradient: Tensor, beta1: float, beta2: float) -> None:
        """Let one gradient in."""
        gradient = gradient.to(self._first.dtype)
        self._first.lerp_(gradient, 1 - beta1)
        self._second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        self._count += 1

    def update(self, beta1: float, beta2: float, eps: float) -> Tensor:
        """Return m̂/(√v̂ + ε), in the memory of the moments."""
        root = self._second.div_(1 - beta2**self._count).sqrt_().add_(eps)
        return self._first.div_(1 - beta1**self._count).div_(root)


def _backward(model: nn.Module, losses: Iterable[LossFn]) -> Iterator[int]:
    """Add the gradient of one loss after the other to ``.grad``, and yield after each how many there were before."""
    hooked = next((p for p in model.parameters() if p._post_accumulate_grad_hooks), None)
    if hooked is not None:
        raise ValueError(
            f"model must have no hooks that run after a gradient is there (register_post_accumulate_grad_hook), got "
            f"one on a parameter of shape {list(hooked.shape)}, which may step it; remove them, or make the direction "
            "by Direction.between"
        )
    number = -1
    for number, loss_fn in enumerate(losses):
        loss = loss_fn()
        check_loss(loss)
        loss.backward()
        yield number
    if number < 0:
        raise ValueError("losses must hold at least one closure, got none; pass one for each batch")
