"""Peak memory of the engines at 7 billion parameters: their own code on fake tensors, which take no memory.

OLMo-2 7B with bf16 weights and a bf16 direction in memory, one sequence of 4096 tokens, the ways of a GPU.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sharpkern.engines.batched import engine as batched
from sharpkern.memory import architectures
from sharpkern.memory.methods import _Engine, _forward
from sharpkern.memory.training_state import TrainingState, fake_copy
from sharpkern.tensors.fake import pretend_device

GIB = 2**30
# The largest layer: one matrix of an MLP.
MLP_BYTES = 4096 * 11008 * 2

pytest.importorskip("transformers", reason="the model is of transformers")


def scene_of(monkeypatch: pytest.MonkeyPatch, layers: int, tokens: int = 4096, head: str = "stock") -> TrainingState:
    whole = architectures.configuration

    def shortened(name: str) -> object:
        config = whole(name)
        config.num_hidden_layers = layers
        config.layer_types = None
        return config

    with monkeypatch.context() as patch:
        patch.setattr(architectures, "configuration", shortened)
        model, vocabulary = architectures.language_model("olmo2-7b", torch.bfloat16)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return TrainingState(fake_copy(model, mode), architectures.language_loss(tokens, 1, head), "none", mode, vocabulary)


@pytest.fixture
def seven_billion(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainingState]:
    """Takes the number of layers."""
    return partial(scene_of, monkeypatch)


def forward_bytes(scene: TrainingState) -> int:
    """Peak of a plain forward pass, above weights and direction."""
    counter = scene.counter()
    with pretend_device("cuda"):
        _forward(scene, counter)
    return counter.peak


def engine_bytes(scene: TrainingState, engine: str, num_steps: int) -> int:
    """Peak of an engine's losses, above weights and direction."""
    counter = scene.counter()
    with pretend_device("cuda"):
        _Engine(engine, "resident", num_steps)(scene, counter)
    return counter.peak - counter.parts["direction"]


def gib(scene: TrainingState, above: int) -> float:
    return (2 * scene.held(gradients=False)["weights"] + above) / GIB


@pytest.mark.long
def test_all_layers(seven_billion: Callable[..., TrainingState]) -> None:
    stock = seven_billion(layers=32)
    assert gib(stock, forward_bytes(stock)) == pytest.approx(31.05, abs=0.01)
    assert gib(stock, forward_bytes(seven_billion(layers=32, head="chunked"))) == pytest.approx(27.60, abs=0.01)
    assert gib(stock, engine_bytes(stock, "virtual", 1)) <= 27.7
    # Of few layers, which take a minute less: more of them take no more, as is shown below.
    assert gib(stock, engine_bytes(seven_billion(layers=3), "batched", 8)) <= 30.5


def test_the_virtual_engine_forms_one_layer_at_a_time(seven_billion: Callable[..., TrainingState]) -> None:
    plain = forward_bytes(seven_billion(layers=2, head="chunked"))
    assert engine_bytes(seven_billion(layers=2), "virtual", 2) <= 1.001 * (plain + MLP_BYTES)


# With few tokens formed weights count for more than activations, which are there as well.
@pytest.mark.parametrize(
    ("num_steps", "tokens", "formed"), [(1, 4096, 0), (4, 4096, 0), (8, 4096, 0), (8, 256, 8 * MLP_BYTES)]
)
def test_the_batched_engine_needs_activations_alone_or_a_formed_layer(
    seven_billion: Callable[..., TrainingState], num_steps: int, tokens: int, formed: int
) -> None:
    plain = forward_bytes(seven_billion(layers=2, tokens=tokens, head="chunked"))
    batched_bytes = engine_bytes(seven_billion(layers=2, tokens=tokens), "batched", num_steps)
    assert formed < batched_bytes <= 1.001 * num_steps * plain + formed


@pytest.mark.long
def test_fewer_step_sizes_per_pass_take_less(
    seven_billion: Callable[..., TrainingState], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = seven_billion(layers=2)
    eight = engine_bytes(scene, "batched", 8)
    monkeypatch.setattr(batched, "NUM_PARALLEL", 2)
    assert 0.9 * eight < 4 * engine_bytes(scene, "batched", 8) < 1.1 * eight


@pytest.mark.parametrize("engine", ["virtual", "batched"])
def test_more_layers_take_no_more(seven_billion: Callable[..., TrainingState], engine: str) -> None:
    two, four = (engine_bytes(seven_billion(layers=layers), engine, 2) for layers in (2, 4))
    assert four <= 1.001 * two
