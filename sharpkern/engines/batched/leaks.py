"""Tensors of torch.func.vmap that outlive it: they are of no use any more, and an error to whoever uses them."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sharpkern.errors import EngineUnsupportedError


@contextmanager
def refuse_leaked_tensors(put_back: Callable[[], object]) -> Iterator[None]:
    """Refuse a closure that keeps its tensors, as by ``nonlocal logits``: the run would fail where it uses them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        before = _batched_tensors(0, 1)
        yield
        if _batched_tensors(0) <= before:
            return
        # What modules keep is put back, and what only cycles hold is freed.
        put_back()
        gc.collect(0)
        if not _batched_tensors(1) <= before:
            raise EngineUnsupportedError(
                "loss_fn keeps tensors that it computes, which are of several step sizes and of no use after its call; "
                "take .detach().clone() of what you need in the training step, not in loss_fn"
            )
    finally:
        if enabled:
            gc.enable()


def _batched_tensors(*generations: int) -> set[int]:
    """The tensors of torch.func.vmap in some of the collector's generations, by identity."""
    return set().union(*(_batched(gc.get_objects(generation)) for generation in generations))


def _batched(things: list[Any]) -> set[int]:
    """Those among what the collector knows: some thousand things, of few kinds."""
    # No list of these may outlive this call: found by the next one, it would hold itself, and all else.
    kinds = {kind for kind in set(map(type, things)) if issubclass(kind, Tensor)}
    return {id(thing) for thing in things if type(thing) in kinds and torch._C._functorch.is_batchedtensor(thing)}
