"""Adam's preconditioner P, which turns the gradient into a step: the metric of preconditioned sharpness."""

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW

from sharpkern.updates.slots import unwrapped


def inverse_preconditioner(optimizer: torch.optim.Optimizer) -> tuple[dict[nn.Parameter, Tensor], float]:
    """Return P⁻¹ of every parameter that the optimizer has moved, P = (1 − β₁ᵗ)(√(v/(1 − β₂ᵗ)) + ε) of its last step.

    Steps are θ − ηP⁻¹g where the momentum is at rest, η being the learning rate of the first moving group; a group
    whose learning rate differs from it has its P divided by the ratio.

    Args:
        optimizer: an Adam or AdamW that has taken a step, or a wrapper that lends the groups of one, as Accelerate's.

    Returns:
        The diagonal of P⁻¹ by parameter, of its shape and on its device, in no less than float32; and η.

    Raises:
        TypeError: if the optimizer is not a `torch.optim.Adam` or `AdamW`.
        ValueError: if it has moved nothing yet.

    Memory:
        One tensor of each parameter's size.

    Source:
        Cohen et al. 2022, arXiv 2207.14484.
    """
    optimizer = unwrapped(optimizer)
    if type(optimizer) not in (Adam, AdamW):
        raise TypeError(
            f"preconditioner must be a torch.optim.Adam or AdamW, got {type(optimizer).__name__}; "
            "leave it out to have no preconditioner"
        )
    # The state is a defaultdict: asking it by [] would create what is not there.
    moved = [
        (group, parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if group["lr"] and optimizer.state.get(parameter)
    ]
    if not moved:
        raise ValueError(
            "preconditioner must have taken a step with a positive learning rate, got an optimizer without state; "
            "call optimizer.step() first"
        )
    reference_lr = float(moved[0][0]["lr"])
    inverses = {}
    for group, parameter in moved:
        state, (beta1, beta2) = optimizer.state[parameter], map(float, group["betas"])
        steps = float(state["step"])
        second_moment = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        second_moment = second_moment.to(torch.promote_types(second_moment.dtype, torch.float32))
        denominator = (second_moment / (1 - beta2**steps)).sqrt() + group["eps"]
        inverses[parameter] = float(group["lr"]) / reference_lr / (1 - beta1**steps) / denominator
    return inverses, reference_lr
