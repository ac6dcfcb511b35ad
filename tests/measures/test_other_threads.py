"""The same loss whenever the closure is called, also where another thread draws random numbers meanwhile."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sharpkern


@pytest.fixture
def other_thread() -> Iterator[None]:
    """A second thread that is alive during the test."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    yield
    end.set()
    thread.join()


MEASURES: dict[str, Callable[..., Any]] = {
    "critical": lambda *at: sharpkern.critical_sharpness(*at).critical_lr,
    "losses": lambda *at: sharpkern.losses_along(*at, [0.0, 0.1]).tolist(),
    "differences": sharpkern.directional_sharpness,
    "gradient": partial(sharpkern.directional_sharpness, method="gradient"),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_a_draw_of_another_thread_in_the_first_call_changes_nothing(measure: str, other_thread: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))
    inputs = torch.randn(16, 4)

    def loss_fn(disturbed_call: int = 0) -> Tensor:
        calls.append(None)
        if len(calls) == disturbed_call:
            # As a thread would that draws between the entry of the call and the dropout.
            torch.rand(3)
        return model(inputs).square().mean()

    calls: list[None] = []
    loss_fn().backward()
    direction = sharpkern.Direction.from_gradients(model)
    quiet = MEASURES[measure](model, loss_fn, direction)
    calls.clear()
    assert MEASURES[measure](model, partial(loss_fn, 1), direction) == pytest.approx(quiet, rel=1e-4)


def test_a_closure_with_another_batch_each_time_is_refused_beside_a_thread(other_thread: None) -> None:
    model = nn.Linear(4, 1)
    batches = iter(torch.randn(100, 8, 4).unbind())
    loss_fn = lambda: model(next(batches)).square().mean()
    loss_fn().backward()
    with pytest.raises(ValueError, match="must return the same loss whenever it is called"):
        sharpkern.critical_sharpness(model, loss_fn, sharpkern.Direction.from_gradients(model))
