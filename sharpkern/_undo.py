"""Run something and put back what it changed, to the end, wherever an interrupt or an error hits it.

An interrupt may come between any two instructions: after a context was entered and before ``with`` knows of it, or
inside of the very code that cleans up. So whatever changes the process for a while notes what is there first, adds how
to put it back to a `Trace`, and only then changes it, all inside of one call of `undone`.
"""

import gc
import os
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from traceback import walk_tb
from typing import Any, TypeVar

import torch
from torch.utils import _python_dispatch

Result = TypeVar("Result")
Step = Callable[[], object]

# Private names of torch for what has no public way to ask or to set.
_functorch: Any = torch._C._functorch
_eval_frame: Any = torch._C._dynamo.eval_frame

_DISPATCH_FLAGS = [name for name in vars(_python_dispatch) if name.startswith("_is_in_")]

_AUTOCAST_DEVICES = ("cpu", "cuda")
_LIBRARIES = (
    *(sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")),
    os.path.dirname(torch.__file__),
)
# Folders of libraries that are none of this environment's own: the user's, or another one's that a path leads to.
_PACKAGES = ("site-packages", "dist-packages")
# How often a step is tried that fails, and how often one that is interrupted.
_TRIES, _INTERRUPTS = 3, 100

# What is noted, changed and put back belongs to the process: one thread at a time.
alone = threading.RLock()


@lru_cache(maxsize=4096)
def is_library_file(path: str) -> bool:
    """Whether code is a library's, and not the user's."""
    return path.startswith((*_LIBRARIES, "<frozen")) or any(name in path.split(os.sep) for name in _PACKAGES)


def undone(body: Callable[[], Result], trace: "Trace") -> Result:
    """Run ``body``, then put back what its trace says, and return or raise what ``body`` did."""
    # Twice: what is raised inside of the first leaves the second to do the rest.
    try:
        try:
            result = body()
        except BaseException as raised:
            trace.let_go(raised)
            raise
        finally:
            trace.put_back()
    except BaseException as raised:
        trace.let_go(raised)
        trace.put_back()
        hidden = trace.interrupt_in(raised)
        if hidden is not None:
            raise hidden from None
        raise
    trace.tell()
    return result


class Trace:
    """How to put back what is about to be changed; the process's own state is noted when it is made."""

    def __init__(self) -> None:
        self._process = ProcessState()
        self._steps: list[Step] = []
        self._failure: BaseException | None = None
        self._handled = sys.exc_info()[1]

    def add(self, *steps: Step) -> None:
        """Add steps that put something back; the last one added is taken first. Each may be taken more than once."""
        self._steps.extend(steps)

    def drop(self, step: Step) -> None:
        """Leave out a step that has been taken."""
        with suppress(ValueError):
            self._steps.remove(step)

    def put_back(self) -> None:
        """Take every step, each on its own, also where one is interrupted or fails; done once, it does nothing more.

        An interrupt is raised at the end; a step that failed is told of by `tell`.
        """
        faults = interrupts = 0
        while self._steps:
            try:
                # First, so that no mode looks on, and after each step, which may have been interrupted in a context.
                self._process.put_back()
                self._steps[-1]()
                self._process.put_back()
                self._steps.pop()
                faults = interrupts = 0
            except BaseException as failure:
                if self._failure is None or not isinstance(failure, Exception):
                    self._failure = failure
                faults += isinstance(failure, Exception)
                interrupts += not isinstance(failure, Exception)
                if faults == _TRIES or interrupts == _INTERRUPTS:
                    self._steps.pop()
                    faults = interrupts = 0
        self._process.put_back()
        if self._failure is not None and not isinstance(self._failure, Exception):
            interrupt, self._failure = self._failure, None
            raise interrupt

    def interrupt_in(self, error: BaseException) -> BaseException | None:
        """Return the interrupt that came first, where a clean-up that it broke has raised something else."""
        context: BaseException | None = error
        while context is not None and context is not self._handled:
            if isinstance(context, (KeyboardInterrupt, SystemExit)):
                return None if context is error else context
            context = context.__context__
        return None

    def let_go(self, error: BaseException) -> None:
        """Forget what frames of libraries hold that an interrupt has ended.

        A context that it has left half-way is a generator, which closes, and changes what it was there for, when the
        last one forgets it: that must be before everything is put back.
        """
        if isinstance(error, Exception) and self.interrupt_in(error) is None:
            return
        context: BaseException | None = error
        while context is not None and context is not self._handled:
            for frame, _ in walk_tb(context.__traceback__):
                if is_library_file(frame.f_code.co_filename):
                    # Those still running are not to be cleared.
                    with suppress(RuntimeError):
                        frame.clear()
            context = context.__context__

    def tell(self) -> None:
        """Raise what a step failed with."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


class ProcessState:
    """What a pass changes of torch and of the interpreter for a while: depths of stacks, and flags."""

    def __init__(self) -> None:
        self._functions = torch._C._len_torch_function_stack()
        self._dispatch = torch._C._len_torch_dispatch_stack()
        self._dispatch_flags = {name: getattr(_python_dispatch, name) for name in _DISPATCH_FLAGS}
        self._layers = _functorch.get_dynamic_layer_stack_depth()
        self._grad = torch.is_grad_enabled()
        self._put_autocast_back = note_autocast()
        self._stance, self._callback = _dynamo_state()
        self._collects = gc.isenabled()
        # A list that the interpreter reads anew for every warning; `warnings.catch_warnings` puts another in its place.
        self._filters: list[Any] = warnings.filters  # type: ignore[assignment]
        self._kept_filters = self._filters.copy()
        self._show = warnings.showwarning

    def put_back(self) -> None:
        """Make all of it what it was; may be called again and again."""
        while torch._C._len_torch_function_stack() > self._functions:
            torch._C._pop_torch_function_stack()
        while torch._C._len_torch_dispatch_stack() > self._dispatch:
            torch._C._pop_torch_dispatch_stack(None)
        if _functorch.get_dynamic_layer_stack_depth() > self._layers:
            _functorch.pop_dynamic_layer_stack_and_undo_to_depth(self._layers)
        torch.set_grad_enabled(self._grad)
        self._put_autocast_back()
        for name, value in self._dispatch_flags.items():
            setattr(_python_dispatch, name, value)
        if _dynamo_state() != (self._stance, self._callback):
            _set_dynamo_state(self._stance, self._callback)
        if gc.isenabled() != self._collects:
            (gc.enable if self._collects else gc.disable)()
        if warnings.filters is not self._filters:
            warnings.filters = self._filters
        if self._filters != self._kept_filters:
            self._filters[:] = self._kept_filters
        if warnings.showwarning is not self._show:
            warnings.showwarning = self._show


def note_autocast() -> Step:
    """Return what puts the state of autocast back to where it is now."""
    cache = torch.is_autocast_cache_enabled()
    states = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _AUTOCAST_DEVICES]

    def put_back() -> None:
        torch.set_autocast_cache_enabled(cache)
        for kind, enabled, dtype in states:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)

    return put_back


def _dynamo_state() -> tuple[Any, Any]:
    """Return torch.compile's stance and what it does with frames, None where nothing has loaded it yet."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return (None, None) if dynamo is None else (dynamo._stance, _eval_frame.get_eval_frame_callback())


def _set_dynamo_state(stance: Any, callback: Any) -> None:
    """Put back what `_dynamo_state` returned; it may have been loaded since."""
    dynamo: Any = sys.modules["torch._dynamo.eval_frame"]
    _eval_frame.set_eval_frame(callback)
    # Its own setter refuses to work where a frame is being compiled.
    dynamo._stance = dynamo.DynamoStance() if stance is None else stance
