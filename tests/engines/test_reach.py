"""State outside of the model that a closure reaches is put back; what it counts for itself stays."""

import itertools
import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern
from sharpkern._undo import is_library_file
from sharpkern.engines.evaluation import guard as guards
from sharpkern.engines.evaluation.reach import Reached, fingerprint

ENGINES = ["virtual", "batched", "inplace"]
X = torch.linspace(-1, 1, 32).reshape(8, 4)
MEMORY: list[Any] = []


def measured(model: nn.Module, loss_fn: Callable[[], Tensor], engine: str = "auto") -> sharpkern.Measurement:
    model.zero_grad()
    loss_fn().backward()
    return sharpkern.critical_sharpness(model, loss_fn, sharpkern.Direction.from_gradients(model), engine=engine)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))


@pytest.mark.parametrize("engine", ENGINES)
def test_another_modules_running_statistics_are_put_back(engine: str) -> None:
    model, critic = net(), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    loss_fn = lambda: F.softplus(-critic(model(X))).mean()
    loss_fn().backward()
    before, gradients = {n: v.clone() for n, v in critic.state_dict().items()}, [p.grad for p in critic.parameters()]
    sharpkern.critical_sharpness(model, loss_fn, sharpkern.Direction.from_gradients(model), engine=engine)
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    assert all(p.grad is gradient for p, gradient in zip(critic.parameters(), gradients, strict=True))


class Criterion:
    """A loss with a running centre, as of self-distillation, and a count."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.centre, self.calls, self.last = model, torch.zeros(4), 0, None

    def __call__(self) -> Tensor:
        return self.loss()

    def loss(self) -> Tensor:
        self.calls += 1
        outputs = self.model(X)
        self.centre = 0.9 * self.centre + 0.1 * outputs.detach().mean(0)
        self.last = outputs
        return (outputs - self.centre).square().mean()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["object", "method", "partial", "closure"])
def test_attributes_of_what_a_closure_is_a_method_of_are_put_back(how: str, engine: str) -> None:
    model = net()
    criterion = Criterion(model)
    loss_fn = {
        "object": criterion,
        "method": criterion.loss,
        "partial": partial(Criterion.loss, criterion),
        "closure": lambda: criterion(),
    }[how]
    criterion().backward()
    direction = sharpkern.Direction.from_gradients(model)
    centre, last, content = criterion.centre, criterion.last, criterion.centre.clone()
    found = sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine)
    assert criterion.centre is centre
    assert criterion.last is last
    assert torch.equal(centre, content)
    # Numbers are the closure's own record, by which tests and logs count.
    assert criterion.calls == 1 + found.forwards or engine == "batched"


@pytest.mark.parametrize("engine", ENGINES)
def test_variables_that_carry_a_state_on_are_put_back(engine: str) -> None:
    model, hidden = net(), torch.zeros(8, 4)

    def loss_fn() -> Tensor:
        nonlocal hidden
        hidden = model(X) + 0.5 * hidden.detach()
        return hidden.square().mean()

    loss_fn().backward()
    before, content = hidden, hidden.detach().clone()
    found = sharpkern.critical_sharpness(model, loss_fn, sharpkern.Direction.from_gradients(model), engine=engine)
    assert found.status == "converged"
    assert hidden is before
    assert torch.equal(hidden, content)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("record", [lambda outputs: outputs.detach(), lambda outputs: 1.0], ids=["tensors", "numbers"])
def test_a_list_that_a_hook_fills_is_put_back(engine: str, record: Callable[[Tensor], Any]) -> None:
    model, seen = net(), []
    model[0].register_forward_hook(lambda module, inputs, outputs: seen.append(record(outputs)))
    loss_fn = lambda: model(X).square().mean()
    loss_fn().backward()
    before = list(seen)
    sharpkern.critical_sharpness(model, loss_fn, sharpkern.Direction.from_gradients(model), engine=engine)
    assert len(seen) == len(before) == 1
    assert seen[0] is before[0]


def test_what_a_hook_counts_stays() -> None:
    """By such counts tests and profilers go; were they put back, a hook that acts at its third call never would."""
    model, counter = net(), SimpleNamespace(calls=0)

    def count(*_: object) -> None:
        counter.calls += 1

    model[0].register_forward_hook(count)
    found = measured(model, lambda: model(X).square().mean(), "virtual")
    assert counter.calls >= 1 + found.forwards


@pytest.mark.parametrize("engine", ["virtual", "inplace"])
@pytest.mark.parametrize(
    "container",
    [
        lambda t: {"a": {"b": [t]}},
        lambda t: (t, 0),
        lambda t: [[t], {"c": (t,)}],
        lambda t: type("Cache", (), {"__slots__": ("k",)})(),
    ],
    ids=["dictionaries", "tuple", "lists", "slots"],
)
def test_tensors_are_put_back_wherever_they_are_nested(container: Callable[[Tensor], Any], engine: str) -> None:
    model, memory = net(), torch.zeros(4)
    model.held = container(memory)
    if hasattr(model.held, "__slots__"):
        model.held.k = memory

    def hook(module: nn.Module, inputs: Any, outputs: Tensor) -> Tensor:
        memory.copy_(outputs.detach().mean(0))
        return outputs + 0.1 * memory

    # The tensor is reached through the model's attribute alone.
    model.forward = lambda x, forward=model.forward: hook(model, x, forward(x))
    measured(model, lambda: model(X).square().mean(), engine)
    content = memory.clone()
    measured(model, lambda: model(X).square().mean(), engine)
    assert torch.equal(memory, content)


@pytest.mark.parametrize("engine", ENGINES)
def test_globals_that_a_closure_names_are_put_back(engine: str) -> None:
    model = net()
    MEMORY.clear()

    def loss_fn() -> Tensor:
        outputs = model(X)
        MEMORY.append(outputs.detach())
        return outputs.square().mean()

    loss_fn().backward()
    sharpkern.critical_sharpness(model, loss_fn, sharpkern.Direction.from_gradients(model), engine=engine)
    assert len(MEMORY) == 1


@pytest.mark.parametrize("engine", ["virtual", "inplace"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.Generator().manual_seed(1),
        lambda: numpy.random.default_rng(1),
    ],
    ids=["torch", "numpy"],
)
def test_generators_of_the_loop_are_put_back(make: Callable[[], Any], engine: str) -> None:
    model, generator = net(), make()

    def noise() -> Tensor:
        if isinstance(generator, torch.Generator):
            return torch.randn(8, 4, generator=generator)
        return torch.from_numpy(generator.standard_normal((8, 4))).float()

    loss_fn = lambda: F.mse_loss(model(X + noise()), X)
    loss_fn().backward()
    state = generator.get_state() if isinstance(generator, torch.Generator) else generator.bit_generator.state
    found = sharpkern.critical_sharpness(model, loss_fn, sharpkern.Direction.from_gradients(model), engine=engine)
    assert found.status == "converged"
    after = generator.get_state() if isinstance(generator, torch.Generator) else generator.bit_generator.state
    assert torch.equal(after, state) if isinstance(state, Tensor) else after == state


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["data", "resize", "set"])
def test_buffers_that_grow_have_their_memory_back(engine: str, how: str) -> None:
    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("bank", torch.arange(8.0).reshape(2, 4))
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            outputs = self.layer(x)
            row = x[:1]
            if how == "data":
                self.bank.data = torch.cat([self.bank, row])
            elif how == "resize":
                self.bank.resize_(len(self.bank) + 1, 4)
                self.bank[-1] = row[0]
            else:
                self.bank = torch.cat([self.bank, row])
            return outputs

    model = Bank()
    loss_fn = lambda: model(X).square().mean()
    loss_fn().backward()
    bank, content = model.bank, model.bank.clone()
    sharpkern.critical_sharpness(model, loss_fn, sharpkern.Direction.from_gradients(model), engine=engine)
    assert model.bank is bank
    assert torch.equal(bank, content)
    assert float(model.count) == 1


@pytest.mark.parametrize("engine", ["virtual", "inplace"])
def test_a_large_tensor_is_copied_only_where_it_is_written(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "_LARGE", 0)
    model, data, memory = net(), torch.arange(400.0).reshape(100, 4), torch.zeros(50, 4)
    copied: list[int] = []
    copy = guards._Kept.copy
    monkeypatch.setattr(guards._Kept, "copy", lambda kept: (copied.append(kept.tensor.data_ptr()), copy(kept))[1])

    def loss_fn() -> Tensor:
        outputs = model(data[:8] / 400)
        memory[3:11] = outputs.detach()
        return (outputs + 0.1 * memory.mean()).square().mean()

    loss_fn().backward()
    content = memory.clone()
    sharpkern.critical_sharpness(model, loss_fn, sharpkern.Direction.from_gradients(model), engine=engine)
    assert torch.equal(memory, content)
    assert set(copied) == {memory.data_ptr()}


def test_what_one_tensor_fails_at_is_put_back_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    loss_fn = lambda: model(X).square().mean()
    loss_fn().backward()
    direction = sharpkern.Direction.from_gradients(model)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    restore, failing = guards._Kept.restore, model[0].running_mean.data_ptr()

    def fails(kept: Any) -> None:
        restore(kept)
        if kept.tensor.data_ptr() == failing:
            raise RuntimeError("planted")

    monkeypatch.setattr(guards._Kept, "restore", fails)
    with pytest.raises(RuntimeError, match="planted"):
        sharpkern.critical_sharpness(model, loss_fn, direction)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_a_closure_that_raises_at_its_third_call_does_so() -> None:
    """Were its count put back before every call, the third would never come."""
    model, calls = net(), []

    def loss_fn() -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise ValueError("third call")
        return model(X).square().mean()

    with pytest.raises(ValueError, match="third call"):
        measured(model, loss_fn)
    assert len(calls) == 4


def test_a_loss_that_measures_is_refused() -> None:
    model = net()
    model(X).square().mean().backward()
    direction = sharpkern.Direction.from_gradients(model)

    def loss_fn() -> Tensor:
        sharpkern.critical_sharpness(model, lambda: model(X).square().mean(), direction)
        return model(X).square().mean()

    with pytest.raises(RuntimeError, match="loss_fn must only return the loss, got one that measures"):
        sharpkern.critical_sharpness(model, loss_fn, direction)
    assert sharpkern.critical_sharpness(model, lambda: model(X).square().mean(), direction).status == "converged"


# -- what findings are keyed on ----------------------------------------------------------------------------------------


def test_closures_of_one_helper_share_findings_only_if_they_call_the_same() -> None:
    model = net()
    wrapped = lambda task: lambda: task(model)
    one, other = (lambda m: m(X).sum()), (lambda m: m(X).mean())
    assert fingerprint(wrapped(one)) == fingerprint(wrapped(one))
    assert fingerprint(wrapped(one)) != fingerprint(wrapped(other))
    of_batch = lambda x, mode: lambda: (model(x), mode)
    assert fingerprint(of_batch(X, "a")) == fingerprint(of_batch(2 * X, "a"))
    assert fingerprint(of_batch(X, "a")) != fingerprint(of_batch(X, "b"))
    assert fingerprint(partial(one, model)) != fingerprint(partial(other, model))
    assert fingerprint(Criterion(model)) == fingerprint(Criterion(model))


def test_a_global_that_is_bound_to_another_function_makes_another_closure() -> None:
    scope: dict[str, Any] = {"model": net(), "X": X}
    exec("loss_fn = lambda: task(model)", scope)
    scope["task"] = lambda m: m(X).sum()
    before = fingerprint(scope["loss_fn"])
    scope["X"] = 2 * X
    assert fingerprint(scope["loss_fn"]) == before
    scope["task"] = lambda m: m(X).mean()
    assert fingerprint(scope["loss_fn"]) != before


def test_an_unrepeatable_closure_is_refused_after_another_of_the_same_helper() -> None:
    model, batches = net(), itertools.cycle([X, 3 * X])
    wrapped = lambda task: lambda: task(model)
    fixed, changing = (lambda m: m(X).square().mean()), (lambda m: m(next(batches)).square().mean())
    assert measured(model, wrapped(fixed)).status == "converged"
    with pytest.raises(ValueError, match="loss_fn must return the same loss"):
        measured(model, wrapped(changing))


def test_the_reach_of_a_closure_is_bounded_by_libraries() -> None:
    model, optimizer = net(), torch.optim.SGD(net().parameters(), lr=0.1)
    reached = Reached(lambda: (model(X), optimizer))
    assert reached.modules == []
    reached.follow()
    assert model in reached.modules
    assert not any(container is optimizer.state for container in reached.containers)


@pytest.mark.parametrize(
    ("path", "is_library"),
    [
        (torch.__file__, True),
        (os.path.join("anywhere", "lib", "site-packages", "some_package", "file.py"), True),
        (os.path.join("anywhere", "dist-packages", "some_package", "file.py"), True),
        ("<frozen importlib._bootstrap>", True),
        (os.path.join("anywhere", "train.py"), False),
        (os.path.join("anywhere", "my-site-packages.py"), False),
        (__file__, False),
    ],
)
def test_code_of_packages_is_a_librarys_wherever_these_lie(path: str, is_library: bool) -> None:
    assert is_library_file(path) == is_library
