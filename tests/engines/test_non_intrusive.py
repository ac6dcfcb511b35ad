"""A run with measurements is the run without them, bit for bit."""

import copy
import importlib
import random
import warnings
from collections.abc import Callable
from functools import partial

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sharpkern
from sharpkern.engines import session
from sharpkern.engines.evaluation import guard as guards
from tests.helpers.oracle import random_direction

ENGINES = ["virtual", "batched", "inplace"]


class Noisy(nn.Module):
    """Draws from every random stream and changes everything a forward pass can change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 10)
        self.norm, self.dropout = nn.BatchNorm1d(32), nn.Dropout(0.2)
        self.register_buffer("calls", torch.zeros(1))
        self.seen: list[float] = []
        self.cache: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(random.random())
        x = self.dropout(F.relu(self.norm(self.first(x)))) * (1 + 0.01 * numpy.random.rand())
        self.cache = x
        return self.second(x)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, object]:
    """Everything a measurement could change, as copies."""
    return {
        "state": copy.deepcopy(model.state_dict()),
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "grad_ids": [id(p.grad) for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "optimizer": copy.deepcopy(optimizer.state_dict()) if optimizer else None,
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "grad_mode": torch.is_grad_enabled(),
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, numpy.ndarray):
        return numpy.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def differing(before: dict[str, object], after: dict[str, object]) -> list[str]:
    return [key for key in before if not same(before[key], after[key])]


def train(make: Callable[[nn.Module], torch.optim.Optimizer], engine: str | None, steps: int) -> dict[str, object]:
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    model = Noisy()
    optimizer = make(model)
    monitor = sharpkern.Monitor(model, optimizer, engine=engine, rtol=0.1) if engine else None
    for _ in range(steps):
        x, y = torch.randn(16, 16), torch.randint(0, 10, (16,))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if monitor is not None:
            monitor(lambda x=x, y=y: F.cross_entropy(model(x), y))
        optimizer.step()
    return {**snapshot(model, optimizer), "seen": model.seen, "cache": model.cache}


@pytest.mark.filterwarnings("ignore::sharpkern.SlopeMismatchWarning")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "make",
    [
        lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    ],
    ids=["sgd", "adamw"],
)
def test_a_hundred_measured_steps_train_the_same_model(make: Callable, engine: str) -> None:
    without, measured = train(make, None, 100), train(make, engine, 100)
    without.pop("grad_ids"), measured.pop("grad_ids")
    assert differing(without, measured) == []


def scaled(loss_fn: Callable, k: int) -> torch.Tensor:
    """The loss of a micro-batch, unlike others'."""
    return loss_fn() * (1 + 0.05 * k)


class Boom(Exception):
    pass


class Faulty:
    """The closure, raising at its ``at``-th call: half-way, after the forward pass has changed things.

    Attributes:
        calls: so far.
    """

    def __init__(self, loss_fn: Callable, at: int, error: BaseException) -> None:
        self._loss_fn, self._at, self._error = loss_fn, at, error
        self.calls = 0

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        loss = self._loss_fn()
        if self.calls == self._at:
            raise self._error
        return loss


def along(model: nn.Module, loss_fn: Callable, direction: sharpkern.Direction, engine: str) -> object:
    return sharpkern.losses_along(model, loss_fn, direction, [0.1 * i for i in range(12)], engine=engine)


def along_several(model: nn.Module, loss_fn: Callable, direction: sharpkern.Direction, engine: str) -> object:
    loss_fns = [(loss_fn, 1.0), (loss_fn, 2.0)]
    return sharpkern.losses_along(model, loss_fns, direction, [0.1, 0.2], engine=engine)


def of_a_part(model: nn.Module, loss_fn: Callable, direction: sharpkern.Direction, engine: str) -> object:
    return sharpkern.critical_sharpness(model, loss_fn, direction.only("second.*"), engine=engine)


MEASURES: dict[str, Callable] = {
    "λ_c": sharpkern.critical_sharpness,
    "losses": along,
    "blocks": sharpkern.blockwise_critical_sharpness,
    "losses of several": along_several,
    "λ_c of a part": of_a_part,
}
# Of micro-batches that training has called.
OF_SAMPLES: dict[str, Callable] = {
    "λ_c of a sample": sharpkern.critical_sharpness,
    "blocks of a sample": partial(sharpkern.blockwise_critical_sharpness, blocks={"last": "second.*"}),
}
ERRORS = [Boom(), KeyboardInterrupt(), torch.OutOfMemoryError("out of memory")]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("measure", "error"),
    [*(("λ_c", error) for error in ERRORS), *((name, ERRORS[1]) for name in [*MEASURES, *OF_SAMPLES][1:])],
    ids=repr,
)
def test_everything_is_restored_when_the_closure_raises_at_any_call(
    engine: str, measure: str, error: BaseException
) -> None:
    model = Noisy()
    x, y = torch.randn(16, 16), torch.randint(0, 10, (16,))
    loss_fn = lambda: F.cross_entropy(model(x), y)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    parts = [sharpkern.MicroBatch(partial(scaled, loss_fn, k)) for k in range(12 if measure in OF_SAMPLES else 0)]
    for part in parts:
        (part() / len(parts)).backward()
    if not parts:
        loss_fn().backward()
    direction = sharpkern.Direction.from_optimizer(optimizer)
    before = snapshot(model, optimizer)
    at = 0
    while True:
        # A sample takes many.
        at += 4 if parts else 1
        closure = Faulty(loss_fn, at, error)
        for k, part in enumerate(parts):
            part.loss_fn = partial(scaled, closure, k)
        try:
            with warnings.catch_warnings():
                # Out of memory in the check by other means is no reason to give up.
                warnings.simplefilter("ignore", sharpkern.UncheckedWarning)
                if measure in MEASURES:
                    MEASURES[measure](model, closure, direction, engine=engine)
                else:
                    found = OF_SAMPLES[measure](model, parts, direction, engine=engine, sample=4, rtol=0.2, clip=1.0)
                    sampled = found.values() if isinstance(found, dict) else [found]
                    assert {m.sample_size for m in sampled} == {4}
        except type(error) as raised:
            assert raised is error
        else:
            if closure.calls < at:
                break
        assert differing(before, snapshot(model, optimizer)) == [], f"raised at call {at}"
    assert at > (2 if engine == "batched" else 4)
    assert differing(before, snapshot(model, optimizer)) == []


def test_in_place_restores_after_an_interrupt_between_two_writes(
    monkeypatch: pytest.MonkeyPatch, no_swapping: None
) -> None:
    # The package hands on the function of that name.
    module = importlib.import_module("sharpkern.ops.form")

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    before = copy.deepcopy(model.state_dict())
    form_into, calls = module.form_into, 0

    def interrupted(*args: object, **kwargs: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return form_into(*args, **kwargs)

    monkeypatch.setattr(module, "form_into", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sharpkern.critical_sharpness(
            model, lambda: model(torch.ones(2, 4)).square().mean(), random_direction(model), engine="inplace"
        )
    assert same(before, model.state_dict())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_closure_may_clear_and_fill_gradients_and_flags(engine: str) -> None:
    model = Noisy()
    x, y = torch.randn(16, 16), torch.randint(0, 10, (16,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(x), y).backward()

    def loss_fn() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=False)
        model.first.weight.requires_grad_(False)
        model.dropout.eval()
        model.norm.eval()
        torch.set_autocast_enabled("cpu", False)
        with torch.enable_grad():
            loss = F.cross_entropy(model(x), y)
        model.dropout.train()
        model.last_loss = loss
        return loss

    direction = sharpkern.Direction.from_optimizer(optimizer)
    before = snapshot(model, optimizer)
    with warnings.catch_warnings():
        # Dropout is off in the closure and was on in the gradient, and so are the batch's statistics.
        warnings.simplefilter("ignore", sharpkern.SlopeMismatchWarning)
        sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine)
    assert differing(before, snapshot(model, optimizer)) == []


@pytest.mark.parametrize("engine", ["virtual", "batched"])
def test_a_backward_pass_begun_before_the_measurement_still_works(engine: str) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 10))
    x, y = torch.randn(16, 16), torch.randint(0, 10, (16,))
    loss_fn = lambda: F.cross_entropy(model(x), y)
    loss = loss_fn()
    sharpkern.critical_sharpness(model, loss_fn, random_direction(model), engine=engine)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_an_enclosing_autocast_keeps_casts_of_the_parameters(engine: str) -> None:
    """It goes on with those that a measurement inside of it has left."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    x, y = torch.randn(16, 16), torch.randint(0, 10, (16,))
    loss_fn = lambda: F.cross_entropy(model(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        before = loss_fn().item()
        sharpkern.critical_sharpness(model, loss_fn, random_direction(model), engine=engine)
        assert loss_fn().item() == before


def test_the_guard_keeps_restoring_when_one_restore_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Noisy()
    stream = torch.get_rng_state()

    def draw(_: session.Session) -> None:
        torch.rand(3)
        monkeypatch.setattr(guards, "_restore_content", lambda *_: (_ for _ in ()).throw(RuntimeError("planted")))

    with pytest.raises(RuntimeError, match="planted"):
        session.in_session(draw, model, None, [])
    assert torch.equal(torch.get_rng_state(), stream)
