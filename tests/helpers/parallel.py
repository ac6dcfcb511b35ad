"""A model, its training and its measurement on several ranks and in one process, for each way of sharding it."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.tensor import DTensor

import sharpkern
from sharpkern.distributed.sharding import local
from sharpkern.memory.counter import bytes_of, peak_bytes
from tests.helpers.models import GPT, Block

OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": partial(torch.optim.AdamW, lr=1e-2),
    "AdamW, fused": partial(torch.optim.AdamW, lr=1e-2, fused=True),
    # No closed form: one step on a copy.
    "NAdam": partial(torch.optim.NAdam, lr=1e-2),
}


def mine(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows."""
    return tensor[distributed.get_rank() :: distributed.get_world_size()]


def tokens() -> torch.Tensor:
    """Rows of all ranks."""
    return torch.randint(0, 128, (6, 17), generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def gpt(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> GPT:
    torch.manual_seed(0)
    # Three ranks divide hardly any dimension evenly.
    return GPT(vocabulary=130, width=20, layers=2, dropout=dropout).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Callable[[], torch.Tensor], steps: int) -> None:
    """Some steps, and the gradient of the next."""
    for _ in range(steps):
        model.zero_grad()
        loss_fn().backward()
        optimizer.step()
    model.zero_grad()
    loss_fn().backward()


def numbers(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Callable[[], torch.Tensor], *, everything: bool = False
) -> dict[str, float]:
    update = sharpkern.Direction.from_optimizer(optimizer)
    measured = sharpkern.critical_sharpness(model, loss_fn, update)
    assert measured.status == "converged", measured
    found = {
        "slope": update.slope,
        "|Δθ|²": update.norm_sq,
        "λ_c": measured.sharpness,
        "loss": measured.base_loss,
        "retained": measured.retained,
    }
    if everything:
        gradient = sharpkern.Direction.from_gradients(model)
        whitened = sharpkern.Direction.from_gradients(model, optimizer)
        tasks = {"twice": lambda: 2 * loss_fn()}
        found |= {
            "|g|²": gradient.norm_sq,
            "gᵀP⁻¹g": whitened.slope,
            "λ_c of the gradient": sharpkern.critical_sharpness(model, loss_fn, gradient).sharpness,
            "relative λ_c": sharpkern.relative_critical_sharpness(model, tasks, update)["twice"].sharpness,
            "loss along": float(sharpkern.losses_along(model, loss_fn, update, [1e-3, 1e-2])[1]),
            "λ_c of blocks": sum(
                m.sharpness for m in sharpkern.blockwise_critical_sharpness(model, loss_fn, update).values()
            ),
            "λ_dir": float(sharpkern.directional_sharpness(model, loss_fn, update)),
            "λ_c of a part": sharpkern.critical_sharpness(model, loss_fn, update.only(first_block(model))).sharpness,
            **of_micro_batches(model, loss_fn, update),
            "|g|² of batches": sharpkern.gradient_direction(model, [loss_fn, lambda: 3 * loss_fn()]).norm_sq,
            "|Δθ|² of batches": sharpkern.adamw_direction(model, [loss_fn, lambda: 3 * loss_fn()]).norm_sq,
        }
        before = {name: value.detach().clone() for name, value in model.state_dict().items()}
        optimizer.step()
        step = sharpkern.Direction.between(before, model, lr=1e-2)
        found["|Δθ|² of a step taken"] = step.norm_sq
        model.load_state_dict(before)
        found["λ_c of a step taken"] = sharpkern.critical_sharpness(model, loss_fn, step).sharpness
        by_name = {name: step_tensor(p) for name, p in model.named_parameters()}
        found["|Δθ|² by name"] = sharpkern.Direction.from_tensors(by_name, model).norm_sq
    return found


def first_block(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, Block))


def of_micro_batches(model: nn.Module, loss_fn: partial[torch.Tensor], update: sharpkern.Direction) -> dict[str, float]:
    """Measures of a step whose micro-batches are single rows, each of a weight of its own."""
    _, rows = loss_fn.args
    parts = [(partial(loss_of, model, row[None]), 1.0 + int(row.sum()) % 3) for row in rows]
    blocks = {"first": first_block(model)}
    return {
        "loss along, micro-batches": float(sharpkern.losses_along(model, parts, update, [1e-3, 1e-2])[1]),
        "λ_c of a block, micro-batches": sharpkern.blockwise_critical_sharpness(model, parts, update, blocks)[
            "first"
        ].sharpness,
        "λ_dir, micro-batches": float(sharpkern.directional_sharpness(model, parts, update)),
        "relative λ_c, micro-batches": sharpkern.relative_critical_sharpness(
            model, {"one": parts, "other": loss_fn}, update
        )["one"].sharpness,
    }


def step_tensor(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach() * 3


def here_and_alone(
    rank: int, prepare: Callable[[nn.Module], nn.Module], optimizer: str = "AdamW", everything: bool = False
) -> list[tuple[str, float, float]]:
    """Every number on this rank's rows with sharded parameters, and on all rows in one process."""
    found = []
    for model, rows in ((prepare(gpt()), mine(tokens())), (gpt(), tokens())):
        loss_fn = partial(loss_of, model, rows)
        stepper = OPTIMIZERS[optimizer](model.parameters())
        train(model, stepper, loss_fn, steps=3)
        found.append(numbers(model, stepper, loss_fn, everything=everything))
    return [(name, found[0][name], found[1][name]) for name in found[0]]


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Everything of a run that a measurement must not touch."""
    tensors: list[Any] = [torch.get_rng_state(), torch.tensor([random.random()])]
    for parameter in optimizer.param_groups[0]["params"]:
        gradient = [] if parameter.grad is None else [parameter.grad]
        tensors += [parameter, *gradient, *optimizer.state[parameter].values()]
    return [t.to_local().clone() if isinstance(t, DTensor) else t.clone() for t in map(torch.Tensor.detach, tensors)]


def curves_in_float32(rank: int, prepare: Callable[[nn.Module], nn.Module]) -> list[tuple[str, float, float]]:
    """Losses along an update, of micro-batches and of one closure, here and in one process."""
    found = []
    for model, rows in ((prepare(gpt(dtype=torch.float32)), mine(tokens())), (gpt(dtype=torch.float32), tokens())):
        loss_fn = partial(loss_of, model, rows)
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        train(model, optimizer, loss_fn, steps=1)
        update, etas = sharpkern.Direction.from_optimizer(optimizer), [0.0, 0.01, 0.1, 1.0]
        parts = [partial(loss_of, model, row[None]) for row in rows]
        of_part = update.only(first_block(model))
        for kind, closure, direction in (
            ("one", loss_fn, update),
            ("several", parts, update),
            ("a part", parts, of_part),
        ):
            losses = sharpkern.losses_along(model, closure, direction, etas).tolist()
            found.append({f"{kind} at {eta}": loss for eta, loss in zip(etas, losses, strict=True)})
    here, alone = ({k: v for one in half for k, v in one.items()} for half in (found[:3], found[3:]))
    return [(name, here[name], alone[name]) for name in here]


def every_call(model: nn.Module, optimizer: torch.optim.Optimizer, parts: list[sharpkern.MicroBatch]) -> None:
    """What can be measured of a step of micro-batches."""
    direction, block = sharpkern.Direction.from_optimizer(optimizer), first_block(model)
    sharpkern.losses_along(model, parts, direction, [0.0, 1e-3, 1e-2])
    sharpkern.critical_sharpness(model, parts, direction.only(block), rtol=0.1)
    assert sharpkern.critical_sharpness(model, parts, direction, sample=4, clip=1.0, rtol=0.2).sample_size == 4
    for sample in (None, 4):
        sharpkern.blockwise_critical_sharpness(
            model, parts, direction, {"first": block}, sample=sample, clip=1.0, rtol=0.2
        )


def run_of_micro_batches(
    prepare: Callable[[nn.Module], nn.Module], steps: int, every: int | None
) -> list[torch.Tensor]:
    """A training loop with dropout over micro-batches, its state at the end of every step; measured or not."""
    model = prepare(gpt(dropout=0.1, dtype=torch.float32))
    torch.manual_seed(distributed.get_rank())
    random.seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trace = []
    for step in range(steps):
        rows = mine(torch.randint(0, 128, (24, 17), generator=torch.Generator().manual_seed(step)))
        parts = [sharpkern.MicroBatch(partial(loss_of, model, two)) for two in rows.split(2)]
        optimizer.zero_grad()
        for part in parts:
            (part() / len(parts)).backward()
        if every is not None and step % every == 0:
            every_call(model, optimizer, parts)
        optimizer.step()
        trace += state_of(model, optimizer)
    return trace


def run(prepare: Callable[[nn.Module], nn.Module], steps: int, every: int | None) -> list[torch.Tensor]:
    """A training loop with dropout, each step on other rows, its state at the end of every step; measured or not."""
    model = prepare(gpt(dropout=0.1, dtype=torch.float32))
    torch.manual_seed(distributed.get_rank())
    random.seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = None if every is None else sharpkern.Monitor(model, optimizer, every=every)
    trace = []
    for step in range(steps):
        rows = mine(torch.randint(0, 128, (6, 17), generator=torch.Generator().manual_seed(step)))
        loss_fn = lambda rows=rows: F.cross_entropy(model(rows[:, :-1]).float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss_fn().backward()
        if monitor is not None:
            monitor(loss_fn)
        optimizer.step()
        trace += state_of(model, optimizer)
    if monitor is not None:
        assert len(monitor.history) == len(range(0, steps, every))
        assert {record.measurement.engine for record in monitor.history} == {"inplace"}
    return trace


def untouched(
    rank: int,
    prepare: Callable[[nn.Module], nn.Module],
    steps: int,
    every: int,
    loop: Callable[..., list[torch.Tensor]] = run,
) -> bool:
    with_it, without = (loop(prepare, steps, measured) for measured in (every, None))
    return len(with_it) == len(without) > steps and all(map(torch.equal, with_it, without))


RAISED = {"ValueError": ValueError, "KeyboardInterrupt": KeyboardInterrupt, "OutOfMemoryError": torch.OutOfMemoryError}


class Tripwire:
    """Raises on one rank, in one evaluation of a measurement, at one place of it."""

    def __init__(self, place: str, kind: str, rank: int, call: int, who: int = 1) -> None:
        self.place, self.kind, self.armed, self.call = place, kind, rank == who, call
        self.calls = 0

    def at(self, place: str) -> None:
        if self.armed and self.calls == self.call and self.place == place:
            raise RAISED[self.kind]("tripped")


FAILING: dict[str, Callable[..., object]] = {
    "λ_c": sharpkern.critical_sharpness,
    "losses": partial(sharpkern.losses_along, step_sizes=[0.0, 1e-3, 1e-2]),
    "losses of several": lambda model, loss_fn, direction: sharpkern.losses_along(
        model, [loss_fn] * 2, direction, [0.0, 1e-3, 1e-2]
    ),
    "blocks": sharpkern.blockwise_critical_sharpness,
    "sample": lambda model, loss_fn, direction: sharpkern.critical_sharpness(
        model, [loss_fn] * 8, direction, sample=4, clip=1.0
    ),
    "blocks of a sample": lambda model, loss_fn, direction: sharpkern.blockwise_critical_sharpness(
        model, [loss_fn] * 8, direction, sample=4, clip=1.0
    ),
}


def one_rank_fails(
    rank: int,
    prepare: Callable[[nn.Module], nn.Module],
    place: str,
    kind: str = "ValueError",
    num_batches: int = 1,
    call: int = 3,
    measure: str = "λ_c",
) -> tuple[str, int, bool]:
    """What a rank is told where rank 1 fails, its collectives until then, and whether the run then goes on as ever."""
    ends = []
    told, collectives = "", 0
    for fails in (True, False):
        model = prepare(gpt(dtype=torch.float32))
        rows = mine(tokens())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        train(model, optimizer, partial(loss_of, model, rows), steps=1)
        if fails:
            wire = Tripwire(place, kind, rank, call)
            second = [module for module in model.modules() if isinstance(module, Block)][1]
            hooks = [second.mlp.register_forward_pre_hook(lambda *_, wire=wire: wire.at("within"))]
            hooks.append(second.register_forward_hook(lambda *_, wire=wire: wire.at("behind")))

            def loss_fn(model=model, wire=wire, rows=rows) -> torch.Tensor:
                wire.calls += 1
                wire.at("before")
                losses = [loss_of(model, rows)]
                for _ in range(1, num_batches):
                    wire.at("between")
                    losses.append(loss_of(model, rows))
                wire.at("after")
                return torch.stack(losses).mean()

            direction = sharpkern.Direction.from_optimizer(optimizer)
            try:
                FAILING[measure](model, loss_fn, direction)
            except BaseException as error:
                told = f"{type(error).__name__}: {error}"
            for hook in hooks:
                hook.remove()
            collectives = distributed.group.WORLD._get_sequence_number_for_group()
        train(model, optimizer, partial(loss_of, model, rows), steps=3)
        ends.append(state_of(model, optimizer)[2:])
    return told, collectives, all(map(torch.equal, *ends))


def peaks(model: nn.Module) -> dict[str, int]:
    """Peak bytes of a pass and of a whole measurement of layers of 256 x 256, and what this rank holds of them."""
    x = torch.randn(2, 256)
    loss_fn = lambda: model(x).square().mean()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, loss_fn, steps=1)

    def plain() -> None:
        with torch.no_grad():
            loss_fn()

    def measure() -> None:
        direction = sharpkern.Direction.from_optimizer(optimizer)
        assert sharpkern.critical_sharpness(model, loss_fn, direction).status == "converged"

    plain()
    return {
        "plain": peak_bytes(plain),
        "measured": peak_bytes(measure),
        "shards": bytes_of(local(parameter) for parameter in model.parameters()),
        "layer": 256 * 256 * 4,
    }


def check_values(ranks: list[Any], rel: float = 1e-5) -> None:
    assert isinstance(ranks[0], list), ranks[0]
    for label, sharded, alone in ranks[0]:
        assert sharded == pytest.approx(alone, rel=rel), label
    sharded = [[value for _, value, _ in rank] for rank in ranks]
    assert all(values == sharded[0] for values in sharded), "the ranks disagree"
