"""Adam's preconditioner P, which turns the gradient into a step: the metric of preconditioned sharpness."""

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW

from sharpkern.directions.parts import Optimizers, parts_of


def inverse_preconditioner(optimizer: Optimizers) -> tuple[dict[nn.Parameter, Tensor], float]:
    """Return P⁻¹ of every parameter that the optimizer has moved, P = (1 − β₁ᵗ)(√(v/(1 − β₂ᵗ)) + ε) of its last step.

    Steps are θ − ηP⁻¹g where the momentum is at rest, η being the learning rate of the first moving group; a group
    whose learning rate differs from it has its P divided by the ratio.
    """
    adams = [part.optimizer for part in parts_of(optimizer)]
    other = next((adam for adam in adams if type(adam) not in (Adam, AdamW)), None)
    if other is not None:
        raise TypeError(
            f"preconditioner must be a torch.optim.Adam or AdamW, got {type(other).__name__}; "
            "leave it out to have no preconditioner"
        )
    # The state is a defaultdict: asking it by [] would create what is not there.
    moved = [
        (group, parameter, adam.state[parameter])
        for adam in adams
        for group in adam.param_groups
        for parameter in group["params"]
        if group["lr"] and adam.state.get(parameter)
    ]
    if not moved:
        raise ValueError(
            "preconditioner must have taken a step with a positive learning rate, got an optimizer without state; "
            "call optimizer.step() first"
        )
    reference_lr = float(moved[0][0]["lr"])
    inverses = {}
    for group, parameter, state in moved:
        beta1, beta2 = map(float, group["betas"])
        steps = float(state["step"])
        second_moment = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        second_moment = second_moment.to(torch.promote_types(second_moment.dtype, torch.float32))
        denominator = (second_moment / (1 - beta2**steps)).sqrt() + group["eps"]
        inverses[parameter] = float(group["lr"]) / reference_lr / (1 - beta1**steps) / denominator
    return inverses, reference_lr
