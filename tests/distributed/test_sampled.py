"""Two ranks sample their own micro-batches: one search for all, equal to one process that is given the same draws."""

import math
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import sharpkern
from sharpkern.search.sampled import SampledSearch, first_size
from tests.helpers.processes import on_ranks

NUM_RANKS, EACH = 2, 12
WEIGHTS = [1.0 + k % 3 for k in range(NUM_RANKS * EACH)]


def data() -> tuple[Tensor, Tensor]:
    """Micro-batches of all ranks."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_RANKS * EACH, 8, 6, generator=generator, dtype=torch.float64)
    return x, (2 * x[..., 0] + torch.randn(x.shape[:2], generator=generator)).long() % 3


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()


def loss_of(model: nn.Module, k: int) -> Tensor:
    x, y = data()
    return F.cross_entropy(model(x[k]), y[k])


def trained(
    model: nn.Module, numbers: range, share: float, *, averages: bool = False
) -> tuple[torch.optim.Optimizer, list[sharpkern.MicroBatch]]:
    """A few steps, and the gradient of one more."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        if step:
            optimizer.step()
        optimizer.zero_grad()
        parts = [sharpkern.MicroBatch(partial(loss_of, model, k)) for k in numbers]
        for k, part in zip(numbers, parts, strict=True):
            (part() * WEIGHTS[k] * share / sum(WEIGHTS)).backward()
        for parameter in model.parameters() if averages else ():
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= NUM_RANKS
    return optimizer, parts


def measured(rank: int, kind: str, **options: Any) -> list[Any]:
    """What a rank finds by a sample."""
    model: nn.Module = layers()
    if kind == "FSDP1":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    model = fully_shard(model) if kind == "FSDP2" else DistributedDataParallel(model) if kind == "DDP" else model
    numbers = range(rank * EACH, (rank + 1) * EACH)
    # Data parallelism takes the mean over the ranks.
    optimizer, parts = trained(model, numbers, NUM_RANKS, averages=kind in ("by hand", "named"))
    options |= {"ranks": sharpkern.Ranks()} if kind == "named" else {}
    weights = WEIGHTS[numbers.start : numbers.stop]
    monitor = sharpkern.Monitor(model, optimizer, sample="auto", engine="auto", **options)
    found = []
    for step in (0, 1):
        monitor.step = step
        m = monitor(parts, weights=weights)
        found.append((m.critical_lr, m.error, m.sample_size, m.num_micro_batches, m.base_loss, m.beta))
    return found


def blocks(rank: int, kind: str) -> list[tuple[float, ...]]:
    """λ_c of each layer by a sample, and of all micro-batches, on ranks whose micro-batches weigh differently."""
    model: nn.Module = fully_shard(layers()) if kind == "FSDP2" else DistributedDataParallel(layers())
    numbers = range(rank * EACH, (rank + 1) * EACH)
    optimizer, parts = trained(model, numbers, NUM_RANKS)
    direction = sharpkern.Direction.from_optimizer(optimizer)
    weights = WEIGHTS[numbers.start : numbers.stop]
    measure = partial(sharpkern.blockwise_critical_sharpness, model, parts, direction, weights=weights)
    found, whole = measure(sample=8, clip=1.0), measure(rtol=1e-4)
    return [(m.critical_lr, m.error, m.sample_size, whole[name].critical_lr) for name, m in found.items()]


def whole_where_ranks_share_a_batch(rank: int) -> tuple[int | None, list[str]]:
    parallel = nn.Linear(6, 6).double()
    parallelize_module(parallel, init_device_mesh("cpu", (NUM_RANKS,)), ColwiseParallel())
    parts = [lambda k=k: parallel(data()[0][k]).square().mean() for k in range(EACH)]
    for part in parts:
        (part() / EACH).backward()
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        m = sharpkern.critical_sharpness(parallel, parts, sharpkern.Direction.from_optimizer(optimizer), sample="auto")
    return m.sample_size, [str(one.message) for one in caught]


def unlike(rank: int) -> tuple[int | None, list[str]]:
    model = DistributedDataParallel(layers())
    optimizer, parts = trained(model, range(EACH), 1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        direction = sharpkern.Direction.from_optimizer(optimizer)
        m = sharpkern.critical_sharpness(model, parts[: EACH - rank], direction, sample="auto")
    return m.sample_size, [str(one.message) for one in caught]


KINDS = ("DDP", "FSDP1", "FSDP2", "by hand", "named")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    jobs: dict[str, Any] = {kind: partial(measured, kind=kind) for kind in KINDS}
    jobs |= {f"blocks, {kind}": partial(blocks, kind=kind) for kind in ("DDP", "FSDP2")}
    jobs |= {"tensor parallel": whole_where_ranks_share_a_batch, "unlike": unlike}
    return on_ranks(jobs, NUM_RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone() -> list[tuple[float, float, int]]:
    """One process with all micro-batches and the same draws, that evaluates by itself."""
    model = layers()
    num, memory, found = NUM_RANKS * EACH, None, []
    optimizer, _ = trained(model, range(num), 1.0)
    direction = sharpkern.Direction.from_optimizer(optimizer)
    theta, delta = [p.detach().clone() for p in direction.parameters], direction.tensors

    @torch.no_grad()
    def loss(k: int, eta: float) -> float:
        for parameter, t, d in zip(direction.parameters, theta, delta, strict=True):
            parameter.copy_(t - eta * d)
        value = float(loss_of(model, k))
        for parameter, t in zip(direction.parameters, theta, strict=True):
            parameter.copy_(t)
        return value

    for step in (0, 1):
        search = SampledSearch(
            direction.slope,
            [range(EACH), range(EACH, num)],
            first_size(num, "auto", 0.05, NUM_RANKS),
            base=[loss(k, 0.0) for k in range(num)],
            weights=WEIGHTS,
            noise=1e-14,
            norm_sq=direction.norm_sq,
            initial_lr=direction.lr,
            memory=memory,
            draw=float(step),
        )
        search.trust_base(is_exact=True)
        asking = search.ask()
        try:
            numbers, eta = next(asking)
            while True:
                numbers, eta = asking.send([loss(k, eta) for k in numbers])
        except StopIteration as stop:
            result = stop.value
        memory = result.found.memory
        found.append((result.found.critical_lr, result.found.error, result.size))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one_process(ranks, alone, kind: str) -> None:
    here, other = (rank[kind] for rank in ranks)
    assert isinstance(here, list), here
    assert here == other
    for (eta, error, size, num, base_loss, _), (own_eta, own_error, own_size) in zip(here, alone, strict=True):
        assert abs(math.log(eta / own_eta)) < 1e-6
        assert error == pytest.approx(own_error, rel=1e-3)
        assert (size, num) == (own_size, NUM_RANKS * EACH)
        assert math.isfinite(base_loss)


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_blocks_of_two_ranks_are_those_of_one_process(ranks, kind: str) -> None:
    here, other = (rank[f"blocks, {kind}"] for rank in ranks)
    assert isinstance(here, list), here
    assert here == other
    model, num = layers(), NUM_RANKS * EACH
    optimizer, parts = trained(model, range(num), 1.0)
    direction = sharpkern.Direction.from_optimizer(optimizer)
    alone = sharpkern.blockwise_critical_sharpness(model, parts, direction, weights=WEIGHTS, rtol=1e-4)
    assert len(here) == len(alone) == 2
    for (eta, error, size, whole), m in zip(here, alone.values(), strict=True):
        assert whole == pytest.approx(m.critical_lr, rel=1e-5)
        assert size == 8
        assert abs(math.log(eta / whole)) <= error


def test_what_cannot_be_sampled_is_measured_whole(ranks) -> None:
    for name, reason in {
        "tensor parallel": "ranks that split tensors hold the same micro-batches",
        "unlike": "ranks differ in the number of their micro-batches",
    }.items():
        for rank in ranks:
            size, told = rank[name]
            assert size is None
            assert any(reason in message for message in told), told
