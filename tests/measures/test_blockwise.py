"""λ_c of one block at a time: what critical_sharpness finds where that block alone moves."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern
from sharpkern import Direction
from sharpkern.directions.blocks import default_blocks
from sharpkern.engines.tracked import TrackedParam
from sharpkern.measures.blockwise import blockwise_critical_sharpness
from tests.helpers.cases import CASES
from tests.helpers.models import GPT, MLP

NAMED = {case.name: case for case in CASES}
OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
}


def trained(model: nn.Module, loss_fn: Callable[[], Tensor], kind: str = "adamw") -> torch.optim.Optimizer:
    """An optimizer with the gradient of its next step, of a model that has learned a little."""
    optimizer = OPTIMIZERS[kind](model)
    for _ in range(20):
        optimizer.step()
        optimizer.zero_grad()
        loss_fn().backward()
    return optimizer


@pytest.mark.parametrize(
    ("kind", "engine", "resident"),
    [
        ("sgd", "auto", True),
        ("adamw", "auto", None),
        ("adamw", "virtual", False),
        ("adamw", "batched", False),
        ("adamw", "inplace", False),
    ],
)
def test_each_is_as_if_nothing_else_moved(kind: str, engine: str, resident: bool | None) -> None:
    model = GPT(width=8, dropout=0.0).double()
    loss_fn = NAMED["gpt"].closure(model)
    direction = Direction.from_optimizer(trained(model, loss_fn, kind), resident=resident)
    found = sharpkern.blockwise_critical_sharpness(model, loss_fn, direction, engine=engine, rtol=1e-3)
    assert list(found) == ["tokens", "positions", "blocks.0", "blocks.1", "norm"]
    assert sum(m.slope for m in found.values()) == pytest.approx(direction.slope)
    deltas = dict(zip(direction.parameters, direction.tensors, strict=True))
    for name, m in found.items():
        alone = {p: deltas[p] for p in model.get_submodule(name).parameters()}
        expected = sharpkern.critical_sharpness(model, loss_fn, Direction.from_tensors(alone, model), rtol=1e-3)
        assert m.status == expected.status
        assert m.sharpness == pytest.approx(expected.sharpness, rel=3e-3) or m.status != "converged"
        assert m.base_loss == pytest.approx(expected.base_loss, rel=1e-12)
        assert m.slope == pytest.approx(Direction.from_tensors(alone, model).slope_of({p: p.grad for p in alone}))
    assert sum(m.status == "converged" for m in found.values()) > 2


def test_one_base_loss_serves_all_blocks_and_weights_of_one_are_formed(
    monkeypatch: pytest.MonkeyPatch, no_swapping: None
) -> None:
    model = MLP()
    calls, formed = [], set[str]()
    x, y = torch.randn(64, 16), torch.randint(0, 10, (64,))
    names = {id(p): name.split(".")[0] for name, p in model.named_parameters()}
    form = TrackedParam.form
    monkeypatch.setattr(
        TrackedParam, "form", lambda pair, step, **k: (formed.add(names[id(pair.parameter)]), form(pair, step, **k))[1]
    )

    def loss_fn() -> Tensor:
        formed.clear()
        loss = F.cross_entropy(model(x), y)
        calls.append("".join(sorted(formed)))
        return loss

    loss_fn().backward()
    direction = Direction.from_gradients(model)
    blockwise_critical_sharpness(model, loss_fn, direction, engine="virtual")
    blockwise_critical_sharpness(model, loss_fn, direction, engine="virtual")
    del calls[:]
    # The third checks the engine and the closure no more.
    found = blockwise_critical_sharpness(model, loss_fn, direction, engine="virtual")
    assert sum(m.forwards for m in found.values()) == len(calls)
    assert calls.count("") == 1
    assert len({m.base_loss for m in found.values()}) == 1
    assert set(calls) == {"", "0", "2", "4"}


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("gpt2", ["transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.1", "transformer.ln_f"]),
        ("llama", ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]),
        ("vit", ["vit.embeddings", "vit.layers.0", "vit.layers.1", "vit.layernorm", "classifier"]),
        ("mlp", ["0", "2", "4"]),
        ("lstm", ["lstm", "head"]),
    ],
)
def test_default_blocks(case: str, names: list[str]) -> None:
    model = NAMED[case].build()
    blocks = default_blocks(model)
    # As versions of transformers call them.
    assert [name.replace("encoder.layer", "layers") for name in blocks] == names
    together = [parameter for parameters in blocks.values() for parameter in parameters]
    assert set(map(id, together)) == set(map(id, model.parameters()))
    assert len(together) == len(list(model.parameters()))
    # As patterns they mean the same.
    loss_fn = NAMED[case].closure(model)
    loss_fn().backward()
    direction = Direction.from_gradients(model)
    for name, parameters in blocks.items():
        assert set(map(id, direction.only(name).bind(model).parameters)) == set(map(id, parameters))


def test_default_blocks_of_wrapped_and_of_nested_models() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    assert list(default_blocks(Wrapper(MLP()))) == ["0", "2", "4"]
    cnn = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    assert list(default_blocks(cnn)) == ["0", "1.0", "1.2", "3"]
    stages = nn.Module()
    stages.features = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.ReLU()) for _ in range(3))
    )
    stages.head = nn.Linear(4, 2)
    assert list(default_blocks(stages)) == ["features.0", "features.1", "features.2", "head"]
    one = nn.Module()
    one.weight, one.layer = nn.Parameter(torch.ones(2)), nn.Linear(2, 2)
    assert list(default_blocks(one)) == ["weight", "layer"]


def scene() -> tuple[nn.Module, Callable[[], Tensor], Direction]:
    model = MLP()
    x, y = torch.randn(16, 16), torch.randint(0, 10, (16,))
    loss_fn = lambda: F.cross_entropy(model(x), y)
    loss_fn().backward()
    return model, loss_fn, Direction.from_gradients(model)


def test_blocks_of_ones_own() -> None:
    model, loss_fn, direction = scene()
    blocks = {
        "biases": "*.bias",
        "ends": ["0", model[4]],
        "a weight": model[2].weight,
        "a group": model[2].parameters(),
        "frozen": "2.weight",
    }
    found = blockwise_critical_sharpness(model, loss_fn, direction.only(["0", "4", "*.bias"]), blocks)
    # What does not move is left out.
    assert list(found) == ["biases", "ends", "a group"]
    expected = sharpkern.critical_sharpness(model, loss_fn, direction.only([model[0], model[4]]))
    assert found["ends"].sharpness == pytest.approx(expected.sharpness, rel=0.05)


def test_a_block_that_the_loss_does_not_depend_on_has_no_crossing() -> None:
    used, loss_fn, _ = scene()
    model = nn.ModuleDict({"used": used[4], "idle": nn.Linear(3, 3)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for parameter in model["idle"].parameters():
        parameter.grad = torch.ones_like(parameter)
    found = blockwise_critical_sharpness(model, loss_fn, Direction.from_optimizer(optimizer))
    assert {name: m.status for name, m in found.items() if m.status != "converged"} == {"idle": "unresolved"}
    # Nothing was learned from it about the engines.
    assert sharpkern.critical_sharpness(model, loss_fn, Direction.from_optimizer(optimizer)).engine == "virtual"


def test_bf16_blocks_have_base_losses_of_their_own() -> None:
    model, _, direction = scene()
    half = lambda: F.cross_entropy(model(torch.ones(512, 16)).float(), torch.arange(512) % 10)
    with torch.autocast("cpu", torch.bfloat16):
        found = blockwise_critical_sharpness(model, half, direction, engine="virtual", rtol=0.1)
        whole = sharpkern.critical_sharpness(model, half, direction, engine="virtual", rtol=0.1)
    assert all(m.forwards > len(m.probes) for m in found.values())
    assert [m.base_loss for m in found.values()] == pytest.approx([whole.base_loss] * 3, rel=1e-3)


@pytest.mark.parametrize(
    ("error", "words", "blocks"),
    [
        (TypeError, "blocks must map names to what moves, got list; pass", ["0"]),
        (ValueError, "blocks must hold at least one block, got none", {}),
        (
            ValueError,
            r"patterns must match parameters of the model, got '9', which matches none; near it: '0",
            {"a": "9"},
        ),
        (TypeError, "must be parameters, modules, or patterns of parameters' names, got int", {"a": 3}),
        (TypeError, "must be parameters, modules, or patterns of parameters' names, got int", {"a": [3]}),
        (ValueError, "must belong to the model, got a parameter of shape .* of another", {"a": MLP()}),
        (sharpkern.NoUpdateError, "direction must move some parameter of the blocks, got none", {"a": "0"}),
    ],
)
def test_bad_input(error: type[Exception], words: str, blocks: object) -> None:
    model, loss_fn, direction = scene()
    with pytest.raises(error, match=words):
        blockwise_critical_sharpness(model, loss_fn, direction.only(model[2]), blocks)
    with pytest.raises(TypeError, match="blockwise_critical_sharpness has no option 'rtoll'; did you mean 'rtol'"):
        blockwise_critical_sharpness(model, loss_fn, direction, rtoll=3)
