"""How much memory a GPU has to spare."""

import torch


def free_bytes(device: torch.device) -> int:
    """Bytes that new tensors can have on a GPU; 0 on any other device."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    # What torch holds and does not use it will give.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
