"""FSDP1: parameters that lie in one flat tensor for each wrapped module, of which every rank holds a piece.

Between passes a parameter that the optimizer holds is this rank's piece, a tensor of one dimension, perhaps an empty
one; in a pass the module computes with views of the gathered flat tensor. torch keeps both in a handle, for which it
has no public name.
"""

import sys
from functools import partial
from typing import Any

from torch import nn

from sharpkern._undo import Trace

# Sharding strategies that leave gathered what a pass has gathered.
_STAY = ("SHARD_GRAD_OP", "_HYBRID_SHARD_ZERO2", "NO_SHARD")


def is_flat(parameter: object) -> bool:
    """Whether a parameter lies in a flat tensor of FSDP1."""
    return getattr(parameter, "_fsdp_flattened", False)


def is_flat_module(module: nn.Module) -> bool:
    """Whether a module is FSDP1's wrapper."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def flat_modules(model: nn.Module) -> list[Any]:
    """Return the wrappers of a model, the outermost first."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    return [module for module in model.modules() if is_flat_module(module)]


def flat_groups(model: nn.Module) -> list[Any]:
    """Return the process groups whose ranks have a batch each: those that shard, and those across such groups."""
    found: dict[Any, None] = {}
    for module in flat_modules(model):
        found[module.process_group] = None
        if module.sharding_strategy.name.lower().lstrip("_").startswith("hybrid"):
            found[module._inter_node_pg] = None
    return list(found)


def splits_of(model: nn.Module) -> dict[int, Any]:
    """Return the group that shards each flat parameter, by the parameter's identity; None for those that are whole."""
    found: dict[int, Any] = {}
    for module in flat_modules(model):
        handle = module._handle
        if handle is not None:
            flat = handle.flat_param
            group = handle.process_group if handle.uses_sharded_strategy else None
            pieces = [flat, *(flat._params or ()), *(flat._shared_params or ())]
            found.update({id(piece): group for piece in pieces})
    return found


def is_inside(model: nn.Module) -> bool:
    """Whether a model's flat parameters belong to wrappers that are around it, or are not known to be within it."""
    modules = flat_modules(model)
    if modules:
        return all(module._is_root is False for module in modules)
    return any(map(is_flat, model.parameters()))


def keep_pieces(model: nn.Module, trace: Trace) -> None:
    """Have passes take for granted that no parameter was replaced, of which a hidden gradient would be a sign."""
    handles = [module._handle for module in flat_modules(model) if module._handle is not None]
    trace.add(*(partial(setattr, one, "_skip_writeback_check", one._skip_writeback_check) for one in handles))
    for handle in handles:
        handle._skip_writeback_check = True


class FlatShards:
    """What a wrapper gathers in a pass.

    Attributes:
        inside: the wrapped module, whose forward pass begins when the wrapper has gathered.
        stays: whether it stays gathered when a pass without gradients ends.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper, self._handle = wrapper, wrapper._handle
        self.inside: nn.Module = wrapper._fsdp_wrapped_module
        self.stays = bool(wrapper._is_root) or wrapper.sharding_strategy.name in _STAY

    def unshard(self) -> None:
        """Gather what a pass would gather."""
        if self._handle is not None:
            self._handle.pre_unshard()
            self._handle.unshard()
            self._handle.post_unshard()

    def reshard(self) -> None:
        """Free what was gathered, so that the parameters are this rank's pieces."""
        handle = self._handle
        # Until its first pass a wrapper has no pieces set aside, and has gathered nothing.
        if handle is None or not hasattr(handle.flat_param, "_local_shard"):
            return
        self.settle()
        if handle.uses_sharded_strategy:
            handle.reshard(True)
        elif handle._uses_param_mixed_precision:
            handle.reshard(False)
            handle.post_reshard()
        handle._prefetched = False

    def settle(self) -> None:
        """Tell the wrapper that it is in no pass any more, which it learns only from passes that end."""
        self._wrapper.training_state = type(self._wrapper.training_state).IDLE
        if self._handle is not None and self._handle._training_state.name == "FORWARD":
            self._handle._training_state = type(self._handle._training_state).IDLE
