"""Directions worked out of the optimizer's state wherever a weight is needed: the same numbers without the memory."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern
from sharpkern import Direction, ops
from sharpkern.engines.retained import retained_share
from sharpkern.engines.tracked import track
from sharpkern.memory.counter import bytes_of, peak_bytes
from tests.directions.test_direction_optimizers import EXACT, WITHIN_ULPS, backward, make_model
from tests.helpers.cases import TORCH_CASES, Case
from tests.helpers.models import GPT
from tests.helpers.oracle import engine_losses

STEP_SIZES = (0.0, 1e-3, 0.02)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1, amsgrad=True),
}


def both(optimizer: torch.optim.Optimizer, **options: Any) -> tuple[Direction, Direction]:
    """The direction in memory, and the one that is worked out."""
    return tuple(Direction.from_optimizer(optimizer, resident=resident, **options) for resident in (True, False))  # type: ignore[return-value]


def trained(case: Case, make: Callable[[Any], torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """A model after two steps, with the gradient of a third."""
    model = case.build()
    optimizer, loss_fn = make(model.parameters()), case.closure(model)
    for step in range(3):
        optimizer.zero_grad()
        loss_fn().backward()
        if step < 2:
            optimizer.step()
    return model, optimizer, loss_fn


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", EXACT | WITHIN_ULPS)
def test_it_is_the_direction_in_memory(name: str, steps: int) -> None:
    model = make_model()
    optimizer = (EXACT | WITHIN_ULPS)[name](model.parameters())
    for step in range(steps + 1):
        backward(model, step)
        if step < steps:
            optimizer.step()
    resident, lazy = both(optimizer)
    assert all(map(torch.equal, resident.tensors, lazy.tensors))
    assert (lazy.nbytes, resident.nbytes) == (0, bytes_of(model.parameters()))
    # In memory float32 products are added pairwise in float32.
    assert lazy.slope == pytest.approx(resident.slope, rel=1e-6)
    assert lazy.norm_sq == pytest.approx(resident.norm_sq, rel=1e-6)
    assert repr(lazy) == repr(resident)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("engine", ["virtual", "inplace"])
@pytest.mark.parametrize("case", TORCH_CASES, ids=lambda case: case.name)
def test_losses_are_those_of_the_direction_in_memory(case: Case, engine: str, optimizer: str) -> None:
    model, taught, loss_fn = trained(case, OPTIMIZERS[optimizer])
    resident, lazy = both(taught)
    expected = engine_losses(engine, model, loss_fn, resident, STEP_SIZES)
    assert engine_losses(engine, model, loss_fn, lazy, STEP_SIZES) == pytest.approx(expected, rel=1e-6)
    assert expected[0] != expected[2]


@pytest.mark.parametrize("engine", ["virtual", "inplace"])
def test_learning_rates_scales_and_masters_enter(engine: str) -> None:
    model = GPT(dropout=0.0)
    masters = {p: p.detach().clone() for p in model.parameters()}
    model.bfloat16()
    x = torch.randint(0, 128, (2, 16))
    loss_fn = lambda: F.cross_entropy(model(x).flatten(0, 1).float(), x.flip(1).flatten())
    groups = [{"params": [p for p in model.parameters() if p.dim() == dim], "lr": 0.01 * dim} for dim in (1, 2)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_fn()).backward()
    resident, lazy = both(optimizer, masters=masters, scaler=scaler)
    unscaled = Direction.from_optimizer(optimizer, masters=masters, resident=False)
    assert lazy.slope == pytest.approx(resident.slope, rel=1e-12)
    assert unscaled.slope == pytest.approx(1024 * lazy.slope, rel=1e-2)
    expected = engine_losses(engine, model, loss_fn, resident, STEP_SIZES)
    assert engine_losses(engine, model, loss_fn, lazy, STEP_SIZES) == pytest.approx(expected, rel=1e-6)
    shares = [retained_share(track(direction.moves()), range(99), -1e-3) for direction in (resident, lazy)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-9)
    assert shares[0] != 1


def test_parameters_split_and_gathered_move_as_wholes() -> None:
    """Views are taken of every state tensor alike, tied and sliced weights included."""

    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(12, 8))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = F.embedding(x, self.table).sum(1), *self.table.chunk(2)
            return q @ k.T @ v[:, 2:].mT.mT + self.table[3:9].unbind(0)[1][:6]

    model = Sliced()
    x, y = torch.randint(0, 12, (4, 3)), torch.randn(4, 6)
    loss_fn = lambda: F.mse_loss(model(x), y)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_fn().backward()
    resident, lazy = both(optimizer)
    expected = engine_losses("inplace", model, loss_fn, resident, STEP_SIZES)
    assert engine_losses("virtual", model, loss_fn, lazy, STEP_SIZES) == pytest.approx(expected, rel=1e-6)


def test_state_laid_out_unlike_its_parameter_is_taken_into_memory() -> None:
    model = nn.Linear(4, 3, bias=False)
    model.weight.grad = torch.randn(4, 3).t()
    resident, lazy = both(torch.optim.SGD(model.parameters(), lr=0.1))
    loss_fn = lambda: model(torch.ones(1, 4)).square().sum()
    expected = engine_losses("inplace", model, loss_fn, resident, STEP_SIZES)
    assert engine_losses("virtual", model, loss_fn, lazy, STEP_SIZES) == pytest.approx(expected, rel=1e-6)


# Memory


def scene() -> tuple[nn.Module, Callable[[], Tensor], torch.optim.Optimizer]:
    model = GPT(vocabulary=512, width=128, layers=4, dropout=0.0)
    x = torch.randint(0, 512, (1, 16))
    loss_fn = lambda: F.cross_entropy(model(x).flatten(0, 1), x.flip(1).flatten())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_fn().backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_fn().backward()
    return model, loss_fn, optimizer


def loss_of(model: nn.Module) -> Tensor:
    return F.mse_loss(model(torch.eye(6)), torch.ones(6, 4))


def peak_of_a_measurement(resident: bool) -> tuple[int, nn.Module]:
    """Bytes at the peak of direction and measurement, above those of a plain forward pass."""
    model, loss_fn, optimizer = scene()

    def measure() -> None:
        direction = Direction.from_optimizer(optimizer, resident=resident)
        sharpkern.critical_sharpness(model, loss_fn, direction, engine="virtual")

    # The first two run checks.
    measure()
    measure()
    with torch.no_grad():
        plain = peak_bytes(loss_fn)
    return peak_bytes(measure) - plain, model


def test_neither_direction_nor_copy_of_the_model_exists() -> None:
    extra, model = peak_of_a_measurement(resident=False)
    largest = max(bytes_of([p]) for p in model.parameters())
    # The rest is samples of every tensor, which do not grow with it.
    assert extra <= 1.4 * largest
    extra, model = peak_of_a_measurement(resident=True)
    assert extra > bytes_of(model.parameters())


def test_slope_and_norm_need_some_numbers_per_parameter() -> None:
    model, _, optimizer = scene()
    make = lambda: Direction.from_optimizer(optimizer, resident=False)
    make()
    assert peak_bytes(make) <= 64 * len(list(model.parameters()))


def test_on_a_gpu_the_sums_over_a_step_have_no_scratch() -> None:
    pytest.importorskip("triton", reason="triton is a Linux package")
    from tests.helpers.compiled import recorded
    from tests.helpers.launches import ADAM, step_sums

    theta, grad, exp_avg, exp_avg_sq = (torch.zeros(1 << 20) for _ in range(4))
    with recorded("sm_90") as launches:
        peak = peak_bytes(lambda: step_sums("adam", theta, grad, (exp_avg, exp_avg_sq, None), ADAM))
    launch, _ = launches
    # Two sums for every program and in the end, a table, which is put together from four, and the nine hyperparameters.
    num_programs = launch.grid[0]
    assert peak <= 16 * (num_programs + 1) + 4 * (16 * num_programs + 64) + 64
    assert peak < theta.nbytes // 100
    # There is no decay for which the weights would be read.
    assert launch.arguments["DTYPES"][1] is None


def test_elsewhere_they_are_taken_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharpkern.ops.arithmetic.CPU_CHUNK", 1 << 12)
    theta, grad, buffer = (torch.ones(1 << 10, 1 << 10) for _ in range(3))
    # Three chunks of float64.
    assert peak_bytes(lambda: ops.sgd_sums(theta, grad, buffer, momentum=0.9)) <= 3 * (8 << 12)


# How long it is true


def test_it_is_refused_once_the_state_has_changed() -> None:
    model, loss_fn, optimizer = scene()
    resident, lazy = both(optimizer)
    optimizer.step()
    assert resident.bind(model) is resident
    with pytest.raises(ValueError, match=r"tensors written since.*or the step itself.*resident=True where it is to"):
        sharpkern.critical_sharpness(model, loss_fn, lazy)


UNCOUNTED: dict[str, tuple[int, Callable[[Any], torch.optim.Optimizer]]] = {
    "fused AdamW": (1, lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True)),
    "fused SGD with momentum": (1, lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, fused=True)),
    "the first step of AdamW": (0, lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)),
    "SGD with decay": (0, lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.1)),
}


@pytest.mark.parametrize("name", UNCOUNTED)
def test_steps_that_autograd_does_not_count_are_noticed(name: str) -> None:
    num_steps, make = UNCOUNTED[name]
    model, loss_fn, _ = scene()
    optimizer = make(model.parameters())
    for _ in range(num_steps):
        optimizer.step()
    lazy = Direction.from_optimizer(optimizer, resident=False)
    assert lazy.bind(model) is lazy
    optimizer.step()
    with pytest.raises(ValueError, match="written since"):
        sharpkern.critical_sharpness(model, loss_fn, lazy)
    with pytest.raises(ValueError, match="written since"):
        _ = lazy.tensors


def test_a_step_that_leaves_the_direction_as_it_is_does_not_matter() -> None:
    model, _, _ = scene()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    resident, lazy = both(optimizer)
    optimizer.step()
    assert lazy.bind(model) is lazy
    assert all(map(torch.equal, resident.tensors, lazy.tensors))


def test_it_is_refused_once_the_gradient_is_zeroed_in_place() -> None:
    model, loss_fn, optimizer = scene()
    _, lazy = both(optimizer)
    optimizer.zero_grad(set_to_none=False)
    with pytest.raises(ValueError, match="written since"):
        sharpkern.critical_sharpness(model, loss_fn, lazy)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("how", ["deep copy", "pickle", "copy"])
def test_a_copy_is_as_true_as_what_it_was_made_of(how: str, resident: bool) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    loss_of(model).backward()
    direction = Direction.from_optimizer(optimizer, resident=resident)
    copied: Callable[[Any], Any] = {
        "deep copy": copy.deepcopy,
        "pickle": lambda both: pickle.loads(pickle.dumps(both)),
        "copy": lambda both: (both[0], copy.copy(both[1])),
    }[how]
    other_model, other = copied((model, direction))
    assert other.bind(other_model) is other
    assert all(map(torch.equal, other.tensors, direction.tensors))
    measured = sharpkern.critical_sharpness(other_model, lambda: loss_of(other_model), other)
    assert measured.sharpness == sharpkern.critical_sharpness(model, lambda: loss_of(model), direction).sharpness
    if how != "copy":
        with pytest.raises(ValueError, match="copies hold parameters of their own"):
            other.bind(model)
    if not resident:
        optimizer.zero_grad(set_to_none=False)
        stale_model, stale = copied((model, direction))
        with pytest.raises(ValueError, match="must hold what it was made with, got tensors written since"):
            stale.bind(stale_model)


def test_a_copy_by_name_is_as_true_as_what_it_was_made_of() -> None:
    before = {"weight": torch.ones(2, 3)}
    direction = pickle.loads(pickle.dumps(Direction.between(before, {"weight": torch.zeros(2, 3)}, 1.0)))
    assert direction.bind(nn.Linear(3, 2)).norm_sq == 6


def test_measuring_in_place_does_not_spoil_it() -> None:
    model, loss_fn, optimizer = scene()
    _, lazy = both(optimizer)
    first, second = (
        sharpkern.critical_sharpness(model, loss_fn, lazy, engine=engine) for engine in ("inplace", "virtual")
    )
    assert first.sharpness == pytest.approx(second.sharpness, rel=1e-3)


def test_gradients_that_are_not_finite_are_named() -> None:
    model, _, optimizer = scene()
    next(model.parameters()).grad[0, 0] = torch.nan
    with pytest.raises(sharpkern.NoUpdateError, match=r"gradient of parameter 0 of group 0.*must be finite"):
        Direction.from_optimizer(optimizer, resident=False)


# What is the default


def test_it_is_the_default_where_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, optimizer = scene()
    assert Direction.from_optimizer(optimizer).nbytes > 0
    monkeypatch.setattr(ops, "has_kernels", lambda device: True)
    assert Direction.from_optimizer(optimizer).nbytes == 0
    assert Direction.from_optimizer(optimizer, resident=True).nbytes > 0


def test_any_other_optimizer_has_its_direction_in_memory() -> None:
    model, _, _ = scene()
    model.zero_grad()
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    direction = Direction.from_optimizer(torch.optim.NAdam(model.parameters(), lr=1e-3), resident=False)
    assert direction.nbytes > 0


@pytest.mark.parametrize("case", TORCH_CASES, ids=lambda case: case.name)
def test_calls_that_kernels_answer_give_the_same_losses(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, with torch in the place of the kernels."""
    model, optimizer, loss_fn = trained(case, OPTIMIZERS["adamw"])
    resident, _ = both(optimizer)
    expected = engine_losses("virtual", model, loss_fn, resident, STEP_SIZES)
    monkeypatch.setattr(ops, "has_kernels", lambda device: True)
    assert engine_losses("virtual", model, loss_fn, resident, STEP_SIZES) == pytest.approx(expected, rel=1e-6)
