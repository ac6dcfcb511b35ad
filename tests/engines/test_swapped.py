"""Parameters that get other memory for the length of a pass: θ is only read, and who keeps its address is found out."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import sharpkern
from sharpkern.engines import session
from sharpkern.engines.swapped import Memory, SwappedEngine, may_swap
from sharpkern.engines.virtual.mode import VirtualParameters
from tests.helpers.cases import CASES, Case
from tests.helpers.models import MLP
from tests.helpers.oracle import deep_copy_losses, engine_losses, random_direction

STEP_SIZES = (0.0, 1e-2, 0.1, 0.0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_equal_those_of_deep_copies(case: Case) -> None:
    model = case.build()
    direction = random_direction(model)
    before = [(p.data_ptr(), p._version, p.detach().clone()) for p in model.parameters()]
    expected = deep_copy_losses(model, case.closure, direction, STEP_SIZES)
    losses = engine_losses("swapped", model, case.closure(model), direction, STEP_SIZES)
    assert losses == pytest.approx(expected, rel=1e-6, abs=0)
    assert len(set(losses)) == 3, "the direction moved nothing"
    for p, (pointer, version, values) in zip(model.parameters(), before, strict=True):
        assert (p.data_ptr(), p._version) == (pointer, version)
        assert torch.equal(p, values)


def measured_with(make: Callable[[nn.Module], nn.Module] = lambda model: model, **options: object) -> list[str]:
    """The engines that one measurement has opened."""
    opened = []
    open_engine = session.Session.open

    def noted(self: session.Session, target: session.Target, name: str, **rest: object):
        opened.append(name)
        return open_engine(self, target, name, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Session, "open", noted)
        model = make(MLP())
        x, y = torch.randn(32, 16, dtype=next(model.parameters()).dtype), torch.randint(0, 10, (32,))
        loss_fn = lambda: F.cross_entropy(model(x), y)
        sharpkern.critical_sharpness(model, loss_fn, random_direction(model), **options)
    return opened


def one_buffer(model: nn.Module) -> nn.Module:
    vector_to_parameters(parameters_to_vector(model.parameters()).detach(), model.parameters())
    return model


def with_a_view(model: nn.Module) -> nn.Module:
    model.seen = model[0].weight.detach().view(-1)
    return model


def test_it_is_taken_where_each_parameter_has_memory_of_its_own() -> None:
    assert measured_with() == measured_with(engine="inplace") == ["swapped"]
    assert measured_with(one_buffer) == ["swapped"]
    assert measured_with(engine="virtual") == ["virtual"]
    assert measured_with(with_a_view) == ["virtual"]
    assert measured_with(with_a_view, engine="inplace") == ["inplace"]


def test_it_is_not_where_parameters_share_memory() -> None:
    model = MLP()
    model.extra = nn.Parameter(model[0].weight.data.view(-1), requires_grad=False)
    direction = sharpkern.Direction.from_tensors({"0.weight": torch.randn_like(model[0].weight)}, model)
    with session.open_session(model, direction, []) as opened:
        assert not may_swap(model, opened.pairs, opened.guard)
    del model.extra
    with session.open_session(model, direction, []) as opened:
        assert may_swap(model, opened.pairs, opened.guard)


def test_in_16_bits_and_for_large_models_the_virtual_engine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured_with(lambda model: model.bfloat16(), noise=1e-3) == ["virtual"]
    assert measured_with(lambda model: model.bfloat16(), noise=1e-3, engine="inplace") == ["inplace"]
    monkeypatch.setattr(session, "_SWAPPED_BYTES", 100)
    assert measured_with() == ["virtual"]
    assert measured_with(engine="inplace") == ["swapped"]


def test_in_inference_mode_it_is_not() -> None:
    with torch.inference_mode(False):
        model = MLP()
        x, y = torch.randn(32, 16), torch.randint(0, 10, (32,))
        direction = random_direction(model)
    loss_fn = lambda: F.cross_entropy(model(x), y)
    expected = sharpkern.critical_sharpness(model, loss_fn, direction)
    with torch.inference_mode():
        found = sharpkern.critical_sharpness(model, loss_fn, direction)
    assert found.critical_lr == pytest.approx(expected.critical_lr, rel=1e-4)


def hidden_alias() -> tuple[nn.Module, Callable[[], Tensor]]:
    """A closure that reads a parameter's memory by a tensor that lies in a library's object, where nobody looks."""
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 10))
    alias = model[2].weight.detach()
    weight = functools.lru_cache(lambda: alias)
    x, y = torch.randn(32, 16), torch.randint(0, 10, (32,))
    loss_fn = lambda: F.cross_entropy(model(x), y) + F.linear(model[:2](x), weight()).square().mean()
    return model, loss_fn


def test_who_reads_the_memory_of_a_parameter_by_another_tensor_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss_fn = hidden_alias()
    direction = random_direction(model)
    (right,) = engine_losses("inplace", model, loss_fn, direction, (0.5,))
    (wrong,) = engine_losses("swapped", model, loss_fn, direction, (0.5,))
    assert wrong != pytest.approx(right, rel=1e-3), "the trap no longer springs"
    expected = engine_losses("inplace", model, loss_fn, direction, (0.3,))
    with pytest.warns(sharpkern.EngineFallbackWarning, match="in place"):
        found = sharpkern.critical_sharpness(model, loss_fn, direction)
    assert found.engine == "inplace"
    named = sharpkern.critical_sharpness(model, lambda: loss_fn(), direction, engine="inplace")
    assert named.critical_lr == pytest.approx(found.critical_lr, rel=1e-6)
    monkeypatch.setattr(SwappedEngine, "writes", True)
    unchecked = sharpkern.critical_sharpness(model, lambda: 1 * loss_fn(), direction, engine="inplace")
    assert unchecked.critical_lr != pytest.approx(found.critical_lr, rel=1e-3), "the trap no longer springs"
    assert engine_losses("inplace", model, loss_fn, direction, (0.3,)) == expected


def test_one_pass_of_each_measurement_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closure that writes a parameter is refused by the mode, before it has written anything."""
    model, teacher = MLP(), MLP()
    x, y = torch.randn(32, 16), torch.randint(0, 10, (32,))

    def loss_fn() -> Tensor:
        with torch.no_grad():
            for p, q in zip(teacher.parameters(), model.parameters(), strict=True):
                p.lerp_(q, 0.1)
        return F.cross_entropy(model(x), y) + (model(x) - teacher(x)).square().mean()

    before = [p.clone() for p in teacher.parameters()]
    with pytest.raises(ValueError, match="write to a parameter"):
        sharpkern.critical_sharpness(model, loss_fn, random_direction(model))
    assert all(map(torch.equal, before, teacher.parameters()))
    monkeypatch.setattr(VirtualParameters, "_refuse_write", lambda *_: None)
    engine_losses("swapped", model, loss_fn, random_direction(model), (0.1,))
    assert not all(map(torch.equal, before, teacher.parameters())), "the trap no longer springs"


def test_a_frozen_embedding_that_renormalises_its_rows_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Embedding(20, 8, max_norm=0.5), nn.Flatten(), nn.Linear(24, 10))
    model[0].weight.requires_grad_(False)
    tokens, y = torch.randint(0, 20, (16, 3)), torch.randint(0, 10, (16,))
    loss_fn = lambda: F.cross_entropy(model(tokens), y)
    direction = sharpkern.Direction.from_tensors({"2.weight": torch.randn(10, 24)}, model)
    before = model[0].weight.clone()
    engine_losses("swapped", model, loss_fn, direction, (0.1, 0.2, 0.3))
    assert torch.equal(model[0].weight, before)
    monkeypatch.setattr(VirtualParameters, "is_needed", False)
    engine_losses("swapped", model, loss_fn, direction, (0.1, 0.2, 0.3))
    assert not torch.equal(model[0].weight, before), "the trap no longer springs"


def test_a_backward_begun_before_still_works_and_gradients_can_be_taken_inside() -> None:
    model = MLP()
    x, y = torch.randn(32, 16), torch.randint(0, 10, (32,))
    loss = F.cross_entropy(model(x), y)

    def penalised() -> Tensor:
        with torch.enable_grad():
            plain = F.cross_entropy(model(x), y)
            gradients = torch.autograd.grad(plain, list(model.parameters()), create_graph=True)
        return plain.detach() + sum(g.square().sum() for g in gradients).detach()

    direction = random_direction(model)
    (swapped,) = engine_losses("swapped", model, penalised, direction, (0.1,))
    (virtual,) = engine_losses("virtual", model, penalised, direction, (0.1,))
    assert swapped == pytest.approx(virtual, rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_several_tasks_take_turns_in_one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    batches = torch.randn(3, 20, 6, dtype=torch.float64)
    tasks = {str(i): lambda batch=batch: model(batch).square().mean() for i, batch in enumerate(batches)}
    tasks["0"]().backward()
    direction = sharpkern.Direction.from_gradients(model)
    made: list[Memory] = []
    make = Memory.__init__
    monkeypatch.setattr(Memory, "__init__", lambda self, pairs: (made.append(self), make(self, pairs))[1])
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    together = sharpkern.relative_critical_sharpness(model, tasks, direction)
    assert len(made) == 1
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    monkeypatch.setattr("sharpkern.engines.session.may_swap", lambda *_: False)
    for name, measured in sharpkern.relative_critical_sharpness(model, tasks, direction).items():
        assert together[name].critical_lr == pytest.approx(measured.critical_lr, rel=1e-9)
        assert (together[name].engine, together[name].status) == (measured.engine, "converged")
    assert len(made) == 1
