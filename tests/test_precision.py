"""The noise that is taken for granted when the caller says nothing."""

import pytest
import torch
import torch.nn.functional as F

from tests.models import MLP
from tests.oracle import engine_on, random_direction


def noise_of(model: torch.nn.Module, loss_fn, engine: str = "virtual") -> float:
    with engine_on(engine, model, loss_fn, random_direction(model)) as (opened, closure):
        opened.losses([0.0])
        return closure.precision.noise()


@pytest.mark.parametrize("engine", ["virtual", "inplace"])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, 1e-14),
        (torch.float32, 1e-6),
        (torch.bfloat16, 1.5 * 2**-8 / 8),
        (torch.float16, 1.5 * 2**-11 / 8),
    ],
)
def test_noise_follows_the_arithmetic_and_the_number_of_targets(
    dtype: torch.dtype, expected: float, engine: str
) -> None:
    model = MLP().to(dtype)
    x, y = torch.randn(64, 16, dtype=dtype), torch.randint(0, 10, (64,))
    assert noise_of(model, lambda: F.cross_entropy(model(x), y), engine) == pytest.approx(expected)


def test_autocast_inside_the_closure_is_seen() -> None:
    model = MLP()
    x, y = torch.randn(64, 16), torch.randint(0, 10, (64,))

    def loss_fn() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        return F.cross_entropy(logits.float(), y)

    assert noise_of(model, loss_fn) == pytest.approx(1.5 * 2**-8 / 8)


def test_a_loss_of_its_own_making_has_a_cautious_default() -> None:
    model = MLP().bfloat16()
    x = torch.randn(64, 16, dtype=torch.bfloat16)
    assert noise_of(model, lambda: model(x).float().square().mean()) == 1e-4
