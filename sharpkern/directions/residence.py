"""Whether Δθ that an optimizer's state tells is kept in memory, and in which dtype."""

from collections.abc import Sequence

import torch

from sharpkern import ops
from sharpkern.directions.optimizer_state import ParamState
from sharpkern.ops.update import LazyUpdate
from sharpkern.tensors.free import free_bytes

# The part of a GPU's free memory that Δθ in bf16 may take unasked: training needs far more of it than a forward pass.
SHARE = 3


def kept_as(
    slots: Sequence[ParamState], steps: Sequence[LazyUpdate], resident: bool | None
) -> list[torch.dtype | None]:
    """Return the dtype that each step's Δθ is kept in; None where it is worked out whenever it is needed.

    On a GPU working it out takes little time beside a forward pass, and memory is short. Of weights in bf16 Δθ takes as
    little as they do: rounding it changes each element by a 512th at most, and the moved weight is rounded as coarsely.
    """
    if resident is not None:
        return [step.dtype if resident else None for step in steps]
    kept = [None if ops.has_kernels(step.base.device) else step.dtype for step in steps]
    short = [i for i, dtype in enumerate(in_bf16(slots)) if dtype is not None and kept[i] is None]
    for device in {steps[i].base.device for i in short}:
        here = [i for i in short if steps[i].base.device == device]
        if may_keep(sum(steps[i].base.numel() for i in here), device):
            for i in here:
                kept[i] = torch.bfloat16
    return kept


def in_bf16(slots: Sequence[ParamState]) -> list[torch.dtype | None]:
    """Return the dtype of each Δθ where those of weights in bf16 are kept, and no others."""
    return [torch.bfloat16 if slot.parameter.dtype == torch.bfloat16 else None for slot in slots]


def may_keep(num_elements: int, device: torch.device) -> bool:
    """Return whether Δθ of so many elements is kept in bf16 on a device, as far as that is told now."""
    # Each rank has memory of its own, and all have to have the same direction.
    is_alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return is_alone and fits(num_elements, free_bytes(device))


def fits(num_elements: int, free: int) -> bool:
    """Return whether Δθ of so many elements is kept in bf16 where so many bytes are free."""
    return 0 < SHARE * torch.bfloat16.itemsize * num_elements <= free
