"""Which engine a loop takes, and how it searches with several step sizes at a time."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sharpkern
from sharpkern import ops
from sharpkern.engines import timing
from sharpkern.engines.batched.engine import NUM_PARALLEL
from sharpkern.engines.session import open_session
from sharpkern.engines.timing import EngineTimes
from sharpkern.measures import critical
from sharpkern.measures.run import ENOUGH_FORWARDS
from sharpkern.search import LineSearch, SearchMemory, SearchResult, find_critical_lr, warm_grid
from tests.engines.test_non_intrusive import differing, snapshot
from tests.helpers.models import GPT, MLP
from tests.helpers.oracle import engine_on, random_direction
from tests.search.test_search import ENDLESS, KNOWN, Function

FIXED = settings(derandomize=True, max_examples=100, deadline=None)

# -- the choice -------------------------------------------------------------------------------------------------------


def test_both_engines_are_tried_and_the_quicker_one_is_taken() -> None:
    for seconds, quicker in ((0.99 * timing._WORTH, "batched"), (1.01 * timing._WORTH, "virtual")):
        pace = EngineTimes()
        assert pace.engine() == "virtual"
        pace.note("virtual", 1000, [1.5, 1.0, 1.1])
        assert pace.engine() == "batched"
        # The first pass may be slow.
        pace.note("batched", 1000, [99.0])
        assert pace.engine() == "batched"
        pace.note("batched", 1000, [seconds])
        assert [pace.engine() for _ in range(3)] == [quicker] * 3


def test_times_are_of_the_last_passes() -> None:
    pace = EngineTimes()
    pace.note("virtual", 1000, [1.0])
    pace.note("batched", 1000, [2.0, 2.0])
    assert pace.engine() == "batched"
    pace.note("batched", 1000, [4.0] * 8)
    assert pace.engine() == "virtual"


def test_another_batch_size_is_measured_anew_and_the_first_remembered() -> None:
    pace = EngineTimes()
    pace.note("virtual", 1000, [1.0])
    pace.note("batched", 1000, [2.0, 2.0])
    assert pace.engine() == "batched"
    pace.note("batched", 4000, [20.0])
    assert pace.engine() == "virtual"
    pace.note("virtual", 4000, [4.0])
    assert pace.engine() == "batched"
    pace.note("batched", 4000, [20.0])
    assert pace.engine() == "virtual"
    # Much the same length as before.
    pace.note("virtual", 1010, [1.0])
    assert pace.engine() == "batched"


def test_passes_that_form_no_weights_are_not_timed() -> None:
    model, x = MLP(), torch.randn(4, 16)
    with engine_on("virtual", model, lambda: model(x).square().mean(), random_direction(model)) as (engine, _):
        for step_sizes, num_times in (([0.0], 0), ([0.0, 0.1], 1), ([0.1, 0.2], 3), ([0.0], 3)):
            engine.losses(step_sizes)
            assert len(engine.seconds) == num_times


# -- in a loop --------------------------------------------------------------------------------------------------------


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch, no_swapping: None) -> Callable[[float], None]:
    """Makes loops choose as on a GPU where a pass of eight step sizes takes so many times as long as one of one."""
    monkeypatch.setattr(critical, "_may_batch", lambda *_: True)
    note = EngineTimes.note

    def set_ratio(ratio: float) -> None:
        seconds = {"virtual": 1.0, "batched": ratio}
        monkeypatch.setattr(
            EngineTimes,
            "note",
            lambda pace, engine, work, times: note(pace, engine, work, [seconds[engine]] * len(times)),
        )

    return set_ratio


def trained(monitored: bool, steps: int = 12, dropout: float = 0.1, **options: Any) -> tuple[dict[str, Any], Any]:
    """A GPT after some steps, and the records of its Monitor."""
    torch.manual_seed(0)
    random.seed(0)
    model = GPT(dropout=dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = sharpkern.Monitor(model, optimizer, rtol=0.1, **options) if monitored else None
    for _ in range(steps):
        x = torch.randint(128, (4, 25))
        loss_fn = lambda x=x: F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss_fn().backward()
        if monitor is not None:
            monitor(loss_fn)
        optimizer.step()
    state = snapshot(model, optimizer)
    state.pop("grad_ids")
    return state, monitor.history if monitor is not None else []


@pytest.mark.parametrize(("ratio", "quicker"), [(2.0, "batched"), (4.0, "virtual")])
def test_a_monitor_takes_the_quicker_engine_and_changes_nothing(
    ratio: float, quicker: str, paced: Callable[[float], None]
) -> None:
    paced(ratio)
    without, _ = trained(monitored=False)
    state, history = trained(monitored=True)
    assert differing(without, state) == []
    engines = [record.measurement.engine for record in history]
    assert engines[:2] == ["virtual", "batched"]
    assert set(engines[3:]) == {quicker}
    assert {record.measurement.status for record in history} == {"converged"}


def test_engines_in_turn_find_the_same_crossings(paced: Callable[[float], None]) -> None:
    paced(2.0)
    _, several = trained(monitored=True, dropout=0.0)
    _, one_by_one = trained(monitored=True, dropout=0.0, engine="virtual")
    assert [record.measurement.engine for record in several] == ["virtual"] + ["batched"] * 11
    for together, alone in zip(several, one_by_one, strict=True):
        assert together.measurement.base_loss == pytest.approx(alone.measurement.base_loss, rel=1e-6)
        # The same crossing, by searches with a tolerance of 10 % each.
        assert together.measurement.critical_lr == pytest.approx(alone.measurement.critical_lr, rel=0.35)


def test_on_a_cpu_one_step_size_at_a_time_is_quicker() -> None:
    _, history = trained(monitored=True, steps=3)
    assert [record.measurement.engine for record in history] == ["virtual"] * 3


@pytest.mark.parametrize(
    "option",
    [
        {"method": "bisection"},
        {"reduce": lambda loss: loss},
        {"max_forwards": ENOUGH_FORWARDS - 1},
        {"engine": "inplace"},
    ],
)
def test_other_choices_stand(option: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "has_kernels", lambda device: True)
    pairs, options, model = [], critical.Options(**option), MLP()
    assert critical._may_batch(pairs, critical.Options())
    assert critical._may_batch(pairs, options) == ("engine" in option)
    with open_session(model, random_direction(model), [len]) as session:
        assert session.choose(session.target(len), options.engine, "batched")[0] == option.get("engine", "batched")


# -- several step sizes at a time -------------------------------------------------------------------------------------


def test_a_warm_search_starts_with_the_base_loss_and_a_grid_in_one_pass() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 1)
    x, y = torch.randn(64, 16), torch.randn(64, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = sharpkern.Monitor(model, optimizer, engine="batched")
    calls = 0

    def loss_fn() -> torch.Tensor:
        nonlocal calls
        calls += 1
        return F.mse_loss(model(x), y)

    made = []
    for _ in range(7):
        optimizer.zero_grad()
        loss_fn().backward()
        calls = 0
        found = monitor(loss_fn)
        made.append((calls, found.forwards, len(found.probes)))
        optimizer.step()
    # The later ones: no checks are due, and the grid around the last crossing suffices.
    assert made[-1] == (1, NUM_PARALLEL, NUM_PARALLEL - 1)


def test_no_grid_where_the_budget_does_not_hold_one() -> None:
    model = nn.Linear(16, 1)
    x, y = torch.randn(64, 16), torch.randn(64, 1)
    loss_fn = lambda: F.mse_loss(model(x), y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for max_forwards in (2, 7, 9):
        monitor = sharpkern.Monitor(model, optimizer, engine="batched", max_forwards=max_forwards)
        for _ in range(3):
            optimizer.zero_grad()
            loss_fn().backward()
            assert monitor(loss_fn).forwards <= max_forwards


@pytest.mark.parametrize("max_forwards", [8, 12, ENOUGH_FORWARDS - 1])
def test_few_evaluations_are_spent_one_at_a_time(max_forwards: int) -> None:
    x, y = torch.randn(64, 16), torch.randn(64, 1)
    found: dict[str, list[Any]] = {}
    for engine in ("virtual", "batched"):
        torch.manual_seed(0)
        model = MLP()
        loss_fn = lambda model=model: F.mse_loss(model(x)[:, :1], y)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        monitor = sharpkern.Monitor(model, optimizer, engine=engine, max_forwards=max_forwards)
        for _ in range(4):
            optimizer.zero_grad()
            loss_fn().backward()
            found.setdefault(engine, []).append(monitor(loss_fn))
            optimizer.step()
    for one_by_one, several in zip(found["virtual"], found["batched"], strict=True):
        assert several.status == one_by_one.status == "converged"
        assert several.critical_lr == pytest.approx(one_by_one.critical_lr, rel=1e-3)
        assert several.forwards == one_by_one.forwards <= max_forwards


def test_enough_evaluations_are_made_several_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = MLP(), torch.randn(64, 16)
    calls: list[None] = []
    loss_fn = lambda: (calls.append(None), model(x).square().mean())[1]
    loss_fn().backward()
    direction = sharpkern.Direction.from_gradients(model)
    for max_forwards, several in ((ENOUGH_FORWARDS - 1, False), (ENOUGH_FORWARDS, True)):
        calls.clear()
        found = sharpkern.critical_sharpness(model, loss_fn, direction, engine="batched", max_forwards=max_forwards)
        assert found.status == "converged"
        assert (len(calls) < found.forwards) == several
    monkeypatch.setattr(ops, "has_kernels", lambda device: True)
    assert critical._may_batch([], critical.Options(max_forwards=ENOUGH_FORWARDS))


@given(
    name=st.sampled_from(sorted(KNOWN)),
    miss=st.floats(-2, 2),
    half_width=st.none() | st.floats(0.2, 1.6),
    known=st.booleans(),
    num=st.integers(2, 15),
)
@FIXED
def test_probes_of_a_warm_grid_lead_to_the_same_crossing(
    name: str, miss: float, half_width: float | None, known: bool, num: int
) -> None:
    f, slope, crossing = KNOWN[name]
    given_slope = slope if known else None
    memory = SearchMemory(eta=crossing * math.exp(miss), half_width=half_width)
    grid = warm_grid(memory, slope=given_slope, num=num)
    assert len(grid) == num
    assert list(grid) == sorted(grid)
    options: dict[str, Any] = {"slope": given_slope, "memory": memory, "num_parallel": 8, "max_evaluations": 79}
    search = LineSearch(f(0.0), probes=[(eta, f(eta)) for eta in grid], **options)
    while step_sizes := search.ask():
        search.tell([f(eta) for eta in step_sizes])
    with_probes, without = search.result(), find_critical_lr(f, base_loss=f(0.0), **options)
    for result in (with_probes, without):
        assert result.status == "converged"
        assert result.critical_lr == pytest.approx(crossing, rel=max(0.012, result.error))
    assert [eta for eta, _ in with_probes.probes[:num]] == list(grid)


@given(miss=st.floats(-0.5, 0.5), name=st.sampled_from(["quadratic", "quartic", "power 1.3", "softplus"]))
@FIXED
def test_a_grid_that_is_known_is_not_asked_for_again(name: str, miss: float) -> None:
    f, slope, crossing = KNOWN[name]
    memory = SearchMemory(eta=crossing * math.exp(miss))
    result = searched(f, slope, memory, 79)
    plain = find_critical_lr(f, base_loss=f(0.0), slope=slope, memory=memory, num_parallel=8, max_evaluations=79)
    assert result.passes <= plain.passes + 1
    assert len({eta for eta, _ in result.probes}) == len(result.probes)


# name: (f, slope at 0, first crossing)
JUMPS: dict[str, tuple[Function, float, float]] = {
    **{name: KNOWN[name] for name in ("quadratic", "wall to nan", "kink")},
    "always falling": (ENDLESS["falling"], 1.0, math.inf),
    "two crossings": (lambda x: 1 - x * (1 - x) * (1 - x / 4) * (1 - x / 12), 1.0, 1.0),
}


@pytest.mark.parametrize("name", JUMPS)
def test_a_narrow_grid_far_off_does_not_use_up_all_evaluations(name: str) -> None:
    f, slope, crossing = JUMPS[name]
    for quarters in range(-8, 9):
        scale = crossing if crossing < math.inf else 1.0
        memory = SearchMemory(eta=scale * 10 ** (quarters / 4), half_width=math.log(1.25))
        result = searched(f, slope, memory, 38)
        alone = find_critical_lr(f, base_loss=f(0.0), slope=slope, memory=memory, max_evaluations=38)
        assert result.status == alone.status == ("converged" if crossing < math.inf else "unbounded")
        if result.status == "converged":
            assert result.critical_lr == pytest.approx(crossing, rel=0.01)


def searched(f: Function, slope: float, memory: SearchMemory, max_evaluations: int) -> SearchResult:
    grid = warm_grid(memory, slope=slope, num=NUM_PARALLEL - 1)
    search = LineSearch(
        f(0.0),
        slope=slope,
        memory=memory,
        num_parallel=NUM_PARALLEL,
        max_evaluations=max_evaluations,
        probes=[(eta, f(eta)) for eta in grid],
    )
    while step_sizes := search.ask():
        search.tell([f(eta) for eta in step_sizes])
    return search.result()


@pytest.mark.parametrize(
    ("memory", "slope"),
    [(None, 1.0), (SearchMemory(), 1.0)],
)
def test_no_grid_without_a_memory(memory: SearchMemory | None, slope: float) -> None:
    assert warm_grid(memory, slope=slope, num=7) == ()
