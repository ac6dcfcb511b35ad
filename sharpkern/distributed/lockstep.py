"""Passes of models that communicate in their forward pass: in step with the other ranks also where one of them fails.

FSDP gathers the shards of a module when it begins, DistributedDataParallel sends the buffers of rank 0 to the others.
Ranks whose pass goes well wait there for the one whose pass failed. That one goes through what it still owes them, and
then all can be told.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sharpkern._undo import Trace
from sharpkern.distributed.flat import FlatShards, flat_modules
from sharpkern.distributed.replay import Replay
from sharpkern.distributed.sharding import fsdp_modules, is_distributed, is_sharded
from sharpkern.distributed.zero_passes import zero_pass_of


@dataclass
class _Order:
    """How a model's modules communicate in a pass, by their numbers, which hold nothing alive.

    Attributes:
        begin: the modules in the order in which they communicate.
        stay: those that stay gathered when they end.
    """

    begin: list[int]
    stay: set[int]


def replicate_state(module: nn.Module) -> Any:
    """The state of composable data parallelism, ``replicate``; None where it was not applied to a module."""
    composable = sys.modules.get("torch.distributed._composable.replicate")
    if composable is None or not isinstance(module, composable.DDP):
        return None
    return composable.replicate.state(module)


def reducers_of(model: nn.Module) -> Iterator[tuple[nn.Module, DistributedDataParallel]]:
    """What averages gradients in a model, each behind the module whose forward pass it begins."""
    for module in model.modules() if is_distributed() else ():
        if isinstance(module, DistributedDataParallel):
            yield module.module, module
        elif (reducer := getattr(replicate_state(module), "_ddp", None)) is not None:
            yield module, reducer


_known: WeakKeyDictionary[nn.Module, _Order] = WeakKeyDictionary()


class Lockstep:
    """The order in which modules communicate in a pass, noted in one and kept up in those that fail."""

    def __init__(self, model: nn.Module, replay: Replay | None = None) -> None:
        self._replay = replay
        reducers = list(reducers_of(model))
        # Modules that were sharded together share their state and are gathered at once.
        self._sharded = {id(module._get_fsdp_state()): module for module in reversed(fsdp_modules(model))}
        # What is inside of a wrapper begins when the wrapper has communicated.
        self._flat = [FlatShards(module) for module in flat_modules(model)]
        self._parts: list[Any] = [*(reducer for _, reducer in reducers), *reversed(self._sharded.values()), *self._flat]
        number_of = {id(part): number for number, part in enumerate(self._parts)}
        self._members: dict[int, tuple[int, Any]] = {
            id(module): (number, module) for number, (module, _) in enumerate(reducers)
        }
        for module in fsdp_modules(model):
            self._members[id(module)] = (number_of[id(self._sharded[id(module._get_fsdp_state())])], module)
        for part in self._flat:
            self._members[id(part.inside)] = (number_of[id(part)], part.inside)
        # Until a pass has shown it: modules run in the order in which they were made, the outermost stays gathered.
        guess = _Order(list(range(len(self._parts))), {len(reducers)} if self._sharded else set())
        guess.stay.update(number_of[id(part)] for part in self._flat if part.stays)
        self._order = _known.setdefault(model, guess) if self._parts else guess
        self._zero = zero_pass_of(model)
        self._begun: list[int] = []
        # Of parts that are in their forward pass, the modules that have yet to end.
        self._open: dict[int, set[int]] = {}

    def watch(self, trace: Trace) -> None:
        """Note which module begins and what it leaves gathered, until the trace is put back."""
        if self._zero is not None:
            self._zero.watch(trace)
        for _, module in self._members.values():
            # After FSDP's own hooks, so that the gather is under way, or what was gathered is freed.
            for register, hook in (
                (module.register_forward_pre_hook, self._begins),
                (module.register_forward_hook, self._ends),
            ):
                trace.add(partial(_unhook, module, hook))
                register(hook)

    def noting(self) -> AbstractContextManager[object]:
        """A context for a pass whose closure may communicate by itself."""
        return nullcontext() if self._replay is None else self._replay.noting()

    def _begins(self, module: nn.Module, _args: Any) -> None:
        number, _ = self._members[id(module)]
        if number not in self._open:
            self._begun.append(number)
            self._open[number] = {member for member, (part, _) in self._members.items() if part == number}

    def _ends(self, module: nn.Module, _args: Any, _output: Any) -> None:
        number, _ = self._members[id(module)]
        yet_to_end = self._open.get(number, set())
        yet_to_end.discard(id(module))
        if yet_to_end:
            return
        self._open.pop(number, None)
        if isinstance(self._parts[number], FlatShards):
            return
        parameter = next(_own_parameters(module), None)
        if parameter is None or is_sharded(parameter):
            self._order.stay.discard(number)
        else:
            self._order.stay.add(number)

    def finish(self) -> None:
        """End a pass that went well."""
        if self._begun:
            self._order.begin = self._begun
        if self._zero is not None:
            self._zero.finish()
        if self._replay is not None:
            self._replay.finish()
        self._free()

    def settle(self) -> None:
        """All ranks have ended a pass that went well."""
        if self._replay is not None:
            self._replay.settle()

    def keep_up(self) -> bool:
        """End a pass that failed: communicate as the other ranks do in the rest; whether another had failed before."""
        if self._zero is not None:
            self._zero.keep_up()
        for module in self._sharded.values():
            _settle(module)
        for part in self._flat:
            part.settle()
        for number in self._open:
            # What the pass broke off in would not be gathered again where it runs once more.
            if number not in self._order.stay and not isinstance(self._parts[number], DistributedDataParallel):
                self._parts[number].reshard()
        for number in self._order.begin[len(self._begun) :]:
            part = self._parts[number]
            if isinstance(part, DistributedDataParallel):
                if torch.is_grad_enabled() and part.reducer._rebuild_buckets():
                    part._has_rebuilt_buckets = True
                if part._check_sync_bufs_pre_fwd():
                    part._sync_buffers()
            else:
                part.unshard()
                if number not in self._order.stay:
                    part.reshard()
        follows = self._replay is not None and self._replay.keep_up()
        self._free()
        return follows

    def _free(self) -> None:
        """Leave the shards as the next pass needs them: what stays gathered would hide the next write."""
        self._begun, self._open = [], {}
        for module in self._sharded.values():
            module.reshard()
        for part in self._flat:
            part.reshard()


def _unhook(module: nn.Module, hook: Callable[..., None]) -> None:
    """Take a hook off a module, whose handle an interrupt may have kept from us."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, one in hooks.items() if one == hook]:
            del hooks[number]


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
    # Of modules that were sharded together, those that have yet to run; since torch 2.7.
    getattr(state, "_modules_to_run_forward", set()).clear()
