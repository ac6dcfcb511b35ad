"""FSDP2, HSDP and tensor parallelism: every rank works on its shards, and all give the whole batch's answer."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sharpkern
from sharpkern.distributed.lockstep import Lockstep
from sharpkern.engines import session
from tests.helpers.models import MLP, Block
from tests.helpers.parallel import (
    FAILING,
    check_values,
    curves_in_float32,
    gpt,
    here_and_alone,
    loss_of,
    mine,
    numbers,
    one_rank_fails,
    peaks,
    run_of_micro_batches,
    tokens,
    train,
    untouched,
)
from tests.helpers.processes import on_ranks


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Shard a GPT the usual way: each block, and the rest with the root."""
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def sharded_together(model: nn.Module) -> nn.Module:
    """The norm and the last block gathered at once."""
    fully_shard(model.blocks[0])
    fully_shard([model.blocks[1], model.norm])
    return fully_shard(model)


def hybrid(model: nn.Module, shape: tuple[int, int]) -> nn.Module:
    return shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))


def compiled_blocks(model: nn.Module) -> nn.Module:
    # Dynamo asks every tensor for its gradient.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    model = shard(model)
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(backend="aot_eager")
    return model


def checkpointed_blocks(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    return shard(model)


def compiled_data_parallel(model: nn.Module) -> nn.Module:
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    return torch.compile(nn.parallel.DistributedDataParallel(model), backend="aot_eager")


def in_tensor_parallel(rank: int) -> list[tuple[str, float, float]]:
    """The same batch on every rank, each layer's outputs or inputs spread over the ranks, the norm replicated."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 16, generator=generator), torch.randint(0, 10, (8,), generator=generator)
    found = []
    for parallel in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 10)).double()
        if parallel:
            mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
            parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        loss_fn = lambda model=model: F.cross_entropy(model(x.double()), y)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        train(model, optimizer, loss_fn, steps=3)
        found.append(numbers(model, optimizer, loss_fn))
    return [(name, found[0][name], found[1][name]) for name in found[0]]


VALUES: dict[str, Callable[[int], list[tuple[str, float, float]]]] = {
    "by default": partial(here_and_alone, prepare=shard, everything=True),
    "resharded": partial(here_and_alone, prepare=partial(shard, reshard_after_forward=True), optimizer="SGD"),
    "kept": partial(here_and_alone, prepare=partial(shard, reshard_after_forward=False), optimizer="AdamW, fused"),
    "elementwise": partial(here_and_alone, prepare=shard, optimizer="NAdam"),
    "offloaded": partial(here_and_alone, prepare=partial(shard, offload_policy=CPUOffloadPolicy(pin_memory=False))),
    "hybrid, 1 x 2": partial(here_and_alone, prepare=partial(hybrid, shape=(1, 2))),
    "hybrid, 2 x 1": partial(here_and_alone, prepare=partial(hybrid, shape=(2, 1))),
    "compiled": partial(here_and_alone, prepare=compiled_blocks),
    "data parallel, compiled": partial(here_and_alone, prepare=compiled_data_parallel),
    "data parallel": partial(here_and_alone, prepare=nn.parallel.DistributedDataParallel, everything=True),
    "curves in float32": partial(curves_in_float32, prepare=shard),
    "curves in float32, data parallel": partial(curves_in_float32, prepare=nn.parallel.DistributedDataParallel),
    "tensor parallel": in_tensor_parallel,
}
VALUES_OF_THREE = {"by default": partial(here_and_alone, prepare=shard), "tensor parallel": in_tensor_parallel}


def whole_matrices(rank: int) -> tuple[float, float, float]:
    """|Δθ|² and slope of an optimizer that multiplies whole matrices, and |Δθ|² of the step that it then takes."""
    model = shard(gpt(dtype=torch.float32))
    loss_fn = partial(loss_of, model, mine(tokens()))
    optimizer = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=1e-2)
    train(model, optimizer, loss_fn, steps=1)
    direction = sharpkern.Direction.from_optimizer(optimizer)
    measured = sharpkern.critical_sharpness(model, loss_fn, direction)
    assert measured.status == "converged", measured
    before = {p: p.detach().clone() for p in direction.parameters}
    optimizer.step()
    step = sharpkern.Direction.between(before, {p: p for p in before}, lr=1e-2)
    return direction.norm_sq, direction.slope, step.norm_sq


def zeros_on_one_rank(rank: int) -> tuple[str, float | None, float]:
    """What is said of gradients of zero on all ranks, and the slope where one rank has another, along which it is 0."""
    model = shard(gpt(dtype=torch.float32))
    loss_fn = partial(loss_of, model, mine(tokens()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    train(model, optimizer, loss_fn, steps=1)
    optimizer.zero_grad(set_to_none=False)
    try:
        sharpkern.Direction.from_optimizer(optimizer)
        told = "nothing"
    except sharpkern.NoUpdateError as error:
        told = str(error)
    if rank == 1:
        weight = model.blocks[0].qkv.weight
        weight.grad.to_local()[0, 0] = 0.5
        optimizer.state[weight]["momentum_buffer"].to_local()[0, 0] = -1.0
    direction = sharpkern.Direction.from_optimizer(optimizer)
    return told, direction.slope, direction.norm_sq


def halves(rank: int) -> list[float]:
    """|Δθ|² and slope of one optimizer, and of two that have one half of the parameters each."""
    model = shard(gpt(dtype=torch.float32))
    parameters = list(model.parameters())
    train(model, torch.optim.SGD(parameters, lr=0.1), partial(loss_of, model, mine(tokens())), steps=0)
    middle = len(parameters) // 2
    both = [torch.optim.NAdam(half, lr=1e-2) for half in (parameters[:middle], parameters[middle:])]
    directions = [sharpkern.Direction.from_optimizer(one) for one in (torch.optim.NAdam(parameters, lr=1e-2), both)]
    return [number for direction in directions for number in (direction.norm_sq, direction.slope)]


def mixed_precision(rank: int) -> tuple[sharpkern.Measurement, list[float], int]:
    """A measurement of fp32 shards that compute in bf16, and the losses of whole copies at its step sizes."""
    model = shard(gpt(dtype=torch.float32), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    rows = mine(tokens())
    loss_fn = lambda: F.cross_entropy(model(rows[:, :-1]).float().flatten(0, 1), rows[:, 1:].flatten())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, loss_fn, steps=3)
    direction = sharpkern.Direction.from_optimizer(optimizer)
    measured = sharpkern.critical_sharpness(model, loss_fn, direction)
    moved = dict(zip(direction.parameters, direction.tensors, strict=True))
    losses = []
    for eta, _ in measured.probes:
        whole = gpt(dtype=torch.float32)
        for copy, parameter in zip(whole.parameters(), model.parameters(), strict=True):
            delta = DTensor.from_local(
                moved[parameter],
                parameter.device_mesh,
                parameter.placements,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            copy.data.copy_((parameter - eta * delta).full_tensor())
        whole.bfloat16()
        with torch.no_grad():
            logits = whole(tokens()[:, :-1]).float()
            losses.append(float(F.cross_entropy(logits.flatten(0, 1), tokens()[:, 1:].flatten())))
    return measured, losses, sum(parameter.dtype == torch.float32 for parameter in direction.parameters)


def stale_gathers(rank: int) -> dict[str, float | str]:
    """λ_c after a pass without gradients, which leaves the root gathered, with and without the cure."""
    found = {}
    for cured in (True, False):
        model = shard(gpt())
        loss_fn = partial(loss_of, model, mine(tokens()))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        train(model, optimizer, loss_fn, steps=3)
        direction = sharpkern.Direction.from_optimizer(optimizer)
        with torch.no_grad():
            loss_fn()
        kept = Lockstep._free
        if not cured:
            Lockstep._free = lambda self: setattr(self, "_begun", [])
        try:
            found["cured" if cured else "without"] = sharpkern.critical_sharpness(model, loss_fn, direction).sharpness
        except RuntimeError as error:
            found["cured" if cured else "without"] = str(error)
        finally:
            Lockstep._free = kept
    return found


RUNS = {
    "checkpointed": partial(untouched, prepare=checkpointed_blocks, steps=3, every=1),
    "compiled": partial(untouched, prepare=compiled_blocks, steps=3, every=1),
    "20 steps": partial(untouched, prepare=shard, steps=20, every=4),
    "kept gathered": partial(untouched, prepare=partial(shard, reshard_after_forward=False), steps=4, every=1),
    "in bf16": partial(
        untouched,
        prepare=partial(shard, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
        steps=4,
        every=2,
    ),
    "every call": partial(untouched, prepare=shard, steps=3, every=1, loop=run_of_micro_batches),
    "every call, data parallel": partial(
        untouched, prepare=nn.parallel.DistributedDataParallel, steps=3, every=1, loop=run_of_micro_batches
    ),
}


def data_parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def with_buffers(model: nn.Module) -> nn.Module:
    """Data parallel with a buffer, which each pass begins by sending from rank 0 to the others."""
    model.register_buffer("scale", torch.ones(1))
    return nn.parallel.DistributedDataParallel(model)


KEPT = partial(shard, reshard_after_forward=False)
FAILURES = {
    **{f"{place}": partial(one_rank_fails, prepare=shard, place=place) for place in ("before", "within", "after")},
    "kept gathered": partial(one_rank_fails, prepare=KEPT, place="within"),
    "micro-batches": partial(one_rank_fails, prepare=shard, place="between", num_batches=2),
    "micro-batches, kept gathered": partial(one_rank_fails, prepare=KEPT, place="between", num_batches=2),
    "within the first micro-batch": partial(one_rank_fails, prepare=shard, place="within", num_batches=2),
    "within the first micro-batch, kept gathered": partial(one_rank_fails, prepare=KEPT, place="within", num_batches=2),
    "within the first micro-batch, together": partial(
        one_rank_fails, prepare=sharded_together, place="within", num_batches=2
    ),
    "interrupt": partial(one_rank_fails, prepare=shard, place="within", kind="KeyboardInterrupt"),
    "memory": partial(one_rank_fails, prepare=shard, place="within", kind="OutOfMemoryError"),
    "data parallel": partial(one_rank_fails, prepare=data_parallel, place="within"),
    "first pass": partial(one_rank_fails, prepare=shard, place="within", call=1),
    "sharded together": partial(one_rank_fails, prepare=sharded_together, place="behind"),
    "sharded together, first pass": partial(one_rank_fails, prepare=sharded_together, place="behind", call=1),
    "buffers, before": partial(one_rank_fails, prepare=with_buffers, place="before"),
    "buffers, within": partial(one_rank_fails, prepare=with_buffers, place="within"),
    "buffers, micro-batches": partial(one_rank_fails, prepare=with_buffers, place="between", num_batches=2),
    "data parallel, memory": partial(one_rank_fails, prepare=data_parallel, place="within", kind="OutOfMemoryError"),
    **{
        f"{measure}, {way}": partial(one_rank_fails, prepare=prepare, place="within", measure=measure)
        for measure in [*FAILING][1:]
        for way, prepare in (("sharded", shard), ("data parallel", data_parallel))
    },
}


class Experts(nn.Module):
    """Two experts, of which a batch goes to one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))
        self.chosen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[self.chosen](x)


def experts_of_their_own(rank: int) -> list[float]:
    """λ_c where each rank's rows go to another expert, and that of both batches in one process."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 6).double(), torch.randint(0, 3, (12,))
    experts = Experts().double()
    model = nn.parallel.DistributedDataParallel(experts, find_unused_parameters=True)
    experts.chosen = rank

    def one(chosen: int) -> torch.Tensor:
        return F.cross_entropy(experts.experts[chosen](x[chosen::2]), y[chosen::2])

    loss_fn = lambda: F.cross_entropy(model(x[rank::2]), y[rank::2])
    loss_fn().backward()
    direction = sharpkern.Direction.from_gradients(model)
    together = sharpkern.critical_sharpness(model, loss_fn, direction, engine="virtual")
    alone = sharpkern.critical_sharpness(experts, lambda: 0.5 * (one(0) + one(1)), direction)
    return [together.sharpness, alone.sharpness]


def blind_on_one_rank(rank: int) -> tuple[str, float, float]:
    """The engine where one rank alone reads a weight out of the virtual engine's sight."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 16), torch.randint(0, 10, (12,))
    layers = MLP()
    model = nn.parallel.DistributedDataParallel(layers)

    def loss_fn() -> torch.Tensor:
        if rank == 1:
            layers[0].weight.data_ptr()
        return F.cross_entropy(model(mine(x)), mine(y))

    loss_fn().backward()
    direction = sharpkern.Direction.from_gradients(model)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        # Swapped memory is in every code's sight.
        patch.setattr(session, "may_swap", lambda *_: False)
        warnings.simplefilter("always")
        measured = sharpkern.critical_sharpness(model, loss_fn, direction)
    assert [warning.category for warning in caught] == [sharpkern.EngineFallbackWarning], caught
    alone = sharpkern.critical_sharpness(layers, lambda: F.cross_entropy(layers(x), y), direction)
    return measured.engine, measured.sharpness, alone.sharpness


def unlike(rank: int) -> list[str]:
    """What is said where the ranks do not hold one direction, and where one of them has none."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 16) * (1 + 9 * rank), torch.randint(0, 10, (12,))
    model = nn.parallel.DistributedDataParallel(MLP())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_fn = lambda: F.cross_entropy(model(x), y)
    told: list[str] = []
    with model.no_sync():
        loss_fn().backward()
    with refused(ValueError, told):
        sharpkern.critical_sharpness(model, loss_fn, sharpkern.Direction.from_optimizer(optimizer))
    with refused(ValueError, told):
        tasks = {"one": loss_fn, "two": loss_fn}
        sharpkern.relative_critical_sharpness(model, tasks, sharpkern.Direction.from_optimizer(optimizer))
    optimizer.zero_grad()
    loss_fn().backward()
    if rank == 1:
        next(model.parameters()).grad.fill_(torch.inf)
    monitor = sharpkern.Monitor(model, optimizer)
    assert monitor(loss_fn) is None
    told += [reason for _, reason in monitor.skipped]
    # A base loss is this rank's own, and the measurement's is the mean.
    optimizer.zero_grad()
    loss_fn().backward()
    direction = sharpkern.Direction.from_optimizer(optimizer)
    given = sharpkern.critical_sharpness(model, loss_fn, direction, base_loss=loss_fn())
    told.append(
        str(given.sharpness == pytest.approx(sharpkern.critical_sharpness(model, loss_fn, direction).sharpness))
    )
    return told


class Counting(nn.Module):
    """A layer whose buffer is a DTensor, replicated, and counts the passes."""

    def __init__(self) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        self.weight = nn.Parameter(distribute_tensor(torch.ones(4, 4, dtype=torch.float64), mesh, [Replicate()]))
        self.register_buffer("count", distribute_tensor(torch.ones(1), mesh, [Replicate()]))

    def forward(self) -> torch.Tensor:
        self.count.add_(1)
        return (self.weight.square() + self.weight).sum()


def counted(rank: int) -> list[float]:
    """A buffer that is a DTensor, before and after a measurement."""
    model = Counting()
    model().backward()
    before = float(model.count.to_local())
    sharpkern.critical_sharpness(model, model, sharpkern.Direction.from_gradients(model))
    return [before, float(model.count.to_local())]


def memory(rank: int) -> dict[str, int]:
    """Peak bytes of a pass and of a whole measurement, and what this rank holds of the parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))
    for layer in model:
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(model)
    return peaks(model)


@contextmanager
def refused(kind: type[Exception], told: list[str]) -> Iterator[None]:
    try:
        yield
    except kind as error:
        told.append(str(error))


def refusals(rank: int) -> list[str]:
    """What is said of what cannot be had."""
    told: list[str] = []
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    model = shard(gpt())
    loss_fn = partial(loss_of, model, mine(tokens()))
    loss_fn().backward()
    direction = sharpkern.Direction.from_gradients(model)
    with refused(sharpkern.EngineUnsupportedError, told):
        sharpkern.critical_sharpness(model, loss_fn, direction, engine="virtual")
    with refused(TypeError, told):
        sharpkern.hessian_sharpness(model, loss_fn)
    with refused(TypeError, told):
        sharpkern.directional_sharpness(model, loss_fn, direction, method="hvp")
    with refused(ValueError, told):
        sharpkern.Direction.from_tensors({"norm.weight": torch.ones(20).double()}, model)
    with refused(ValueError, told):
        sharpkern.Direction.between({"w": torch.ones(4)}, {"w": distribute_tensor(torch.ones(4), mesh)}, lr=1.0)
    sums = nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Partial()]))
    sums.grad = torch.ones_like(sums)
    with refused(TypeError, told):
        sharpkern.Direction.from_optimizer(torch.optim.SGD([sums], lr=0.1))
    return told


OTHERS = {
    "whole matrices": whole_matrices,
    "zeros": zeros_on_one_rank,
    "halves": halves,
    "mixed precision": mixed_precision,
    "stale gathers": stale_gathers,
    "experts": experts_of_their_own,
    "blind": blind_on_one_rank,
    "unlike": unlike,
    "counted": counted,
    "memory": memory,
    "refusals": refusals,
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found, in every job."""
    # Failures come last: should one leave a rank behind, the others are done.
    jobs = {
        f"{part}: {name}": job
        for part, jobs in (("values", VALUES), ("runs", RUNS), ("others", OTHERS), ("failures", FAILURES))
        for name, job in jobs.items()
    }
    return on_ranks(jobs, 2, tmp_path_factory.mktemp("two"), seconds=400)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(VALUES_OF_THREE, 3, tmp_path_factory.mktemp("three"), seconds=200)


@pytest.mark.parametrize("name", VALUES)
def test_two_ranks_give_what_one_process_gives(two, name) -> None:
    check_values([rank[f"values: {name}"] for rank in two])


@pytest.mark.long
@pytest.mark.parametrize("name", VALUES_OF_THREE)
def test_three_ranks_give_what_one_process_gives(three, name) -> None:
    check_values([rank[name] for rank in three])


def test_an_optimizer_of_whole_matrices_takes_the_step_that_its_copy_took(two) -> None:
    found = [rank["others: whole matrices"] for rank in two]
    assert isinstance(found[0], tuple), found[0]
    norm_sq, slope, norm_sq_of_step = found[0]
    assert norm_sq == pytest.approx(norm_sq_of_step, rel=1e-4)
    assert slope > 0
    assert found[1] == found[0]


def test_gradients_are_zero_only_where_they_are_on_all_ranks(two) -> None:
    (told, slope, norm_sq), other = (results["others: zeros"] for results in two)
    assert "all gradients are zero" in told
    assert (slope, norm_sq > 0) == (0, True)
    assert other == (told, slope, norm_sq)


def test_two_optimizers_of_shards_are_one_that_holds_the_parameters_of_both(two) -> None:
    norm_sq, slope, *of_both = two[0]["others: halves"]
    assert of_both == pytest.approx([norm_sq, slope], rel=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_the_run_is_bit_for_bit_what_it_would_have_been(two, name) -> None:
    assert [rank[f"runs: {name}"] for rank in two] == [True, True], two[0][f"runs: {name}"]


def test_shards_of_a_mixed_precision_policy_move_in_full_precision(two) -> None:
    found = [rank["others: mixed precision"] for rank in two]
    assert isinstance(found[0], tuple), found[0]
    measured, losses, num_fp32 = found[0]
    assert num_fp32 > 0
    assert measured.status in {"converged", "unresolved"}
    assert [loss for _, loss in measured.probes] == pytest.approx(losses, rel=5e-3)
    assert found[1][0].probes == measured.probes


def test_what_a_pass_leaves_gathered_would_hide_the_next_write(two) -> None:
    found = two[0]["others: stale gathers"]
    assert isinstance(found, dict), found
    plain = next(value for label, value, _ in two[0]["values: by default"] if label == "λ_c")
    assert found["cured"] == pytest.approx(plain, rel=1e-6)
    # The guards, which put the modules' attributes back, keep it from being wrong without a word.
    assert "mixed torch.Tensor and DTensor" in found["without"]


@pytest.mark.parametrize("name", FAILURES)
def test_where_one_rank_fails_all_are_told_and_the_run_goes_on(two, name) -> None:
    found = [rank[f"failures: {name}"] for rank in two]
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


def test_an_expert_that_has_tokens_on_another_rank_alone_is_no_obstacle(two) -> None:
    found = [rank["others: experts"] for rank in two]
    assert isinstance(found[0], list), found[0]
    assert found[0][0] == pytest.approx(found[0][1], rel=1e-5)
    assert found[0] == found[1]


def test_all_ranks_leave_an_engine_that_is_unable_on_one(two) -> None:
    found = [rank["others: blind"] for rank in two]
    assert isinstance(found[0], tuple), found[0]
    engine, together, alone = found[0]
    assert engine == "inplace"
    assert together == pytest.approx(alone, rel=1e-5)
    assert found[0] == found[1]


def test_ranks_that_do_not_hold_one_direction_are_told_so(two) -> None:
    for rank, other in ((0, 1), (1, 0)):
        told = two[rank]["others: unlike"]
        assert isinstance(told, list), told
        assert len(told) == 4, told
        for message in told[:2]:
            assert message.startswith("direction must be the same on every rank, got |Δθ|² = ")
        assert told[2].endswith("another rank has no update") == (rank == 0)
        assert told[3] == "True"
        assert two[other]["others: unlike"][0] != told[0]


def test_buffers_that_are_dtensors_are_put_back(two) -> None:
    assert [rank["others: counted"] for rank in two] == [[2.0, 2.0]] * 2


def test_no_rank_holds_more_than_its_shards_and_a_pass(two) -> None:
    found = two[0]["others: memory"]
    assert isinstance(found, dict), found
    # Δθ and the backup of θ, of this rank's shards; a thread of gloo may let go of a gathered layer late.
    assert found["measured"] <= found["plain"] + 2 * found["shards"] + 1.2 * found["layer"]
    assert found["measured"] < 2 * found["shards"] + 4 * found["layer"]


def test_what_cannot_be_had_is_refused_by_name(two) -> None:
    told = two[0]["others: refusals"]
    assert isinstance(told, list), told
    said = [
        "the model's parameters are DTensors, of which the forward pass reads gathered copies; use engine='auto'",
        "parameters must be plain tensors for Hessian-vector products, got DTensors",
        "parameters must be plain tensors for Hessian-vector products, got DTensors",
        "direction for 'norm.weight' must be a DTensor where the parameter is one, got Tensor for DTensor; use "
        "torch.distributed.tensor.distribute_tensor",
        "'w' must be a DTensor before and after or on neither side, got Tensor and DTensor",
        "parameter 0 of group 0 (shape [2]) must be sharded or replicated, got a DTensor placed as P",
    ]
    assert len(told) == len(said), told
    for message, start in zip(told, said, strict=True):
        assert message.startswith(start), message


@pytest.fixture(params=["cpu", "cuda"])
def one_rank(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device, and a process group of this process alone that communicates there."""
    backend = "gloo" if request.param == "cpu" else "nccl"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    yield torch.device(request.param)
    distributed.destroy_process_group()


ONE_RANK = pytest.mark.parametrize(
    "one_rank",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
    indirect=True,
)


@ONE_RANK
@pytest.mark.parametrize("policy", ["none", "bf16", "offload"])
def test_one_rank_alone_is_sharded_all_the_same(one_rank: torch.device, policy: str) -> None:
    options: dict[str, Any] = {"mesh": init_device_mesh(one_rank.type, (1,))}
    if policy == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    if policy == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=one_rank.type == "cuda")
    rows = tokens().to(one_rank)
    measured = []
    for prepare in (partial(shard, **options), lambda model: model):
        model = prepare(gpt(dtype=torch.float32).to(one_rank))
        loss_fn = lambda model=model: F.cross_entropy(model(rows[:, :-1]).float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, optimizer, loss_fn, steps=2)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        measured.append(sharpkern.critical_sharpness(model, loss_fn, sharpkern.Direction.from_optimizer(optimizer)))
        assert all(map(torch.equal, before, model.parameters()))
    assert measured[0].sharpness == pytest.approx(measured[1].sharpness, rel=0.05 if policy == "bf16" else 1e-4)
