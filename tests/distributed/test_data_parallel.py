"""Two processes under DistributedDataParallel: both give the whole batch's answer, and the run is not touched."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import sharpkern
from tests.helpers.processes import on_ranks

NUM_RANKS = 2
# DistributedDataParallel's own ways of going about a backward pass.
KINDS = {
    "plain": {},
    "unused parameters": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
    "gradients in buckets": {"gradient_as_bucket_view": True},
}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of all ranks; each rank has its own half."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(32, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (32,), generator=generator)


def shard(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, labels = batch()
    return inputs[rank::NUM_RANKS], labels[rank::NUM_RANKS]


def values(rank: int) -> dict[str, tuple[float, float]]:
    """Every measurement on the rank's shard, and the same on the whole batch without data parallelism."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    model = DistributedDataParallel(layers, gradient_as_bucket_view=True)
    (inputs, labels), (all_inputs, all_labels) = shard(rank), batch()
    loss_fn = lambda: F.cross_entropy(model(inputs), labels)
    whole = lambda: F.cross_entropy(model.module(all_inputs), all_labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
    optimizer.zero_grad()
    loss_fn().backward()
    update = sharpkern.Direction.from_optimizer(optimizer)
    gradient = sharpkern.Direction.from_gradients(model)
    preconditioned = sharpkern.Direction.from_gradients(model, optimizer)

    def each(m, f):
        return {
            "λ_max": sharpkern.hessian_sharpness(m, f, tol=1e-4).value,
            "λ_max of P^-1/2 H P^-1/2": sharpkern.hessian_sharpness(m, f, preconditioner=optimizer, tol=1e-4).value,
            "λ_dir of the gradient, hvp": sharpkern.directional_sharpness(m, f, gradient, method="hvp"),
            "λ_dir of the update, hvp": sharpkern.directional_sharpness(m, f, update, method="hvp"),
            "λ_dir of P⁻¹g, hvp": sharpkern.directional_sharpness(m, f, preconditioned, method="hvp"),
            "λ_dir of the update, forward": sharpkern.directional_sharpness(m, f, update),
            "λ_dir of the update, forward, chosen h": sharpkern.directional_sharpness(m, f, update, step_size=1e-3),
            "λ_c": sharpkern.critical_sharpness(m, f, update).sharpness,
            # Twice the same: their mean, and not what the second left in the reducer's buckets.
            "|g|² of batches": sharpkern.gradient_direction(m, [f, lambda: 3 * f()]).norm_sq,
            "|Δθ|² of batches": sharpkern.adamw_direction(m, [f, lambda: 3 * f()]).norm_sq,
        }

    here, there = each(model, loss_fn), each(model.module, whole)
    return {name: (float(here[name]), float(there[name])) for name in here}


def run(rank: int, kind: str, measured: bool, set_to_none: bool) -> list[torch.Tensor]:
    """Parameters, gradients and buffers after each step of a training loop."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({"first": nn.Linear(6, 12), "norm": nn.BatchNorm1d(12), "last": nn.Linear(12, 3)})
    if kind in {"unused parameters", "static graph"}:
        layers["unused"] = nn.Linear(6, 6)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers.double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers["last"](torch.tanh(self.layers["norm"](self.layers["first"](x))))

    # A bucket for each parameter.
    model = DistributedDataParallel(Model(), bucket_cap_mb=1e-4, **KINDS[kind])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs, labels = shard(rank)
    loss_fn = lambda: F.cross_entropy(model(inputs), labels)
    trace = []
    for _ in range(4):
        optimizer.zero_grad(set_to_none=set_to_none)
        if measured:
            sharpkern.hessian_sharpness(model, loss_fn, max_iter=3)
        loss = loss_fn()
        if measured:
            sharpkern.hessian_sharpness(model, loss_fn, max_iter=3)
        loss.backward()
        if measured:
            direction = sharpkern.Direction.from_optimizer(optimizer)
            sharpkern.hessian_sharpness(model, loss_fn, max_iter=3)
            sharpkern.directional_sharpness(model, loss_fn, direction, method="hvp")
            sharpkern.directional_sharpness(model, loss_fn, direction)
            sharpkern.gradient_direction(model, [loss_fn] * 2)
            sharpkern.adamw_direction(model, [loss_fn] * 2)
        trace += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        trace += [tensor.clone() for tensor in model.state_dict().values()]
    return trace


def untouched(rank: int, kind: str, set_to_none: bool) -> bool:
    with_it, without = (run(rank, kind, measured, set_to_none) for measured in (True, False))
    return len(with_it) == len(without) and all(map(torch.equal, with_it, without))


def stopped_and_taken_up(rank: int, folder: Path) -> tuple[list[float], list[float]]:
    """A sweep over each rank's own data in one go, and one that was stopped where one rank was a row ahead."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(6, 3).double())
    old, new = shard(rank)[0].split(8)
    loss = lambda x: (model(x) - x[:, :3].sin()).square().mean()

    def sweep(path: Path | None) -> list[float]:
        tasks, mix = {"old": old[:4], "new": new[:4]}, {"old": old[4:], "new": new[4:]}
        ratios, options = [0.0, 0.5, 1.0], {"batch_size": 4, "repeats": 1, "progress": False}
        found = sharpkern.mixture_sweep(model, tasks, mix, ratios, batch_loss=loss, path=path, **options)
        return [point.critical_lr for point in found.points]

    path = folder / "sweep.jsonl"
    through = sweep(path)
    own = path if rank == 0 else folder / "sweep.rank1.jsonl"
    own.write_text("".join(own.read_text().splitlines(keepends=True)[: 2 + rank]))
    distributed.barrier()
    return through, sweep(path)


JOBS = {
    "values": values,
    **{
        f"{kind}, {'fresh' if none else 'zeroed'} gradients": partial(untouched, kind=kind, set_to_none=none)
        for kind in KINDS
        for none in (True, False)
    },
}


def capped(rank: int) -> tuple[list[float], list[torch.Tensor]]:
    """Rates and weights of a run with a cap, whose ranks have data of their own."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=8.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    monitor = sharpkern.Monitor(model, optimizer, every=2)
    cap = sharpkern.LRCap(monitor, optimizer, peak=8.0, warm_steps=4)
    inputs, labels = shard(rank)
    loss_fn = lambda: F.cross_entropy(model(inputs), labels)
    for _ in range(8):
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        monitor(loss_fn, loss=loss)
        cap.step()
        optimizer.step()
        scheduler.step()
    return [one.lr for one in cap.history], [p.detach() for p in model.parameters()]


JOBS["capped"] = capped


def found_lr(rank: int) -> tuple[float, float, bool]:
    """The rate that two ranks find with halves of each batch, that of one process, and whether nothing was touched."""
    rates = []
    for parallel in (True, False):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
        model = DistributedDataParallel(layers) if parallel else layers
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        inputs, labels = shard(rank) if parallel else batch()
        # Halves of whole batches.
        batches = [*zip(inputs.split(len(inputs) // 2), labels.split(len(labels) // 2), strict=True)]
        loss_of = lambda one, model=model: F.cross_entropy(model(one[0]), one[1])
        loss_of(batches[0]).backward()
        optimizer.step()
        before = [t.clone() for p in model.parameters() for t in (p, p.grad, optimizer.state[p]["momentum_buffer"])]
        rates.append(sharpkern.find_lr(model, optimizer, batches, loss_of).lr)
        after = [t for p in model.parameters() for t in (p, p.grad, optimizer.state[p]["momentum_buffer"])]
        rates.append(all(map(torch.equal, before, after)))
    return rates[0], rates[2], rates[1] and rates[3]


JOBS["found lr"] = found_lr


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What each rank found."""
    folders = [tmp_path_factory.mktemp(name) for name in ("ranks", "sweep")]
    sweep = partial(stopped_and_taken_up, folder=folders[1])
    return on_ranks({**JOBS, "sweep": sweep}, NUM_RANKS, folders[0])


def test_all_ranks_agree_with_the_whole_batch(ranks) -> None:
    here, other = (rank["values"] for rank in ranks)
    assert isinstance(here, dict), here
    assert len(here) == 10
    for name, (value, whole) in here.items():
        assert value == other[name][0], name
        assert value == pytest.approx(whole, rel=1e-5), name


@pytest.mark.parametrize("name", [name for name in JOBS if name.endswith("gradients")])
def test_the_run_is_bit_for_bit_what_it_would_have_been(ranks, name) -> None:
    assert [rank[name] for rank in ranks] == [True] * NUM_RANKS, ranks[0][name]


def test_all_ranks_take_the_same_capped_rates(ranks) -> None:
    here, other = (rank["capped"] for rank in ranks)
    assert isinstance(here, tuple), here
    assert here[0] == other[0]
    assert max(here[0]) < 8.0
    assert all(map(torch.equal, here[1], other[1]))


def test_all_ranks_find_the_rate_that_one_process_finds(ranks) -> None:
    here, other = (rank["found lr"] for rank in ranks)
    assert isinstance(here, tuple), here
    assert here == other
    lr, alone, is_untouched = here
    assert lr == pytest.approx(alone, rel=1e-3)
    assert is_untouched


def test_a_sweep_goes_on_where_all_ranks_were(ranks) -> None:
    here, other = (rank["sweep"] for rank in ranks)
    assert isinstance(here, tuple), here
    through, taken_up = here
    assert through == taken_up == other[0] == other[1]
