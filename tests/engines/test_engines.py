"""The engines against deep copies, on the models people train."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.cases import CASES, Case
from tests.helpers.models import MLP
from tests.helpers.oracle import (
    LossFn,
    assert_as_exact_as_copies,
    deep_copy_losses,
    engine_losses,
    engine_on,
    random_direction,
)

STEP_SIZES = (0.0, 1e-3, 3e-3, 1e-2, 0.03, 0.05, 0.1, 0.0)
ENGINES = ["virtual", "batched", "inplace"]
# torch.func.vmap has no rule for recurrent layers.
UNABLE = {("batched", "lstm")}


def counted(loss_fn: LossFn) -> tuple[LossFn, list[None]]:
    """The closure, and a list with an item for each of its calls."""
    calls: list[None] = []
    return lambda: (calls.append(None), loss_fn())[1], calls


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.mark.parametrize(
    ("engine", "case"),
    [
        pytest.param(engine, case, id=f"{engine}-{case.name}")
        for case in CASES
        for engine in ENGINES
        if (engine, case.name) not in UNABLE
    ],
)
def test_losses_equal_those_of_deep_copies(engine: str, case: Case) -> None:
    model = case.build()
    direction = random_direction(model)
    versions = [p._version for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]

    expected = deep_copy_losses(model, case.closure, direction, STEP_SIZES)
    loss_fn, calls = counted(case.closure(model))
    losses = engine_losses(engine, model, loss_fn, direction, STEP_SIZES)

    assert losses == pytest.approx(expected, rel=1e-6, abs=0)
    assert len(set(losses)) == 7, "the direction moved nothing"
    assert len(calls) == (1 if engine == "batched" else len(STEP_SIZES))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    if engine != "inplace":
        assert [p._version for p in model.parameters()] == versions


@pytest.mark.parametrize("case", [case for case in CASES if ("batched", case.name) not in UNABLE], ids=lambda c: c.name)
def test_any_number_of_step_sizes_is_batched(case: Case) -> None:
    model = case.build()
    direction = random_direction(model)
    step_sizes = [0.01 * k for k in range(11)]
    expected = deep_copy_losses(model, case.closure, direction, step_sizes)
    for chosen, num_calls in ((slice(2, 3), 1), (slice(3), 1), (slice(11), 2)):
        loss_fn, calls = counted(case.closure(model))
        losses = engine_losses("batched", model, loss_fn, direction, step_sizes[chosen])
        assert losses == pytest.approx(expected[chosen], rel=1e-6, abs=0)
        assert len(calls) == num_calls


# Their masks are drawn alike in every dtype, or there are none.
PRECISION_CASES = [case for case in CASES if case.name in ("gpt", "llama", "olmo2", "resnet")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", PRECISION_CASES, ids=lambda case: case.name)
def test_losses_are_as_exact_as_those_of_deep_copies(case: Case, engine: str, dtype: torch.dtype) -> None:
    assert_as_exact_as_copies(case, engine, dtype)


def test_the_storage_oracle_agrees_with_the_virtual_engine(case: Case) -> None:
    model = case.build()
    with engine_on("virtual", model, case.closure(model), random_direction(model)) as (engine, _):
        (loss,) = engine.losses([0.05])
        assert engine.oracle_loss(0.05) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("read", [Tensor.float, lambda w: w.t().reshape(-1), lambda w: w.t().contiguous()])
def test_the_storage_oracle_sees_copies_in_inference_mode(read: Callable[[Tensor], Tensor]) -> None:
    model = nn.Linear(8, 8).bfloat16()
    loss_fn = lambda: read(model.weight).float().square().sum()
    with torch.inference_mode(), engine_on("virtual", model, loss_fn, random_direction(model)) as (engine, _):
        base, moved = engine.losses([0.0, 2.0])
        assert engine.oracle_loss(2.0) == pytest.approx(moved, rel=1e-2)
        assert moved != pytest.approx(base, rel=0.5)


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
