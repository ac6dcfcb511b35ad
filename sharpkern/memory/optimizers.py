"""What an optimizer holds for every parameter, as tensors: nothing is trained with them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# One scale in float32 for so many 8-bit numbers.
_BLOCK = 256


class _EightBit(torch.optim.Optimizer):
    """The state of an 8-bit AdamW; a step is some in-place operation, since what it computes takes no memory here."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad, alpha=-group["lr"])


def _moments(parameter: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    moments = (torch.zeros_like(parameter, dtype=dtype, requires_grad=False) for _ in range(2))
    return {"step": torch.tensor(1.0), **dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True))}


def _with_master(parameter: Tensor) -> dict[str, Tensor]:
    master = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
    return {**_moments(parameter, torch.float32), "master_param": master}


def _blocks(parameter: Tensor) -> dict[str, Tensor]:
    moments = (torch.zeros_like(parameter, dtype=torch.uint8, requires_grad=False) for _ in range(2))
    scales = (parameter.new_zeros(-(-parameter.numel() // _BLOCK), dtype=torch.float32) for _ in range(2))
    return dict(zip(("exp_avg", "exp_avg_sq", "scale", "scale_sq"), (*moments, *scales), strict=True))


_STATE: Mapping[str, Callable[[Tensor], dict[str, Any]]] = {
    "adamw-fp32": lambda parameter: _moments(parameter, torch.float32),
    "adamw-bf16": lambda parameter: _moments(parameter, torch.bfloat16),
    "adamw-masters": _with_master,
    "adamw-8bit": _blocks,
}

OPTIMIZERS: Mapping[str, str] = {
    "none": "nothing: a checkpoint is measured, along an update in memory",
    "adamw-fp32": "two float32 moments",
    "adamw-bf16": "two bfloat16 moments",
    "adamw-masters": "two float32 moments and a float32 master of each weight",
    "adamw-8bit": f"two 8-bit moments, with a float32 scale for {_BLOCK} of each",
}
"""What there is, and what it holds for every parameter besides its gradient."""


def has_formula(name: str) -> bool:
    """Whether Δθ can be worked out of the state of an optimizer."""
    return name not in ("none", "adamw-8bit")


def optimizer_of(name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer | None:
    """Return an optimizer that has taken a step."""
    if name == "none":
        return None
    kind = _EightBit if name == "adamw-8bit" else torch.optim.AdamW
    optimizer = kind(parameters)
    for parameter in parameters:
        optimizer.state[parameter] = _STATE[name](parameter.detach())
    return optimizer
