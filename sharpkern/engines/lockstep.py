"""Passes of models that communicate in their forward pass: in step with the other ranks also where one of them fails.

FSDP2 gathers the shards of a module when it begins, DistributedDataParallel sends the buffers of rank 0 to the others.
Ranks whose pass goes well wait there for the one whose pass failed. That one goes through what it still owes them, and
then all can be told.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sharpkern.shards import fsdp_modules, is_sharded


class Lockstep:
    """The order in which modules communicate in a pass, noted in one and kept up in those that fail.

    Args:
        model: with FSDP2 modules or `DistributedDataParallel` in it, or without, where all of this does nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sharded = fsdp_modules(model)
        wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
        # What is inside begins when the wrapper has communicated.
        self._wrapper_of = {id(wrapper.module): wrapper for wrapper in wrappers}
        # Until a pass has shown it: modules run in the order in which they were made, the outermost stays gathered.
        self._order = [*(wrapper.module for wrapper in wrappers), *self._sharded]
        self._stay = {id(module) for module in self._sharded[:1]}
        self._watched = list(self._order)
        self._begun: list[Any] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note which module begins and what it leaves gathered, as long as the block lasts."""
        with ExitStack() as hooks:
            for module in self._watched:
                # After FSDP's own hooks, so that the gather is under way, or what was gathered is freed.
                hooks.enter_context(module.register_forward_pre_hook(self._begins))
            for module in self._sharded:
                hooks.enter_context(module.register_forward_hook(self._ends))
            yield

    def _begins(self, module: nn.Module, _args: Any) -> None:
        self._begun.append(module)

    def _ends(self, module: nn.Module, _args: Any, _output: Any) -> None:
        parameter = next(_own_parameters(module), None)
        if parameter is None or is_sharded(parameter):
            self._stay.discard(id(module))
        else:
            self._stay.add(id(module))

    def finish(self) -> None:
        """End a pass that went well."""
        if self._begun:
            self._order = self._begun
        self._free()

    def keep_up(self) -> None:
        """End a pass that failed: communicate as the other ranks do in the rest of it."""
        for module in self._sharded:
            _settle(module)
        for module in self._order[len(self._begun) :]:
            wrapper = self._wrapper_of.get(id(module))
            if wrapper is None:
                module.unshard()
                if id(module) not in self._stay:
                    module.reshard()
            elif wrapper._check_sync_bufs_pre_fwd():
                wrapper._sync_buffers()
        self._free()

    def _free(self) -> None:
        """Leave the shards as the next pass needs them: what stays gathered would hide the next write."""
        self._begun = []
        for module in self._sharded:
            module.reshard()


def _own_parameters(module: Any) -> Iterator[nn.Parameter]:
    """Parameters that are gathered with a module and not with an FSDP2 module inside of it."""
    inner = {id(parameter) for child in fsdp_modules(module)[1:] for parameter in child.parameters()}
    return (parameter for parameter in module.parameters() if id(parameter) not in inner)


def _settle(module: Any) -> None:
    """Tell FSDP2 that a module is not in its forward pass any more, which it learns only from passes that end."""
    state = module._get_fsdp_state()
    # One group before torch 2.11, several since.
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    for part in (state, *groups):
        if part is not None and part._training_state.name == "FORWARD":
            part._training_state = type(part._training_state).IDLE
    state._state_ctx.iter_forward_root = None
