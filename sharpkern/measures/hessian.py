"""Hessian sharpness: the largest eigenvalue of the loss Hessian, plain or preconditioned as Adam does.

Lanczos' method (ARPACK, by scipy) builds a basis of {v, Hv, H²v, …} with one exact Hessian-vector product per vector.
"Largest" is algebraic: far below zero may lie an eigenvalue of larger magnitude, which is no sharpness (GPT-2 at its
initialization has −19).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sharpkern._support.optional import missing
from sharpkern.directions.preconditioner import inverse_preconditioner
from sharpkern.distributed.declared import Ranks, check_ranks
from sharpkern.distributed.sharding import local
from sharpkern.engines.session import Session, in_session
from sharpkern.measures.hvp import GradientGraph, check_symmetry
from sharpkern.measures.micro_batches import Several, Step
from sharpkern.tensors.storage import overlapping

# Vectors that ARPACK holds at a time, and products before its first answer. More make a restart rarer.
_BASIS_SIZE = 8


@dataclass(frozen=True)
class HessianResult:
    """The largest eigenvalue of a Hessian and how well it is known.

    Attributes:
        value: λ, in units of 1/learning-rate. It is approached from below: without convergence it is a lower bound.
            nan if the loss is not finite.
        residual: |Hv − λv| / |λ| for the unit vector v found.
        iterations: Hessian-vector products computed.
        converged: Whether the residual reached ``tol``, or the limit that rounding sets.
        vector: v, flat, over the parameters in the model's order; give it as ``v0`` to the next measurement.
    """

    value: float
    residual: float
    iterations: int
    converged: bool
    vector: Tensor = field(repr=False, compare=False)


def hessian_sharpness(
    model: nn.Module,
    loss_fn: Several,
    *,
    preconditioner: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    tol: float = 1e-2,
    max_iter: int = 100,
    v0: Tensor | None = None,
    ranks: Ranks | str | None = None,
    weights: Sequence[float] | None = None,
) -> HessianResult:
    """Measure λ_max(H), or λ_max(P^-1/2 H P^-1/2) with Adam's preconditioner P; the run it interrupts is not touched.

    Args:
        model: The model; its parameters with ``requires_grad`` are θ. Under `DistributedDataParallel` the loss is the
            mean over the ranks, each of which gets its sharpness. So it is on ranks that hold the same weights and
            gradients.
        loss_fn: Returns the scalar loss of the model's current parameters, with its graph. Called once, and once more
            where ranks have yet to find out whether they train one model. Or a sequence of closures, or of
            (closure, weight): the micro-batches of one step, whose graphs are held together.
        preconditioner: The Adam or AdamW that trains the model, or a list of several, after at least one step:
            P = (1 − β₁ᵗ)(√(v/(1 − β₂ᵗ)) + ε) of its last step. θ is then what they move. A group whose
            learning rate differs from that of the first moving group has its P divided by the ratio.
        tol: Relative residual to stop at. The error of the value is of the order of its square.
        max_iter: Most Hessian-vector products to compute.
        v0: Where to start: the ``vector`` of an earlier measurement of the same parameters. Random if left out,
            the same in every call.
        ranks: As for `critical_sharpness`; not for ranks that split the model.
        weights: Of the micro-batches, as for `critical_sharpness`.

    Returns:
        The eigenvalue, its residual, the number of products and whether it converged.

    Raises:
        TypeError: If the preconditioner is not a `torch.optim.Adam` or `AdamW`.
        ValueError: If ``tol``, ``max_iter`` or ``v0`` is out of range, the preconditioner is another model's,
            parameters share memory, or there is nothing to differentiate.
        RuntimeError: If the loss cannot be differentiated twice. Where that cannot be told of an operator, because its
            gradient is not torch's own, a warning says so.
        ImportError: If scipy, the extra ``hessian``, is missing.

    Memory: about 10 vectors of the size of θ in float64 on the host, and the graph of a forward and a backward pass.
    Determinism: as deterministic as the model's backward passes.
    Source: Cohen et al. 2021 and 2022 (arXiv 2103.00065, 2207.14484).

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> result = hessian_sharpness(model, lambda: 3 * model.weight.square().sum())
        >>> round(result.value, 4), result.converged
        (6.0, True)
    """
    check_ranks(ranks)
    step = Step.of(loss_fn, weights)
    if not isinstance(tol, (int, float)) or not 0 < tol < 1:
        raise ValueError(f"tol must be a number in (0, 1), got {tol}; leave it out for 0.01")
    if not isinstance(max_iter, int) or isinstance(max_iter, bool) or max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}; leave it out for 100")
    if preconditioner is None:
        scales = {parameter: torch.ones(()) for parameter in model.parameters() if parameter.requires_grad}
    else:
        inverse, _ = inverse_preconditioner(preconditioner)
        own = {id(parameter) for parameter in model.parameters()}
        if any(id(parameter) not in own for parameter in inverse):
            raise ValueError(
                "preconditioner must hold parameters of the model alone, got others; pass the optimizer that trains "
                "this model"
            )
        # What was frozen after it had moved is no part of θ any more.
        scales = {parameter: diagonal.sqrt() for parameter, diagonal in inverse.items() if parameter.requires_grad}
    if not scales:
        raise ValueError("model must have parameters that require gradients, got none; unfreeze some of them")
    parameters = tuple(scales)
    _refuse_shared_memory(model, parameters)
    start = _start(parameters, v0)

    def measured(session: Session) -> HessianResult:
        step.settle(session)
        graph = GradientGraph(session, step.closure, parameters)
        if not math.isfinite(graph.loss):
            return HessianResult(math.nan, math.nan, 0, False, start / start.norm())

        def product(vector: Tensor) -> Tensor:
            pieces = torch.split(vector, [parameter.numel() for parameter in parameters])
            scaled = [scale * piece.view_as(p) for piece, (p, scale) in zip(pieces, scales.items(), strict=True)]
            products = zip(graph.product(scaled), scales.values(), strict=True)
            return torch.cat([(scale * hv.to(start)).flatten() for hv, scale in products])

        result = _largest_eigenpair(product, start, tol, max_iter)
        graph.tell_unchecked()
        return result

    return in_session(measured, model, None, step.loss_fns, ranks=ranks, grad=True, plan=(tol, max_iter))


def _refuse_shared_memory(model: nn.Module, parameters: tuple[nn.Parameter, ...]) -> None:
    """Refuse parameters that cannot move by themselves, as autograd, which H is of, takes them to."""
    named = list(model.named_parameters())
    mine = {id(parameter) for parameter in parameters}
    for group in overlapping([local(parameter) for _, parameter in named]):
        if any(id(named[i][1]) in mine for i in group):
            raise ValueError(
                f"{' and '.join(repr(named[i][0]) for i in group)} must not share memory, along which H is another; "
                "use critical_sharpness or directional_sharpness, or one Parameter in both places"
            )


def _start(parameters: tuple[nn.Parameter, ...], v0: Tensor | None) -> Tensor:
    """Return the first vector, in the parameters' precision but no less than float32."""
    size = sum(parameter.numel() for parameter in parameters)
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    noise = torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(0)).to(parameters[0].device)
    if v0 is None:
        return noise
    shape = list(v0.shape) if isinstance(v0, Tensor) else type(v0).__name__
    if shape != [size]:
        raise ValueError(
            f"v0 must be a vector of the {size} parameters, got shape {shape}; "
            "give the vector of an earlier result for the same parameters, or leave it out"
        )
    if not v0.isfinite().all() or not v0.any():
        raise ValueError("v0 must be finite and not zero, got one that is not; leave it out for a random start")
    # A trace of noise, so that a direction the earlier vector knows nothing of can still come up.
    start: Tensor = v0.to(noise) / v0.norm() + 0.1 * noise / noise.norm()
    return start


class _StoppedError(Exception):
    """The products are used up, or one of them is not finite."""


class _Products:
    """Counts the products of a symmetric operator, and keeps what can be said when there may be no more."""

    def __init__(self, product: Callable[[Tensor], Tensor], limit: int) -> None:
        self._product = product
        self._limit = limit
        self.count = 0
        self.magnitude = 0.0
        self._first: tuple[Tensor, Tensor] | None = None
        self.best: tuple[float, float, Tensor] = (-math.inf, math.nan, torch.empty(0))

    def __call__(self, vector: Tensor) -> Tensor:
        if self.count == self._limit:
            raise _StoppedError
        self.count += 1
        curved = self._product(vector)
        norm = vector.norm()
        # The Rayleigh quotient of any vector is a lower bound of the largest eigenvalue.
        value = float(vector @ curved / norm**2)
        length = float((curved - value * vector).norm() / norm)
        if not math.isfinite(length):
            self.best = (math.nan, math.nan, vector)
            raise _StoppedError
        self.magnitude = max(self.magnitude, float(curved.norm() / norm))
        if self._first is None:
            self._first = (vector.clone(), curved)
        elif self.count == 2:
            other, other_curved = self._first
            scale = float((other_curved.norm() * norm).maximum(curved.norm() * other.norm()))
            check_symmetry(float(other @ curved), float(vector @ other_curved), scale)
        if value > self.best[0]:
            self.best = (value, length, vector / norm)
        return curved


def _largest_eigenpair(product: Callable[[Tensor], Tensor], start: Tensor, tol: float, max_iter: int) -> HessianResult:
    """Find the largest eigenvalue by ARPACK, or by the whole matrix where that takes no more products."""
    products = _Products(product, max_iter)
    try:
        if start.numel() <= _BASIS_SIZE:
            matrix = torch.stack([products(unit) for unit in torch.eye(start.numel()).to(start)])
            value, vector = (part[..., -1] for part in torch.linalg.eigh(matrix))
            distance = float((matrix @ vector - value * vector).norm())
        else:
            vector = _arpack(products, start, tol)
            curved = products(vector)
            value = vector @ curved
            distance = float((curved - value * vector).norm())
    except _StoppedError:
        value, distance, vector = products.best
        residual = distance / abs(value) if value else math.inf
        return HessianResult(value, residual, products.count, False, vector)
    rounding = 10 * torch.finfo(start.dtype).eps * products.magnitude
    converged = distance <= max(tol * abs(float(value)), rounding)
    residual = distance / abs(float(value)) if value else math.inf if distance else 0.0
    return HessianResult(float(value), residual, products.count, converged, vector)


def _arpack(products: _Products, start: Tensor, tol: float) -> Tensor:
    """Return the unit eigenvector of the largest algebraic eigenvalue."""
    try:
        from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
    except ImportError:
        raise missing("scipy", "hessian", "hessian_sharpness") from None

    def matvec(vector: Any) -> Any:
        return products(torch.from_numpy(vector.ravel()).to(start)).double().cpu().numpy()

    size = start.numel()
    operator = LinearOperator((size, size), matvec=matvec, dtype="float64")
    try:
        # Half the tolerance: ARPACK estimates the residual, and its vector is rounded to the parameters' precision.
        _, vectors = eigsh(operator, k=1, which="LA", v0=start.double().cpu().numpy(), ncv=_BASIS_SIZE, tol=tol / 2)
    except ArpackNoConvergence:
        raise _StoppedError from None
    except ArpackError:
        if products.magnitude:
            raise
        # There is no curvature at all: ARPACK has no vector to begin with, and any is an eigenvector.
        vectors = start.double().cpu().numpy()[:, None]
    vector: Tensor = torch.from_numpy(vectors[:, 0]).to(start)
    return vector.div_(vector.norm())
