"""λ_c of losses whose critical learning rate is known."""

import math
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from inspect import signature
from typing import get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sharpkern
from sharpkern import Direction
from sharpkern.measures.result import MeasureOptions, Options
from sharpkern.monitoring.monitor import MonitorOptions
from tests.helpers.cases import tokens
from tests.helpers.models import GPT


class Point(nn.Module):
    """A loss as a function of one vector of parameters."""

    def __init__(self, theta: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.theta, self.loss = nn.Parameter(theta), loss

    def forward(self) -> torch.Tensor:
        return self.loss(self.theta)


def measure(
    loss: Callable[[torch.Tensor], torch.Tensor],
    theta: list[float],
    delta: list[float] | None = None,
    **options: object,
) -> sharpkern.Measurement:
    """Along the gradient, or along ``delta``."""
    model = Point(torch.tensor(theta, dtype=torch.float64), loss)
    model().backward()
    if delta is None:
        direction = Direction.from_gradients(model)
    else:
        direction = Direction.from_tensors({"theta": torch.tensor(delta, dtype=torch.float64)}, model)
    return sharpkern.critical_sharpness(model, model, direction, **options)


def quadratic(curvature: list[float]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda theta: 0.5 * (torch.tensor(curvature, dtype=torch.float64) * theta.square()).sum() + 1


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0.1, 100), min_size=1, max_size=5),
    st.floats(1e-3, 1e3),
    st.floats(1e-2, 1e2),
    st.sampled_from(["virtual", "inplace"]),
)
def test_a_quadratic_has_its_closed_form(curvature: list[float], scale: float, factor: float, engine: str) -> None:
    theta = [1.0 + k for k in range(len(curvature))]
    gradient = [h * t for h, t in zip(curvature, theta, strict=True)]
    # λ_c = gᵀHg/gᵀg along the gradient; a direction c times as long has c times the sharpness.
    expected = sum(h * g * g for h, g in zip(curvature, gradient, strict=True)) / sum(g * g for g in gradient)
    along = [factor * g for g in gradient]
    loss = quadratic(curvature)
    m = measure(lambda t: scale * loss(t), theta, [scale * a for a in along], engine=engine)
    assert m.status == "converged"
    assert m.sharpness == pytest.approx(scale * factor * expected, rel=1e-3)
    assert m.sharpness == pytest.approx(2 / m.critical_lr)
    assert m.bracket[0] <= m.critical_lr <= m.bracket[1]


def test_statuses() -> None:
    convex = quadratic([1.0, 3.0])
    assert measure(convex, [1.0, 1.0]).status == "converged"
    ascent = measure(convex, [1.0, 1.0], [-1.0, -1.0])
    assert (ascent.status, ascent.sharpness, ascent.critical_lr) == ("ascent", math.inf, 0.0)
    unbounded = measure(lambda theta: -theta.sum(), [1.0, 1.0])
    assert unbounded.status == "unbounded"
    assert unbounded.sharpness == 2 / max(eta for eta, _ in unbounded.probes)
    nonfinite = measure(lambda theta: theta.sum() * math.inf, [1.0, 1.0], [1.0, 1.0])
    assert nonfinite.status == "nonfinite"
    assert math.isnan(nonfinite.sharpness)
    flat = measure(
        lambda theta: 1 + 1e-17 * theta.sum().sin() + 1e-9 * theta.detach().sum() % 1e-9, [1.0], [1.0], noise=1e-3
    )
    assert flat.status == "unresolved"
    assert math.isnan(flat.sharpness)


def test_a_wall_of_nan_counts_as_a_rise() -> None:
    m = measure(lambda theta: -theta.sum() + torch.where(theta.sum() > 1.7, math.nan, 0.0), [0.0], rtol=0.01)
    assert m.status == "converged"
    assert m.critical_lr == pytest.approx(1.7, rel=0.03)


def test_a_known_base_loss_saves_one_forward_and_changes_nothing() -> None:
    loss = quadratic([1.0, 3.0])
    own, given_ = measure(loss, [1.0, 1.0]), measure(loss, [1.0, 1.0], base_loss=torch.tensor(3.0, dtype=torch.float64))
    assert given_.forwards == own.forwards - 1
    assert (given_.critical_lr, given_.probes) == (own.critical_lr, own.probes)


@pytest.mark.parametrize("limit", [2, 3, 4, 5, 6, 40])
@pytest.mark.parametrize("method", ["auto", "bisection"])
def test_never_more_forwards_than_allowed(limit: int, method: str) -> None:
    calls = 0
    loss = quadratic([1.0, 30.0])

    def counted(theta: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return loss(theta)

    m = measure(counted, [1.0, 1.0], max_forwards=limit, method=method, initial_lr=1e-4)
    assert m.forwards == calls - 1 <= limit
    assert m.status in ("converged", "unresolved")
    assert m.status == "converged" or math.isnan(m.sharpness)


def test_bisection_is_the_published_search() -> None:
    m = measure(quadratic([1.0, 3.0]), [1.0, 1.0], method="bisection")
    assert m.status == "converged"
    assert m.sharpness == pytest.approx(2.8, rel=1 / 16)
    assert m.bracket[1] / m.bracket[0] <= 1 + 1 / 16 + 1e-9


def test_reduce_sees_the_loss_before_any_decision() -> None:
    seen: list[torch.Tensor] = []

    def reduce(loss: torch.Tensor) -> torch.Tensor:
        seen.append(loss)
        return loss * 2

    loss = quadratic([1.0, 3.0])
    m = measure(loss, [1.0, 1.0], [1.0, 3.0], reduce=reduce)
    assert len(seen) == m.forwards
    assert m.base_loss == 6.0
    assert m.critical_lr == pytest.approx(measure(loss, [1.0, 1.0], [1.0, 3.0]).critical_lr)


def test_clipped_gradients_cost_evaluations_and_not_accuracy() -> None:
    """The slope handed in is a hundredth of the loss's own, and no batch was mixed up: no warning."""
    model = Point(torch.ones(2, dtype=torch.float64), quadratic([1.0, 3.0]))
    model().backward()
    direction = Direction.from_gradients(model)
    for factor in (0.01, 1.0):
        m = sharpkern.critical_sharpness(model, model, replace(direction, slope=direction.slope * factor))
        assert m.status == "converged"
        assert m.sharpness == pytest.approx(2.8, rel=1e-2)


def test_data_parallel_models_average_over_their_ranks() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(4, 1))
        x, y = torch.randn(8, 4), torch.randn(8, 1)
        loss_fn = lambda: (model(x) - y).square().mean()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss_fn().backward()
        m = sharpkern.critical_sharpness(model, loss_fn, Direction.from_optimizer(optimizer))
        alone = sharpkern.critical_sharpness(
            model.module, lambda: (model.module(x) - y).square().mean(), Direction.from_optimizer(optimizer)
        )
        assert m.critical_lr == pytest.approx(alone.critical_lr, rel=1e-6)
    finally:
        torch.distributed.destroy_process_group()


def test_a_check_that_does_not_fit_into_memory_is_left_out_once(
    monkeypatch: pytest.MonkeyPatch, no_swapping: None
) -> None:
    def too_large(self: object, eta: float) -> float:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("sharpkern.engines.virtual.engine.VirtualEngine.oracle_loss", too_large)
    model = Point(torch.tensor([1.0, 2.0]), lambda theta: theta.square().sum())
    model().backward()
    direction = Direction.from_gradients(model)
    with pytest.warns(sharpkern.UncheckedWarning, match="does not fit into memory and is left out for this model"):
        assert sharpkern.critical_sharpness(model, model, direction).sharpness == pytest.approx(2, rel=1e-2)
    # A second warning would be an error.
    assert sharpkern.critical_sharpness(model, model, direction).sharpness == pytest.approx(2, rel=1e-2)


def test_a_known_base_loss_of_coarser_arithmetic_is_not_compared_with() -> None:
    model = GPT(dropout=0.0).bfloat16()
    x = tokens(batch=2)

    def loss_fn() -> torch.Tensor:
        return nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    loss_fn().backward()
    direction = Direction.from_gradients(model)
    with torch.no_grad():
        coarse = loss_fn()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sharpkern.RetainedWarning)
        own = sharpkern.critical_sharpness(model, loss_fn, direction)
        for _ in range(2):
            given_ = sharpkern.critical_sharpness(model, loss_fn, direction, base_loss=coarse)
            assert given_.base_loss == own.base_loss != float(coarse)


def test_editors_know_the_options_of_whatever_measures_for_its_caller() -> None:
    options = {field.name: field.type for field in fields(Options)}
    assert get_type_hints(MeasureOptions) == options
    keywords = signature(sharpkern.critical_sharpness).parameters
    assert keywords.keys() - {"model", "loss_fn", "direction"} == {*options, "base_loss", "weights", "clip"}
    own = {name for name, one in signature(sharpkern.Monitor).parameters.items() if one.kind is one.KEYWORD_ONLY}
    assert get_type_hints(MonitorOptions).keys() == {*options, *own}
