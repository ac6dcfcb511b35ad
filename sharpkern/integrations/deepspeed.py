"""The moment in which a DeepSpeed engine is about to step: what Accelerate's and Transformers' monitors wait for."""

from collections.abc import Callable
from typing import Any

from torch import nn

from sharpkern.distributed.deepspeed import engine_in, refuse_unknown

_ABSENT = object()


class BeforeStep:
    """Calls a function on entry to every step of a DeepSpeed engine that moves the weights.

    Gradients are averaged over the ranks then, and neither clipped nor divided by the loss scale; the weights are those
    that the gradients are of. A call of ``engine.step()`` between two accumulation boundaries calls nothing.

    Args:
        engine: of DeepSpeed.
        call: takes no argument; what it raises, ``engine.step()`` raises, and the step is not taken.

    Raises:
        TypeError: the engine is of a kind that cannot be measured.

    Memory: none.
    """

    def __init__(self, engine: Any, call: Callable[[], object]) -> None:
        refuse_unknown(engine)
        self._engine, self._call = engine, call
        self._before, self._step = vars(engine).get("step", _ABSENT), engine.step
        # Of the object: who calls the engine finds it there.
        engine.step = self._noted

    def remove(self) -> None:
        """Put the engine's method back, if that has not been done."""
        if vars(self._engine).get("step") != self._noted:
            return
        if self._before is _ABSENT:
            del self._engine.step
        else:
            self._engine.step = self._before

    def _noted(self, *args: Any, **kwargs: Any) -> Any:
        if self._engine.is_gradient_accumulation_boundary():
            self._call()
        return self._step(*args, **kwargs)


def before_steps_of(model: nn.Module, call: Callable[[], object]) -> BeforeStep | None:
    """Call a function before each step of the engine that a model is; None where it is no engine of DeepSpeed."""
    engine = engine_in(model)
    return None if engine is None else BeforeStep(engine, call)
