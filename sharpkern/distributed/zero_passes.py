"""Passes of ZeRO-3 that fail on one rank: it goes on through the gathers that the others need from it.

Before a module runs, ZeRO-3 gathers its parameters and begins to gather those of the modules that its trace has next;
when it ends they may be let go. What is gathered when depends on every begin and end before. So a rank whose pass has
failed goes through those that are left, in the order of a pass that went well, or else of DeepSpeed's own trace.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from sharpkern._undo import Trace
from sharpkern.distributed.deepspeed import engine_in, wrapped

# A module, and whether it begins; it ends otherwise.
_Event = tuple["ref[nn.Module]", bool]
_STEPS = (("pre_sub_module_forward_function", True), ("post_sub_module_forward_function", False))
_known: WeakKeyDictionary[nn.Module, list[_Event]] = WeakKeyDictionary()


def zero_pass_of(model: nn.Module) -> "ZeroPass | None":
    """What keeps the passes of a model in step that ZeRO-3 gathers; None of any other."""
    engine = engine_in(model)
    known = None if engine is None else wrapped(engine.optimizer)
    return ZeroPass(known.wrapper.parameter_offload) if known is not None and known.gathers else None


class ZeroPass:
    """The order in which modules begin and end in a pass, noted in one and kept up in those that fail."""

    def __init__(self, offload: Any) -> None:
        self._offload = offload
        self._root: nn.Module = offload.module
        self._events: list[_Event] = []
        self._depth = len(_stack())

    def watch(self, trace: Trace) -> None:
        """Note what begins and ends, until the trace is put back."""
        # DeepSpeed's hooks look them up on the object: so they are noted when the gathers are done, whoever else has
        # hooks on the modules, which may raise.
        for name, begins in _STEPS:
            trace.add(partial(vars(self._offload).pop, name, None))
            setattr(self._offload, name, self._noting(getattr(self._offload, name), begins))

    def _noting(self, step: Callable[[nn.Module], None], begins: bool) -> Callable[[nn.Module], None]:
        def noting(module: nn.Module) -> None:
            step(module)
            self._events.append((ref(module), begins))

        return noting

    def finish(self) -> None:
        """End a pass that went well."""
        if self._events:
            _known[self._root] = self._events
        self._events = []

    def keep_up(self) -> None:
        """End a pass that failed: gather as the other ranks do in the rest of it."""
        done = len(self._events)
        stack = _stack()
        for module_ref, begins in (_known.get(self._root) or list(self._traced()))[done:]:
            module = module_ref()
            if module is None:
                continue
            if begins and module is self._root:
                self._offload.get_param_coordinator().reset_step()
            if begins:
                self._offload.pre_sub_module_forward_function(module)
            else:
                self._offload.post_sub_module_forward_function(module)
        # Modules that have begun stand in it, and the failed ones have not ended.
        del stack[self._depth :]
        self._events = []
        for module in self._root.modules():
            # Otherwise whoever looks at a parameter gathers it.
            if hasattr(module._parameters, "_in_forward"):
                module._parameters._in_forward = False

    def _traced(self) -> Iterator[_Event]:
        """The begins and ends of a forward pass as DeepSpeed has seen it, which only notes what begins."""
        coordinator = self._offload.get_param_coordinator()
        order = getattr(coordinator, f"_{type(coordinator).__name__}__submodule_order", ())
        yield from _nested(_forward_part(order))


def _stack() -> list[Any]:
    """DeepSpeed's list of modules that are in their forward pass, below them the root of every engine."""
    stack: list[Any] = sys.modules["deepspeed.runtime.zero.parameter_offload"].FWD_MODULE_STACK
    return stack


def _forward_part(order: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules of a trace until the first comes again, in the backward pass."""
    found: dict[nn.Module, None] = {}
    for module in order:
        if module in found:
            break
        found[module] = None
    return list(found)


def _nested(modules: Sequence[nn.Module]) -> Iterator[_Event]:
    """Begins and ends of modules that begin in an order, each of which ends when what is inside of it has."""
    running: list[nn.Module] = []
    for module in modules:
        while running and not any(module is inside for inside in running[-1].modules()):
            yield ref(running.pop()), False
        running.append(module)
        yield ref(module), True
    while running:
        yield ref(running.pop()), False
