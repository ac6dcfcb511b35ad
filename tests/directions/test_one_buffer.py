"""Parameters that are parts of one buffer, as flattened recurrent weights and `vector_to_parameters` make them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import sharpkern
from sharpkern import Direction
from sharpkern.tensors.storage import Owners, overlapping
from tests.engines.test_non_intrusive import differing, snapshot
from tests.helpers.cases import TORCH_CASES, Case
from tests.helpers.oracle import deep_copy_losses, engine_losses, engine_on, random_direction

STEP_SIZES = (0.0, 0.01, 0.05)


def in_one_buffer(model: nn.Module, *, with_buffers: bool = False) -> nn.Module:
    """The model, its parameters (and floating-point buffers) made views of one tensor, one after the other."""
    tensors = [*model.parameters(), *(b for b in model.buffers() if with_buffers and b.is_floating_point())]
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.data = part.view_as(tensor)
    return model


@pytest.fixture(params=TORCH_CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.mark.parametrize("engine", ["virtual", "batched", "inplace"])
def test_losses_are_those_of_deep_copies(case: Case, engine: str) -> None:
    if (engine, case.name) == ("batched", "lstm"):
        pytest.skip("torch.func.vmap has no rule for recurrent layers")
    model = in_one_buffer(case.build(), with_buffers=True)
    direction, before = random_direction(model), snapshot(model)
    expected = deep_copy_losses(model, case.closure, direction, STEP_SIZES)
    assert engine_losses(engine, model, case.closure(model), direction, STEP_SIZES) == pytest.approx(expected, rel=1e-6)
    assert differing(before, snapshot(model)) == []


def test_the_oracle_finds_every_parameter(case: Case) -> None:
    model = in_one_buffer(case.build(), with_buffers=True)
    with engine_on("virtual", model, case.closure(model), random_direction(model)) as (engine, _):
        (loss,) = engine.losses([0.05])
        assert engine.oracle_loss(0.05) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("engine", ["auto", "virtual", "batched", "inplace"])
def test_a_vector_of_all_parameters(engine: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    vector_to_parameters(parameters_to_vector(model.parameters()).detach(), model.parameters())
    x, y = torch.randn(32, 6, dtype=torch.float64), torch.randint(0, 3, (32,))
    loss_fn = lambda: F.cross_entropy(model(x), y)
    loss_fn().backward()
    direction = Direction.from_gradients(model)
    found = sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine, rtol=1e-3)
    eta = found.critical_lr
    closure = lambda moved: lambda: F.cross_entropy(moved(x), y)
    fall, rise = deep_copy_losses(model, closure, direction, [0.99 * eta, 1.01 * eta])
    assert (found.status, fall < found.base_loss < rise) == ("converged", True)
    assert found.engine == ("virtual" if engine == "auto" else engine)


class Decayed(nn.Module):
    """A layer whose penalty is of the one vector that all parameters lie in, with something behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = torch.randn(24, dtype=torch.float64)
        self.weight, self.bias = nn.Parameter(self.vector[2:18].view(4, 4)), nn.Parameter(self.vector[18:22])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).square().mean() + self.vector.square().sum()


def test_a_read_of_all_parameters_at_once() -> None:
    model, x = Decayed(), torch.randn(8, 4, dtype=torch.float64)
    direction, loss_fn, before = random_direction(model), lambda: model(x), model.vector.clone()

    def expected(eta: float) -> float:
        delta = parameters_to_vector(direction.tensors)
        flat = model.vector.clone()
        flat[2:22] -= eta * delta
        return float(F.linear(x, flat[2:18].view(4, 4), flat[18:22]).square().mean() + flat.square().sum())

    with engine_on("virtual", model, loss_fn, direction) as (engine, _):
        assert engine.oracle_loss(0.1) == pytest.approx(expected(0.1))
    for engine in ("auto", "inplace"):
        found = sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine)
        assert found.engine == ("virtual" if engine == "auto" else engine)
        assert dict(found.probes) == pytest.approx({eta: expected(eta) for eta, _ in found.probes})
    assert torch.equal(model.vector, before)


@pytest.mark.parametrize("build", [lambda flat: flat.split(8), lambda flat: flat.view(8, 2).T.unbind()])
def test_a_neighbour_that_is_read_is_not_taken_for_one_that_is_not(build: Callable) -> None:
    model = nn.ParameterList(nn.Parameter(part) for part in build(torch.randn(16)))
    loss_fn = lambda: model[0].square().sum()
    found = sharpkern.critical_sharpness(model, loss_fn, random_direction(model), engine="virtual")
    assert found.engine == "virtual"


def test_whose_memory_a_tensor_lies_in() -> None:
    flat, other = torch.zeros(6, 6), torch.zeros(6)
    parts = {"rows": flat[1:3], "even": flat[3:, ::2], "odd": flat[3:, 1::2], "last": flat[5, 4:], "other": other[:2]}
    owners = Owners((part, name) for name, part in parts.items())
    assert overlapping(list(parts.values())) == [[1, 2, 3]]
    assert overlapping([flat[:, 0], flat[:, 1], other, flat[:0]]) == []
    assert sorted(owners.of(flat)) == ["even", "last", "odd", "rows"]
    assert owners.of(flat[0]) == owners.of(other[2:]) == owners.of(flat[2:2]) == owners.of(flat.to_sparse()) == []
    assert owners.of(flat[4, 3]) == ["odd"]
    assert owners.of(flat[2:4, 0].expand(3, 2)) == ["even", "rows"]
    assert owners.of(flat[1].view(torch.int8)[-1:]) == ["rows"]
