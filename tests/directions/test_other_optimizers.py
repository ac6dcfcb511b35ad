"""Optimizers of other packages, and those whose step cannot be foreseen; what each way takes of memory."""

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lion_pytorch import Lion
from torch import Tensor, nn

import sharpkern
from sharpkern import Direction
from sharpkern.integrations.around_step import AroundStep
from sharpkern.memory.counter import bytes_of, peak_bytes

DOCS = Path(__file__).parents[2] / "docs" / "training-loop.md"
Build = Callable[[nn.Module], torch.optim.Optimizer]


def torchao(name: str) -> Build:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        with warnings.catch_warnings():
            # Of its own imports.
            warnings.simplefilter("ignore")
            package = pytest.importorskip("torchao.optim", reason="torchao is not installed")
        return getattr(package, name)(model.parameters(), lr=1e-2)

    return build


def adam_mini(model: nn.Module) -> torch.optim.Optimizer:
    package = pytest.importorskip("adam_mini", reason="adam-mini is not installed")
    return package.Adam_mini(model.named_parameters(), lr=1e-2, dim=64, n_heads=4, verbose=False)


def huggingface(**options: Any) -> Build:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        package = pytest.importorskip("transformers.optimization", reason="transformers is not installed")
        return package.Adafactor(model.parameters(), **options)

    return build


def collection(name: str, **options: Any) -> Build:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        package = pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed")
        made: torch.optim.Optimizer = getattr(package, name)(model.parameters(), lr=1e-2, **options)
        return made

    return build


def plain(kind: str) -> Build:
    if not hasattr(torch.optim, kind):
        return lambda model: pytest.skip(f"torch.optim.{kind} is of a later torch")
    return lambda model: getattr(torch.optim, kind)(model.parameters(), lr=1e-2)


ON_A_COPY = {
    "AdamW8bit": torchao("AdamW8bit"),
    "AdamW4bit": torchao("AdamW4bit"),
    "AdamWFp8": torchao("AdamWFp8"),
    "Adam-mini": adam_mini,
    "Adafactor, its own rate": huggingface(),
    "Adafactor, warm-up": huggingface(warmup_init=True),
    "Adafactor, a rate": huggingface(lr=1e-2, relative_step=False, scale_parameter=False),
    "schedule-free": collection("ScheduleFreeAdamW"),
    "Prodigy": collection("Prodigy", d0=1e-2),
    "CAME": collection("CAME"),
    "Lamb": collection("Lamb"),
    "AdEMAMix": collection("AdEMAMix"),
}


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    """Torchao compiles its steps, which takes longer than all else here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))


def loss_of(model: nn.Module, step: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(32, 64, generator=generator) for _ in range(2))
    dtype = next(model.parameters()).dtype
    return lambda: F.mse_loss(model(x.to(dtype)), y.to(dtype))


def state_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [
        value.dequantize() if hasattr(value, "dequantize") and type(value) is not Tensor else value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]


@pytest.mark.parametrize("name", ON_A_COPY)
def test_the_direction_is_what_the_real_step_then_does(name: str) -> None:
    model = network()
    optimizer = ON_A_COPY[name](model)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step)().backward()
        held = copy.deepcopy([value.detach().clone() for value in state_of(optimizer)])
        before = [p.detach().double() for p in model.parameters()]
        direction = Direction.from_optimizer(optimizer)
        assert all(map(torch.equal, held, state_of(optimizer)))
        moved = dict(zip(map(id, direction.parameters), direction.tensors, strict=True))
        optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            real = old - p.detach().double()
            # Of the weights' own rounding there is more than of the direction's.
            assert (real - direction.lr * moved[id(p)].double()).norm() <= 1e-7 * old.norm() + 1e-5 * real.norm()
            assert real.norm() > 0


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
def test_quantised_state_of_16_bit_weights_makes_a_direction_in_float32(name: str) -> None:
    coarse = network().bfloat16()
    fine = copy.deepcopy(coarse).float()
    optimizers = [ON_A_COPY[name](model) for model in (coarse, fine)]
    for step in range(3):
        for model in (coarse, fine):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)
        found = [Direction.from_optimizer(optimizer).tensors for optimizer in optimizers]
        for a, b in zip(*found, strict=True):
            assert a.dtype is torch.float32
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
        for optimizer in optimizers:
            optimizer.step()


def test_steps_that_the_optimizer_finds_by_itself_are_counted() -> None:
    """Without a learning rate η is in steps: 1 is the step that is taken."""
    model = network()
    optimizer = huggingface()(model)
    monitor, around = (sharpkern.Monitor(model, optimizer) for _ in range(2))
    losses: list[Callable[[], Tensor]] = []
    AroundStep(optimizer, lambda: True, lambda direction: around(lambda: losses[-1](), direction=direction))
    for step in range(3):
        losses.append(loss_of(model, step))
        optimizer.zero_grad()
        losses[-1]().backward()
        monitor(losses[-1])
        optimizer.step()
    for one, other in zip(monitor.history, around.history, strict=True):
        assert one.lr == other.lr == 1.0
        assert (one.measurement.status, other.measurement.status) == ("converged", "converged")
        assert other.measurement.sharpness == pytest.approx(one.measurement.sharpness, rel=1e-3)
    with pytest.raises(ValueError, match="must have a learning rate in all groups, got Adafactor, which finds its own"):
        sharpkern.LRCap(monitor, optimizer, peak=1.0)


# Around the real step.


def measured_around(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[..., Any], lr: float) -> None:
    """A measurement around a step is that at the weights of before, along what the step moved."""
    monitor = sharpkern.Monitor(model, optimizer)
    loss_fn = loss_of(model, 0)
    around = AroundStep(optimizer, lambda: True, lambda direction: monitor(loss_fn, direction=direction))
    before = {p: p.detach().clone() for p in model.parameters()}
    step(loss_fn)
    around.remove()
    (record,) = monitor.history
    after = {p: p.detach().clone() for p in model.parameters()}
    with torch.no_grad():
        for p, value in before.items():
            p.copy_(value)
    expected = sharpkern.critical_sharpness(model, loss_fn, Direction.between(before, after, lr))
    assert record.measurement.status == expected.status == "converged"
    assert record.measurement.sharpness == pytest.approx(expected.sharpness, rel=2e-2)


def test_lbfgs_is_measured_around_its_step() -> None:
    model = network().double()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)

    def step(loss_fn: Callable[[], Tensor]) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_fn()
            loss.backward()
            return loss

        with pytest.raises(TypeError, match=r"must step without a closure, got LBFGS, whose .*AroundStep or by hand"):
            Direction.from_optimizer(optimizer)
        optimizer.step(closure)

    closure_grads = loss_of(model, 0)
    closure_grads().backward()
    measured_around(model, optimizer, step, 0.5)


def test_sophia_is_measured_around_its_step() -> None:
    """Its Hessian comes of the gradient's own graph, which no copy has."""
    model = network()
    optimizer = collection("SophiaH", update_period=1)(model)

    def step(loss_fn: Callable[[], Tensor]) -> None:
        loss_fn().backward(create_graph=True)
        with pytest.raises(TypeError, match=r"got SophiaH, which fails with RuntimeError: .*AroundStep or by hand"):
            Direction.from_optimizer(optimizer)
        optimizer.step()
        optimizer.zero_grad()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True", UserWarning)
        measured_around(model, optimizer, step, 1e-2)


# What each way takes, in multiples of θ.

MEMORY: dict[str, tuple[Build, str]] = {
    **{kind: (plain(kind), "closed form") for kind in ("SGD", "Adam", "AdamW", "RMSprop")},
    "Lion": (lambda model: Lion(model.parameters()), "closed form"),
    **{
        kind: (plain(kind), "one copied parameter at a time")
        for kind in ("Adadelta", "Adafactor", "Adagrad", "Adamax", "ASGD", "Muon", "NAdam", "RAdam", "Rprop")
    },
    "AdamW8bit": (torchao("AdamW8bit"), "step on a copy"),
    "AdamW4bit": (torchao("AdamW4bit"), "step on a copy"),
    "transformers' Adafactor": (huggingface(), "step on a copy"),
    "Adam-mini": (adam_mini, "step on a copy"),
    # Of its own, LBFGS holds some hundred updates more.
    "LBFGS": (plain("Muon"), "around the step"),
}


def documented(name: str) -> tuple[str, float]:
    """The way and the memory that the guide gives an optimizer."""
    rows = [line.strip("| ").split(" | ") for line in DOCS.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    names_of = lambda row: re.split("[,;] ", re.sub(r"\b[\w-]+'s ", "", row[0]))
    (row,) = [row for row in rows if len(row) == 3 and name in names_of(row)]
    return row[1], float(re.match(r"[\d.]+", row[2])[0])


@pytest.mark.parametrize("name", MEMORY)
def test_the_guide_says_what_each_way_takes_of_memory(name: str) -> None:
    build, way = MEMORY[name]
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(20)))
    optimizer = build(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    kept: list[Direction] = []
    copied = 0
    if way == "around the step":
        AroundStep(optimizer, lambda: True, lambda direction: kept.append(direction()))
        peak = peak_bytes(optimizer.step)
    else:
        peak = peak_bytes(lambda: kept.append(Direction.from_optimizer(optimizer)))
        # What deepcopy reads by its storage counts as new once.
        if way != "closed form":
            copied = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if type(t) is Tensor)
    theta = bytes_of(model.parameters())
    said, multiple = documented(name)
    assert said == way
    # Of one of 20 parameters there are some at a time besides.
    assert multiple - 0.01 <= (peak - copied) / theta <= multiple + 0.4
