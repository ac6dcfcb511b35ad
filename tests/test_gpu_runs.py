"""Measuring in runs on a GPU: monitors, streams, precision, graphs, memory. What needs no GPU runs on a CPU as well."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern
from sharpkern import ops
from sharpkern.memory.cards import MethodMemory
from tests.helpers.cases import tokens
from tests.helpers.models import GPT
from tests.helpers.oracle import deep_copy_losses, engine_losses, random_direction

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
ENGINES = ["virtual", "batched", "inplace"]


def on_gpu(test: Any) -> Any:
    for mark in ON_GPU:
        test = mark(test)
    return test


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def gpt(device: str | torch.device, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = GPT(context=64, dropout=0.0).to(device, dtype)
    x = tokens(length=64).to(device)
    return model, lambda: F.cross_entropy(model(x[:, :-1]).flatten(0, 1).float(), x[:, 1:].flatten())


def train(model: nn.Module, loss_fn: Callable[[], Tensor], steps: int, **options: Any) -> sharpkern.Monitor:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = sharpkern.Monitor(model, optimizer, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        monitor(loss_fn, loss=loss)
        optimizer.step()
    return monitor


def from_state(model: nn.Module, loss_fn: Callable[[], Tensor]) -> sharpkern.Direction:
    """The next update of AdamW after two steps, worked out of its state."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
    optimizer.zero_grad()
    loss_fn().backward()
    return sharpkern.Direction.from_optimizer(optimizer, resident=False)


@pytest.mark.parametrize("engine", ["auto", "batched"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_monitor_measures_every_step_and_leaves_the_run_as_it_is(device: str, engine: str) -> None:
    model, loss_fn = gpt(device)
    without = copy.deepcopy(model)
    x = tokens(length=64).to(device)
    monitor = train(model, loss_fn, 6, engine=engine, rtol=0.1)
    assert len(monitor.history) == 6
    assert {record.measurement.status for record in monitor.history} <= {"converged", "unresolved", "unbounded"}
    optimizer = torch.optim.AdamW(without.parameters(), lr=1e-3)
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(without(x[:, :-1]).flatten(0, 1).float(), x[:, 1:].flatten()).backward()
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), without.parameters()))


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_on_another_device_than_the_current_one(engine: str) -> None:
    torch.cuda.set_device(0)
    model, loss_fn = gpt("cuda:1")
    direction = from_state(model, loss_fn)
    losses = engine_losses(engine, model, loss_fn, direction, (0.0, 1e-3, 1e-2))
    assert torch.cuda.current_device() == 0
    other, other_loss = gpt("cuda:0")
    other.load_state_dict(model.state_dict())
    assert losses[0] == pytest.approx(other_loss().item(), rel=1e-5)
    resident = sharpkern.Direction.from_tensors(dict(zip(direction.parameters, direction.tensors, strict=True)), model)
    assert losses == pytest.approx(engine_losses("inplace", model, loss_fn, resident, (0.0, 1e-3, 1e-2)), rel=1e-5)


@on_gpu
@pytest.mark.parametrize("engine", ENGINES)
def test_a_measurement_on_a_side_stream(engine: str) -> None:
    model, loss_fn = gpt("cuda")
    direction = from_state(model, loss_fn)
    step_sizes = (0.0, 1e-3, 1e-2, 5e-3)
    expected = engine_losses(engine, model, loss_fn, direction, step_sizes)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        losses = engine_losses(engine, model, loss_fn, direction, step_sizes)
    torch.cuda.current_stream().wait_stream(side)
    assert losses == pytest.approx(expected, rel=1e-6)


@on_gpu
def test_a_closure_that_uses_two_streams() -> None:
    model, _ = gpt("cuda")
    x = tokens(length=64).to("cuda")
    side = torch.cuda.Stream()

    def loss_of(part: Tensor) -> Tensor:
        return F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())

    def loss_fn() -> Tensor:
        half = len(x) // 2
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            second = loss_of(x[half:])
        first = loss_of(x[:half])
        torch.cuda.current_stream().wait_stream(side)
        return (first + second) / 2

    direction = from_state(model, lambda: loss_of(x))
    resident = sharpkern.Direction.from_tensors(dict(zip(direction.parameters, direction.tensors, strict=True)), model)
    step_sizes = (0.0, 1e-3, 1e-2)
    expected = engine_losses("inplace", model, loss_fn, resident, step_sizes)
    for _ in range(5):
        assert engine_losses("virtual", model, loss_fn, direction, step_sizes) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("device", DEVICES)
def test_autocast_with_a_direction_from_state(device: str, engine: str, no_swapping: None) -> None:
    model, plain = gpt(device)

    def loss_fn() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return plain()

    direction = from_state(model, loss_fn)
    tensors = dict(zip(direction.parameters, direction.tensors, strict=True))
    resident = sharpkern.Direction.from_tensors(tensors, model)
    step_sizes = (0.0, 1e-3, 1e-2)
    x = tokens(length=64).to(device)

    def closure(moved: nn.Module) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                return F.cross_entropy(moved(x[:, :-1]).flatten(0, 1).float(), x[:, 1:].flatten())

        return loss

    expected = deep_copy_losses(model, closure, resident, step_sizes)
    assert engine_losses(engine, model, loss_fn, direction, step_sizes) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("engine", ["virtual", "inplace"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_closure_in_inference_mode(device: str, engine: str, no_swapping: None) -> None:
    model, plain = gpt(device)
    direction = from_state(model, plain)
    loss_fn = torch.inference_mode()(plain)
    step_sizes = (0.0, 1e-3, 1e-2)
    expected = engine_losses(engine, model, plain, direction, step_sizes)
    assert engine_losses(engine, model, loss_fn, direction, step_sizes) == pytest.approx(expected, rel=1e-5)


class _Flattening(nn.Module):
    """An LSTM that asks for its weights in one piece at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        self.lstm.flatten_parameters()
        return self.head(self.lstm(x)[0][:, -1])


@pytest.mark.filterwarnings("ignore:RNN module weights")
@pytest.mark.parametrize("engine", ["virtual", "inplace"])
@pytest.mark.parametrize("device", DEVICES)
def test_an_lstm_whose_weights_are_in_one_piece(device: str, engine: str, no_swapping: None) -> None:
    model = _Flattening().to(device)
    x, y = torch.randn(16, 5, 8, device=device), torch.randint(0, 10, (16,), device=device)
    loss_fn = lambda: F.cross_entropy(model(x), y)
    direction = random_direction(model)
    before = [parameter.clone() for parameter in model.parameters()]
    expected = deep_copy_losses(model, lambda moved: lambda: F.cross_entropy(moved(x), y), direction, (0.0, 0.01, 0.1))
    losses = engine_losses(engine, model, loss_fn, direction, (0.0, 0.01, 0.1))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_formed_and_summed_together_is_what_is_formed_and_summed_alone(device: str, dtype: torch.dtype) -> None:
    numbers = (0.1, 1.0, 1.0, 0.1, 0.999, 0.001, 10.0, 0.0316, 1e-8)
    sizes = (1, 63, 1000, 4097, (1 << 18) + 3)
    thetas, grads = ([torch.randn(size, device=device).to(dtype) for size in sizes] for _ in range(2))
    states = [part for size in sizes for part in (torch.randn(size).to(device), torch.rand(size).to(device), None)]
    alpha = torch.full((1,), -0.3, device=device)
    written = [torch.empty_like(theta) for theta in thetas]
    ops.form_steps_("adam", written, thetas, grads, states, alpha, numbers, decoupled=True)
    sums = ops.sum_steps("adam", thetas, grads, states, numbers, decoupled=True)
    for i, (theta, grad) in enumerate(zip(thetas, grads, strict=True)):
        one = ("adam", theta, grad, states[3 * i : 3 * i + 3])
        assert torch.equal(written[i], ops.form_step(*one, alpha, numbers, decoupled=True)[0])
        assert sums[i].tolist() == pytest.approx(ops.step_sums(*one, numbers, decoupled=True).tolist(), rel=1e-12)


@on_gpu
def test_tf32_is_taken_for_the_noise_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        model, loss_fn = gpt("cuda")
        direction = from_state(model, loss_fn)
        coarse = sharpkern.critical_sharpness(model, loss_fn, direction)
        torch.set_float32_matmul_precision("highest")
        fine = sharpkern.critical_sharpness(model, lambda: loss_fn(), direction)
    finally:
        torch.set_float32_matmul_precision(before)
    assert coarse.critical_lr == pytest.approx(fine.critical_lr, rel=0.05)


@on_gpu
@pytest.mark.parametrize("engine", ["virtual", "inplace"])
def test_a_graphed_training_step_beside_a_measurement(engine: str) -> None:
    model, loss_fn = gpt("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        loss_fn().backward()
        optimizer.step()

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def run(measured: bool) -> list[Tensor]:
        # In place: the graph holds addresses.
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(state[0][name])
        for index, parameter in enumerate(model.parameters()):
            for name, value in optimizer.state[parameter].items():
                value.copy_(state[1]["state"][index][name])
        for _ in range(5):
            graph.replay()
            if measured:
                direction = sharpkern.Direction.from_optimizer(optimizer)
                sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine, rtol=0.1)
        return [parameter.clone() for parameter in model.parameters()]

    assert all(map(torch.equal, run(False), run(True)))


@on_gpu
@pytest.mark.parametrize("engine", ["virtual", "inplace"])
def test_peaks_of_memory_are_those_that_are_planned(engine: str) -> None:
    vocabulary, width = 1024, 1024

    def build() -> nn.Module:
        return GPT(vocabulary=vocabulary, width=width, layers=4, dropout=0.0)

    def loss_of(model: nn.Module) -> Tensor:
        x = torch.zeros(1, 16, dtype=torch.int64, device=next(model.parameters()).device)
        return F.cross_entropy(model(x).flatten(0, 1), x.flatten())

    name = {"virtual": "virtual", "inplace": "in place"}[engine]
    plan = sharpkern.memory_plan(build(), loss_of, optimizer="adamw-fp32", progress=False)
    planned: MethodMemory = plan[name, "state"]
    model = build().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of(model).backward()
    optimizer.step()
    direction = sharpkern.Direction.from_optimizer(optimizer)
    loss_fn = lambda: loss_of(model)
    sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine)
    torch.cuda.reset_peak_memory_stats()
    sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine)
    peak = torch.cuda.max_memory_allocated()
    assert peak <= 1.1 * planned.peak_bytes + 2**24


@on_gpu
def test_after_precompiling_a_measurement_is_told_of_no_compiling() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    model, loss_fn = gpt("cuda", torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    states = torch.get_device_module("cuda").get_rng_state()
    before = [parameter.clone() for parameter in model.parameters()]
    assert sharpkern.precompile(model, optimizer) > 0
    assert not optimizer.state
    assert torch.equal(states, torch.get_device_module("cuda").get_rng_state())
    assert all(map(torch.equal, model.parameters(), before))
    loss_fn().backward()
    assert sharpkern.Monitor(model, optimizer, engine="virtual")(loss_fn) is not None


def test_there_is_nothing_to_precompile_on_a_cpu() -> None:
    model = nn.Linear(2, 1)
    assert sharpkern.precompile(model, torch.optim.SGD(model.parameters(), lr=0.1)) == 0
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        sharpkern.precompile(3, torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[arg-type]
