"""FSDP1: every rank moves its pieces of the flat parameters, and all give the whole batch's answer."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import sharpkern
from tests.helpers.models import Block
from tests.helpers.parallel import OPTIMIZERS, gpt, loss_of, mine, one_rank_fails, peaks, tokens, train, untouched
from tests.helpers.processes import on_ranks

BF16 = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def flat(
    model: nn.Module, strategy: str = "FULL_SHARD", mesh: tuple[int, int] | None = None, **options: Any
) -> FullyShardedDataParallel:
    """Wrap each block and the whole."""
    warnings.filterwarnings("ignore", "The `NO_SHARD` sharding strategy is deprecated", FutureWarning)
    if mesh is not None:
        options["device_mesh"] = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard"))
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
        **{"use_orig_params": True, **options},
    )


def only(model: nn.Module, kind: type[nn.Module]) -> list[nn.Parameter]:
    return [p for module in model.modules() if isinstance(module, kind) for p in module.parameters(recurse=False)]


def numbers(
    model: nn.Module,
    inner: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[], torch.Tensor],
    more: bool,
) -> dict[str, float]:
    """What all ranks find, and one process."""
    update = sharpkern.Direction.from_optimizer(optimizer)
    measured = sharpkern.critical_sharpness(inner, loss_fn, update)
    assert measured.status == "converged", measured
    found = {"λ_c": measured.sharpness, "slope": measured.slope, "loss": measured.base_loss, "kept": measured.retained}
    if more:
        gradient = sharpkern.Direction.from_gradients(model)
        tasks = {"once": loss_fn, "twice": lambda: 2 * loss_fn()}
        blocks = {"norms": only(model, nn.LayerNorm), "head": list(model.parameters())[:1]}
        of_blocks = sharpkern.blockwise_critical_sharpness(model, loss_fn, update, blocks)
        found |= {
            "λ_c of the gradient": sharpkern.critical_sharpness(model, loss_fn, gradient).sharpness,
            "relative λ_c": sharpkern.relative_critical_sharpness(model, tasks, update)["twice"].sharpness,
            "loss along": float(sharpkern.losses_along(model, loss_fn, update, [1e-3, 1e-2])[1]),
            "λ_dir": float(sharpkern.directional_sharpness(model, loss_fn, update)),
            "λ_dir of the gradient": float(sharpkern.directional_sharpness(model, loss_fn, gradient)),
            **{f"λ_c of {name}": one.sharpness for name, one in of_blocks.items()},
        }
    return found


def here_and_alone(
    rank: int, optimizer: str = "AdamW", dtype: torch.dtype = torch.float64, inside: bool = False, **options: Any
) -> list[tuple[str, float, float]]:
    """Every number of this rank's pieces and rows, and of all rows in one process."""
    more = options.pop("more", False)
    # As many rows for each rank.
    rows = tokens()[: 6 - 6 % distributed.get_world_size()]
    found = []
    for alone in (False, True):
        whole = gpt(dtype=dtype)
        model = whole if alone else flat(whole, **options)
        loss_fn = partial(loss_of, model, rows if alone else mine(rows))
        stepper = OPTIMIZERS[optimizer](model.parameters())
        train(model, stepper, loss_fn, steps=3)
        # A pass without gradients leaves the outermost module gathered.
        with torch.no_grad():
            loss_fn()
        found.append(numbers(model, whole if inside else model, stepper, loss_fn, more))
    return [(name, found[0][name], found[1][name]) for name in found[1]]


VALUES: dict[str, Callable[[int], list[tuple[str, float, float]]]] = {
    f"{strategy}, {'original' if original else 'flat'}": partial(
        here_and_alone, strategy=strategy, use_orig_params=original, mesh=mesh
    )
    for original in (True, False)
    for strategy, mesh in {
        "FULL_SHARD": None,
        "SHARD_GRAD_OP": None,
        "NO_SHARD": None,
        "HYBRID_SHARD": (1, 2),
    }.items()
}
VALUES |= {
    "everything": partial(here_and_alone, more=True),
    "inside of the wrapper": partial(here_and_alone, inside=True),
    "inside of the wrapper, flat": partial(here_and_alone, inside=True, use_orig_params=False),
    "SGD": partial(here_and_alone, optimizer="SGD"),
    "no formula": partial(here_and_alone, optimizer="NAdam"),
    "float32": partial(here_and_alone, dtype=torch.float32),
}


def groups_of_their_own_rates(rank: int) -> list[tuple[str, float, float]]:
    """Of the first group, whose rate the others are taken by, not every rank has a piece."""
    found = []
    for alone in (False, True):
        model: nn.Module = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Tanh(), nn.Linear(2, 40)).double()
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).double()
        if not alone:
            model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
            x = mine(x)
        first, *others = model.parameters()
        groups = [{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.02}]
        optimizer = torch.optim.SGD(groups)
        (model(x) - 1).square().mean().backward()
        direction = sharpkern.Direction.from_optimizer(optimizer)
        loss_fn = lambda model=model, x=x: (model(x) - 1).square().mean()
        measured = sharpkern.critical_sharpness(model, loss_fn, direction)
        found.append({"λ_c": measured.sharpness, "lr": measured.lr})
    return [(name, found[0][name], found[1][name]) for name in found[0]]


def in_bf16(rank: int) -> list[list[float]]:
    """Losses along the update of FSDP1, and of FSDP2, which compute alike."""
    found = []
    for prepare in (
        partial(flat, mixed_precision=BF16),
        partial(flat, mixed_precision=BF16, strategy="NO_SHARD"),
        lambda model: fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)),
    ):
        model = prepare(gpt(dtype=torch.float32))
        rows = mine(tokens())
        loss_fn = lambda model=model, rows=rows: F.cross_entropy(
            model(rows[:, :-1]).float().flatten(0, 1), rows[:, 1:].flatten()
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        train(model, optimizer, loss_fn, steps=2)
        direction = sharpkern.Direction.from_optimizer(optimizer)
        found.append(sharpkern.losses_along(model, loss_fn, direction, [0.0, 0.01, 0.1]).tolist())
    return found


RUNS = {
    "original": partial(untouched, prepare=flat, steps=4, every=2),
    "flat": partial(untouched, prepare=partial(flat, use_orig_params=False), steps=3, every=1),
    "kept gathered": partial(untouched, prepare=partial(flat, strategy="SHARD_GRAD_OP"), steps=3, every=1),
    "whole": partial(untouched, prepare=partial(flat, strategy="NO_SHARD"), steps=3, every=1),
    "in bf16": partial(untouched, prepare=partial(flat, mixed_precision=BF16), steps=3, every=1),
    "whole, in bf16": partial(
        untouched, prepare=partial(flat, mixed_precision=BF16, strategy="NO_SHARD"), steps=3, every=1
    ),
}


def accumulated(rank: int, **options: Any) -> bool:
    """Whether gradients of two passes add up as ever where the first is measured before the second."""
    ends = []
    for measured in (True, False):
        model = flat(gpt(dtype=torch.float32), **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        first, second = (partial(loss_of, model, mine(tokens())[k::2]) for k in (0, 1))
        first().backward()
        if measured:
            direction = sharpkern.Direction.from_optimizer(optimizer)
            assert sharpkern.critical_sharpness(model, first, direction).status == "converged"
        second().backward()
        ends.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        optimizer.step()
        ends[-1] += [p.detach().clone() for p in model.parameters()]
    return all(map(torch.equal, *ends))


def a_part_alone(rank: int) -> bool:
    """Whether gradients stay where a pass is of a wrapper within, which does not make ready for it as the root does."""
    model = flat(gpt(dtype=torch.float32))
    loss_of(model, mine(tokens())).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    x = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(rank))
    direction = sharpkern.Direction.from_gradients(model).only("blocks.0")
    sharpkern.losses_along(model, lambda: model.module.blocks[0](x).square().mean(), direction, [0.1, 0.2])
    after = [p.grad for p in model.parameters() if p.grad is not None]
    return len(before) == len(after) and all(map(torch.equal, before, after))


RUNS["a part alone"] = a_part_alone
RUNS |= {
    f"accumulated, {name}": partial(accumulated, **options)
    for name, options in {
        "original": {},
        "flat": {"use_orig_params": False},
        "kept gathered": {"strategy": "SHARD_GRAD_OP"},
        "whole": {"strategy": "NO_SHARD"},
    }.items()
}
FLAT = partial(flat, use_orig_params=False)
KEPT = partial(flat, strategy="SHARD_GRAD_OP")
FAILURES = {
    **{f"{place}": partial(one_rank_fails, prepare=flat, place=place) for place in ("before", "within", "after")},
    "first pass": partial(one_rank_fails, prepare=flat, place="within", call=1),
    "flat": partial(one_rank_fails, prepare=FLAT, place="within"),
    "flat, before": partial(one_rank_fails, prepare=FLAT, place="before"),
    "kept gathered": partial(one_rank_fails, prepare=KEPT, place="within"),
    "micro-batches": partial(one_rank_fails, prepare=flat, place="between", num_batches=2),
    "micro-batches, kept gathered": partial(one_rank_fails, prepare=KEPT, place="between", num_batches=2),
    "interrupt": partial(one_rank_fails, prepare=flat, place="within", kind="KeyboardInterrupt"),
    "memory": partial(one_rank_fails, prepare=flat, place="within", kind="OutOfMemoryError"),
}


def memory(rank: int) -> dict[str, int]:
    """Peak bytes of a pass and of a whole measurement, and what this rank holds of the parameters."""
    torch.manual_seed(0)
    model = FullyShardedDataParallel(
        nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8))),
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )
    return peaks(model)


def refusals(rank: int) -> list[str]:
    """What is said of what cannot be had."""
    model = flat(gpt())
    loss_fn = partial(loss_of, model, mine(tokens()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, loss_fn, steps=1)
    direction = sharpkern.Direction.from_optimizer(optimizer)
    zeros = [torch.zeros_like(p) for p in model.parameters()]
    jobs: list[Callable[[], object]] = [
        lambda: sharpkern.critical_sharpness(model, loss_fn, direction, engine="virtual"),
        lambda: sharpkern.critical_sharpness(model, loss_fn, direction, ranks="alone"),
        lambda: sharpkern.hessian_sharpness(model, loss_fn),
        lambda: sharpkern.directional_sharpness(model, loss_fn, direction, method="gradient"),
        lambda: sharpkern.gradient_direction(model, [loss_fn]),
        lambda: sharpkern.critical_sharpness(model, loss_fn, direction.only([])),
        lambda: sharpkern.critical_sharpness(model.module, lambda: torch.zeros(()), direction),
    ]
    told = []
    for job in jobs:
        try:
            job()
            told.append("nothing")
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    for parameter, zero in zip(model.parameters(), zeros, strict=True):
        parameter.grad = zero
    # Which moves by its momentum.
    monitor = sharpkern.Monitor(model, optimizer)
    assert monitor(loss_fn) is None
    return [*told, *(reason for _, reason in monitor.skipped)]


REFUSED = [
    "EngineUnsupportedError: the model's parameters lie in flat tensors, of which the forward pass reads gathered",
    "ValueError: ranks must not be 'alone' where the model's parameters lie in flat tensors",
    "TypeError: parameters must be plain tensors for Hessian-vector products, got shards of FSDP1",
    "TypeError: parameters must be plain tensors for Hessian-vector products, got shards of FSDP1",
    "TypeError: model must be whole on every rank, or sharded by fully_shard, for gradients of its own losses",
    "NoUpdateError: direction must move some parameter, got all zeros, or gradients of zero, on all ranks",
    "TypeError: model must be the FullyShardedDataParallel wrapper around all of it, got what is inside of it",
    "direction must move some parameter, got all zeros, or gradients of zero, on all ranks",
]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    jobs = {
        **{f"values: {name}": job for name, job in VALUES.items()},
        "values: groups": groups_of_their_own_rates,
        "bf16": in_bf16,
        "memory": memory,
        "refusals": refusals,
    }
    return on_ranks(jobs, 2, tmp_path_factory.mktemp("two"), seconds=300)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    jobs = {f"runs: {name}": job for name, job in RUNS.items()}
    jobs |= {f"failures: {name}": job for name, job in FAILURES.items()}
    return on_ranks(jobs, 2, tmp_path_factory.mktemp("running"), seconds=300)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    hybrid = partial(here_and_alone, strategy="HYBRID_SHARD", mesh=(2, 2))
    jobs = {"original": hybrid, "flat": partial(hybrid, use_orig_params=False)}
    return on_ranks(jobs, 4, tmp_path_factory.mktemp("four"), seconds=200)


def check(ranks: list[Any]) -> None:
    assert isinstance(ranks[0], list), ranks[0]
    for name, here, alone in ranks[0]:
        assert here == pytest.approx(alone, rel=1e-5), name
    here = [[value for _, value, _ in rank] for rank in ranks]
    assert all(values == here[0] for values in here), "the ranks disagree"


@pytest.mark.parametrize("name", [*VALUES, "groups"])
def test_pieces_give_what_one_process_gives(two, name) -> None:
    check([rank[f"values: {name}"] for rank in two])


@pytest.mark.long
@pytest.mark.parametrize("name", ["original", "flat"])
def test_copies_of_shards_give_what_one_process_gives(four, name) -> None:
    check([rank[name] for rank in four])


def test_pieces_move_in_full_precision_where_passes_round_them(two) -> None:
    found = [rank["bf16"] for rank in two]
    assert not isinstance(found[0], str), found[0]
    pieces, whole, fsdp2 = found[0]
    assert pieces == pytest.approx(fsdp2, rel=2e-3)
    assert whole == pytest.approx(fsdp2, rel=2e-3)
    assert found[0] == found[1]


@pytest.mark.parametrize("name", RUNS)
def test_the_run_is_bit_for_bit_what_it_would_have_been(running, name) -> None:
    assert [rank[f"runs: {name}"] for rank in running] == [True, True], running[0][f"runs: {name}"]


@pytest.mark.parametrize("name", FAILURES)
def test_where_one_rank_fails_all_are_told_and_the_run_goes_on(running, name) -> None:
    found = [rank[f"failures: {name}"] for rank in running]
    assert isinstance(found[0], tuple), found[0]
    (told, collectives, same), (own, other_collectives, other_same) = found
    kind = FAILURES[name].keywords.get("kind", "ValueError")
    assert own == f"{kind}: tripped"
    if kind == "OutOfMemoryError":
        assert told == "OutOfMemoryError: out of memory on 1 of 2 ranks, not on this one"
    else:
        assert told == "RankError: the measurement failed on 1 of 2 ranks, not on this one; read there what happened"
    assert collectives == other_collectives
    assert same
    assert other_same


def test_no_rank_holds_more_than_its_pieces_and_a_pass(two) -> None:
    found = two[0]["memory"]
    assert isinstance(found, dict), found
    # Δθ and the backup of θ, of this rank's pieces; a thread of gloo may let go of a gathered layer late.
    assert found["measured"] <= found["plain"] + 2 * found["shards"] + 1.2 * found["layer"]
    assert found["shards"] == 4 * found["layer"]


def test_what_cannot_be_had_is_refused_by_name(two) -> None:
    told = two[0]["refusals"]
    assert isinstance(told, list), told
    assert len(told) == len(REFUSED)
    for message, start in zip(told, REFUSED, strict=True):
        assert message.startswith(start), message
