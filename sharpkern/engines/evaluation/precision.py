"""How finely a loss can be resolved: losses are computed in float32, and what the products rounded before is noted."""

import math
from typing import Any

import torch
from torch import Tensor

from sharpkern.engines.virtual.torch_calls import map_tensors
from sharpkern.tensors.storage import storage_pointer

# Relative standard deviation of a float32 loss: usually 5e-8 on small networks, 2e-7 at worst. Where it is a small
# difference of large outputs, and rounded more coarsely, the searches see that for themselves.
_FLOAT32_NOISE = 2e-7
# For losses whose precision cannot be seen from outside, as in a compiled model with 16-bit arithmetic.
_UNSEEN_NOISE = 1e-4


# Looked up at every product of every pass.
_ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.bfloat16, torch.float16)}


def is_low(dtype: torch.dtype) -> bool:
    """Whether a dtype is a floating type narrower than float32."""
    return dtype.is_floating_point and dtype.itemsize < 4


class LossPrecision:
    """What one measurement learns of its loss's precision.

    Attributes:
        unit_roundoff: of the coarsest dtype a product was rounded to; None while all were float32 or wider.
        widened_roundoff: of the coarsest dtype that a loss function would have been computed in; 0 while none was.
        loss_dtype: of the loss that the closure returned.
    """

    def __init__(self) -> None:
        self.unit_roundoff: float | None = None
        self.widened_roundoff = 0.0
        self.loss_dtype = torch.float32
        self._num_targets: Tensor | None = None

    def widen_loss(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a loss function with 16-bit tensors taken to float32: a bf16 loss moves η_c by up to 11 %."""
        target = args[1] if len(args) > 1 else kwargs.get("target")
        if isinstance(target, Tensor):
            self._note_targets(target.detach())
        args = map_tensors(args, self._widen)
        kwargs = map_tensors(kwargs, self._widen)
        return args, kwargs

    def _widen(self, tensor: Tensor) -> Tensor:
        if not is_low(tensor.dtype):
            return tensor
        self.widened_roundoff = max(self.widened_roundoff, torch.finfo(tensor.dtype).eps / 2)
        return tensor.float()

    @property
    def num_targets(self) -> int | None:
        """Size of the largest target a loss function was given, or None; read from the device."""
        return None if self._num_targets is None else int(self._num_targets)

    def _note_targets(self, target: Tensor) -> None:
        """Remember the largest number of targets that count; on the device, where the host does not wait for it."""
        if target.is_floating_point() or storage_pointer(target) is None:
            # Wrappers of torch.func, and what is made of them, are of no use after the pass.
            counted = torch.full((), target.numel(), dtype=torch.int64, device=target.device)
        else:
            # Negative labels are ignored ones.
            counted = (target >= 0).sum()
        before = self._num_targets
        if before is not None and before.device == counted.device:
            counted = torch.maximum(before, counted)
        self._num_targets = counted

    def note_product(self, name: str, result: Any) -> None:
        """Remember the coarsest rounding of a matrix product or convolution."""
        if not isinstance(result, Tensor):
            return
        dtype = result.dtype
        if dtype in _ROUNDOFF:
            self._note_roundoff(_ROUNDOFF[dtype])
        elif is_low(dtype):
            self._note_roundoff(torch.finfo(dtype).eps / 2)
        elif result.is_cuda and dtype == torch.float32 and _is_tf32(name):
            # TF32 keeps 10 bits of the operands.
            self._note_roundoff(2.0**-11)

    def _note_roundoff(self, unit_roundoff: float) -> None:
        if self.unit_roundoff is None or unit_roundoff > self.unit_roundoff:
            self.unit_roundoff = unit_roundoff

    def noise(self, *, low_and_unseen: bool = False) -> float:
        """Relative noise of one loss: the default of ``critical_sharpness(noise=None)``."""
        if is_low(self.loss_dtype):
            return torch.finfo(self.loss_dtype).eps
        if self.unit_roundoff is not None:
            num_targets = self.num_targets
            if not num_targets:
                return _UNSEEN_NOISE
            return max(1.5 * self.unit_roundoff / math.sqrt(num_targets), _FLOAT32_NOISE)
        if low_and_unseen:
            return _UNSEEN_NOISE
        return 1e-14 if self.loss_dtype == torch.float64 else _FLOAT32_NOISE


def _is_tf32(name: str) -> bool:
    """Whether a float32 product on a GPU is computed in TF32; convolutions are by default."""
    is_convolution = name.startswith("conv")
    backend = getattr(torch.backends.cudnn, "conv", None) if is_convolution else torch.backends.cuda.matmul
    precision = getattr(backend, "fp32_precision", None)
    if precision is not None:
        # Where this is there, the questions below may raise.
        return bool(precision == "tf32")
    return torch.backends.cudnn.allow_tf32 if is_convolution else torch.get_float32_matmul_precision() != "highest"
