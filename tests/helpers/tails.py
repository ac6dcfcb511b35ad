"""Closures over the logits of a language model, by engines with every head deferred, and with none."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor, nn

from sharpkern.engines.virtual import layers
from sharpkern.engines.virtual import lm_head as tail
from sharpkern.ops import linear_cross_entropy as head
from tests.helpers.cases import tokens
from tests.helpers.oracle import LossFn, deep_copy_losses, engine_losses, random_direction

STEP_SIZES = (0.0, 1e-2, 0.1)
# Of K step sizes at once, and of K after one another.
PASSES = {"virtual": len(STEP_SIZES), "batched": 1}
BOTH = pytest.mark.parametrize("engine", PASSES)
NEVER = 2**60

Loss = Callable[[Tensor, Tensor], Tensor]


class Taken(list[dict[str, Any]]):
    """The options of every chunked cross-entropy."""


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """Every head is large, and chunks are of 48 rows."""
    calls = Taken()
    chunked = layers.cross_entropy_of_rows

    def spy(*args: Any, **options: Any) -> Tensor:
        calls.append(options)
        return chunked(*args, **options)

    monkeypatch.setattr(layers, "cross_entropy_of_rows", spy)
    monkeypatch.setattr(tail, "HEAD_THRESHOLD", 0)
    monkeypatch.setattr(tail, "HEAD_ROWS", 0)
    monkeypatch.setattr(head, "VOCABULARY_CHUNK", 48)
    return calls


def closure_of(loss: Loss) -> Callable[[nn.Module], LossFn]:
    """A closure that does something with a model's logits [B, T, V] and the labels [B, T]."""

    def closure(model: nn.Module) -> LossFn:
        x = tokens().to(next(model.parameters()).device)
        return lambda: loss(model(x), x.flip(1))

    return closure


def losses_of(
    model: nn.Module, loss: Loss, step_sizes: Sequence[float] = STEP_SIZES, engine: str = "virtual"
) -> list[float]:
    return engine_losses(engine, model, closure_of(loss)(model), random_direction(model), step_sizes)


def exact_losses(model: nn.Module, loss: Loss, step_sizes: Sequence[float] = STEP_SIZES) -> list[float]:
    return deep_copy_losses(model, closure_of(loss), random_direction(model), step_sizes)


def undeferred_losses(
    model: nn.Module, loss: Loss, step_sizes: Sequence[float] = STEP_SIZES, engine: str = "virtual"
) -> list[float]:
    """What the engine gives where no head is large enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail, "HEAD_THRESHOLD", NEVER)
        return losses_of(model, loss, step_sizes, engine)


def wrong(got: list[float], right: list[float]) -> bool:
    return got != pytest.approx(right, rel=1e-3)
