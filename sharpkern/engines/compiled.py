"""Compiled models are evaluated as they are: nothing is compiled that the run has not compiled itself.

Dynamo keeps graphs for training and for evaluation without gradients apart, and both count towards its limit for one
function (``torch._dynamo.config.recompile_limit``). Graphs of a measurement's own would make a run reach that limit
sooner, and then go on eagerly, with other roundings, or with ``fullgraph=True`` stop.

Evaluating with gradients on would take the training's graphs, and the memory of its activations besides the parameters'
backup; `torch.nn.parallel.DistributedDataParallel` would take it for a training step.
"""

import sys

import torch


class NothingCompiled:
    """A context, to be entered any number of times, in which compiled functions run from the graphs there are.

    A call that none of the graphs fits runs eagerly. Without gradients that is every call, unless the run evaluates
    without gradients itself: one call of the closure under `torch.no_grad` before the loop has the graphs compiled.
    """

    def __enter__(self) -> None:
        # Nothing is compiled before Dynamo is loaded, and loading it takes seconds.
        self._stance = torch.compiler.set_stance("eager_on_recompile") if "torch._dynamo" in sys.modules else None

    def __exit__(self, *exception: object) -> None:
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
