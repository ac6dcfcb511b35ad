"""Ranks that the caller names: pipelines, layers split by hand, and mixtures give what one process gives."""

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sharpkern
from tests.helpers.models import Block
from tests.helpers.parallel import Tripwire
from tests.helpers.processes import on_ranks
from tests.helpers.split_models import Pipeline, batch, layers, loss_of, split_mlps

STEPS = 4
# λ_c, loss and slope of each step, and the weights at its end.
Run = tuple[list[list[float]], list[Tensor]]


def one_process(_: int, freeze: tuple[str, ...] = (), **options: Any) -> Run:
    """The run that all others are compared with."""
    model = layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(freeze))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    monitor = sharpkern.Monitor(model, optimizer, ranks="alone", **options)
    for step in range(STEPS):
        loss_fn = lambda step=step: loss_of(model, batch(step))
        optimizer.zero_grad()
        loss_fn().backward()
        assert monitor(loss_fn) is not None, monitor.skipped
        optimizer.step()
    return of(monitor), list(model.parameters())


def of(monitor: sharpkern.Monitor) -> list[list[float]]:
    return [[m.sharpness, m.base_loss, m.slope, m.retained] for m in (one.measurement for one in monitor.history)]


def averaged(model: nn.Module, group: Any) -> None:
    """What a loop that is data-parallel by hand does between backward and step."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad, group=group)
            parameter.grad /= distributed.get_world_size(group)


def pipeline(
    rank: int,
    measured: bool = True,
    schedule: str = "GPipe",
    freeze: str = "",
    wrap: Callable[[nn.Module], nn.Module] = lambda part: part,
    by_hand: bool = True,
    told: bool = False,
    **options: Any,
) -> Run:
    """A pipeline of two stages, on as many copies as there are ranks for."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size() // 2, 2), mesh_dim_names=("data", "stages"))
    stages, copies = mesh.get_group("stages"), mesh.get_group("data")
    pipe = Pipeline(schedule, stages, wrap)
    for name, parameter in pipe.model.named_parameters():
        parameter.requires_grad_(not (freeze and name.startswith(freeze)))
    optimizer = torch.optim.AdamW(pipe.model.parameters(), lr=3e-3)
    monitor = sharpkern.Monitor(pipe.model, optimizer, ranks=sharpkern.Ranks(split=stages), **options)
    for step in range(STEPS):
        rows = batch(step)[mesh.get_local_rank("data") :: mesh.size(0)]
        optimizer.zero_grad()
        loss = pipe.step(rows)
        if by_hand:
            averaged(pipe.model, copies)
        if measured:
            known = None if loss is None else loss.detach()
            made = monitor(partial(pipe.evaluate, rows), **({"loss": known} if told else {}))
            assert made is not None, monitor.skipped
        optimizer.step()
    return of(monitor), list(pipe.model.parameters())


def by_tensors(rank: int, measured: bool = True, **options: Any) -> Run:
    """The MLPs of all blocks split over all ranks, everything else on each of them."""
    model = layers()
    split = split_mlps(model, distributed.group.WORLD)
    ranks = sharpkern.Ranks(split=lambda p: distributed.group.WORLD if p in split else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    monitor = sharpkern.Monitor(model, optimizer, ranks=ranks, **options)
    for step in range(STEPS):
        loss_fn = lambda step=step: loss_of(model, batch(step))
        optimizer.zero_grad()
        loss_fn().backward()
        if measured:
            assert monitor(loss_fn) is not None, monitor.skipped
        optimizer.step()
    return of(monitor), list(model.parameters())


def by_data(rank: int, measured: bool = True) -> Run:
    """Whole models on all ranks, whose gradients the loop averages."""
    model = layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    monitor = sharpkern.Monitor(model, optimizer, ranks=sharpkern.Ranks())
    for step in range(STEPS):
        rows = batch(step)[rank :: distributed.get_world_size()]
        loss_fn = lambda rows=rows: loss_of(model, rows)
        optimizer.zero_grad()
        loss_fn().backward()
        averaged(model, None)
        if measured:
            monitor(loss_fn)
        optimizer.step()
    return of(monitor), list(model.parameters())


def sweep_by_data(rank: int, measured: bool = True) -> Run:
    """Two models that two ranks each train; the group of the others is never told of."""
    groups = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    mine = groups[rank // 2]
    model = layers()
    if rank >= 2:
        for parameter in model.parameters():
            parameter.data.mul_(0.9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    monitor = sharpkern.Monitor(model, optimizer, ranks=sharpkern.Ranks(mine))
    for step in range(STEPS):
        rows = batch(step)[rank % 2 :: 2]
        loss_fn = lambda rows=rows: loss_of(model, rows)
        optimizer.zero_grad()
        loss_fn().backward()
        averaged(model, mine)
        if measured and (rank < 2 or step > 1):
            monitor(loss_fn)
        optimizer.step()
    return of(monitor), list(model.parameters())


def stages_of_split_layers(rank: int, measured: bool = True) -> Run:
    """A pipeline of two stages, each with MLPs that are split over two ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tensors", "stages"))
    split: set[nn.Parameter] = set()

    def wrap(part: nn.Module) -> nn.Module:
        split.update(split_mlps(part, mesh.get_group("tensors")))
        return part

    pipe = Pipeline("1F1B", mesh.get_group("stages"), wrap)
    whole, stages = distributed.group.WORLD, mesh.get_group("stages")
    ranks = sharpkern.Ranks(split=lambda p: whole if p in split else stages)
    optimizer = torch.optim.AdamW(pipe.model.parameters(), lr=3e-3)
    monitor = sharpkern.Monitor(pipe.model, optimizer, ranks=ranks)
    for step in range(STEPS):
        optimizer.zero_grad()
        pipe.step(batch(step))
        if measured:
            monitor(partial(pipe.evaluate, batch(step)))
        optimizer.step()
    return of(monitor), list(pipe.model.parameters())


def sharded(part: nn.Module) -> nn.Module:
    """Shard a stage over the ranks that have a copy of it."""
    return fully_shard(part, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "stages"))["data"])


def reads_nothing_of_its_own(monitored: Callable[..., Run], rank: int) -> tuple[Any, bool]:
    """What a run has measured, and whether it ends where it would have ended unmeasured."""
    measured, with_it = monitored(rank)
    _, without = monitored(rank, measured=False)
    local = lambda p: getattr(p, "_local_tensor", p)
    return measured, all(torch.equal(local(a), local(b)) for a, b in zip(with_it, without, strict=True))


RUNS: dict[str, Callable[..., Run]] = {
    **{schedule: partial(pipeline, schedule=schedule) for schedule in ("GPipe", "1F1B", "interleaved")},
    "in place": partial(pipeline, engine="inplace"),
    "the loss handed in": partial(pipeline, told=True),
    "tensors": by_tensors,
    "tensors, in place": partial(by_tensors, engine="inplace"),
    "data": by_data,
}
OF_FOUR: dict[str, Callable[..., Run]] = {
    "stages and data": partial(pipeline, schedule="1F1B"),
    "stages and tensors": stages_of_split_layers,
    "stages and shards": partial(pipeline, wrap=sharded, by_hand=False),
}


def one_frozen(rank: int) -> tuple[Any, Any]:
    """A stage that has nothing to move, and the same in one process; by the monitor and by hand."""
    by_hand = []
    for alone in (False, True):
        pipe = Pipeline("GPipe", distributed.group.WORLD)
        model, frozen = (layers(), ("0.", "1.")) if alone else (pipe.model, ("stage0",))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        ranks: Any = "alone" if alone else sharpkern.Ranks(split=distributed.group.WORLD)
        if alone:
            loss_of(model, batch(0)).backward()
        else:
            pipe.step(batch(0))
        loss_fn = partial(loss_of, model, batch(0)) if alone else partial(pipe.evaluate, batch(0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        directions = [
            sharpkern.Direction.from_optimizer(optimizer, ranks=ranks),
            sharpkern.Direction.from_gradients(model, ranks=ranks),
        ]
        by_hand.append([sharpkern.critical_sharpness(model, loss_fn, d, ranks=ranks).sharpness for d in directions])
    measured, expected = pipeline(rank, freeze="stage0")[0], one_process(rank, freeze=("0.", "1."))[0]
    return [*measured, by_hand[0]], [*expected, by_hand[1]]


def every_measure(rank: int) -> list[tuple[str, float, float]]:
    """Measures by stages, by split tensors, and in one process."""
    found: list[dict[str, float]] = []
    world = distributed.group.WORLD
    for kind in ("stages", "tensors", "alone"):
        ranks: Any = "alone"
        model: nn.Module = layers()
        evaluate = partial(loss_of, model)
        if kind == "stages":
            pipe = Pipeline("GPipe", world)
            model, evaluate, ranks = pipe.model, pipe.evaluate, sharpkern.Ranks(split=world)
            pipe.step(batch(0))
        else:
            if kind == "tensors":
                split = split_mlps(model, world)
                ranks = sharpkern.Ranks(split=lambda p, split=split: world if p in split else None)
            evaluate(batch(0)).backward()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        direction = sharpkern.Direction.from_optimizer(optimizer)
        gradient = sharpkern.Direction.from_gradients(model)
        loss_fn, other = partial(evaluate, batch(0)), partial(evaluate, batch(1))
        tasks = {"one": loss_fn, "other": other}
        blocks = {
            "norms": [p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()],
            "last": [p for n, p in model.named_parameters() if n in ("3.1.weight", "stage1.1.1.weight")],
        }
        if kind == "stages":
            # One that the first rank does not know of.
            blocks = {"norms": blocks["norms"]} | ({"last": blocks["last"]} if rank else {})
        by_block = sharpkern.blockwise_critical_sharpness(model, loss_fn, direction, blocks, ranks=ranks)
        found.append(
            {
                "λ_c": sharpkern.critical_sharpness(model, loss_fn, direction, ranks=ranks).sharpness,
                "λ_c of parts": sharpkern.critical_sharpness(
                    model, [loss_fn, loss_fn], direction, ranks=ranks
                ).sharpness,
                "of the gradient": sharpkern.critical_sharpness(model, loss_fn, gradient, ranks=ranks).sharpness,
                "relative": sharpkern.relative_critical_sharpness(model, tasks, direction, ranks=ranks)[
                    "other"
                ].sharpness,
                "loss along": float(sharpkern.losses_along(model, loss_fn, direction, [0.0, 0.01], ranks=ranks)[1]),
                "λ_dir": float(sharpkern.directional_sharpness(model, loss_fn, direction, ranks=ranks, step_size=1e-3)),
                **{f"λ_c of {name}": one.sharpness for name, one in by_block.items()},
            }
        )
    *split_up, alone = found
    return [(name, one[name], alone[name]) for one in split_up for name in alone]


def one_fails(
    rank: int, kind: str, place: str, call: int = 3, who: int = 1, before: bool = False
) -> tuple[str, float, bool]:
    """What a rank is told where one fails, how long it takes, and whether the run then goes on as ever."""
    ends = []
    told, seconds = "", 0.0
    world = distributed.group.WORLD
    for fails in (True, False):
        model: nn.Module = layers()
        step: Callable[[Tensor], Any]
        if kind == "tensors":
            split = split_mlps(model, world)
            ranks = sharpkern.Ranks(split=lambda p, split=split: world if p in split else None)
            evaluate = partial(loss_of, model)
            step = lambda rows, evaluate=evaluate: evaluate(rows).backward()
        else:
            pipe = Pipeline(kind, world)
            model, evaluate, step, ranks = pipe.model, pipe.evaluate, pipe.step, sharpkern.Ranks(split=world)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        wire = Tripwire(place, "ValueError", rank, call if fails else 0, who)

        def loss_fn(wire: Tripwire = wire, evaluate: Callable[[Tensor], Any] = evaluate) -> Any:
            wire.calls += 1
            wire.at("before")
            loss = evaluate(batch(0))
            wire.at("after")
            return loss

        block = next(module for module in model.modules() if isinstance(module, Block))
        block.mlp.register_forward_pre_hook(lambda *_, wire=wire: wire.at("within"))
        wire.calls = -1
        step(batch(0))
        direction = sharpkern.Direction.from_optimizer(optimizer)
        if before:
            wire.calls = -100
            sharpkern.critical_sharpness(model, loss_fn, direction, ranks=ranks)
        wire.calls = 0
        started = time.monotonic()
        try:
            sharpkern.critical_sharpness(model, loss_fn, direction, ranks=ranks)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        seconds = max(seconds, time.monotonic() - started)
        wire.calls = -1
        optimizer.step()
        optimizer.zero_grad()
        step(batch(1))
        ends.append([p.grad.clone() for p in model.parameters()] + [p.detach().clone() for p in model.parameters()])
    return told, seconds, all(map(torch.equal, *ends))


FAILURES = {
    f"{kind}, {place}": partial(one_fails, kind=kind, place=place)
    for kind, place in (
        ("GPipe", "before"),
        ("GPipe", "after"),
        ("1F1B", "within"),
        ("interleaved", "before"),
        ("interleaved", "within"),
        ("tensors", "within"),
        ("tensors", "after"),
    )
}
FAILURES |= {"the first stage": partial(one_fails, kind="1F1B", place="within", who=0)}
FAILURES |= {
    f"first pass, {kind}, {place}{' of the first' * (who == 0)}": partial(
        one_fails, kind=kind, place=place, call=1, who=who
    )
    for kind, place, who in (
        ("1F1B", "before", 1),
        ("1F1B", "within", 0),
        ("1F1B", "within", 1),
        ("interleaved", "before", 1),
        ("tensors", "before", 1),
        ("tensors", "within", 0),
    )
}
FAILURES |= {
    f"second measurement, {kind}, {place}": partial(one_fails, kind=kind, place=place, call=1, before=True)
    for kind, place in (("1F1B", "before"), ("interleaved", "within"))
}


class In16Bits(nn.Module):
    """A part that computes in bf16."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.part(x).float()


def unlike_stages(rank: int, kind: str) -> list[tuple[str, float, list[float]]]:
    """Engine, λ_c and step sizes where one stage alone is compiled, or computes in 16 bits; and in one process."""
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")

    def changed(part: nn.Module) -> nn.Module:
        if kind == "16 bits":
            return In16Bits(part)
        part.compile(backend="aot_eager")
        return part

    found = []
    for alone in (False, True):
        pipe = Pipeline("GPipe", distributed.group.WORLD, wrap=changed if rank == 0 else lambda part: part)
        whole = layers()
        model = nn.Sequential(changed(whole[:2]), whole[2:]) if alone else pipe.model
        loss_fn = partial(loss_of, model, batch(0)) if alone else partial(pipe.evaluate, batch(0))
        if alone:
            loss_fn().backward()
        else:
            pipe.step(batch(0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ranks: Any = "alone" if alone else sharpkern.Ranks(split=distributed.group.WORLD)
        m = sharpkern.critical_sharpness(
            model, loss_fn, sharpkern.Direction.from_optimizer(optimizer), ranks=ranks, engine="auto"
        )
        found.append((m.engine, m.sharpness, [eta for eta, _ in m.probes]))
    return found


def refused(rank: int) -> list[str]:
    """What is said of what cannot be had."""
    pipe = Pipeline("GPipe", distributed.group.WORLD)
    pipe.step(batch(0))
    loss_fn = partial(pipe.evaluate, batch(0))
    optimizer = torch.optim.AdamW(pipe.model.parameters(), lr=3e-3 * (1 + rank))
    direction = sharpkern.Direction.from_gradients(pipe.model)
    ranks = sharpkern.Ranks(split=distributed.group.WORLD)
    jobs: list[Callable[[], object]] = [
        lambda: sharpkern.critical_sharpness(pipe.model, loss_fn, direction, ranks=ranks, engine="batched"),
        lambda: sharpkern.critical_sharpness(
            pipe.model, loss_fn, sharpkern.Direction.from_optimizer(optimizer), ranks=ranks
        ),
        lambda: sharpkern.critical_sharpness(pipe.model, lambda: loss_fn() and None, direction, ranks=ranks),
        lambda: sharpkern.hessian_sharpness(pipe.model, loss_fn, ranks=ranks),
        lambda: sharpkern.directional_sharpness(pipe.model, loss_fn, direction, method="hvp", ranks=ranks),
        lambda: sharpkern.gradient_direction(pipe.model, [loss_fn], ranks=ranks),
        lambda: sharpkern.critical_sharpness(pipe.model, loss_fn, direction, ranks="all"),
        lambda: sharpkern.critical_sharpness(pipe.model, loss_fn, direction, ranks=ranks, reduce=lambda loss: loss),
        lambda: sharpkern.Ranks(group=3),
        lambda: sharpkern.Ranks(split="stages"),
        lambda: sharpkern.critical_sharpness(
            pipe.model, loss_fn, direction, ranks=sharpkern.Ranks(split=lambda p: "x" if rank else None)
        ),
    ]
    told = []
    for job in jobs:
        try:
            told.append(f"no error: {job()}")
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


SAID = [
    "EngineUnsupportedError: ranks that run other modules than others take one step size at a time",
    "ValueError: direction must be per unit of the same learning rate on every rank, got 0.00",
    "ValueError: loss_fn must return the loss on one rank at least, got None on all of them",
    "TypeError: parameters must be plain tensors for Hessian-vector products, got a model that is split over ranks",
    "TypeError: parameters must be plain tensors for Hessian-vector products, got a model that is split over ranks",
    "TypeError: model must be whole on every rank, or sharded by fully_shard, for gradients of its own losses",
    "TypeError: ranks must be a sharpkern.Ranks or 'alone', got 'all'",
    "ValueError: reduce cannot be combined with ranks=",
    "TypeError: group must be a process group that this rank belongs to, got 3",
    "TypeError: split must be a process group that this rank belongs to, or a function of a parameter, got 'stages'",
    "TypeError: split must return a process group that this rank belongs to, or None, got 'x'",
]


def sampled(rank: int) -> tuple[list[str], float, float]:
    """What is told where a sample is asked for of ranks that hold the same micro-batches."""
    pipe = Pipeline("GPipe", distributed.group.WORLD)
    pipe.step(batch(0))
    direction = sharpkern.Direction.from_gradients(pipe.model)
    parts = [partial(pipe.evaluate, batch(0)[k : k + 2]) for k in range(0, 8, 2)] * 4
    ranks = sharpkern.Ranks(split=distributed.group.WORLD)
    measure = partial(sharpkern.critical_sharpness, pipe.model, parts, direction, ranks=ranks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asked = measure(sample="auto").sharpness
    return [str(one.message) for one in caught], asked, measure().sharpness


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    jobs = {
        "alone": one_process,
        **{f"runs: {name}": partial(reads_nothing_of_its_own, run) for name, run in RUNS.items()},
        "frozen": one_frozen,
        "measures": every_measure,
        "refused": refused,
        "compiled": partial(unlike_stages, kind="compiled"),
        "16 bits": partial(unlike_stages, kind="16 bits"),
        "sampled": sampled,
    }
    return on_ranks(jobs, 2, tmp_path_factory.mktemp("two"), seconds=300)


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(FAILURES, 2, tmp_path_factory.mktemp("failing"), seconds=300)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    jobs = {"alone": one_process} | {
        f"runs: {name}": partial(reads_nothing_of_its_own, run) for name, run in OF_FOUR.items()
    }
    jobs["sweep"] = partial(reads_nothing_of_its_own, sweep_by_data)
    return on_ranks(jobs, 4, tmp_path_factory.mktemp("four"), seconds=300)


def check(ranks: list[dict[str, Any]], name: str) -> None:
    found = [rank[f"runs: {name}"] for rank in ranks]
    assert isinstance(found[0], tuple), found[0]
    expected, _ = ranks[0]["alone"]
    for measured, is_same in found:
        assert is_same
        assert measured == found[0][0]
        for here, alone in zip(measured, expected, strict=True):
            assert here == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_give_what_one_process_gives_and_leave_no_trace(two, name) -> None:
    check(two, name)


@pytest.mark.long
@pytest.mark.parametrize("name", OF_FOUR)
def test_four_ranks_give_what_one_process_gives_and_leave_no_trace(four, name) -> None:
    check(four, name)


@pytest.mark.long
def test_ranks_of_a_group_need_nobody_else(four) -> None:
    found = [rank["sweep"] for rank in four]
    assert isinstance(found[0], tuple), found[0]
    assert all(is_same for _, is_same in found)
    (first, _), (second, _), (third, _), (fourth, _) = found
    for here, alone in zip(first, four[0]["alone"][0], strict=True):
        assert here == pytest.approx(alone, rel=1e-5)
    assert (second, fourth) == (first, third)
    assert (len(third), third[0] == first[2]) == (2, False)


def test_a_stage_that_has_nothing_to_move_has_an_empty_direction(two) -> None:
    found = [rank["frozen"] for rank in two]
    assert isinstance(found[0], tuple), found[0]
    for measured, alone in found:
        for here, expected in zip(measured, alone, strict=True):
            assert here == pytest.approx(expected, rel=1e-5)


def test_every_measure_takes_ranks(two) -> None:
    found = [rank["measures"] for rank in two]
    assert isinstance(found[0], list), found[0]
    for name, here, alone in found[0]:
        assert here == pytest.approx(alone, rel=1e-2 if name == "λ_dir" else 1e-5), name
    assert [here for _, here, _ in found[0]] == [here for _, here, _ in found[1]]


@pytest.mark.parametrize("name", FAILURES)
def test_where_one_rank_fails_no_other_waits(failing, name) -> None:
    found = [rank[name] for rank in failing]
    assert isinstance(found[0], tuple), found[0]
    who = FAILURES[name].keywords.get("who", 1)
    # What it was sent made it fail too, where nothing was known of the sizes.
    late = "RankError: the measurement failed on another rank before it did here"
    assert found[1 - who][0].startswith(("RankError: the measurement failed on 1 of 2 ranks, not on this one", late))
    assert name.startswith("first pass") or not found[1 - who][0].startswith(late)
    # A schedule says where it failed by an error of its own.
    assert found[who][0].startswith(("ValueError: tripped", "RuntimeError: ")), found[who][0]
    assert "[Stage" in found[who][0] or found[who][0] == "ValueError: tripped"
    for _, seconds, same in found:
        # The groups themselves give up after 30.
        assert seconds < 25
        assert same


def test_what_cannot_be_had_is_refused_by_name(two) -> None:
    # Of the last one the first rank has not heard why.
    for told, last in ((two[0]["refused"], "RankError: "), (two[1]["refused"], SAID[-1])):
        assert isinstance(told, list), told
        assert len(told) == len(SAID)
        for message, start in zip(told, [*SAID[:-1], last], strict=True):
            assert message.startswith(start), message


@pytest.mark.parametrize(("kind", "rel"), [("compiled", 1e-4), ("16 bits", 0.03)])
def test_stages_that_are_unlike_take_one_engine_and_the_same_steps(two, kind, rel) -> None:
    found = [rank[kind] for rank in two]
    assert isinstance(found[0], list), found[0]
    (engine, sharpness, steps), (_, alone, _) = found[0]
    assert (engine, steps) == (found[1][0][0], found[1][0][2])
    assert sharpness == found[1][0][1] == pytest.approx(alone, rel=rel)
    assert kind == "16 bits" or engine == "inplace"


def test_ranks_that_split_a_model_are_not_sampled(two) -> None:
    found = [rank["sampled"] for rank in two]
    assert isinstance(found[0], tuple), found[0]
    for told, asked, measured in found:
        assert len(told) == 1
        assert "ranks that split a model hold the same micro-batches" in told[0]
        assert asked == pytest.approx(measured, rel=0.05)
