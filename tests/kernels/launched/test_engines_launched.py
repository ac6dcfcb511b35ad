"""The engines on a GPU that computes nothing but what plain torch fills in: losses are those of plain torch."""

import pytest
import torch

from sharpkern import Direction
from sharpkern.engines.virtual import lm_head
from tests.helpers.cases import CASES, tokens
from tests.helpers.llama import TrainedLlama
from tests.helpers.models import GPT
from tests.helpers.oracle import engine_losses, random_direction

STEP_SIZES = (0.0, 0.02, 0.05, 0.01)
BY_NAME = {case.name: case for case in CASES}


def stepped(model, loss_fn, kind):
    """An optimizer of a model between backward and step."""
    optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
    return optimizer


def both(model, loss_fn, make_direction, engine, step_sizes, gpu, monkeypatch):
    with gpu.counted() as counts:
        losses = engine_losses(engine, model, loss_fn, make_direction(), step_sizes)
    monkeypatch.setenv("SHARPKERN_BACKEND", "torch")
    return losses, engine_losses(engine, model, loss_fn, make_direction(), step_sizes), counts


@pytest.mark.parametrize(
    ("name", "engine"),
    [(name, engine) for name in ("gpt", "resnet") for engine in ("virtual", "inplace", "batched")]
    # Recurrent layers have no rule for several step sizes at once.
    + [("lstm", "virtual"), ("lstm", "inplace")],
)
def test_losses_of_a_direction_in_memory(name, engine, gpu, monkeypatch, no_swapping):
    model = BY_NAME[name].build()
    direction = random_direction(model)
    losses, expected, counts = both(
        model, BY_NAME[name].closure(model), lambda: direction, engine, STEP_SIZES, gpu, monkeypatch
    )
    assert losses == pytest.approx(expected, rel=1e-5)
    assert counts.launches.total() > 0
    assert counts.refused == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["virtual", "inplace", "batched"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_losses_of_a_direction_from_state(kind, engine, dtype, gpu, monkeypatch, no_swapping):
    model = GPT(width=16, layers=2).eval().to(dtype)
    x = tokens(batch=2, length=16)
    loss_fn = lambda: torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    optimizer = stepped(model, loss_fn, kind)
    losses, expected, counts = both(
        model,
        loss_fn,
        lambda: Direction.from_optimizer(optimizer, resident=False),
        engine,
        STEP_SIZES,
        gpu,
        monkeypatch,
    )
    # Sixteen-bit norms are formed in fp32 here and there.
    assert losses == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 2e-3)
    assert counts.launches.total() > 0
    assert counts.refused == {}


@pytest.mark.parametrize("engine", ["virtual", "inplace", "batched"])
def test_losses_of_a_language_model_whose_logits_are_deferred(engine, gpu, monkeypatch):
    pytest.importorskip("transformers", reason="the model is of transformers")
    monkeypatch.setattr(lm_head, "HEAD_THRESHOLD", 2**16)
    llama = TrainedLlama(2)
    losses, expected, counts = both(
        llama.model,
        llama.loss,
        lambda: Direction.from_optimizer(llama.optimizer, resident=False),
        engine,
        (0.0, 1e-3, 2e-3, 1e-3),
        gpu,
        monkeypatch,
    )
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[1] == losses[3]
    assert counts.refused == {}


def test_a_slope_and_a_norm_from_state(gpu, monkeypatch):
    llama = TrainedLlama(2)
    found = Direction.from_optimizer(llama.optimizer, resident=False)
    monkeypatch.setenv("SHARPKERN_BACKEND", "torch")
    expected = Direction.from_optimizer(llama.optimizer, resident=False)
    assert found.slope == pytest.approx(expected.slope, rel=1e-9)
    assert found.norm_sq == pytest.approx(expected.norm_sq, rel=1e-9)
