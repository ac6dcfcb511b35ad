"""Compiled models are evaluated as they are: nothing is compiled that the run has not compiled itself.

Dynamo keeps graphs for training and for evaluation without gradients apart, and both count towards its limit for one
function (``torch._dynamo.config.recompile_limit``). Graphs of a measurement's own would make a run reach that limit
sooner, and then go on eagerly, with other roundings, or with ``fullgraph=True`` stop.

Evaluating with gradients on would take the training's graphs, and the memory of its activations besides the parameters'
backup; `torch.nn.parallel.DistributedDataParallel` would take it for a training step.
"""

import sys
from contextlib import AbstractContextManager
from typing import Any

import torch

from sharpkern._undo import ProcessState


class Eagerly:
    """A context, to be entered any number of times, in which compiled functions run as plain Python."""

    _stance = "force_eager"

    def __init__(self, *modes: AbstractContextManager[Any]) -> None:
        self._modes = modes

    def __enter__(self) -> None:
        self._process = ProcessState()
        self._entered = []
        # Nothing can be compiled before Dynamo is loaded, and loading it takes seconds.
        if "torch._dynamo" in sys.modules:
            torch.compiler.set_stance(self._stance)
        for mode in self._modes:
            mode.__enter__()
            self._entered.append(mode)

    def __exit__(self, *exception: Any) -> None:
        try:
            while self._entered:
                self._entered.pop().__exit__(None, None, None)
        finally:
            # By depth: an interrupt may have come between a mode's entry and our note of it.
            self._process.put_back()


class FromGraphs(Eagerly):
    """A context, to be entered any number of times, in which compiled functions run from the graphs that there are.

    A call that none of the graphs fits runs eagerly. Without gradients that is every call, unless the run evaluates
    without gradients itself: one call of the closure under `torch.no_grad` before the loop has the graphs compiled.
    """

    _stance = "eager_on_recompile"

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        if isinstance(error, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(
                f"{error}\nCompiled functions were measured eagerly where there is no graph without gradients, which "
                "takes more memory; call loss_fn once under torch.no_grad() before the loop to have them compiled"
            ) from error
