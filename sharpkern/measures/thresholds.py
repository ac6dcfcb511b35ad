"""Stability thresholds: the curvature at which an optimizer's steps stop contracting on a quadratic.

Along one eigenvector of the Hessian, with eigenvalue λ, every optimizer here is a linear recursion of second order. It
is stable while both roots lie inside the unit circle, and as λ grows the first root to leave goes through −1. Putting
z = −1 into the characteristic polynomial gives the threshold:

- SGD, momentum μ, dampening τ:  z² − (1 + μ − η(1−τ)(λ+γ))z + μ           λ = (2+2μ)/((1−τ)η) − γ
- SGD, Nesterov momentum μ:      z² − (1+μ)(1 − η(λ+γ))z + μ(1 − η(λ+γ))   λ = (2+2μ)/((1+2μ)η) − γ
- Adam, λ of P^-1/2 H P^-1/2:    z² − (1 + β₁ − η(1−β₁)λ)z + β₁            λ = (2+2β₁)/((1−β₁)η)

SGD's weight decay γ adds γ to every eigenvalue, so its −γ is exact. Adam's preconditioner P is held fixed, and its
two kinds of weight decay differ:

- Decoupled (AdamW): the published −γ. The decay acts beside the momentum and not through it, and the exact threshold,
  (2/η − γ)(1+β₁)/(1−β₁), is lower by the share ηγβ₁/(1+β₁): 5e-5 at η = 1e-3, γ = 0.1, β₁ = 0.9.
- Part of the gradient (Adam's own ``weight_decay``): γ is divided by P like the gradient, a different amount in every
  coordinate, which no single number can express. The threshold is that of γ = 0 and is exact for the sharpness of the
  loss *with* its term γ|θ|²/2.
"""

import math
from typing import Any

from torch.optim import SGD, Adam, AdamW

from sharpkern.directions.parts import Optimizers, parts_of


def stability_threshold(optimizer: Optimizers) -> float | dict[int, float]:
    """Return the sharpness above which the optimizer's steps grow: 2/η for plain gradient descent.

    Compare it with the largest Hessian eigenvalue (SGD) or with the preconditioned one (Adam, AdamW). The critical
    sharpness belongs to the optimizer's own update and is compared with 2/η for every optimizer; the two thresholds are
    one for plain gradient descent. The value follows the learning rate: call it again after a scheduler's step.
    ``maximize`` turns the loss upside down and leaves the threshold as it is.

    Args:
        optimizer: A `torch.optim.SGD`, `Adam` or `AdamW`, or a list or container of several of one kind; Accelerate's
            and Lightning's wrappers are looked through. Only parameter groups are read.

    Returns:
        The threshold in units of 1/learning-rate, inf for a learning rate of 0; where the groups differ, a dict from
        the group's index to its threshold, the groups of several optimizers counted on.

    Raises:
        TypeError: If the optimizer is of another type, a subclass included: its recursion is not known.
        ValueError: If no curvature at all is stable (momentum of 1 or more, dampening above 1).

    Source: Kalra et al. 2026, arXiv 2601.16979; the derivation is in this module's docstring.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> stability_threshold(torch.optim.SGD([weight], lr=0.5))
        4.0
        >>> round(stability_threshold(torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.1)), 6)
        37999.9
    """
    optimizers = [part.optimizer for part in parts_of(optimizer)]
    kinds = {type(one) for one in optimizers}
    if kinds == {SGD}:
        thresholds = [_sgd(group) for one in optimizers for group in one.param_groups]
    elif kinds <= {Adam, AdamW}:
        thresholds = [_adam(group, type(one) is AdamW) for one in optimizers for group in one.param_groups]
    elif kinds <= {SGD, Adam, AdamW}:
        raise TypeError(
            "optimizers must all be SGD, or all Adam or AdamW, got both kinds, whose thresholds are of two different "
            "matrices; ask for each by itself"
        )
    else:
        other = next(kind.__name__ for kind in kinds if kind not in (SGD, Adam, AdamW))
        raise TypeError(
            "optimizer must be a torch.optim.SGD, Adam or AdamW (not a subclass, nor a wrapper, but for Accelerate's "
            f"and Lightning's), got {other}; unwrap it, or compare the sharpness with 2/lr as a first guide"
        )
    if all(threshold == thresholds[0] for threshold in thresholds):
        return thresholds[0]
    return dict(enumerate(thresholds))


def _sgd(group: dict[str, Any]) -> float:
    """Return the threshold of one SGD group."""
    lr, momentum, decay = float(group["lr"]), float(group["momentum"]), float(group["weight_decay"])
    # torch leaves the dampening out where there is no momentum buffer to dampen.
    dampening = float(group["dampening"]) if momentum else 0.0
    if momentum >= 1 or dampening > 1:
        raise ValueError(
            "SGD has a stability threshold only with momentum below 1 and dampening of at most 1, "
            f"got momentum {momentum:g} and dampening {dampening:g}; lower them"
        )
    gain = 1 + 2 * momentum if group["nesterov"] else 1 - dampening
    return _ratio(2 + 2 * momentum, gain * lr) - decay


def _adam(group: dict[str, Any], decoupled: bool) -> float:
    """Return the threshold of one Adam or AdamW group; newer torch keeps the kind of weight decay in the group."""
    beta1 = float(group["betas"][0])
    decay = float(group["weight_decay"]) if group.get("decoupled_weight_decay", decoupled) else 0.0
    return _ratio(2 + 2 * beta1, (1 - beta1) * float(group["lr"])) - decay


def _ratio(numerator: float, denominator: float) -> float:
    """Divide, with inf for a step of size zero."""
    return numerator / denominator if denominator else math.inf
