"""The second difference over the first: the value at any scale, and whether its error covers the truth."""

import dataclasses
import importlib
import math
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpkern.directions.direction import Direction
from sharpkern.measures.directional import directional_sharpness
from sharpkern.search.finite_differences import at_step, three_point


def measured(f, first_step, noise=1e-14):
    """The value and the number of losses it took."""
    count = 0

    def losses(step_sizes):
        nonlocal count
        count += len(step_sizes)
        return [f(eta) for eta in step_sizes]

    return three_point(losses, f(0.0), first_step=first_step, noise=noise).value, count


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    scale=st.floats(-9, 9).map(lambda x: 10**x),
    guess=st.floats(-4, 4).map(lambda x: 10**x),
    slope=st.floats(-3, 0).map(lambda x: 10**x),
    sign=st.sampled_from([1, -1]),
)
def test_a_quadratic_at_any_scale_and_first_guess(scale, guess, slope, sign):
    # f = 1 − s·η + ½·s·λ·η² with λ = ±2/scale.
    value, count = measured(lambda eta: 1 - slope * eta + sign * slope * eta**2 / scale, guess * scale)
    assert value == pytest.approx(sign * 2 / scale, rel=1e-3)
    assert count <= 20


@settings(derandomize=True, max_examples=40, deadline=None)
@given(guess=st.floats(-4, 5).map(lambda x: 10**x), steepness=st.floats(1, 20))
def test_a_curve_with_all_derivatives_rounded_to_float32(guess, steepness):
    def f(eta):
        return torch.tensor(math.exp(-steepness * min(max(eta, -30), 1e4)) + eta * eta).float().item()

    value, _ = measured(f, guess, noise=1e-6)
    assert value == pytest.approx((steepness**2 + 2) / steepness, rel=0.01)


def test_a_large_fourth_derivative_is_seen_and_extrapolated_away():
    # As in the first steps of a transformer: the step that balances rounding against |λ|³ alone is off by 40 %.
    def f(eta):
        return 1 - eta + eta**2 + 1000 * eta**4

    assert (f(0.02) - 2 * f(0.0) + f(-0.02)) / 0.02**2 == pytest.approx(2.8)
    assert measured(f, 0.02, noise=1e-6)[0] == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("first_step", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(
    "f", [lambda eta: 1.0, lambda eta: 1 - eta, lambda eta: math.nan, lambda eta: 0.0 if eta == 0 else math.inf]
)
def test_what_cannot_be_resolved_is_nan_after_a_bounded_number_of_losses(f, first_step):
    value, count = measured(f, first_step, noise=1e-6)
    assert math.isnan(value)
    assert count <= 20


def test_curvature_within_three_standard_errors_is_nan():
    def f(eta):
        return 1 - 0.04 * eta + 0.04 * eta**2

    assert measured(f, 0.3, noise=5e-4)[0] == pytest.approx(2, rel=1e-6)
    assert math.isnan(measured(f, 0.3, noise=1e-3)[0])


def test_a_wall_of_nan_beyond_the_first_step_is_walked_back_from():
    value, count = measured(lambda eta: math.nan if abs(eta) > 0.3 else 1 - eta + 3 * eta**2, 10.0)
    assert value == pytest.approx(6, rel=1e-4)
    assert count <= 12


def test_a_chosen_step_takes_four_losses_and_two_where_the_fourth_difference_is_no_rounding():
    calls = []

    def losses(step_sizes):
        calls.extend(step_sizes)
        return [math.exp(-eta) for eta in step_sizes]

    estimate = at_step(losses, 1.0, step=0.2, noise=1e-14)
    assert calls == [0.2, -0.2, 0.1, -0.1, 0.05, -0.05]
    # cosh and sinh of the step.
    assert estimate.value == pytest.approx((math.cosh(0.2) - 1) / 0.02 / (math.sinh(0.2) / 0.2), rel=1e-10)
    assert abs(estimate.value - 1) < estimate.error * estimate.value < 3 * abs(estimate.value - 1)

    calls.clear()
    at_step(losses, 1.0, step=0.2, noise=1e-3)
    assert calls == [0.2, -0.2, 0.1, -0.1]


@pytest.mark.parametrize("h", [None, 0.1])
def test_a_loss_rounded_more_coarsely_than_its_size_says_is_not_believed(h):
    # A cross-entropy near zero: of 1e-4, in steps of 6e-8, a thousand times what noise·f says.
    covered, values = 0, 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)

        def losses(step_sizes, generator=generator):
            noise = 3e-8 * torch.randn(len(step_sizes), generator=generator, dtype=torch.float64)
            return [
                1e-4 * (1 - 0.3 * eta + 0.02 * eta**2) + n for eta, n in zip(step_sizes, noise.tolist(), strict=True)
            ]

        (base,) = losses([0.0])
        one = (
            three_point(losses, base, first_step=0.1, noise=1e-6)
            if h is None
            else at_step(losses, base, step=h, noise=1e-6)
        )
        if not math.isnan(one.value):
            values += 1
            covered += abs(one.value - 0.04 / 0.3) <= 3 * one.error * abs(one.value)
    assert covered >= 0.9 * values


@pytest.mark.parametrize("step", [1e-9, 1e3])
def test_a_chosen_step_that_resolves_nothing_gives_nan(step):
    estimate = at_step(
        lambda etas: [math.exp(-eta) if eta > -700 else math.inf for eta in etas], 1.0, step=step, noise=1e-6
    )
    assert math.isnan(estimate.value)
    assert math.isnan(estimate.error)
    assert estimate.step == step


def test_the_error_of_an_extrapolated_value_covers_what_the_part_in_h_squared_left():
    def f(eta):
        return 1 - eta + eta**2 + 1e3 * eta**4 + 1e6 * eta**6

    estimate = three_point(lambda etas: [f(eta) for eta in etas], f(0.0), first_step=0.02, noise=1e-6)
    assert estimate.step == 0.01
    assert 0.05 < abs(estimate.value / 2 - 1) < estimate.error < 0.2


@pytest.mark.long
def test_the_error_covers_the_truth_in_training(monkeypatch):
    """MLP on digits and GPT on bytes, float32 against the exact product in float64."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    for name, run in importlib.import_module("workloads").standard_runs(quick=True).items():
        points = [
            [value_at(point, torch.float64, "hvp"), *(value_at(point, torch.float32, m) for m in ("forward", "hvp"))]
            for point in dataclasses.replace(run, measured=run.measured[::2]).points()
        ]
        # Each is no empty promise either.
        for which, most in ((1, 0.03), (2, 1e-4)):
            covered = [abs(values[which] - values[0]) <= values[which].error * abs(values[which]) for values in points]
            assert sum(covered) >= 0.9 * len(points), name
            assert statistics.median(values[which].error for values in points) < most, name


def value_at(point, dtype, method):
    point = point.to(dtype)
    tensors = dict(zip(point.model.parameters(), point.direction, strict=True))
    direction = dataclasses.replace(Direction.from_tensors(tensors, point.model), lr=point.lr)
    return directional_sharpness(point.model, lambda: point.loss_of(point.model), direction, method=method)
