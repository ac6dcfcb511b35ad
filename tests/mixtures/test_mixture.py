"""Sweeps over data mixes: closed forms on quadratics, the sweet spot, and a sweep that was stopped and taken up."""

import csv
import functools
import itertools
import json
import math
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import sharpkern
from sharpkern.errors import SharpkernWarning
from sharpkern.mixtures import sweep as mixture
from sharpkern.mixtures.results import MixturePoint, MixtureSweep, SweetSpot
from sharpkern.mixtures.sampling import MixSampler
from tests.helpers.models import GPT

RATIOS = [0.0, 0.25, 0.5, 0.75, 1.0]


class Point(nn.Module):
    """θ between the minima of two tasks; a batch holds the minima that its samples pull to."""

    def __init__(self, at: tuple[float, float] = (0.0, 0.0)) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(at, dtype=torch.float64))

    def loss(self, minima: torch.Tensor) -> torch.Tensor:
        return 0.5 * (self.theta - minima).square().sum(1).mean()


def rows(*minimum: float, num: int = 16) -> torch.Tensor:
    return torch.tensor(minimum, dtype=torch.float64).repeat(num, 1)


OLD, NEW = rows(1.0, 2.0), rows(1.0, -2.0)


def sweep(**changes: object) -> MixtureSweep:
    model = changes.pop("model", None)
    model = Point() if model is None else model
    arguments = {
        "tasks": {"old": OLD[:1], "new": NEW[:1]},
        "mix": {"old": OLD, "new": NEW},
        "ratios": RATIOS,
        "batch_loss": getattr(model, "loss", None),
        "batch_size": 8,
        "repeats": 2,
        "rtol": 1e-4,
    }
    return sharpkern.mixture_sweep(model, **{**arguments, **changes})


def test_every_ratio_and_task_has_its_closed_form() -> None:
    found = sweep()
    assert (found.sources, found.tasks) == (("old", "new"), ("old", "new"))
    for share, (task, sign) in itertools.product(RATIOS, [("old", 1), ("new", -1)]):
        # −g is what the mix pulls to; of a task with its minimum at (1, ±2), λ_c = |g|²/gᵀg_task.
        g = torch.tensor([1.0, 4 * share - 2])
        along = (g @ torch.tensor([1.0, 2.0 * sign])).item()
        expected = (g @ g).item() / along if along > 0 else math.inf
        summary = found.summary((share, 1 - share), task)
        assert summary.sharpness == pytest.approx(expected, rel=1e-3), (share, task)
        assert summary.ascent == (2 if along <= 0 else 0)
    spot = found.sweet_spot
    assert spot.shares == {"old": 0.5, "new": 0.5}
    assert spot.sharpness == pytest.approx(1.0, rel=1e-3)
    assert spot.critical_lr == pytest.approx(2.0, rel=1e-3)
    assert spot.of_repeats == ((0.5, 0.5),) * 2


def test_the_mix_of_three_sources_by_name_and_in_order() -> None:
    third = rows(-2.0, 0.0)
    ratios = [{"old": 0.5, "new": 0.5}, (0.25, 0.25, 0.5)]
    found = sweep(mix={"old": OLD, "new": NEW, "third": third}, ratios=ratios, batch_size=4)
    assert found.mixes == ((0.5, 0.5, 0.0), (0.25, 0.25, 0.5))
    # Half of the third pulls to (−½, 0), away from both tasks.
    assert [found.summary(found.mixes[1], task).ascent for task in found.tasks] == [2, 2]
    assert found.sweet_spot.shares == {"old": 0.5, "new": 0.5, "third": 0.0}


def test_no_sweet_spot_where_some_task_always_gets_worse() -> None:
    found = sweep(tasks={"old": OLD[:1], "away": rows(-1.0, 0.0, num=1)})
    assert found.sweet_spot is None
    assert {row["ascent"] for row in found.table if row["task"] == "away"} == {2}


@pytest.mark.parametrize(
    "task",
    [OLD, [OLD[:1], OLD[1:3]], iter([OLD]), torch.utils.data.DataLoader(OLD, batch_size=4)],
    ids=["batch", "batches", "iterator", "loader"],
)
def test_a_task_is_a_batch_or_batches_or_a_closure(task: object) -> None:
    model = Point()
    by_closure = sweep(model=model, tasks={"old": lambda: model.loss(OLD)})
    assert [p.sharpness for p in sweep(model=model, tasks={"old": task}).points] == pytest.approx(
        [p.sharpness for p in by_closure.points], rel=1e-3
    )


def test_tasks_and_sources_of_closures_need_no_data() -> None:
    model = Point()
    losses = {"old": lambda: model.loss(OLD), "new": lambda: model.loss(NEW)}
    by_closures = sharpkern.mixture_sweep(model, losses, losses, RATIOS, repeats=2, rtol=1e-4)
    by_data = sweep(model=model)
    assert [p.status for p in by_closures.points] == [p.status for p in by_data.points]
    assert [p.critical_lr for p in by_closures.points] == pytest.approx(
        [p.critical_lr for p in by_data.points], rel=1e-3
    )


def test_closures_that_draw_their_batch_draw_another_one_in_every_repeat() -> None:
    model = Point()

    def drawn(data: torch.Tensor) -> torch.Tensor:
        return model.loss(data[torch.randint(len(data), (4,))] + torch.randn(4, 2, dtype=data.dtype) / 10)

    sources = {"old": functools.partial(drawn, OLD), "new": functools.partial(drawn, NEW)}
    tasks = {"old": lambda: model.loss(OLD)}
    found = [sharpkern.mixture_sweep(model, tasks, sources, [1.0], repeats=3) for _ in range(2)]
    assert len({p.critical_lr for p in found[0].points}) == 3
    assert numbers(found[0]) == numbers(found[1])


def test_samples_of_any_kind_are_collated() -> None:
    model = nn.Linear(2, 1)
    data = [{"x": torch.randn(2), "y": i / 8} for i in range(8)]

    def loss(batch: dict) -> torch.Tensor:
        return F.mse_loss(model(batch["x"])[:, 0], batch["y"].float())

    found = sweep(
        model=model,
        tasks={"all": torch.utils.data.default_collate(data)},
        mix={"a": data[:4], "b": data[4:]},
        batch_loss=loss,
        batch_size=4,
    )
    assert {p.status for p in found.points} <= {"converged", "ascent"}


def language_model() -> tuple[GPT, torch.Tensor, object]:
    model = GPT(dropout=0.2)
    generator = torch.Generator().manual_seed(3)
    data = torch.randint(0, 128, (40, 17), generator=generator)
    return model, data, lambda x: F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


def language_sweep(path=None, **changes: object) -> MixtureSweep:
    model, data, loss = language_model()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    arguments = {
        "tasks": {"a": data[:4], "b": data[4:8]},
        "mix": {"a": data[8:24], "b": data[24:]},
        "ratios": [0.0, 0.5, 1.0],
        "batch_loss": loss,
        "batch_size": 8,
        "repeats": 2,
        "path": path,
    }
    return sharpkern.mixture_sweep(model, **{**arguments, **changes})


def numbers(found: MixtureSweep) -> list[tuple]:
    """What a sweep found, without the number of forwards: checks are made once in a process."""
    return [(p.shares, p.repeat, p.task, repr(p.critical_lr), p.status, repr(p.error), p.loss) for p in found.points]


class Stopped(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("make", [sharpkern.gradient_direction, functools.partial(sharpkern.adamw_direction, eps=1e-4)])
def test_stopped_and_taken_up_gives_the_numbers_of_one_run_through(make, tmp_path, monkeypatch) -> None:
    through = language_sweep(make_direction=make, num_batches=2)
    path = tmp_path / "sweep.jsonl"
    relative = mixture.relative_critical_sharpness
    for after in (2, 3, None):
        # Whatever else draws random numbers in between does not matter.
        torch.rand(after or 1)
        calls = itertools.count()

        def stop(*args, after=after, calls=calls, **kwargs):
            if next(calls) == after:
                raise Stopped
            return relative(*args, **kwargs)

        monkeypatch.setattr(mixture, "relative_critical_sharpness", stop)
        if after is not None:
            with pytest.raises(Stopped):
                language_sweep(path, make_direction=make, num_batches=2)
    taken_up = language_sweep(path, make_direction=make, num_batches=2)
    assert numbers(taken_up) == numbers(through)
    assert len(path.read_text().splitlines()) == 1 + 6


def test_repeats_and_ratios_may_be_added_and_left_out(tmp_path) -> None:
    path = tmp_path / "sweep.jsonl"
    first = language_sweep(path, repeats=1, ratios=[0.0, 1.0])
    more = language_sweep(path)
    assert set(numbers(first)) < set(numbers(more))
    assert len(more.points) == 3 * 2 * 2
    assert set(numbers(language_sweep(path, repeats=1, ratios=[0.0, 1.0]))) == set(numbers(first))
    assert len(path.read_text().splitlines()) == 1 + 6


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"batch_size": 4}, "batch_size was 8, is 4"),
        ({"make_direction": sharpkern.adamw_direction}, "direction was 'gradient_direction', is 'adamw_direction'"),
        ({"rtol": 0.1}, r"options was {}, is {'rtol': 0\.1}"),
    ],
)
def test_another_sweep_is_measured_anew_beside_that_of_the_file(change, named, tmp_path) -> None:
    path = tmp_path / "sweep.jsonl"
    first = language_sweep(path, ratios=[0.5], repeats=1)
    with pytest.warns(SharpkernWarning, match=f"holds results of other settings: .*{named}.*; they are kept"):
        other = language_sweep(path, ratios=[0.5], repeats=1, **change)
    assert numbers(other) == numbers(language_sweep(None, ratios=[0.5], repeats=1, **change)) != numbers(first)
    lines = path.read_bytes()
    # What is in the file is found again, of the one and of the other.
    assert numbers(language_sweep(path, ratios=[0.5], repeats=1)) == numbers(first)
    assert numbers(language_sweep(path, ratios=[0.5], repeats=1, **change)) == numbers(other)
    assert path.read_bytes() == lines


def test_another_checkpoint_is_measured_anew(tmp_path) -> None:
    path = tmp_path / "sweep.jsonl"
    sweep(path=path, ratios=[0.5])
    with pytest.warns(SharpkernWarning, match=r"other settings: model was \d+, is \d+; they are kept"):
        other = sweep(path=path, ratios=[0.5], model=Point((1.0, 1.0)))
    assert numbers(other) == numbers(sweep(ratios=[0.5], model=Point((1.0, 1.0))))


@pytest.mark.parametrize(
    "change",
    [
        # Shares are in the order of the sources.
        {"mix": {"new": NEW, "old": OLD}},
        {"mix": {"old": OLD, "new": NEW + 1}},
        {"tasks": {"old": OLD[:1], "new": NEW[:1] + 1}},
        {"tasks": {"new": NEW[:1], "old": OLD[:1]}},
    ],
)
def test_other_data_is_measured_anew(change, tmp_path) -> None:
    path = tmp_path / "sweep.jsonl"
    model = Point()
    sweep(model=model, path=path, ratios=[0.25])
    with pytest.warns(SharpkernWarning, match=r"other settings: (tasks|sources) was .*; they are kept"):
        other = sweep(model=model, path=path, ratios=[0.25], **change)
    assert numbers(other) == numbers(sweep(model=model, ratios=[0.25], **change))
    model.eval()
    with pytest.warns(SharpkernWarning, match=r"other settings: .*model was \d+, is \d+"):
        sweep(model=model, path=path, ratios=[0.25])


class Samples(torch.utils.data.Dataset):
    """Rows that nobody sees but by asking for each."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.data[index]


class Twice(Point):
    """The same parameters, and another loss."""

    def loss(self, minima: torch.Tensor) -> torch.Tensor:
        return 2 * super().loss(minima)


MODEL = Point()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_loss": lambda batch: MODEL.loss(batch).square()}, "the loss of source 'old' was"),
        ({"model": Twice()}, "the loss of task 'old' was 2.5, is 5.0"),
        ({"mix": {"old": Samples(OLD), "new": Samples(2 * NEW)}}, "the loss of source 'new' was"),
        ({"tasks": {"old": lambda: MODEL.loss(OLD), "new": lambda: MODEL.loss(2 * NEW)}}, "the loss of task 'new' was"),
        ({"make_direction": lambda model, losses: of_first(model, losses[:1])}, "direction was"),
    ],
)
def test_what_only_losses_and_code_tell_apart_is_measured_anew(change, named, tmp_path) -> None:
    path = tmp_path / "sweep.jsonl"
    arguments = {
        "model": MODEL,
        "batch_loss": MODEL.loss,
        "tasks": {"old": lambda: MODEL.loss(OLD), "new": lambda: MODEL.loss(NEW)},
        "mix": {"old": Samples(OLD), "new": Samples(NEW)},
        "make_direction": lambda model, losses: of_first(model, losses),
        "ratios": [0.5],
        "path": path,
    }
    if "model" in change:
        change = {**change, "batch_loss": change["model"].loss, "tasks": {"old": OLD, "new": NEW}}
        arguments["tasks"] = {"old": OLD, "new": NEW}
    first = sweep(**arguments)
    assert numbers(sweep(**arguments)) == numbers(first)
    with pytest.warns(SharpkernWarning, match=f"other settings: {named}"):
        other = sweep(**{**arguments, **change})
    assert numbers(other) == numbers(sweep(**{**arguments, **change, "path": None}))


def test_sources_that_give_another_batch_each_time_are_gone_on_with(tmp_path) -> None:
    path = tmp_path / "sweep.jsonl"
    batches = itertools.count(1)
    mix = {"old": lambda: MODEL.loss(OLD * next(batches)), "new": lambda: MODEL.loss(NEW)}
    arguments = {"model": MODEL, "mix": mix, "path": path}
    first = sweep(**arguments, ratios=[0.5])
    again = sweep(**arguments, ratios=[0.5, 1.0])
    assert set(numbers(first)) < set(numbers(again))
    with pytest.warns(SharpkernWarning, match="the loss of source 'new' was"):
        sweep(**{**arguments, "mix": {**mix, "new": lambda: MODEL.loss(2 * NEW)}}, ratios=[0.5])


def of_first(model, losses):
    return sharpkern.gradient_direction(model, losses)


def spoil(row, **changes):
    row["points"][1].update(changes)
    return row


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda row: spoil(row, critical_lr="0.5"), "critical_lr is '0.5'"),
        (lambda row: spoil(row, critical_lr=math.nan), "critical_lr is nan where the status is 'converged'"),
        (lambda row: spoil(row, critical_lr=-1.0), "critical_lr is -1.0 where the status is 'converged'"),
        (lambda row: spoil(row, status="ascent"), "critical_lr is .* where the status is 'ascent'"),
        (lambda row: spoil(row, sharpness=7.5), "sharpness is 7.5 where critical_lr is"),
        (lambda row: spoil(row, loss=math.inf), "the loss is inf where the status is 'converged'"),
        (lambda row: spoil(row, status="fine"), "status is 'fine'"),
        (lambda row: spoil(row, bracket=[1.0]), r"bracket is \[1.0\]"),
        (lambda row: spoil(row, forwards=2.5), "forwards is 2.5"),
        (lambda row: spoil(row, repeat=True), "repeat is True"),
        (lambda row: spoil(row, task="old"), "it is not of the tasks in their order"),
        (lambda row: spoil(row, shares=[0.25, 0.75]), "it is not of the tasks in their order"),
        (lambda row: spoil(row, more=1), "a MixturePoint has the fields shares, repeat, task"),
        (lambda row: {**row, "points": row["points"][:1]}, "it is not of the tasks in their order"),
        (lambda row: {**row, "shares": 0.5}, "not iterable"),
        (lambda row: {name: row[name] for name in ("shares", "repeat")}, "'points'"),
    ],
)
def test_a_row_that_no_sweep_wrote_is_refused_and_the_file_left_alone(damage, reason, tmp_path) -> None:
    path = tmp_path / "sweep.jsonl"
    sweep(path=path, ratios=[0.5], repeats=1)
    head, row = path.read_text().splitlines()
    path.write_text(f"{head}\n{row}\n{json.dumps(damage(json.loads(row)))}\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"wrote, got another in line 3 \(.*{reason}"):
        sweep(path=path, ratios=[0.5])
    assert path.read_bytes() == before


def test_without_a_file_nothing_is_marked(monkeypatch) -> None:
    monkeypatch.setattr(mixture, "fingerprint_of_model", None)
    assert len(sweep(ratios=[0.5]).points) == 4


def test_a_file_without_a_row_is_begun_anew(tmp_path, monkeypatch) -> None:
    path = tmp_path / "sweep.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(mixture, "relative_critical_sharpness", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            sweep(path=path)
    assert len(path.read_text().splitlines()) == 1
    # Nothing is there to warn of.
    assert len(sweep(path=path, batch_size=4).points) == 20


def test_two_processes_on_one_file_count_once(tmp_path) -> None:
    path = tmp_path / "sweep.jsonl"
    once = sweep(path=path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, *lines[1:]]))
    assert numbers(sweep(path=path)) == numbers(once)


def test_a_direction_that_moves_the_model_is_refused() -> None:
    model = Point()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(given: nn.Module, losses: list) -> sharpkern.Direction:
        losses[0]().backward()
        before = {name: value.clone() for name, value in given.state_dict().items()}
        optimizer.step()
        return sharpkern.Direction.between(before, given, 0.1)

    with pytest.raises(ValueError, match="make_direction must leave the parameters as they are, got some written"):
        sweep(model=model, make_direction=step)


def test_a_mix_without_a_gradient_is_named() -> None:
    opposite = {"old": rows(1.0, 0.0), "new": rows(-1.0, 0.0)}
    with pytest.raises(sharpkern.NoUpdateError, match=r"at shares \(0.5, 0.5\), repeat 0: direction must move some"):
        sweep(mix=opposite, ratios=[0.0, 0.5])


def test_names_of_any_letters_go_to_the_disk_and_into_the_plot(tmp_path) -> None:
    name = "$x_{$ [/b]\u2028é"
    arguments = {
        "tasks": {name: OLD[:1]},
        "mix": {name: OLD, "new": NEW},
        "ratios": [0.5],
        "path": tmp_path / "s.jsonl",
    }
    model = Point()
    found = sweep(model=model, **arguments)
    assert numbers(sweep(model=model, **arguments)) == numbers(found)
    found.plot(tmp_path / "sweep.png")


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor])
def test_numbers_of_any_kind_are_taken(kind) -> None:
    found = sweep(ratios=[kind(0.25), kind(1.0)], seed=np.int64(0), repeats=np.int32(2), batch_size=np.int64(8))
    assert found.mixes == ((0.25, 0.75), (1.0, 0.0))


def test_a_search_starts_from_the_smallest_step_before_or_where_it_is_told() -> None:
    starts = []
    relative = mixture.relative_critical_sharpness

    def spy(*arguments, initial_lr, **options):
        starts.append(initial_lr)
        return relative(*arguments, initial_lr=initial_lr, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "relative_critical_sharpness", spy)
        found = sweep(ratios=[0.5, 1.0], repeats=1)
        assert starts == [None, pytest.approx(min(p.critical_lr for p in found.points[:2]))]
        starts.clear()
        sweep(ratios=[0.5, 1.0], repeats=1, initial_lr=0.125)
        assert starts == [0.125, 0.125]


def test_a_shuffled_loader_is_a_task_and_the_streams_stay_where_they_were(tmp_path) -> None:
    data = torch.utils.data.TensorDataset(torch.cat([OLD, NEW]))
    model = Point()

    def run(path):
        loader = torch.utils.data.DataLoader(data, batch_size=12, shuffle=True, drop_last=True)
        torch.rand(3)
        stream = torch.get_rng_state()
        found = sweep(model=model, tasks={"most": loader}, batch_loss=of_batch, path=path)
        assert torch.equal(torch.get_rng_state(), stream)
        return numbers(found)

    def of_batch(batch):
        return model.loss(batch[0] if isinstance(batch, list) else batch)

    assert run(tmp_path / "sweep.jsonl") == run(tmp_path / "sweep.jsonl") == run(None)


def test_nothing_of_the_run_changes() -> None:
    model, data, loss = language_model()
    loss(data[:4]).backward()
    gradients = [p.grad for p in model.parameters()]
    contents = [p.detach().clone() for p in (*model.parameters(), *gradients)]
    torch.manual_seed(5)
    stream = torch.get_rng_state()
    arguments = {"mix": {"a": data[:16], "b": data[16:]}, "ratios": [0.5], "batch_loss": loss, "batch_size": 8}
    sharpkern.mixture_sweep(model, {"a": data[:4]}, **arguments, repeats=1)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    now = (*model.parameters(), *gradients)
    assert all(torch.equal(one, other) for one, other in zip(now, contents, strict=True))


def test_a_direction_of_ones_own_sees_the_losses_of_mixed_batches() -> None:
    model = Point()
    seen = []

    def make(given: nn.Module, losses: list) -> sharpkern.Direction:
        assert given is model
        assert torch.is_grad_enabled()
        seen.append([loss().item() for loss in losses])
        losses[0]().backward()
        return sharpkern.Direction.from_gradients(model)

    by_own = sweep(model=model, make_direction=make, num_batches=3)
    assert [len(losses) for losses in seen] == [3] * 10
    assert numbers(by_own) == numbers(sweep(model=model))
    assert model.theta.grad is None


def test_mixes_of_a_repeat_share_their_samples_and_repeats_do_not() -> None:
    mix = MixSampler({"a": torch.arange(100), "b": torch.arange(100, 200)}, torch.sum, batch_size=10, seed=0)
    few, many = mix.batch(mix.shares(0.3), 0, 0).tolist(), mix.batch(mix.shares(0.7), 0, 0).tolist()
    assert few[:3] == many[:3]
    assert few[3:6] == many[7:]
    assert (sum(x < 100 for x in few), sum(x < 100 for x in many)) == (3, 7)
    assert len(set(many)) == 10
    assert mix.batch(mix.shares(0.3), 0, 0).tolist() == few
    others = [mix.batch(mix.shares(0.3), 1, 0), mix.batch(mix.shares(0.3), 0, 1)]
    assert all(set(other.tolist()) != set(few) for other in others)


@pytest.mark.parametrize(("share", "count"), [(0.29, 29), (0.57, 57), (1 / 3, 33), (0.005, 1), (0.995, 99)])
def test_shares_become_whole_samples(share: float, count: int) -> None:
    mix = MixSampler({"a": torch.zeros(100), "b": torch.ones(100)}, torch.sum, batch_size=100, seed=0)
    batch = mix.batch(mix.shares(share), 0, 0)
    assert (len(batch), int((batch == 0).sum())) == (100, count)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ratios": [0.5, 1.2]}, ValueError, r"a ratio must be within \[0, 1\], got 1.2; shares are parts of 1"),
        ({"ratios": [-0.1]}, ValueError, r"a ratio must be within \[0, 1\], got -0.1"),
        ({"ratios": [math.nan]}, ValueError, r"a ratio must be within \[0, 1\], got nan"),
        ({"ratios": [(0.5, 0.6)]}, ValueError, r"must add up to 1, got \(0.5, 0.6\); divide them by 1.1"),
        ({"ratios": [(1.0,)]}, ValueError, r"one share for each of \['old', 'new'\], got \(1.0,\); pass them by name"),
        ({"ratios": [{"older": 1.0}]}, ValueError, r"name sources of \['old', 'new'\], got \['older'\] besides"),
        ({"ratios": ["half"]}, TypeError, "a ratio must be a number in .* or the shares of all sources, got 'half'"),
        ({"ratios": []}, ValueError, r"ratios must hold a mix, and each of them once, got \[\]"),
        ({"ratios": [0.5, 0.5]}, ValueError, r"each of them once, got \[0.5, 0.5\]"),
        (
            {"ratios": [0.01]},
            ValueError,
            "0.01 of 'old' must be at least one sample .* of 8; raise batch_size",
        ),
        ({"batch_size": 64}, ValueError, "source 'new' must hold at least the 64 samples .* got 16; lower batch_size"),
        ({"batch_size": 0}, ValueError, "batch_size must be a positive int, got 0"),
        ({"ratios": 0.5}, TypeError, r"ratios must be several, got 0.5; pass such as \[0, 0.5, 1\]"),
        (
            {"mix": {"old": OLD, "new": {"x": NEW}}},
            TypeError,
            "'new' must have a length and an index, .*got dict",
        ),
        ({"tasks": {("old", 1): OLD}}, TypeError, r"the names of tasks must be texts, got \('old', 1\)"),
        (
            {"tasks": {"old": OLD[:1] * math.nan}},
            ValueError,
            "loss of task 'old' must be finite, got nan; check",
        ),
        ({"mix": {"old": OLD}}, ValueError, "mix must hold at least two sources, got 1"),
        ({"mix": [OLD, NEW]}, TypeError, "mix must map names to samples, got list"),
        ({"mix": {"old": OLD, "new": NEW[:0]}}, ValueError, "source 'new' must hold samples, got none; check where"),
        ({"mix": {"old": OLD, "new": iter(NEW)}}, TypeError, "source 'new' must have a length and an index"),
        (
            {"mix": {"a": OLD, "b": NEW, "c": NEW}},
            ValueError,
            "a ratio of 3 sources must hold the share of each, got",
        ),
        ({"tasks": {}}, ValueError, "tasks must hold at least one task, got none"),
        ({"tasks": [OLD]}, TypeError, "tasks must map names to closures or data, got list"),
        (
            {"tasks": {"old": []}},
            ValueError,
            "task 'old' must hold data, got none; pass a batch, a list",
        ),
        ({"tasks": {"old": OLD[:0]}}, ValueError, "task 'old' must hold data, got none"),
        ({"make_direction": "gradient"}, TypeError, "got 'gradient'; pass sharpkern.gradient_direction or"),
        ({"make_direction": lambda *_: None}, TypeError, r"must return a sharpkern\.Direction, got NoneType"),
        ({"batch_loss": None}, TypeError, "batch_loss must be a function of a batch where data is given, got None"),
        (
            {"batch_loss": None, "mix": {"a": len, "b": len}},
            TypeError,
            "batch_loss must be a function of a batch where data is given, got None for task 'old'",
        ),
        ({"batch_loss": OLD}, TypeError, "batch_loss must be callable on a batch, got Tensor; pass a function"),
        ({"repeats": 0}, ValueError, "repeats must be a positive int, got 0"),
        ({"num_batches": 1.5}, ValueError, "num_batches must be a positive int, got 1.5"),
        ({"rtoll": 0.1}, TypeError, "mixture_sweep has no option 'rtoll'; did you mean 'rtol'"),
        ({"repeat": 3}, TypeError, "mixture_sweep has no option 'repeat'; did you mean 'repeats'"),
        ({"model": OLD}, TypeError, r"model must be a torch\.nn\.Module, got Tensor"),
    ],
)
def test_bad_input_is_refused_with_the_remedy_before_any_work(change, error, message, tmp_path) -> None:
    path = tmp_path / "sweep.jsonl"
    given = change.get("model")
    arguments = {"batch_loss": Point().loss} if given is not None else {}
    with pytest.raises(error, match=message):
        sweep(path=path, **arguments, **change)
    assert not path.exists() or len(path.read_text().splitlines()) == 1


def point(
    share: float, task: str, critical_lr: float, status: str = "converged", repeat: int = 0, rise: float = math.inf
) -> MixturePoint:
    sharpness = 2 / critical_lr if critical_lr else math.inf
    return MixturePoint(
        (share, 1 - share), repeat, task, critical_lr, sharpness, status, 0.01, (0.0, rise), 1.0, 4, "virtual"
    )


def made(*points: MixturePoint) -> MixtureSweep:
    mixes = tuple(dict.fromkeys(p.shares for p in points))
    return MixtureSweep(("old", "new"), tuple(dict.fromkeys(p.task for p in points)), mixes, points)


def test_repeats_without_a_step_count_as_zero_and_failures_are_counted_apart() -> None:
    outcomes = [(1.0, "converged"), (3.0, "converged"), (0.0, "ascent"), (8.0, "unbounded"), (math.nan, "unresolved")]
    found = made(*(point(0.5, "a", eta, status, i) for i, (eta, status) in enumerate(outcomes)))
    summary = found.summary((0.5, 0.5), "a")
    assert (summary.critical_lr_low, summary.critical_lr, summary.critical_lr_high) == (0.75, 2.0, 4.25)
    assert (summary.sharpness_low, summary.sharpness, summary.sharpness_high) == (2 / 4.25, 1.0, 2 / 0.75)
    assert (summary.repeats, summary.ascent, summary.unbounded, summary.unresolved, summary.failed) == (5, 1, 1, 0, 1)


def test_one_that_is_known_to_rise_and_not_where_allows_no_step() -> None:
    # Dropping the three, or counting them with the rise, would allow a step that most repeats may not.
    hidden = [point(0.5, "a", math.nan, "unresolved", i, rise) for i, rise in enumerate((0.1, 1.0, 2.0))]
    found = made(point(0.5, "a", 5.0, repeat=3), point(0.5, "a", 6.0, repeat=4), *hidden)
    summary = found.summary((0.5, 0.5), "a")
    assert (summary.critical_lr, summary.sharpness, summary.critical_lr_high) == (0.0, math.inf, 5.0)
    assert (summary.unresolved, summary.failed) == (3, 0)
    assert found.sweet_spot is None


def test_a_median_that_goes_uphill_is_infinite_and_one_of_failures_is_nan() -> None:
    found = made(
        *(point(0.5, "a", 0.0, "ascent", i) for i in range(2)),
        point(0.5, "a", 1.0, repeat=2),
        point(0.5, "b", math.nan, "unresolved"),
    )
    assert found.summary((0.5, 0.5), "a").sharpness == math.inf
    assert found.summary((0.5, 0.5), "a").sharpness_low == 4.0
    assert math.isnan(found.summary((0.5, 0.5), "b").sharpness)
    with pytest.raises(ValueError, match=r"must be of this sweep, got \(0.4, 0.6\) and 'a'; it has the mixes"):
        found.summary((0.4, 0.6), "a")


def test_the_sweet_spot_is_the_least_of_the_largest_and_skips_what_is_not_known() -> None:
    found = made(
        point(0.0, "a", 9.0), point(0.0, "b", math.nan, "unresolved"),
        point(0.3, "a", 2.0), point(0.3, "b", 5.0),
        point(0.6, "a", 3.0), point(0.6, "b", 2.5),
        point(1.0, "a", 0.0, "ascent"), point(1.0, "b", 9.0),
    )  # fmt: skip
    assert found.sweet_spot == SweetSpot({"old": 0.6, "new": 0.4}, 2.5, 0.8, "b", ((0.6, 0.4),))


def test_table_csv_and_pandas_hold_the_same(tmp_path, monkeypatch) -> None:
    found = sweep()
    found.to_csv(tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open(encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(found.table) == 10
    assert [float(row["lambda_c"]) for row in written] == [row["lambda_c"] for row in found.table]
    assert (written[0]["share_old"], written[0]["task"], written[0]["lambda_c"]) == ("0.0", "old", "inf")
    frame = found.to_pandas()
    assert list(frame.columns) == list(written[0])
    assert frame["ascent"].sum() == sum(row["ascent"] for row in found.table)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"to_pandas needs pandas.*pip install 'sharpkern\[pandas\]'"):
        found.to_pandas()


@pytest.fixture
def drawn(monkeypatch):
    """The axes of figures that were saved."""
    axes = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (axes.extend(f.axes), save(f, *a, **k))[1])
    return axes


def test_ascent_is_drawn_at_the_upper_edge_and_the_sweet_spot_as_a_line(tmp_path, drawn) -> None:
    found = sweep()
    found.plot(tmp_path / "sweep.png")
    assert matplotlib.image.imread(tmp_path / "sweep.png").ndim == 3
    (axes,) = drawn
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["old"].get_xdata()) == RATIOS
    assert math.isnan(lines["old"].get_ydata()[0])
    uphill = [line for line in axes.lines if line.get_marker() == "^"]
    places = [(line.get_xdata()[0], round(line.get_ydata()[0], 3)) for line in uphill]
    assert places == [(0.0, 0.97), (0.25, 0.97), (0.75, 0.95), (1.0, 0.95)]
    assert "sweet spot, $\\eta$ = 2" in lines
    assert len(axes.collections) == 2


def test_a_bound_far_below_the_curves_leaves_the_axis_alone(tmp_path, drawn) -> None:
    found = [(2.0, "converged"), (1e9, "unbounded"), (1.0, "unbounded")]
    points = [
        MixturePoint((i / 2, 1 - i / 2), 0, "a", eta, 2 / eta, status, 0.01, (0.0, math.inf), 1.0, 3, "virtual")
        for i, (eta, status) in enumerate(found)
    ]
    MixtureSweep(("old", "new"), ("a",), tuple(p.shares for p in points), tuple(points)).plot(tmp_path / "sweep.png")
    (axes,) = drawn
    assert axes.get_ylim()[0] > 0.1
    bounds = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if line.get_marker() == "v"]
    assert bounds == [([1.0], [2.0]), ([0.5], [0.03])]


def test_three_sources_are_drawn_mix_by_mix(tmp_path, drawn) -> None:
    mix = {"old": OLD, "new": NEW, "third": NEW}
    sweep(mix=mix, ratios=[(0.5, 0.5, 0), (0.25, 0.25, 0.5)]).plot(tmp_path / "sweep.png")
    assert [label.get_text() for label in drawn[0].get_xticklabels()] == ["0.5\n0.5\n0", "0.25\n0.25\n0.5"]


def test_rows_on_the_disk_say_what_they_are_of(tmp_path) -> None:
    path = tmp_path / "sweep.jsonl"
    sweep(path=path, ratios=[0.25], repeats=1)
    settings, row = (json.loads(line) for line in path.read_text().splitlines())
    assert [source[0] for source in settings["settings"]["sources"]] == ["old", "new"]
    assert (row["shares"], row["repeat"], [p["task"] for p in row["points"]]) == ([0.25, 0.75], 0, ["old", "new"])
