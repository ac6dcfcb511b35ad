"""Both engines against deep copies, on the models people train."""

import pytest
import torch

from tests.cases import CASES, Case
from tests.models import MLP
from tests.oracle import (
    LossFn,
    assert_as_exact_as_copies,
    deep_copy_losses,
    engine_losses,
    engine_on,
    random_direction,
)

STEP_SIZES = (0.0, 1e-3, 1e-2, 0.1, 0.0)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.mark.parametrize("engine", ["virtual", "inplace"])
def test_losses_equal_those_of_deep_copies(case: Case, engine: str) -> None:
    model = case.build()
    direction = random_direction(model)
    versions = [p._version for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]

    expected = deep_copy_losses(model, case.closure, direction, STEP_SIZES)
    losses = engine_losses(engine, model, case.closure(model), direction, STEP_SIZES)

    assert losses == pytest.approx(expected, rel=1e-6, abs=0)
    assert len(set(losses)) == 4, "the direction moved nothing"
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    if engine == "virtual":
        assert [p._version for p in model.parameters()] == versions


# Their masks are drawn alike in every dtype, or there are none.
PRECISION_CASES = [case for case in CASES if case.name in ("gpt", "llama", "olmo2", "resnet")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["virtual", "inplace"])
@pytest.mark.parametrize("case", PRECISION_CASES, ids=lambda case: case.name)
def test_losses_are_as_exact_as_those_of_deep_copies(case: Case, engine: str, dtype: torch.dtype) -> None:
    assert_as_exact_as_copies(case, engine, dtype)


def test_the_storage_oracle_agrees_with_the_virtual_engine(case: Case) -> None:
    model = case.build()
    with engine_on("virtual", model, case.closure(model), random_direction(model)) as (engine, _):
        (loss,) = engine.losses([0.05])
        assert engine.oracle_loss(0.05) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("engine", ["virtual", "inplace"])
def test_a_closure_may_differentiate_by_its_inputs(engine: str) -> None:
    """The residual of a differential equation, as physics-informed networks have it."""

    def closure(model: torch.nn.Module) -> LossFn:
        def loss_fn() -> torch.Tensor:
            with torch.enable_grad():
                x = torch.linspace(0, 1, 16 * 8).view(8, 16).requires_grad_()
                u = model(x).sum()
                (du,) = torch.autograd.grad(u, x, create_graph=True)
                return (du - u).square().mean()

        return loss_fn

    model = MLP()
    direction = random_direction(model)
    expected = deep_copy_losses(model, closure, direction, STEP_SIZES)
    assert engine_losses(engine, model, closure(model), direction, STEP_SIZES) == pytest.approx(expected, rel=1e-6)
