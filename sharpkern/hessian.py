"""Hessian sharpness: the largest eigenvalue of the loss Hessian, plain or preconditioned as Adam does.

Lanczos builds an orthonormal basis V of {v, Hv, H²v, …} with one exact Hessian-vector product per vector, and the
largest eigenvalue of the small matrix T = VᵀHV climbs to that of H from below. "Largest" is algebraic: far below zero
may lie an eigenvalue of larger magnitude, which is no sharpness (GPT-2 at its initialization has −19).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW

from sharpkern._hvp import GradientGraph, check_symmetry
from sharpkern.engines.guards import preserved

# Vectors held at a time. More make a restart rarer and cost one copy of the parameters each.
_BASIS_SIZE = 16


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
    loss_fn: Callable[[], Tensor],
    *,
    preconditioner: torch.optim.Optimizer | None = None,
    tol: float = 1e-2,
    max_iter: int = 100,
    v0: Tensor | None = None,
) -> HessianResult:
    """Measure λ_max(H), or λ_max(P^-1/2 H P^-1/2) with Adam's preconditioner P; the run it interrupts is not touched.

    Args:
        model: The model; its parameters with ``requires_grad`` are θ.
        loss_fn: Returns the scalar loss of the model's current parameters, with its graph. Called once.
        preconditioner: The Adam or AdamW that trains the model, after at least one step:
            P = (1 − β₁ᵗ)(√(v/(1 − β₂ᵗ)) + ε) of its last step. θ is then what this optimizer moves. A group whose
            learning rate differs from that of the first moving group has its P divided by the ratio.
        tol: Relative residual to stop at. The error of the value is of the order of its square.
        max_iter: Most Hessian-vector products to compute.
        v0: Where to start: the ``vector`` of an earlier measurement of the same parameters. Random if left out,
            the same in every call.

    Returns:
        The eigenvalue, its residual, the number of products and whether it converged.

    Raises:
        TypeError: If the preconditioner is not a `torch.optim.Adam` or `AdamW`.
        ValueError: If ``tol``, ``max_iter`` or ``v0`` is out of range, or there is nothing to differentiate.

    Memory: 17 vectors of the size of θ in float32, and the graph of a forward and a backward pass.
    Determinism: as deterministic as the model's backward passes.
    Source: Cohen et al. 2021 and 2022 (arXiv 2103.00065, 2207.14484); Wu and Simon 2000 for the thick restart.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> result = hessian_sharpness(model, lambda: 3 * model.weight.square().sum())
        >>> round(result.value, 4), result.converged
        (6.0, True)
    """
    if not 0 < tol < 1:
        raise ValueError(f"tol must be a number in (0, 1), got {tol}; leave it out for 0.01")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}; leave it out for 100")
    if preconditioner is None:
        scales = {parameter: torch.ones(()) for parameter in model.parameters() if parameter.requires_grad}
    else:
        scales = _inverse_root(preconditioner)
    if not scales:
        raise ValueError("model must have parameters that require gradients, got none; unfreeze some of them")
    parameters = tuple(scales)
    start = _start(parameters, v0)
    with preserved(model, parameters, grad=True):
        graph = GradientGraph(loss_fn, parameters)

        def product(vector: Tensor) -> Tensor:
            pieces = torch.split(vector, [parameter.numel() for parameter in parameters])
            scaled = [scale * piece.view_as(p) for piece, (p, scale) in zip(pieces, scales.items(), strict=True)]
            products = zip(graph.product(scaled), scales.values(), strict=True)
            return torch.cat([(scale * hv.to(start)).flatten() for hv, scale in products])

        return _largest_eigenpair(product, start, tol, max_iter)


def _inverse_root(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, Tensor]:
    """Return P^-1/2 of every parameter that the optimizer has moved."""
    if type(optimizer) not in (Adam, AdamW):
        raise TypeError(
            f"preconditioner must be a torch.optim.Adam or AdamW, got {type(optimizer).__name__}; "
            "leave it out for the Hessian itself"
        )
    # The state is a defaultdict: asking it by [] would create what is not there.
    moved = [
        (group, p)
        for group in optimizer.param_groups
        for p in group["params"]
        if group["lr"] and optimizer.state.get(p)
    ]
    if not moved:
        raise ValueError(
            "preconditioner must have taken a step with a positive learning rate, got an optimizer without state; "
            "call optimizer.step() first"
        )
    reference_lr = float(moved[0][0]["lr"])
    roots = {}
    for group, parameter in moved:
        state, (beta1, beta2) = optimizer.state[parameter], group["betas"]
        second_moment = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        steps = float(state["step"])
        denominator = (second_moment / (1 - beta2**steps)).sqrt() + group["eps"]
        roots[parameter] = (float(group["lr"]) / reference_lr / (1 - beta1**steps) / denominator).sqrt()
    return roots


def _start(parameters: tuple[nn.Parameter, ...], v0: Tensor | None) -> Tensor:
    """Return the first vector, in the parameters' precision but no less than float32."""
    size = sum(parameter.numel() for parameter in parameters)
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    noise = torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(0)).to(parameters[0].device)
    if v0 is None:
        return noise
    if v0.shape != noise.shape:
        raise ValueError(
            f"v0 must be a vector of the {size} parameters, got shape {list(v0.shape)}; "
            "give the vector of an earlier result for the same parameters, or leave it out"
        )
    # A trace of noise, so that a direction the earlier vector knows nothing of can still come up.
    start: Tensor = v0.to(noise) / v0.norm() + 0.1 * noise / noise.norm()
    return start


def _largest_eigenpair(product: Callable[[Tensor], Tensor], start: Tensor, tol: float, max_iter: int) -> HessianResult:
    """Run Lanczos with full reorthogonalization, restarted from the best Ritz vectors when the basis is full."""
    size = min(_BASIS_SIZE, start.numel())
    basis = torch.empty(size, start.numel(), dtype=start.dtype, device=start.device)
    basis[0] = start / start.norm()
    projected = torch.zeros(size, size, dtype=torch.float64)
    num_vectors, length = 0, 0.0
    for iterations in range(1, max_iter + 1):
        remainder = product(basis[num_vectors])
        num_vectors += 1
        spanned = basis[:num_vectors]
        coefficients = spanned @ remainder
        remainder = remainder - coefficients @ spanned
        # Once more: rounding leaves a share of the basis behind that would grow into copies of eigenvalues.
        correction = spanned @ remainder
        remainder = remainder - correction @ spanned
        column = (coefficients + correction).double().cpu()
        if num_vectors == 2 == iterations:
            check_symmetry(column[0].item(), length, scale=max(length, column.norm().item()))
        length = remainder.norm().item()
        if not math.isfinite(length) or not column.isfinite().all():
            return HessianResult(math.nan, math.nan, iterations, False, start)
        projected[:num_vectors, num_vectors - 1] = projected[num_vectors - 1, :num_vectors] = column
        values, vectors = torch.linalg.eigh(projected[:num_vectors, :num_vectors])
        value, ritz = values[-1].item(), vectors[:, -1]
        distance = length * abs(ritz[-1].item())
        rounding = torch.finfo(start.dtype).eps * values.abs().max().item()
        converged = distance <= max(tol * abs(value), 10 * rounding) or num_vectors == start.numel()
        if converged or iterations == max_iter:
            break
        if num_vectors == size:
            num_vectors = size // 2
            basis[:num_vectors] = vectors[:, -num_vectors:].T.to(basis) @ basis
            projected.zero_()
            projected.diagonal()[:num_vectors] = values[-num_vectors:]
        basis[num_vectors] = remainder / length
    residual = distance / abs(value) if value else math.inf if distance else 0.0
    return HessianResult(value, residual, iterations, converged, ritz.to(spanned) @ spanned)
