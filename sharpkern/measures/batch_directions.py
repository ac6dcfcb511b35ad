"""Directions from batches alone, where no training loop holds a gradient: of a checkpoint, or of a mix of data."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from sharpkern.directions.direction import Direction
from sharpkern.directions.placement import checked_module
from sharpkern.directions.shared_memory import summed
from sharpkern.distributed.declared import Ranks, check_ranks
from sharpkern.distributed.sharding import fsdp_modules, is_sharded, reshard
from sharpkern.engines.evaluation.parametrizations import empty_cache
from sharpkern.engines.session import Session, in_session
from sharpkern.measures.hvp import check_differentiable, no_reducers

LossFn = Callable[[], Tensor]


def gradient_direction(model: nn.Module, losses: Iterable[LossFn], *, ranks: Ranks | str | None = None) -> Direction:
    """Return the mean gradient of some batches, the update of plain gradient descent; the model stays as it is.

    Args:
        model: whose parameters with ``requires_grad`` move.
        losses: one closure per batch, each returning the scalar loss of the model's current parameters with its graph.
            They are called once, in order, from the random state at entry on.
        ranks: as for `critical_sharpness`, for the mean over ranks that nothing tells of; not for ranks that split the
            model.

    Returns:
        The direction, with |g|² as its slope, which is Δθᵀg of the mean loss of all batches.

    Raises:
        TypeError: if ``model`` is no module, or a closure returns no tensor.
        ValueError: if there is no closure, or a loss that depends on no parameter.

    Memory:
        The mean gradient, in float32 for 16-bit weights, which the direction keeps; and one batch's forward and
        backward pass.

    Determinism:
        As deterministic as the model's backward pass.

    Source:
        Kalra et al. 2026, arXiv 2601.16979.

    Examples:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> gradient_direction(model, [lambda: 2 * model.weight.sum(), lambda: 4 * model.weight.sum()]).tensors
        (tensor([[3., 3.]]),)
    """

    def mean(session: Session) -> dict[nn.Parameter, Tensor]:
        sums: dict[nn.Parameter, Tensor] = {}
        num_batches = 0
        for gradients in _gradients(session, losses):
            num_batches += 1
            for parameter, gradient in gradients.items():
                wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                sums[parameter] = sums[parameter].add_(wide) if parameter in sums else wide
        return {parameter: total.div_(num_batches) for parameter, total in sums.items()}

    given = checked_module(model)
    check_ranks(ranks)
    direction = _direction(in_session(mean, given, None, _known(losses), ranks=ranks, grad=True), model)
    return direction.as_gradient()


def adamw_direction(
    model: nn.Module,
    losses: Iterable[LossFn],
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    ranks: Ranks | str | None = None,
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
        ranks: as for `gradient_direction`.

    Returns:
        The direction, per unit learning rate. It has no slope, since no single batch's gradient belongs to it.

    Raises:
        TypeError: if ``model`` is no module, or a closure returns no tensor.
        ValueError: if there is no closure, a loss that depends on no parameter, or a setting is out of range.

    Memory:
        Both moments in float32, the gradient, and one batch's forward and backward pass; one tensor of each
        parameter's size, in float32, stays with the direction.

    Determinism:
        As deterministic as the model's backward pass.

    Source:
        Loshchilov & Hutter 2019, arXiv 1711.05101; Kalra et al. 2026, arXiv 2601.16979.

    Examples:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> adamw_direction(model, [lambda: 2 * model.weight.sum()] * 3, weight_decay=0.0)
        Direction(1 tensors, 2 elements, |Δθ| = 1.41)
    """
    beta1, beta2 = betas
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}; leave them out for (0.9, 0.95)")
    for name, value in (("eps", eps), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number >= 0, got {value}; leave it out for the default")

    def updates(session: Session) -> dict[nn.Parameter, Tensor]:
        moments: dict[nn.Parameter, _Moments] = {}
        for gradients in _gradients(session, losses):
            for parameter, gradient in gradients.items():
                moments.setdefault(parameter, _Moments(parameter)).enter(gradient, beta1, beta2)
        with torch.no_grad():
            return {p: one.update(beta1, beta2, eps).add_(p, alpha=weight_decay) for p, one in moments.items()}

    given = checked_module(model)
    check_ranks(ranks)
    return _direction(in_session(updates, given, None, _known(losses), ranks=ranks, grad=True), model)


def _direction(updates: dict[nn.Parameter, Tensor], model: nn.Module) -> Direction:
    """Return the direction of each parameter's own update."""
    labels = [f"the parameter of shape {list(parameter.shape)}" for parameter in updates]
    moved = summed(list(updates), list(updates.values()), labels)
    return Direction.from_tensors(dict(zip(updates, moved, strict=True)), model)


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


def _known(losses: Iterable[LossFn]) -> Sequence[LossFn]:
    """Return the closures that are there already; an iterator makes them one by one."""
    return losses if isinstance(losses, Sequence) else ()


def _gradients(session: Session, losses: Iterable[LossFn]) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Yield the gradients of one loss after the other, of parameters that have one, and leave no ``.grad`` behind."""
    model, ranks = session.model, session.ranks
    if ranks.splits:
        raise TypeError(
            "model must be whole on every rank, or sharded by fully_shard, for gradients of its own losses, got one "
            "that is split over ranks or wrapped in FSDP1; make the direction by Direction.from_optimizer"
        )
    hooked = next((p for p in model.parameters() if p._post_accumulate_grad_hooks), None)
    if hooked is not None:
        raise ValueError(
            f"model must have no hooks that run after a gradient is there (register_post_accumulate_grad_hook), got "
            f"one on a parameter of shape {list(hooked.shape)}, which may step it; remove them, or make the direction "
            "by Direction.between"
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # FSDP2 communicates in its backward pass, where a rank that fails leaves the others behind.
    step = nullcontext if fsdp_modules(model) else session.in_step
    found = False
    for loss_fn in losses:
        found = True
        # A data-parallel reducer would write the buckets that the run's own gradients may be views of.
        with step(), no_reducers(session.outer):
            empty_cache()
            check_differentiable(loss_fn()).backward()
        gradients = {parameter: parameter.grad for parameter in parameters}
        for parameter in parameters:
            parameter.grad = None
        reshard(model)
        # FSDP2 takes the mean of its gradients itself; of the others those used on any rank.
        plain = [parameter for parameter in parameters if not is_sharded(parameter)]
        used = ranks.any_of([gradients[parameter] is not None for parameter in plain])
        for parameter in itertools.compress(plain, used):
            gradient = gradients[parameter]
            gradients[parameter] = ranks.mean(torch.zeros_like(parameter) if gradient is None else gradient)
        yield {parameter: gradient for parameter, gradient in gradients.items() if gradient is not None}
    if not found:
        raise ValueError("losses must hold at least one closure, got none; pass one for each batch")
