"""The published measurement, written anew from its description, to compare with.

Clone-and-dictionary: the update is a dictionary of tensors, and so are the weights, cloned once; at every probe the
weights θ − ηΔθ are built anew and copied into the model. The step size is doubled from a first guess until the loss
exceeds that at θ, or halved while the guess itself exceeds it, and the bracket is bisected to 1/16; the next
measurement starts at the last result. What the description leaves open is taken the quick way: one fused operation
for θ − ηΔθ, and no dictionary that outlives the copying.

Source: Kalra et al. 2026, arXiv 2601.16979.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_MOST_PROBES = 40


@dataclass(frozen=True)
class Published:
    """One result.

    Attributes:
        critical_lr: the middle of the last bracket, a learning rate; None where there was no rise, or no fall.
        forwards: losses evaluated, the base loss among them.
    """

    critical_lr: float | None
    forwards: int


@torch.no_grad()
def critical_lr(
    model: nn.Module, optimizer: torch.optim.AdamW, loss_fn: Callable[[], Tensor], guess: float, width: float = 1 / 16
) -> Published:
    """Measure η_c as published; the model is left as it was.

    Args:
        model: evaluated by ``loss_fn``.
        optimizer: that trains it, with the gradient of the batch.
        loss_fn: returns the loss of that batch.
        guess: first step size: the last result, or the learning rate.
        width: of the last bracket, relative to its lower end.
    """
    update = adamw_update(model, optimizer)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    base = float(loss_fn())
    lo, hi, eta, forwards = 0.0, float("inf"), guess, 1
    while forwards < _MOST_PROBES:
        _copy_into(model, {name: torch.sub(weights[name], update[name], alpha=eta) for name in weights})
        forwards += 1
        # A loss that is not finite exceeds it too.
        if float(loss_fn()) <= base:
            lo = eta
        else:
            hi = eta
        if lo > 0 and hi - lo <= width * lo:
            break
        eta = 2 * lo if hi == float("inf") else (lo + hi) / 2
    _copy_into(model, weights)
    return Published((lo + hi) / 2 if lo > 0 and hi < float("inf") else None, forwards)


@torch.no_grad()
def adamw_update(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return what the next step of AdamW subtracts from the weights, per unit learning rate, by name.

    Args:
        model: that is trained.
        optimizer: after at least one step, with the next gradient.
    """
    (group,) = optimizer.param_groups
    beta1, beta2 = group["betas"]
    update = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        step = float(state["step"]) + 1
        mean = torch.lerp(state["exp_avg"], parameter.grad, 1 - beta1)
        square = (state["exp_avg_sq"] * beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        denominator = square.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        moved = mean.div_(1 - beta1**step).div_(denominator)
        update[name] = moved.add_(parameter, alpha=group["weight_decay"])
    return update


def _copy_into(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
