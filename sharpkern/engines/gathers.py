"""Passes of FSDP2 models: shards gathered anew for each, in step with the other ranks also where one of them fails."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from sharpkern.shards import fsdp_modules, is_sharded


class Gathers:
    """The order in which a pass gathers the shards of modules, noted in one pass and kept up in those that fail.

    Ranks whose pass goes well wait in a collective for the one whose pass failed. That one goes through the gathers
    that it still owes, and then all can be told.

    Args:
        model: with FSDP2 modules, or without, where all of this does nothing.
        watch: note the order, by hooks; not in compiled models, which would be compiled anew.
    """

    def __init__(self, model: nn.Module, *, watch: bool) -> None:
        self._modules = fsdp_modules(model)
        self._watch = watch
        # Until a pass has shown it: modules run in the order in which they were made, the outermost stays gathered.
        self._order = list(self._modules)
        self._stay = {id(module) for module in self._modules[:1]}
        self._entered: list[Any] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note which module begins and what it leaves gathered, as long as the block lasts."""
        with ExitStack() as hooks:
            for module in self._modules if self._watch else ():
                # After FSDP's own hooks, so that the gather is under way, or what was gathered is freed.
                hooks.enter_context(module.register_forward_pre_hook(self._begins))
                hooks.enter_context(module.register_forward_hook(self._ends))
            yield

    def _begins(self, module: nn.Module, _args: Any) -> None:
        self._entered.append(module)

    def _ends(self, module: nn.Module, _args: Any, _output: Any) -> None:
        parameter = next(_own_parameters(module), None)
        if parameter is None or is_sharded(parameter):
            self._stay.discard(id(module))
        else:
            self._stay.add(id(module))

    def finish(self) -> None:
        """End a pass that went well."""
        if self._entered:
            self._order = self._entered
        self._free()

    def keep_up(self) -> None:
        """End a pass that failed: gather what the other ranks gather in the rest of it."""
        for module in self._modules:
            _settle(module)
        for module in self._order[len(self._entered) :]:
            module.unshard()
            if id(module) not in self._stay:
                module.reshard()
        self._free()

    def _free(self) -> None:
        self._entered = []
        for module in self._modules:
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
