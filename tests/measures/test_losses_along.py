"""Losses along a direction: those of copies of the model that really moved."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sharpkern
from sharpkern import Direction
from tests.helpers.cases import TORCH_CASES
from tests.helpers.oracle import deep_copy_losses, random_direction

ENGINES = ["auto", "virtual", "batched", "inplace"]
STEP_SIZES = [0.3, -0.1, 0.0, 1.0, 1e-3, *torch.linspace(0.01, 0.2, 8).tolist()]


def parabola() -> tuple[nn.Module, Callable[[], Tensor], Direction]:
    """L(θ − ηΔθ) = 2(1 − 4η)² along the gradient."""
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.ones_(model.weight)
    loss_fn = lambda: model.weight.square().sum() * 1.0
    loss_fn().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, loss_fn, Direction.from_optimizer(optimizer)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", TORCH_CASES[:4], ids=lambda case: case.name)
def test_they_are_those_of_moved_copies(case, engine: str) -> None:
    model = case.build().double()
    loss_fn, direction = case.closure(model), random_direction(model)
    expected = deep_copy_losses(model, case.closure, direction, STEP_SIZES)
    losses = sharpkern.losses_along(model, loss_fn, direction, STEP_SIZES, engine=engine)
    assert losses.dtype == torch.float64
    assert losses.tolist() == pytest.approx(expected, rel=1e-9)
    # Once more, when engine and closure are known.
    assert sharpkern.losses_along(model, loss_fn, direction, STEP_SIZES, engine=engine).tolist() == losses.tolist()


@pytest.mark.parametrize(
    "step_sizes",
    [(0.0, 0.25), np.array([0.0, 0.25]), torch.tensor([0.0, 0.25]), [torch.tensor(0.0), np.float32(0.25)]],
    ids=["tuple", "numpy", "tensor", "scalars"],
)
def test_step_sizes_are_any_numbers(step_sizes) -> None:
    model, loss_fn, direction = parabola()
    assert sharpkern.losses_along(model, loss_fn, direction, step_sizes).tolist() == pytest.approx([2.0, 0.5])


def test_one_pass_takes_several_and_fewer_where_memory_is_short() -> None:
    model, loss_fn, direction = parabola()
    sizes: list[int] = []

    def short_of_memory() -> Tensor:
        sizes.append(len(sizes))
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return loss_fn()

    etas = [i / 16 for i in range(1, 13)]
    losses = sharpkern.losses_along(model, short_of_memory, direction, etas, engine="batched")
    assert losses.tolist() == pytest.approx([2 * (1 - 2 * eta) ** 2 for eta in etas])
    # The base loss and twelve in passes of four, the repeated base loss, and the independent check.
    assert len(sizes) == 1 + 4 + 1 + 1
    before = len(sizes)
    sharpkern.losses_along(model, short_of_memory, direction, etas, engine="batched")
    sharpkern.losses_along(model, short_of_memory, direction, etas, engine="batched")
    # The second measurement checks again, the third does not: passes of eight and four.
    assert len(sizes) - before == (2 + 1 + 1) + 2


def test_a_curve_may_leave_the_finite_numbers() -> None:
    model, _, direction = parabola()
    losses = sharpkern.losses_along(model, lambda: model.weight.log().sum(), direction, [0.0, 0.25, 0.5, 1.0])
    assert losses[:2].isfinite().all()
    assert losses[2] == -math.inf
    assert losses[3].isnan()
    nothing = sharpkern.losses_along(model, lambda: model.weight.sum() * math.nan, direction, [0.1])
    assert nothing.isnan().all()


def test_steps_too_short_to_be_seen_are_no_mistake() -> None:
    model, loss_fn, direction = parabola()
    with pytest.warns(sharpkern.RetainedWarning, match="only 0.00 of the longest"):
        losses = sharpkern.losses_along(model, loss_fn, direction, [1e-20, 2e-20])
    assert losses.tolist() == [2.0, 2.0]


def test_a_closure_that_is_no_function_of_the_parameters_is_refused() -> None:
    model, loss_fn, direction = parabola()
    constant = loss_fn().detach()
    with pytest.raises(sharpkern.NoUpdateError, match="loss_fn must depend on the parameters"):
        sharpkern.losses_along(model, lambda: constant, direction, [0.1, 0.2])
    losses = iter(range(1, 100))
    with pytest.raises(ValueError, match="loss_fn must return the same loss whenever it is called"):
        sharpkern.losses_along(model, lambda: loss_fn() * next(losses), direction, [0.1, 0.2])


def test_reads_that_no_mode_sees_are_measured_in_place() -> None:
    model, _, direction = parabola()
    view = model.weight.detach().numpy()
    hidden = lambda: torch.tensor(float((view**2).sum()))
    with pytest.warns(sharpkern.EngineFallbackWarning, match="in place"):
        losses = sharpkern.losses_along(model, hidden, direction, [0.25, 0.5])
    assert losses.tolist() == pytest.approx([0.5, 0.0])
    with pytest.raises(sharpkern.EngineUnsupportedError):
        sharpkern.losses_along(model, hidden, direction, [0.25, 0.5], engine="virtual")


def test_rounding_to_16_bits_is_told() -> None:
    model = nn.Linear(8, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    direction = Direction.from_tensors({"weight": -torch.ones(1, 8)}, model)
    with pytest.warns(sharpkern.RetainedWarning, match="of the longest displacement"):
        losses = sharpkern.losses_along(
            model, lambda: model.weight.float().sum(), direction, [0.01, 0.011], engine="inplace"
        )
    assert losses.tolist() == [8 * (1 + 2**-7)] * 2


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ValueError, "step_sizes must hold at least one number, got none", {"step_sizes": []}),
        (TypeError, "step_sizes must be numbers, got float; pass a list", {"step_sizes": 0.1}),
        (TypeError, "got 'a' among them", {"step_sizes": ["a"]}),
        (TypeError, "got True among them", {"step_sizes": [True]}),
        (TypeError, r"got \[0.5, 0.25\] among them", {"step_sizes": torch.tensor([[0.5, 0.25]])}),
        (TypeError, "step_sizes must be numbers, got float", {"step_sizes": torch.tensor(0.1)}),
        (ValueError, "finite learning rates, got nan", {"step_sizes": [0.1, math.nan]}),
        (ValueError, "finite learning rates, got inf", {"step_sizes": [math.inf]}),
        (ValueError, "engine must be one of", {"engine": "fast"}),
        (TypeError, "reduce must be callable", {"reduce": 3}),
        (TypeError, "direction must be a sharpkern.Direction", {"direction": None}),
    ],
)
def test_bad_input(error: type[Exception], words: str, options: dict) -> None:
    model, loss_fn, direction = parabola()
    arguments = {"direction": direction, "step_sizes": [0.1], **options}
    with pytest.raises(error, match=words):
        sharpkern.losses_along(model, loss_fn, **arguments)


def test_a_flat_curve_is_the_same_mistake_in_every_call() -> None:
    model, loss_fn, _ = parabola()
    model.unused = nn.Parameter(torch.ones(3))
    direction = Direction.from_tensors({"unused": torch.ones(3)}, model)
    for _ in range(6):
        with pytest.raises(sharpkern.NoUpdateError, match="must depend on the parameters"):
            sharpkern.losses_along(model, loss_fn, direction, [0.0, 0.1, 0.2, 0.5])
