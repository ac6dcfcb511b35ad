"""How finely a loss can be resolved: losses are computed in float32, and what the products rounded before is noted."""

import math
from typing import Any

import torch
from torch import Tensor

from sharpkern.engines.calls import map_tensors

# Relative standard deviation of a float32 loss; measured on small networks.
_FLOAT32_NOISE = 1e-6
# For losses whose precision cannot be seen from outside, as in a compiled model with 16-bit arithmetic.
_UNSEEN_NOISE = 1e-4


def is_low(dtype: torch.dtype) -> bool:
    """Whether a dtype is a floating type narrower than float32."""
    return dtype.is_floating_point and dtype.itemsize < 4


class LossPrecision:
    """What one measurement learns of its loss's precision.

    Attributes:
        unit_roundoff: of the coarsest dtype a product was rounded to; None while all were float32 or wider.
        num_targets: size of the largest target a loss function was given, or None.
        loss_dtype: of the loss that the closure returned.
    """

    def __init__(self) -> None:
        self.unit_roundoff: float | None = None
        self.num_targets: int | None = None
        self.loss_dtype = torch.float32

    def widen_loss(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a loss function with 16-bit tensors taken to float32: a bf16 loss moves η_c by up to 11 %."""
        target = args[1] if len(args) > 1 else kwargs.get("target")
        if isinstance(target, Tensor):
            # Negative labels are ignored ones.
            counted = target.numel() if target.is_floating_point() else int((target >= 0).sum())
            self.num_targets = max(self.num_targets or 0, counted)
        args = map_tensors(args, _widen)
        kwargs = map_tensors(kwargs, _widen)
        return args, kwargs

    def note_product(self, result: Any) -> None:
        """Remember the coarsest rounding of a matrix product."""
        if not isinstance(result, Tensor):
            return
        if is_low(result.dtype):
            self._note_roundoff(torch.finfo(result.dtype).eps / 2)
        elif result.is_cuda and result.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            # TF32 keeps 10 bits of the operands.
            self._note_roundoff(2.0**-11)

    def _note_roundoff(self, unit_roundoff: float) -> None:
        self.unit_roundoff = max(self.unit_roundoff or 0.0, unit_roundoff)

    def noise(self, *, low_and_unseen: bool = False) -> float:
        """Relative noise of one loss: the default of ``critical_sharpness(noise=None)``.

        Args:
            low_and_unseen: 16-bit arithmetic is known to happen where no product was seen.

        Returns:
            float: standard deviation of a loss over its value.
        """
        if is_low(self.loss_dtype):
            return torch.finfo(self.loss_dtype).eps
        if self.unit_roundoff is not None:
            if not self.num_targets:
                return _UNSEEN_NOISE
            return max(1.5 * self.unit_roundoff / math.sqrt(self.num_targets), _FLOAT32_NOISE)
        if low_and_unseen:
            return _UNSEEN_NOISE
        return 1e-14 if self.loss_dtype == torch.float64 else _FLOAT32_NOISE


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if is_low(tensor.dtype) else tensor
