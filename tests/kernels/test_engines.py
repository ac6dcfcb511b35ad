"""The engines on the kernels: the path of a GPU from closure to launch, with Triton's interpreter as the device."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sharpkern import Direction, ops
from sharpkern.ops import registry
from tests.helpers.cases import CASES, Case, tokens
from tests.helpers.models import GPT, ResNet
from tests.helpers.oracle import engine_losses, random_direction

STEP_SIZES = (0.0, 0.02)


def few_tokens(model):
    """A row of a norm and of an embedding is a program of its own, and the interpreter is slow."""
    x = tokens(batch=1, length=8)
    if isinstance(model, GPT):
        return lambda: F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    return lambda: model(input_ids=x, labels=x).loss


def small_gpt():
    return GPT(width=16, layers=1)


BY_NAME = {case.name: case for case in CASES}
MODELS = [
    Case("gpt", small_gpt, few_tokens),
    replace(BY_NAME["resnet"], build=lambda: ResNet(channels=4)),
    BY_NAME["stacked-experts"],
    BY_NAME["lstm"],
    replace(BY_NAME["olmo2"], closure=few_tokens),
]


@pytest.fixture
def launched(monkeypatch):
    """Which kernels ran, and which refused their operands, while "auto" takes them on the CPU."""
    counts = Counter()
    real = registry._launcher

    def launcher(name, kernel):
        def accept(*operands, **options):
            counts[name] += 1
            counts["refused"] += real(name, kernel).refusal(*operands, **options) is not None
            return real(name, kernel).accept(*operands, **options)

        return SimpleNamespace(accept=accept)

    monkeypatch.setattr(registry, "_launcher", launcher)
    for module in (registry, ops):
        monkeypatch.setattr(module, "has_kernels", lambda device: True)
    registry._kernels_work.cache_clear()
    yield counts
    registry._kernels_work.cache_clear()


@pytest.mark.parametrize(
    ("engine", "case"),
    [
        ("inplace", MODELS[0]),
        *(("virtual", case) for case in MODELS[:-1]),
        pytest.param("virtual", MODELS[-1], marks=pytest.mark.long),
    ],
    ids=lambda one: getattr(one, "name", one),
)
def test_losses_are_those_of_plain_torch(case, engine, launched, monkeypatch):
    if case.name == "olmo2":
        pytest.importorskip("transformers", reason="the model is of transformers")
    model = case.build()
    loss_fn = case.closure(model)
    direction = random_direction(model)
    losses = engine_losses(engine, model, loss_fn, direction, STEP_SIZES)
    ran = dict(launched)
    monkeypatch.setenv("SHARPKERN_BACKEND", "torch")
    expected = engine_losses(engine, model, loss_fn, direction, STEP_SIZES)
    assert losses == pytest.approx(expected, rel=1e-6)
    expected_kernels = {"axpy_"} if engine == "inplace" else {"form"}
    if case.name == "gpt" and engine == "virtual":
        expected_kernels = {"form", "embedding", "layer_norm"}
    assert expected_kernels <= set(ran)
    assert ran["refused"] == 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_a_direction_from_state_goes_through_the_kernels(kind, launched, monkeypatch):
    model = small_gpt().eval()
    loss_fn = few_tokens(model)
    optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
    direction = Direction.from_optimizer(optimizer)
    losses = engine_losses("virtual", model, loss_fn, direction, STEP_SIZES)
    ran = dict(launched)
    monkeypatch.setenv("SHARPKERN_BACKEND", "torch")
    in_torch = Direction.from_optimizer(optimizer)
    assert direction.slope == pytest.approx(in_torch.slope, rel=1e-6)
    assert losses == pytest.approx(engine_losses("virtual", model, loss_fn, in_torch, STEP_SIZES), rel=1e-6)
    assert ran["form_step"] > 1
    # Those of the direction, and of what tells whether it still holds.
    assert ran["sum_steps"] == 2
    assert ran["refused"] == 0
