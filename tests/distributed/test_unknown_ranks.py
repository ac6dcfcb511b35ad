"""Ranks that no wrapper in sight tells of: the number of one process on all the data, their own, or an error."""

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed._composable.replicate import replicate
from torch.nn.parallel import DistributedDataParallel

import sharpkern
from sharpkern.distributed.ranks import KINDS
from sharpkern.engines import settling
from sharpkern.engines.judging import Facts, judged
from tests.helpers.processes import on_ranks

Loss = Callable[[], Tensor]
Optimizer = Callable[..., torch.optim.Optimizer]

# Losses of the two halves are far apart.
SCALE = torch.cat([torch.ones(16, 1), 3 * torch.ones(16, 1)]).double()
X = torch.randn(32, 6, generator=torch.Generator().manual_seed(1)).double() * SCALE
Y = torch.randint(0, 3, (32,), generator=torch.Generator().manual_seed(2))


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()


def half(model: nn.Module, rank: int) -> Tensor:
    """The loss of a rank's rows."""
    mine = slice(16 * rank, 16 * rank + 16)
    return F.cross_entropy(model(X[mine]), Y[mine])


def whole(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


def mean(tensor: Tensor) -> Tensor:
    total = tensor.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def itself(loss: Tensor) -> Tensor:
    """A ``reduce`` of one process."""
    return loss


def averaged(model: nn.Module) -> None:
    """What a loop that is data-parallel by hand does between backward and step."""
    for parameter in model.parameters():
        parameter.grad = mean(parameter.grad)


def missed() -> int:
    """How often a rank has waited for another in vain."""
    c10d = distributed.distributed_c10d
    return c10d.PrefixStore("sharpkern", c10d._get_default_store()).add("missed", 0)


def update(model: nn.Module, make: Optimizer = torch.optim.SGD) -> sharpkern.Direction:
    return sharpkern.Direction.from_optimizer(make(model.parameters(), lr=0.1))


def told(job: Callable[[], object]) -> str:
    """How a job ends: with its error, soon."""
    started = time.monotonic()
    try:
        found = job()
    except Exception as error:
        return f"{type(error).__name__}: {error}{' (late)' if time.monotonic() - started > 15 else ''}"
    return f"no error: {found}"


# One model on several batches.


def loop(rank: int, measured: bool, alone: bool) -> tuple[list[float], int, int, Tensor]:
    """λ_c, forwards told, calls and weights of a loop that is data-parallel by hand, or in one process."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = sharpkern.Monitor(model, optimizer, **({"reduce": itself} if alone else {}))
    evaluate = partial(whole, model) if alone else partial(half, model, rank)
    calls = []

    def loss_fn() -> Tensor:
        calls.append(1)
        return evaluate()

    for _ in range(4):
        optimizer.zero_grad()
        evaluate().backward()
        if not alone:
            averaged(model)
        if measured:
            monitor(loss_fn)
        optimizer.step()
    found = [record.measurement for record in monitor.history]
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return [m.sharpness for m in found], sum(m.forwards for m in found), len(calls), weights


def loops(rank: int) -> list[tuple[list[float], int, int, Tensor]]:
    return [loop(rank, measured, alone) for measured, alone in ((True, False), (False, False), (True, True))]


def block(model: nn.Module, loss_fn: Loss, direction: sharpkern.Direction) -> sharpkern.Measurement:
    last = list(model.parameters())[-2:]
    return sharpkern.blockwise_critical_sharpness(model, loss_fn, direction, {"last": last})["last"]


Wrap = Callable[[nn.Module], nn.Module]
MEASURES: dict[str, Callable[[nn.Module, Loss, sharpkern.Direction], float]] = {
    "λ_c": lambda m, f, d: sharpkern.critical_sharpness(m, f, d).sharpness,
    "λ_max": lambda m, f, d: sharpkern.hessian_sharpness(m, f, tol=1e-5).value,
    "λ_dir": lambda m, f, d: float(sharpkern.directional_sharpness(m, f, d, step_size=1e-3)),
    "λ_dir, hvp": lambda m, f, d: float(sharpkern.directional_sharpness(m, f, d, method="hvp")),
    "loss along": lambda m, f, d: float(sharpkern.losses_along(m, f, d, [0.1, 0.5])[1]),
    "λ_c of a block": lambda m, f, d: block(m, f, d).sharpness,
    "relative λ_c": lambda m, f, d: sharpkern.relative_critical_sharpness(m, {"1": f, "2": f}, d)["2"].sharpness,
}


def values(rank: int, wrap: Wrap, inner: bool = False, by_hand: bool = True, zeros: bool = False) -> dict[str, Any]:
    """Every measure of this rank's half, of a new model each, and of all rows in one process."""
    found = {}
    for name, measure in MEASURES.items():
        pair = []
        for alone in (False, True):
            model = mlp()
            if zeros:
                # The same loss on all batches, at the first step.
                nn.init.zeros_(model[2].weight)
                nn.init.zeros_(model[2].bias)
            wrapper = model if alone else wrap(model)
            loss_fn = partial(whole, model) if alone else partial(half, wrapper, rank)
            loss_fn().backward()
            if by_hand and not alone:
                averaged(model)
            pair.append(measure(model if inner else wrapper, loss_fn, update(model)))
            # A reducer works as before.
            loss_fn().backward()
        found[name] = tuple(pair)
    return found


def out_of_sight(model: nn.Module) -> nn.Module:
    """A wrapper that has averaged the gradients, and that no closure calls."""
    half(DistributedDataParallel(model), distributed.get_rank()).backward()
    model.zero_grad()
    return model


VALUES = {
    "by hand": partial(values, wrap=nn.Sequential),
    "the same loss at first": partial(values, wrap=nn.Sequential, zeros=True),
    "inside of a wrapper": partial(values, wrap=DistributedDataParallel, inner=True, by_hand=False),
    "replicate": partial(values, wrap=replicate, by_hand=False),
    "a wrapper out of sight": partial(values, wrap=out_of_sight),
}


def own_mean(rank: int) -> tuple[float, float]:
    """λ_c with the caller's own mean of the losses, and of all rows."""
    found = []
    for loss_of, reduce in ((partial(half, rank=rank), mean), (whole, itself)):
        model = mlp()
        loss_fn = partial(loss_of, model)
        loss_fn().backward()
        averaged(model)
        found.append(sharpkern.critical_sharpness(model, loss_fn, update(model), reduce=reduce).sharpness)
    return found[0], found[1]


# Models of their own.


def own_runs(rank: int, seed: int = 0, faster: int = 0, rows: int = 0, rarer: int = 0) -> tuple[Any, Any, int]:
    """λ_c of every step, the same told that each rank is alone, and how often a rank waited in vain."""
    found = []
    for options in ({}, {"reduce": itself}):
        model = mlp(seed * rank)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (1 + faster * rank))
        monitor = sharpkern.Monitor(model, optimizer, every=1 + rarer * rank, **options)
        loss_fn = partial(half, model, rows * rank)
        for _ in range(5):
            optimizer.zero_grad()
            loss_fn().backward()
            monitor(loss_fn)
            optimizer.step()
        found.append([record.measurement.sharpness for record in monitor.history])
    return found[0], found[1], missed()


def adversaries(rank: int) -> tuple[Any, Any, int]:
    found = []
    for reduce in (None, itself):
        model = mlp() if rank == 0 else mlp()[2:]
        loss_fn = partial(whole, model) if rank == 0 else lambda model=model: model(X.repeat(1, 2)).square().mean()
        loss_fn().backward()
        found.append(sharpkern.critical_sharpness(model, loss_fn, update(model), reduce=reduce).sharpness)
    return found[0], found[1], missed()


def two_networks(rank: int, by_hand: bool) -> tuple[Any, Any, int]:
    """A GAN whose two networks have a monitor each: one on both ranks, averaged by hand, or one GAN for each rank."""
    found = []
    for alone in (False, True):
        seed = 0 if by_hand else 10 * rank
        torch.manual_seed(seed)
        makes, judges = nn.Linear(6, 6).double(), mlp(1 + seed)
        rows = X if alone and by_hand else X[16 * rank : 16 * rank + 16]
        options = {"ranks": "alone"} if alone else {}
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (makes, judges)]
        monitors = [
            sharpkern.Monitor(model, optimizer, **options)
            for model, optimizer in zip((makes, judges), optimizers, strict=True)
        ]
        score = lambda x, judges=judges: judges(x)[:, 0].mean()
        for _ in range(2):
            made = makes(rows).detach()
            losses = [
                lambda rows=rows, makes=makes, score=score: -score(torch.tanh(makes(rows))),
                lambda rows=rows, made=made, score=score: score(torch.tanh(made)) - score(torch.tanh(rows)),
            ]
            for loss_fn, model, optimizer, monitor in zip(losses, (makes, judges), optimizers, monitors, strict=True):
                optimizer.zero_grad()
                loss_fn().backward()
                if by_hand and not alone:
                    averaged(model)
                monitor(loss_fn)
                optimizer.step()
        found.append([record.measurement.critical_lr for monitor in monitors for record in monitor.history])
    return found[0], found[1], missed()


def no_update_on_one(rank: int) -> tuple[Any, Any, int]:
    """Steps that are measured, and those expected, where one rank's run begins with a learning rate of 0."""
    model = mlp(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (1 - rank))
    monitor = sharpkern.Monitor(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        whole(model).backward()
        monitor(partial(whole, model))
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
    return [record.step for record in monitor.history], [0, 1, 2][rank:], missed()


OWN = {
    "seeds": partial(own_runs, seed=1),
    "learning rates": partial(own_runs, faster=1),
    "batches": partial(own_runs, seed=1, rows=1),
    "the same": own_runs,
    "other steps": partial(own_runs, seed=1, rarer=1),
    "the same at other steps": partial(own_runs, rarer=1),
    "adversaries": adversaries,
    "a GAN each": partial(two_networks, by_hand=False),
    "no update on one": no_update_on_one,
}


def impatient() -> None:
    settling._PATIENCE, settling._LITTLE_PATIENCE = 1.0, 0.2


def one_measures(rank: int) -> tuple[list[float], list[type], list[str], int]:
    """How long the first of two ranks measures, of two models twice each, what it is told, and how often it waited."""
    impatient()
    waited = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model in [mlp(0), mlp(1)] if rank == 0 else []:
            whole(model).backward()
            for _ in range(2):
                started = time.monotonic()
                sharpkern.critical_sharpness(model, partial(whole, model), update(model))
                waited.append(time.monotonic() - started)
    distributed.barrier()
    return waited, [one.category for one in caught], [str(one.message) for one in caught], missed()


def told_to_be_alone(rank: int) -> tuple[list[float], list[str], int]:
    """Half of one model's data, measured by the first of two ranks, which is told to be by itself."""
    before, found = missed(), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for options in ({"ranks": "alone"}, {"reduce": itself}) if rank == 0 else ():
            model = mlp()
            half(model, rank).backward()
            measured = sharpkern.critical_sharpness(model, partial(half, model, rank), update(model), **options)
            found.append(measured.sharpness)
    distributed.barrier()
    return found, [str(one.message) for one in caught], missed() - before


def once_together(rank: int) -> tuple[list[float], list[str], str]:
    """A model of all ranks, measured by all, by one of them, by all again, and by all with options of their own."""
    impatient()
    model = mlp()
    loss_fn = partial(half, model, rank)
    loss_fn().backward()
    averaged(model)
    monitor = sharpkern.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1))
    monitor(loss_fn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if rank == 0:
            monitor(loss_fn)
    distributed.barrier()
    # What that one has counted and learned meanwhile must not part it from the others.
    for _ in range(3):
        monitor(loss_fn)
    found = [record.measurement.sharpness for record in monitor.history]
    measure = partial(sharpkern.critical_sharpness, model, loss_fn, update(model), rtol=0.01 * (1 + rank))
    return found, [str(one.message) for one in caught], told(measure)


def no_gradients(rank: int) -> tuple[float, list[type], str]:
    """λ_max where the weights are the same and nothing else is known, and what is told."""
    model = mlp()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = sharpkern.hessian_sharpness(model, partial(half, model, rank)).value
    return found, [one.category for one in caught], str(caught[0].message)


# What cannot be measured.


def not_averaged(rank: int, make: Optimizer) -> list[str]:
    """Every measure along updates of each rank's own rows. Adam's first ones have one norm, whatever the gradient."""
    model = mlp()
    loss_fn = partial(half, model, rank)
    loss_fn().backward()
    direction = update(model, make)
    reduced = partial(sharpkern.critical_sharpness, model, loss_fn, direction, reduce=mean)
    monitor = sharpkern.Monitor(model, make(model.parameters(), lr=0.1))
    others = [partial(measure, model, loss_fn, direction) for name, measure in MEASURES.items() if name != "λ_max"]
    return [told(job) for job in (reduced, partial(monitor, loss_fn), *others)]


class Summed(torch.autograd.Function):
    """The sum over the ranks."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return 2 * mean(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient


class Part(nn.Module):
    """This rank's half of a hidden layer."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        first, _, last = mlp()
        mine = slice(6 * rank, 6 * rank + 6)
        self.first = nn.Parameter(first.weight.detach()[mine].clone())
        self.last = nn.Parameter(last.weight.detach()[:, mine].clone())

    def forward(self, x: Tensor) -> Tensor:
        return Summed.apply(torch.tanh(x @ self.first.T) @ self.last.T)


class Experts(nn.Module):
    """A layer that all ranks have, and one that is this rank's own and gets the rows of all."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.first, self.own = rank, mlp()[0], mlp(1 + rank)[2]

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        everywhere = [torch.zeros_like(hidden) for _ in range(2)]
        distributed.all_gather(everywhere, hidden.detach())
        everywhere[self.rank] = hidden
        return Summed.apply(self.own(torch.stack(everywhere)))[self.rank]


def by_parts(rank: int, make: Callable[[int], nn.Module], loss_of: Callable[..., Tensor]) -> list[str]:
    """A model that is split by hand, with and without a function that makes one loss of all."""
    model = make(rank)
    loss_fn = partial(loss_of, model)
    loss_fn().backward()
    direction = update(model)
    return [
        told(partial(sharpkern.critical_sharpness, model, loss_fn, direction, reduce=reduce))
        for reduce in (None, mean, itself)
    ]


def experts(rank: int) -> list[str]:
    return by_parts(rank, Experts, partial(half, rank=rank))


def pipeline(rank: int) -> list[str]:
    """A stage on each rank; the last one has the loss."""
    layers = mlp()
    stage = layers[:2] if rank == 0 else layers[2:]

    def loss_fn(train: bool = False) -> Tensor:
        hidden = stage(X) if rank == 0 else torch.empty(32, 12).double()
        if rank == 0:
            distributed.send(hidden.detach(), 1)
            gradient = torch.empty_like(hidden)
            if train:
                distributed.recv(gradient, 1)
                hidden.backward(gradient)
            return torch.zeros(())
        distributed.recv(hidden, 0)
        loss = F.cross_entropy(stage(hidden.requires_grad_(train)), Y)
        if train:
            loss.backward()
            distributed.send(hidden.grad, 0)
        return loss

    def of_the_last(loss: Tensor) -> Tensor:
        loss = loss.detach().double()
        distributed.broadcast(loss, 1)
        return loss

    loss_fn(train=True)
    direction = update(stage)
    return [
        told(partial(sharpkern.critical_sharpness, stage, loss_fn, direction, reduce=reduce))
        for reduce in (None, of_the_last, itself)
    ]


SPLIT = "ValueError: model must be whole on every rank, got |θ|² = "
NOT_REDUCED = "ValueError: reduce must return the same loss on all ranks that work together, got"
UNLIKE = "ValueError: direction must be the same on every rank, got |Δθ|² = "
ERRORS = {
    "not averaged, SGD": (partial(not_averaged, make=torch.optim.SGD), UNLIKE),
    "not averaged, Adam": (partial(not_averaged, make=torch.optim.Adam), UNLIKE),
    "tensor parallel": (partial(by_parts, make=Part, loss_of=whole), SPLIT),
    "experts": (experts, SPLIT),
    "pipeline": (pipeline, SPLIT),
}


# One rank fails.


def trip() -> Any:
    raise ArithmeticError("tripped")


def failures(rank: int, wrap: Wrap, inner: bool = False) -> dict[str, str]:
    """How every measure ends where rank 1 fails in binding, in making the direction, or in the closure."""
    said = {}

    def note(name: str, job: Callable[[nn.Module, Loss, sharpkern.Direction], object], where: str) -> None:
        model, other = mlp(), mlp()
        # Which a wrapper sends from rank 0 to the others at the start of a pass.
        model.register_buffer("unused", torch.ones(1))
        wrapper = wrap(model)

        def loss_fn() -> Tensor:
            return trip() if rank == 1 and where == "closure" else half(wrapper, rank)

        half(wrapper, rank).backward()
        averaged(model)
        whole(other).backward()
        direction = update(other if rank == 1 and where == "bind" else model)
        said[name] = told(partial(job, model if inner else wrapper, loss_fn, direction))

    def monitored(model: nn.Module, loss_fn: Loss, direction: sharpkern.Direction) -> object:
        monitor = sharpkern.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1))
        return monitor(loss_fn, direction=trip if rank == 1 else lambda: direction)

    note("direction", monitored, "direction")
    for name, measure in MEASURES.items():
        note(f"{name}, closure", measure, "closure")
        if name != "λ_max":
            note(f"{name}, bind", measure, "bind")
    if wrap is DistributedDataParallel:
        note("|g|²", lambda m, f, _: sharpkern.gradient_direction(m, [f]), "closure")
    return said


FAILURES = {
    "by hand": partial(failures, wrap=nn.Sequential),
    "wrapped": partial(failures, wrap=DistributedDataParallel),
    "inside of a wrapper": partial(failures, wrap=DistributedDataParallel, inner=True),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found, in every job."""
    jobs = {
        "loops": loops,
        "own mean": own_mean,
        "no gradients": no_gradients,
        "a GAN by hand": partial(two_networks, by_hand=True),
        "told to be alone": told_to_be_alone,
        **{f"values: {name}": job for name, job in VALUES.items()},
        **{f"own: {name}": job for name, job in OWN.items()},
        **{f"errors: {name}": job for name, (job, _) in ERRORS.items()},
        **{f"failures: {name}": job for name, job in FAILURES.items()},
        # These have ranks wait in vain.
        "one measures": one_measures,
        "once together": once_together,
    }
    return on_ranks(jobs, 2, tmp_path_factory.mktemp("two"), seconds=300)


def test_a_loop_that_averages_its_gradients_by_hand_is_measured_on_the_whole_batch(two) -> None:
    found = [rank["loops"] for rank in two]
    assert isinstance(found[0], list), found[0]
    for measured, unmeasured, alone in found:
        assert measured[0] == pytest.approx(alone[0], rel=1e-6)
        assert measured[1] == measured[2]
        assert torch.equal(measured[3], unmeasured[3])
    assert found[0][0][:3] == found[1][0][:3]


@pytest.mark.parametrize("name", VALUES)
def test_ranks_of_one_model_give_what_one_process_gives(two, name) -> None:
    found = [rank[f"values: {name}"] for rank in two]
    assert isinstance(found[0], dict), found[0]
    for measure, (here, alone) in found[0].items():
        assert here == pytest.approx(alone, rel=1e-4), measure
    assert [here for here, _ in found[0].values()] == [here for here, _ in found[1].values()]


def test_both_networks_of_a_gan_are_measured_on_all_rows(two) -> None:
    found = [rank["a GAN by hand"] for rank in two]
    assert isinstance(found[0], tuple), found[0]
    assert len(found[0][0]) == 4
    assert found[0][0] == pytest.approx(found[0][1], rel=1e-5)
    assert found[0][0] == found[1][0]


def test_a_rank_that_is_told_to_be_alone_waits_for_nobody(two) -> None:
    found = two[0]["told to be alone"]
    assert isinstance(found, tuple), found
    (told, reduced), messages, num_missed = found
    assert told == reduced
    assert (messages, num_missed) == ([], 0)


def test_a_mean_of_the_callers_own_is_taken(two) -> None:
    found = [rank["own mean"] for rank in two]
    assert isinstance(found[0], tuple), found[0]
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx(found[0][1], rel=1e-6)


@pytest.mark.parametrize("name", OWN)
def test_ranks_with_runs_of_their_own_do_not_mix_nor_wait(two, name) -> None:
    found = [rank[f"own: {name}"] for rank in two]
    assert isinstance(found[0], tuple), found[0]
    for here, alone, num_missed in found:
        assert here == pytest.approx(alone, rel=1e-9)
        assert num_missed == 0
    same = found[0][0] == found[1][0]
    assert same == (name == "the same")


def test_one_rank_that_measures_waits_once_and_is_told_so(two) -> None:
    found = two[0]["one measures"]
    assert isinstance(found, tuple), found
    waited, categories, messages, num_missed = found
    assert categories == [sharpkern.UncheckedWarning] * 2
    assert messages[0].startswith("1 of 2 ranks measure, so that the ranks could not be compared: each takes its own")
    assert waited[0] >= 1
    assert waited[2] >= 0.2
    assert num_missed == 2


def test_ranks_that_were_together_need_not_stay_so(two) -> None:
    first, other = (rank["once together"] for rank in two)
    assert isinstance(first, tuple), first
    together, alone, *again = first[0]
    assert other[0] == [together, *again]
    assert again == pytest.approx([together] * 3, rel=0.01)
    assert alone != pytest.approx(together, rel=0.01)
    assert first[1][0].startswith("1 of 2 ranks measure, so that the ranks could not be compared")
    assert first[2] == other[2]
    assert first[2].startswith("ValueError: ranks that train one model must measure alike")


def test_without_gradients_each_rank_takes_its_own_hessian_and_is_told_so(two) -> None:
    found = [rank["no gradients"] for rank in two]
    assert isinstance(found[0], tuple), found[0]
    assert found[0][0] != found[1][0]
    for _, categories, message in found:
        assert categories == [sharpkern.UncheckedWarning]
        assert message.startswith("the ranks hold the same weights, and no gradients tell whether they train one model")


@pytest.mark.parametrize("name", ERRORS)
def test_what_ranks_cannot_measure_is_refused_on_all_of_them(two, name) -> None:
    found = [rank[f"errors: {name}"] for rank in two]
    assert isinstance(found[0], list), found[0]
    for said in found:
        for message in said:
            assert message.startswith((ERRORS[name][1], NOT_REDUCED))
            assert not message.startswith(SPLIT) or "pass ranks=sharpkern.Ranks(split=group)" in message
            assert not message.startswith(UNLIKE) or "pass ranks='alone' where each rank" in message
            assert not message.endswith("(late)")


@pytest.mark.parametrize("name", FAILURES)
def test_where_one_rank_fails_no_other_waits(two, name) -> None:
    told, own = (rank[f"failures: {name}"] for rank in two)
    assert isinstance(told, dict), told
    assert len(told) == len(own) >= 10
    for case in told:
        kind = "ValueError: direction must belong to the model" if case.endswith("bind") else "ArithmeticError: tripped"
        assert own[case].startswith(kind), case
        assert told[case].startswith("RankError: the measurement failed on 1 of 2 ranks, not on this one"), case
        assert not (own[case] + told[case]).endswith("(late)"), case


# Judged without ranks.

FACTS = Facts(theta_sq=4.0, along=0.5, norm_sq=1.0, loss=1.0, plan="λ_c")


def verdict(*ranks: dict[str, Any]) -> dict[str, Any]:
    return dict(judged([asdict(FACTS) | one for one in ranks], len(ranks)))


def test_ranks_without_an_update_are_waited_for_no_longer() -> None:
    no_update = {"failure": KINDS[0]}
    assert judged([{"ready": True}, no_update], 2) == {"together": None, "mean": False}
    assert judged([asdict(FACTS), no_update], 2) == {"together": None, "mean": False}
    # Ranks that train one model would have none together.
    assert judged([asdict(FACTS) | {"loss": None}, no_update], 2)["warning"].startswith("1 of 2 ranks measure")
    assert judged([asdict(FACTS), no_update, {"failure": KINDS[-1]}], 3) == {"failures": [1, 0, 0, 1]}


def test_a_part_of_the_ranks_that_trains_one_model_is_told_to_say_so() -> None:
    one, other = {"theta_sq": 4.0}, {"theta_sq": 5.0}
    found = verdict(one, one | {"loss": 2.0}, other, other | {"loss": 3.0})
    assert found["error"].startswith("model must say which ranks it is trained on, got 2 of 4 ranks with the same")
    assert "pass ranks=sharpkern.Ranks(group)" in found["error"]
    # Groups that reduce the loss among themselves.
    own = {"reduces": True, "talks": True}
    assert "error" not in verdict(one | own, one | own, other | own | {"loss": 3.0}, other | own | {"loss": 3.0})


def test_a_sweep_over_seeds_and_learning_rates_is_of_runs_of_their_own() -> None:
    ranks = [{"theta_sq": theta, "loss": theta, "plan": f"{lr}"} for theta in (4.0, 5.0) for lr in (0.1, 0.2)]
    assert verdict(*ranks) == {"together": False, "mean": False}
    # The same loss at the first step, from a head of zeros.
    assert verdict({}, {"theta_sq": 5.0}) == {"together": False, "mean": False}


def test_losses_that_no_two_ranks_share_are_not_reduced() -> None:
    own = {"reduces": True, "talks": True}
    assert verdict(own, own | {"loss": 2.0})["error"].startswith("reduce must return the same loss on all ranks")


def test_nan_is_one_loss_as_another() -> None:
    assert verdict({"loss": float("nan")}, {"loss": float("nan")}) == {"together": None, "mean": True}
    assert verdict({"loss": float("nan")}, {}) == {"together": True, "mean": True}
