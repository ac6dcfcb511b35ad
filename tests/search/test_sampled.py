"""The crossing of a mean of many functions from a sample of them, against functions whose crossing is known."""

import math
import random
from collections.abc import Callable, Sequence
from statistics import median

import pytest

from sharpkern.search.sampled import OtherSlopeError, SampledResult, SampledSearch, _student, first_size

Function = Callable[[float], float]


def parabolas(num: int, seed: int, spread: float = 0.3) -> tuple[list[Function], list[float], list[float]]:
    """L_i(η) = c_i − s_i·η + h_i·η²/2 whose slopes and curvatures scatter together; their s_i, h_i."""
    own = random.Random(seed)
    slopes, bends, functions = [], [], []
    for _ in range(num):
        scale = math.exp(own.gauss(0, spread))
        slope, bend, base = scale, scale * math.exp(own.gauss(0, spread / 3)), 3 + own.gauss(0, 0.3)
        functions.append(lambda eta, s=slope, h=bend, c=base: c - s * eta + h * eta**2 / 2)
        slopes.append(slope)
        bends.append(bend)
    return functions, slopes, bends


def search(
    functions: Sequence[Function], slope: float, size: int | None = None, *, is_exact: bool = True, **options: object
) -> tuple[SampledResult, list[tuple[tuple[int, ...], float]]]:
    """Drive a search; returns what was asked as well."""
    num = len(functions)
    chosen = {"groups": [range(num)], "noise": 1e-12, "base": [f(0.0) for f in functions], **options}
    groups = chosen.pop("groups")
    first = first_size(num, "auto", 0.05, len(groups)) if size is None else size
    sampled = SampledSearch(slope, groups, first, may_grow=size is None, **chosen)
    if is_exact:
        sampled.trust_base(is_exact=True)
    asking, asked = sampled.ask(), []
    try:
        question = next(asking)
        while True:
            asked.append(question)
            numbers, eta = question
            question = asking.send([functions[i](eta) for i in numbers])
    except StopIteration as stop:
        return stop.value, asked


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def forwards(asked: Sequence[tuple[tuple[int, ...], float]], num: int) -> float:
    return sum(len(numbers) for numbers, _ in asked) / num


def test_functions_that_differ_in_scale_alone_need_no_more_than_the_slope() -> None:
    own = random.Random(0)
    scales = [math.exp(own.gauss(0, 1)) for _ in range(40)]
    functions = [lambda eta, c=c: c * (1 - eta + eta**2 / 4) for c in scales]
    found, _ = search(functions, mean(scales), 8, base=None, is_exact=False)
    # A plain mean of the 8 would do as well here; what the slopes say has to be left aside, β = 0.
    assert found.found.critical_lr == pytest.approx(4.0, rel=1e-3)
    assert (found.size, found.beta) == (8, pytest.approx(0.0, abs=0.02))


@pytest.mark.parametrize("num", [32, 128])
def test_error_holds_for_the_whole_and_the_sample_is_cheap(num: int) -> None:
    off, held, cost = [], [], []
    for seed in range(60):
        functions, slopes, bends = parabolas(num, seed)
        found, asked = search(functions, mean(slopes), draw=seed, initial_lr=1.5)
        error = abs(math.log(found.found.critical_lr / (2 * mean(slopes) / mean(bends))))
        off.append(error)
        held.append(error <= found.found.error)
        cost.append(forwards(asked, num))
        assert found.found.bracket[0] < found.found.critical_lr < found.found.bracket[1]
    assert mean(held) >= 0.92
    assert median(off) <= 0.02
    assert mean(cost) <= (1.7 if num == 32 else 1.1)


def test_slopes_of_the_whole_take_away_most_of_a_sample_s_error() -> None:
    off, plain = [], []
    for seed in range(40):
        own = random.Random(seed)
        # Curvatures that are alike, and slopes that are not: what a batch's gradient is made of.
        slopes = [math.exp(own.gauss(0, 0.8)) for _ in range(64)]
        functions = [lambda eta, s=s: 3 - s * eta + 0.5 * eta**2 for s in slopes]
        truth = 2 * mean(slopes)
        found, _ = search(functions, mean(slopes), 8, draw=seed, base=None, is_exact=False)
        off.append(abs(math.log(found.found.critical_lr / truth)))
        plain.append(abs(math.log(2 * mean(random.Random(seed).sample(slopes, 8)) / truth)))
    assert median(off) < 0.01 < 0.1 < median(plain)


def test_all_functions_decide_where_the_sample_cannot() -> None:
    functions, slopes, bends = parabolas(24, 1, spread=1.5)
    found, asked = search(functions, mean(slopes), rtol=0.002, initial_lr=1.0)
    assert found.size == 24
    assert found.found.critical_lr == pytest.approx(2 * mean(slopes) / mean(bends), rel=0.002)
    # The sample told where, and one or two evaluations of all did the rest.
    assert forwards(asked, 24) < 4.5


def test_all_functions_decide_where_they_bend_before_their_slopes_are_seen() -> None:
    _, slopes, bends = parabolas(128, 7, spread=0.02)
    functions = [lambda eta, s=s, h=h: 3 + h * eta**1.2 - s * eta for s, h in zip(slopes, bends, strict=True)]
    truth = (mean(slopes) / mean(bends)) ** 5
    found, _ = search(functions, mean(slopes), initial_lr=1.0)
    assert found.size == 128
    assert found.found.critical_lr == pytest.approx(truth, rel=0.05)
    few, _ = search(functions, mean(slopes), 16, initial_lr=1.0)
    assert few.size == 16
    assert abs(math.log(few.found.critical_lr / truth)) < few.found.error


def test_weights_count() -> None:
    functions, slopes, bends = parabolas(32, 2)
    weights = [1.0 + (k % 5) for k in range(32)]
    slope = sum(w * s for w, s in zip(weights, slopes, strict=True)) / sum(weights)
    bend = sum(w * h for w, h in zip(weights, bends, strict=True)) / sum(weights)
    found, _ = search(functions, slope, rtol=0.01, weights=weights)
    assert found.found.critical_lr == pytest.approx(2 * slope / bend, rel=0.01)
    assert found.base_loss == pytest.approx(
        sum(w * f(0.0) for w, f in zip(weights, functions, strict=True)) / sum(weights)
    )


def test_draws_are_one_of_each_stratum_alike_in_all_groups_and_reproducible() -> None:
    functions, slopes, _ = parabolas(64, 3)
    functions = [lambda eta, f=f, k=k: f(eta) + k for k, f in enumerate(functions)]
    drawn = []
    for draw in (0, 0, 1):
        _, asked = search(functions, mean(slopes), 8, draw=draw, groups=[range(32), range(32, 64)])
        members = sorted(asked[0][0])
        assert [number // 8 for number in members] == list(range(8))
        drawn.append(members)
    assert drawn[0] == drawn[1] != drawn[2]


def test_base_losses_are_asked_of_members_alone() -> None:
    functions, slopes, _ = parabolas(64, 4)
    found, asked = search(functions, mean(slopes), 8, is_exact=False)
    zero = [numbers for numbers, eta in asked if eta == 0.0]
    assert [len(numbers) for numbers in zero] == [8]
    assert found.found.status == "converged"


@pytest.mark.parametrize("clip", [0.3, 0.5])
def test_a_slope_that_is_not_the_functions_own_is_refused(clip: float) -> None:
    functions, slopes, _ = parabolas(64, 5)
    with pytest.raises(OtherSlopeError, match="standard errors below"):
        search(functions, clip * mean(slopes), 16)


def test_a_slope_that_is_a_sum_of_the_functions_own_leaves_it_to_all() -> None:
    functions, slopes, bends = parabolas(32, 7)
    found, _ = search(functions, 32 * mean(slopes), 8)
    assert found.size == 32
    assert found.excess < -4
    assert found.found.critical_lr == pytest.approx(2 * mean(slopes) / mean(bends), rel=0.05)


def test_a_sample_whose_slope_is_far_from_that_of_all_is_not_enough() -> None:
    functions, slopes, _ = parabolas(24, 8)
    functions = [f if i % 2 else (lambda eta: 0.0) for i, f in enumerate(functions)]
    bends = [f(2.0) - 2 * f(1.0) + f(0.0) for f in functions]
    slope = mean([s if i % 2 else 0.0 for i, s in enumerate(slopes)])
    truth = 2 * slope / mean(bends)
    off = []
    for draw in range(24):
        # Nothing to make strata of: a sample may have more of one kind than of the other.
        found, _ = search(functions, slope, draw=draw, base=None)
        off.append(abs(math.log(found.found.critical_lr / truth)))
    assert max(off) < 0.25
    assert sum(one < 0.05 for one in off) >= 16


def test_uphill_constant_and_infinite_functions_are_left_to_all() -> None:
    functions, slopes, _ = parabolas(16, 6)
    found, _ = search(functions, -mean(slopes))
    assert (found.size, found.found.status) == (16, "converged")
    found, _ = search([lambda eta: 1 + eta] * 16, -1.0)
    assert found.found.status == "ascent"
    found, _ = search([lambda eta: 1.0] * 16, 1.0)
    assert {loss for _, loss in found.found.probes} == {1.0}
    found, _ = search([lambda eta: math.nan] * 16, 1.0)
    assert found.found.status == "nonfinite"
    # A loss that is infinite beyond a step is a rise there.
    walls = [lambda eta, f=f: f(eta) if eta < 0.5 else math.inf for f in functions]
    found, _ = search(walls, mean(slopes), 8, initial_lr=2.0)
    assert found.found.critical_lr == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize(
    ("num", "sample", "rtol", "groups", "size"),
    [
        (11, "auto", 0.05, 1, 11),
        (32, "auto", 0.05, 1, 4),
        (128, "auto", 0.05, 1, 6),
        (128, "auto", 0.2, 1, 6),
        (128, 0.25, 0.05, 1, 32),
        (32, 0.1, 0.05, 1, 8),
        (128, 10, 0.05, 4, 8),
        (64, "auto", 0.05, 16, 16),
        (16, 0.9, 0.05, 1, 16),
        (16, "auto", 0.05, 16, 16),
    ],
)
def test_first_sizes(num: int, sample: float | str, rtol: float, groups: int, size: int) -> None:
    assert first_size(num, sample, rtol, groups) == size


@pytest.mark.parametrize(("dof", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (6, 2.447), (30, 2.042)])
def test_quantiles(dof: int, quantile: float) -> None:
    assert _student(dof) == pytest.approx(quantile, rel=0.01)


def test_a_larger_sample_takes_two_evaluations_of_each_new_member() -> None:
    grown = 0
    for seed in range(20):
        functions, slopes, _ = parabolas(128, seed, spread=0.2)
        found, asked = search(functions, mean(slopes), draw=seed, initial_lr=1.5)
        if 6 < found.size < 128:
            grown += 1
            first = set(asked[0][0])
            places = [{eta for numbers, eta in asked if i in numbers} for i in range(128) if i not in first]
            taken = [len(one) for one in places if one]
            assert len(taken) == found.size - 6
            assert mean(taken) <= 2.5
    assert grown >= 10


def test_all_are_evaluated_where_the_sample_was() -> None:
    functions, slopes, bends = parabolas(32, 3, spread=0.6)
    found, asked = search(functions, mean(slopes), initial_lr=2.0)
    assert found.size == 32
    # The members of the sample have been there.
    assert [len(numbers) for numbers, _ in asked][-1] == 28
    assert found.found.critical_lr == pytest.approx(2 * mean(slopes) / mean(bends), rel=0.05)


def crossing(functions: Sequence[Function], low: float, high: float) -> float:
    """Where their mean crosses what it is at 0."""
    for _ in range(60):
        middle = (low + high) / 2
        rises = mean([f(middle) - f(0.0) for f in functions]) > 0
        low, high = (low, middle) if rises else (middle, high)
    return low


def test_functions_that_fall_faster_than_their_slopes_and_rise_at_once_are_crossed_exactly() -> None:
    off = []
    for seed in range(40):
        own = random.Random(seed)
        slopes = [math.exp(own.gauss(0, 0.2)) for _ in range(28)]
        walls = [math.exp(own.gauss(0, 1.0)) for _ in range(28)]
        pairs = zip(slopes, walls, strict=True)
        functions = [lambda eta, s=s, w=w: 3 - s * eta * (1 + 2 * eta) + w * eta**12 for s, w in pairs]
        found, _ = search(functions, mean(slopes), draw=seed, initial_lr=0.3)
        off.append(abs(math.log(found.found.critical_lr / crossing(functions, 0.2, 3.0))))
    assert max(off) < 0.05


def powers(seed: int, exponent: float) -> tuple[list[Function], list[float]]:
    """Functions whose mean crosses near 2 with this exponent; their slopes."""
    own = random.Random(seed)
    slopes = [math.exp(own.gauss(0, 0.3)) for _ in range(28)]
    bends = [s * math.exp(own.gauss(0, 0.3)) for s in slopes]
    pairs = zip(slopes, bends, strict=True)
    return [lambda eta, s=s, h=h: 3 - s * eta + 2 * h * (eta / 2) ** (1 + exponent) for s, h in pairs], slopes


def test_an_exponent_that_is_remembered_alone_is_not_relied_upon() -> None:
    held = []
    for seed in range(30):
        memory = None
        for k in range(5):
            functions, slopes = powers(1000 * seed + k, 8.0)
            memory = search(functions, mean(slopes), draw=k, initial_lr=1.0, memory=memory)[0].found.memory
        functions, slopes = powers(1000 * seed + 9, 0.8)
        found, _ = search(functions, mean(slopes), memory=memory)
        off = abs(math.log(found.found.critical_lr / crossing(functions, 0.5, 8.0)))
        held.append(off <= found.found.error)
    assert mean(held) >= 0.92
