"""Interrupts and errors between any two instructions of ours leave nothing behind, and come out as themselves."""

import contextlib
import gc
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sharpkern
from sharpkern import _undo
from sharpkern.engines.evaluation import guard as guards

ENGINES = ["virtual", "batched", "inplace"]
NUM_FAULTS = 4
PACKAGE = os.path.dirname(sharpkern.__file__) + os.sep


class Scene:
    """A model with everything that a measurement changes for a while, and what all of it is like before."""

    def __init__(
        self, engine: str, measure: Callable[..., object] = sharpkern.critical_sharpness, *, several: bool = False
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 3))
        x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
        one = lambda k: F.cross_entropy(self.model(x), y) * (1 + 0.05 * k)
        parts = [sharpkern.MicroBatch(partial(one, k)) for k in range(12 if several else 1)]
        self.loss_fn = parts if several else partial(one, 0)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        for part in parts:
            (part() / len(parts)).backward()
        self.direction = sharpkern.Direction.from_optimizer(optimizer)
        self.engine, self._measure = engine, measure
        # What is checked once is found out, and whatever is imported is there.
        self.measure()
        self._gradients = [p.grad for p in self.model.parameters()]
        self._state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self._before = self._process()

    def measure(self) -> Any:
        return self._measure(self.model, self.loss_fn, self.direction, engine=self.engine, rtol=0.1)

    def _process(self) -> dict[str, Any]:
        dynamo = sys.modules.get("torch._dynamo.eval_frame")
        return {
            "function modes": torch._C._len_torch_function_stack(),
            "dispatch modes": torch._C._len_torch_dispatch_stack(),
            "vmap levels": torch._C._functorch.get_dynamic_layer_stack_depth(),
            "stance": repr(getattr(dynamo, "_stance", None)),
            "grad mode": torch.is_grad_enabled(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "collector": gc.isenabled(),
            "filters": list(warnings.filters),
            "hooks": [len(module._forward_hooks) for module in self.model.modules()],
            "requires_grad": [p.requires_grad for p in self.model.parameters()],
            "stream": torch.get_rng_state().tolist(),
        }

    def left(self) -> list[str]:
        """What is not as it was."""
        found = [name for name, value in self._process().items() if value != self._before[name]]
        if any(p.grad is not gradient for p, gradient in zip(self.model.parameters(), self._gradients, strict=True)):
            found.append("gradients")
        return found + [n for n, value in self.model.state_dict().items() if not torch.equal(value, self._state[n])]


def fault_at(number: int, error: type[BaseException]) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that raises at the ``number``-th instruction of ours, once."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == number:
                raise error
        return trace

    trace.count = lambda: count  # type: ignore[attr-defined]
    return trace


def traced(trace: Any, run: Callable[[], object]) -> None:
    before = sys.gettrace()
    # Python 3.12 asks when it begins to trace whether any frame wants its instructions.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)


def losses(*given: Any, engine: str, rtol: float) -> torch.Tensor:
    return sharpkern.losses_along(*given, [0.1, 0.2, 0.3], engine=engine)


def of_a_part(model: nn.Module, loss_fn: Any, direction: sharpkern.Direction, **options: Any) -> object:
    return sharpkern.critical_sharpness(model, loss_fn, direction.only("3.*"), **options)


SAMPLED = partial(sharpkern.critical_sharpness, sample=4, clip=1.0)
BLOCKS_SAMPLED = partial(sharpkern.blockwise_critical_sharpness, blocks={"last": "3.*"}, sample=4, clip=1.0)


@pytest.mark.parametrize(
    ("engine", "measure", "several"),
    [
        *((engine, sharpkern.critical_sharpness, False) for engine in ENGINES),
        ("batched", losses, False),
        ("virtual", losses, True),
        ("inplace", sharpkern.blockwise_critical_sharpness, False),
        ("virtual", of_a_part, False),
        ("virtual", SAMPLED, True),
        ("inplace", BLOCKS_SAMPLED, True),
    ],
)
def test_an_error_at_any_instruction_leaves_nothing(engine: str, measure: Callable[..., object], several: bool) -> None:
    scene = Scene(engine, measure, several=several)
    counting = fault_at(-1, MemoryError)
    traced(counting, scene.measure)
    total, positions = counting.count(), random.Random(0)
    assert total > 5000
    for error in (MemoryError, SystemExit, KeyboardInterrupt):
        for _ in range(NUM_FAULTS):
            position = positions.randrange(1, total + 1)
            with contextlib.suppress(error):
                traced(fault_at(position, error), scene.measure)
            assert scene.left() == [], f"{error.__name__} at instruction {position}"


def test_a_fault_inside_of_the_restore_is_made_good() -> None:
    scene = Scene("inplace")
    counting = fault_at(-1, MemoryError)
    # Without the checks of the first two, which most of those that follow do not make.
    scene.measure()
    traced(counting, scene.measure)
    total = counting.count()
    # The last instructions are those that put everything back.
    raised = 0
    for position in range(total - 1500, total, 97):
        try:
            traced(fault_at(position, MemoryError), scene.measure)
        except MemoryError:
            raised += 1
        assert scene.left() == [], f"at instruction {position} of {total}"
    assert raised > 10


@pytest.fixture
def alarm() -> Any:
    """Interrupts after a while, as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


# One that comes while another package's callback of the garbage collector runs is lost by Python, and told of.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("engine", "measure", "several"),
    [
        *((engine, sharpkern.critical_sharpness, False) for engine in ENGINES),
        ("virtual", SAMPLED, True),
        ("inplace", BLOCKS_SAMPLED, True),
        ("inplace", losses, True),
    ],
)
def test_an_interrupt_at_any_time_leaves_nothing(
    engine: str, measure: Callable[..., object], several: bool, alarm: Callable[[float], object]
) -> None:
    scene, times = Scene(engine, measure, several=several), random.Random(0)
    took = min(timed(scene.measure) for _ in range(3))
    interrupted = 0
    for _ in range(60):
        try:
            alarm(times.uniform(1e-4, took))
            scene.measure()
            alarm(0)
        except KeyboardInterrupt:
            interrupted += 1
        assert scene.left() == []
    assert interrupted > 3


def test_a_measurement_in_a_thread_goes_on_when_the_main_one_is_interrupted(alarm: Callable[[float], object]) -> None:
    scene = Scene("virtual")
    found: list[str] = []
    finished = threading.Event()

    def measure() -> None:
        found.extend(scene.measure().status for _ in range(20))
        finished.set()

    threading.Thread(target=measure).start()
    alarm(0.02)
    with pytest.raises(KeyboardInterrupt):
        finished.wait()
    assert finished.wait(60)
    assert found == ["converged"] * 20
    assert scene.left() == []


def test_an_interrupt_comes_out_as_itself_where_a_clean_up_that_it_broke_fails() -> None:
    scene = Scene("virtual")

    def broken() -> torch.Tensor:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("trying to pop from an empty stack")

    with pytest.raises(KeyboardInterrupt):
        sharpkern.critical_sharpness(scene.model, broken, scene.direction)
    assert scene.left() == []
    # One that the caller has handled is none of ours.
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(RuntimeError, match="planted"):
            sharpkern.critical_sharpness(scene.model, planted, scene.direction)


def planted() -> torch.Tensor:
    raise RuntimeError("planted")


def test_without_the_second_try_an_interrupt_of_the_restore_would_leave_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene, process = Scene("virtual"), _undo.ProcessState()
    restore, calls = guards.Guard.restore, 0

    def interrupted(guard: guards.Guard) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        restore(guard)

    monkeypatch.setattr(guards.Guard, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scene.measure()
    assert scene.left() == []
    calls = 0
    monkeypatch.setattr(_undo, "_TRIES", 0)
    monkeypatch.setattr(_undo.Trace, "put_back", lambda trace: [step() for step in reversed(trace._steps)])
    with pytest.raises(KeyboardInterrupt):
        scene.measure()
    left = scene.left()
    process.put_back()
    assert left != []
