"""Operators that call Python functions, such as flex attention: what those read is seen, or refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import sharpkern
from tests.helpers.oracle import LossFn, deep_copy_losses, engine_losses, engine_on, random_direction

# It has no backward pass on a CPU, and says that it is slow when it is not compiled.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")

STEP_SIZES = (0.0, 0.01, 0.1)


class Flex(nn.Module):
    """Attention with a bias by distance, which is given or learned."""

    def __init__(self, *, learned: bool, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.learned = heads, learned
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, 10)
        self.slopes = nn.Parameter(torch.rand(heads) / 10)

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, _ = x_BTC.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(x_BTC).chunk(3, -1))
        slopes = self.slopes if self.learned else self.slopes.detach().clone()

        def bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score - slopes[h] * (i - j).abs()

        mixed = flex_attention(q, k, v, score_mod=bias)
        return self.project(mixed.transpose(1, 2).flatten(2)) * (1 + self.slopes.sum())


def closure(model: nn.Module) -> LossFn:
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    return lambda: model(x).square().mean()


@pytest.mark.parametrize("engine", ["virtual", "inplace"])
def test_functions_that_read_no_parameter(engine: str) -> None:
    model = Flex(learned=False)
    direction = random_direction(model)
    expected = deep_copy_losses(model, closure, direction, STEP_SIZES)
    assert engine_losses(engine, model, closure(model), direction, STEP_SIZES) == pytest.approx(expected, rel=1e-6)
    assert len(set(expected)) == len(STEP_SIZES)


def test_functions_that_read_a_parameter_lead_to_the_engine_that_writes(no_swapping: None) -> None:
    """Though the model reads it elsewhere too, so that it has not been left out."""
    model = Flex(learned=True)
    direction = random_direction(model)
    with pytest.raises(
        sharpkern.EngineUnsupportedError, match="flex_attention calls a function that reads a parameter"
    ):
        engine_losses("virtual", model, closure(model), direction, STEP_SIZES)
    with pytest.warns(sharpkern.EngineFallbackWarning, match="flex_attention calls a function"):
        measured = sharpkern.critical_sharpness(model, closure(model), direction)
    assert measured.engine == "inplace"
    expected = deep_copy_losses(model, closure, direction, STEP_SIZES)
    assert engine_losses("inplace", model, closure(model), direction, STEP_SIZES) == pytest.approx(expected, rel=1e-6)


def test_the_storage_oracle_sees_what_the_functions_read() -> None:
    model = Flex(learned=True)
    direction = random_direction(model)
    (expected,) = deep_copy_losses(model, closure, direction, (0.1,))
    with engine_on("virtual", model, closure(model), direction) as (engine, _):
        assert engine.oracle_loss(0.1) == pytest.approx(expected, rel=1e-6)
