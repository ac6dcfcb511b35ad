"""Parameters on one memory: a real step moves it once for each of them, and what is measured is that step."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern
from sharpkern import Direction
from sharpkern.engines.session import Session, in_session
from sharpkern.integrations import around_step
from tests.helpers.oracle import engine_losses

ENGINES = ["virtual", "batched", "inplace"]
STEP_SIZES = (0.0, 0.03, 0.3)
Layout = Callable[[Tensor], tuple[Tensor, Tensor]]

LAYOUTS: dict[str, Layout] = {
    "same": lambda memory: (memory.view(6, 6), memory.view(6, 6)),
    "transposed": lambda memory: (memory.view(6, 6), memory.view(6, 6).t()),
    "reshaped": lambda memory: (memory.view(6, 6), memory.view(2, 18)),
    "slice": lambda memory: (memory.view(6, 6), memory.view(6, 6)[2:5]),
    "windows": lambda memory: (memory[:24].view(4, 6), memory[12:].view(4, 6)),
    "columns": lambda memory: (memory.view(6, 6)[:, ::2], memory[1:].view(5, 7)),
    "apart": lambda memory: (memory.view(6, 6)[:, :2], memory.view(6, 6)[:, 2:]),
}
by_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
by_engine = pytest.mark.parametrize("engine", ENGINES)


class Sharing(nn.Module):
    """Two parameters that lie somewhere in one memory, and one that has its own."""

    def __init__(self, layout: Layout = LAYOUTS["transposed"], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        self.a, self.b = (nn.Parameter(part) for part in layout(draw(36) / 3))
        self.c = nn.Parameter(torch.ones((), dtype=dtype))
        self.x, self.y = draw(32, self.a.numel()), draw(32, self.b.numel())

    def forward(self) -> Tensor:
        first, second = torch.tanh(self.x @ self.a.reshape(-1)), F.linear(self.y, self.b.reshape(1, -1)).squeeze(1)
        return (first * second - self.c).square().mean()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def in_training(
    model: Sharing, make: Callable[[nn.Module], torch.optim.Optimizer] = sgd, steps: int = 2
) -> torch.optim.Optimizer:
    """An optimizer that has taken some steps, and holds the gradients of the next one."""
    optimizer = make(model)
    for step in range(steps + 1):
        optimizer.zero_grad()
        model().backward()
        if step < steps:
            optimizer.step()
    return optimizer


def after_real_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, rates: Sequence[float], look: Callable[[], object] | None = None
) -> list:
    """What there is to see after a step of each learning rate; the run is put back after each."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}.values()
    before, state, seen = [storage.clone() for storage in storages], optimizer.state_dict(), []
    state = copy.deepcopy(state)
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        seen.append(look() if look else model().item())
        for storage, content in zip(storages, before, strict=True):
            storage.copy_(content)
        optimizer.load_state_dict(copy.deepcopy(state))
    return seen


@by_engine
@by_layout
@pytest.mark.parametrize(
    "make", [sgd, lambda model: torch.optim.Adam(model.parameters(), lr=0.05)], ids=["sgd", "adam"]
)
def test_losses_are_those_of_real_steps(make: Callable, layout: Layout, engine: str) -> None:
    model = Sharing(layout)
    optimizer = in_training(model, make)
    before = [p.detach().clone() for p in model.parameters()]
    direction = Direction.from_optimizer(optimizer).bind(model)
    losses = engine_losses(engine, model, model, direction, STEP_SIZES)
    assert losses == pytest.approx(after_real_steps(model, optimizer, STEP_SIZES), rel=1e-9)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@by_layout
def test_the_copy_on_the_host_is_put_back_bit_for_bit(layout: Layout) -> None:
    model = Sharing(layout)
    optimizer = in_training(model)
    before = [p.detach().clone() for p in model.parameters()]

    def evaluate(session: Session) -> list[float]:
        with session.open(session.target(model), "inplace", backup="host") as engine:
            return engine.losses(STEP_SIZES)

    losses = in_session(evaluate, model, Direction.from_optimizer(optimizer), [model])
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert losses == pytest.approx(after_real_steps(model, optimizer, STEP_SIZES), rel=1e-9)


def test_two_optimizers_on_one_memory_move_it_together() -> None:
    model = Sharing()
    optimizer = in_training(model, lambda model: torch.optim.SGD(model.parameters(), lr=0.05))
    both = [torch.optim.SGD([model.a, model.c], lr=0.05), torch.optim.SGD([model.b], lr=0.05)]
    joint, one = Direction.from_optimizer(both), Direction.from_optimizer(optimizer)
    assert (joint.slope, joint.norm_sq) == pytest.approx((one.slope, one.norm_sq))
    losses = [engine_losses("virtual", model, model, direction, STEP_SIZES) for direction in (joint, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@by_layout
@pytest.mark.parametrize("resident", [True, False])
def test_slope_and_norm_are_of_the_one_memory(layout: Layout, resident: bool) -> None:
    model = Sharing(layout)
    optimizer = in_training(model)
    direction = Direction.from_optimizer(optimizer, resident=resident)
    h = 1e-6
    forth, back = engine_losses("inplace", model, model, direction, (h, -h))
    assert direction.slope == pytest.approx((back - forth) / (2 * h), rel=1e-5)
    assert direction.slope == pytest.approx(direction.slope_of({p: p.grad for p in model.parameters()}))
    memory = lambda: torch.cat([model.a.new_empty(0).set_(model.a.untyped_storage()), model.c.detach().view(1)])
    start, (moved,) = memory(), after_real_steps(model, optimizer, [h], memory)
    assert direction.norm_sq == pytest.approx(float(((start - moved) / h).square().sum()), rel=1e-6)


@by_layout
@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_gradient_is_that_of_the_one_memory(layout: Layout, preconditioned: bool) -> None:
    model = Sharing(layout)
    optimizer = in_training(model, lambda model: torch.optim.Adam(model.parameters(), lr=0.05))
    direction = Direction.from_gradients(model, optimizer if preconditioned else None)
    forth, back = engine_losses("inplace", model, model, direction, (1e-6, -1e-6))
    assert direction.slope == pytest.approx((back - forth) / 2e-6, rel=1e-5)
    assert preconditioned or direction.slope == direction.norm_sq


@by_layout
def test_directions_of_batches_alone_add_up_too(layout: Layout) -> None:
    model = Sharing(layout)
    in_training(model, steps=0)
    of_batches, own = sharpkern.gradient_direction(model, [model, model]), Direction.from_gradients(model)
    assert (of_batches.slope, of_batches.norm_sq) == pytest.approx((own.slope, own.norm_sq))
    optimizer = in_training(model, lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0), steps=0)
    adamw = sharpkern.adamw_direction(model, [model], weight_decay=0.0)
    assert adamw.norm_sq == pytest.approx(Direction.from_optimizer(optimizer).norm_sq)


@by_layout
@by_engine
def test_a_parameter_that_is_not_stepped_moves_with_the_memory(engine: str, layout: Layout) -> None:
    model = Sharing(layout)
    optimizer = in_training(model, lambda model: torch.optim.SGD([model.a, model.c], lr=0.05))
    direction = Direction.from_optimizer(optimizer).bind(model)
    losses = engine_losses(engine, model, model, direction, STEP_SIZES)
    assert losses == pytest.approx(after_real_steps(model, optimizer, STEP_SIZES), rel=1e-9)
    shares = layout is not LAYOUTS["apart"]
    # How fast the loss falls by the other one is known to nobody.
    assert (direction.slope is None) == shares


@pytest.mark.parametrize("method", ["forward", "hvp"])
@pytest.mark.parametrize("frozen", [None, "a", "b"])
def test_curvature_is_that_of_the_memory(frozen: str | None, method: str) -> None:
    model, h = Sharing(), 1e-4
    if frozen:
        getattr(model, frozen).requires_grad_(False)
    optimizer = in_training(model, steps=0)
    direction = Direction.from_optimizer(optimizer)
    back, base, forth = engine_losses("inplace", model, model, direction.bind(model), (-h, 0.0, h))
    assert forth == pytest.approx(*after_real_steps(model, optimizer, [h]))
    found = sharpkern.directional_sharpness(model, model, direction, method=method)
    assert found == pytest.approx((forth - 2 * base + back) / (back - forth) * 2 / h, rel=1e-3)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@by_layout
def test_a_monitored_loop_measures_its_own_steps_and_trains_the_same_model(layout: Layout, engine: str) -> None:
    trained = []
    for measured in (False, True):
        model = Sharing(layout)
        make = lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.8, weight_decay=0.01)
        optimizer = in_training(model, make, steps=0)
        monitor = sharpkern.Monitor(model, optimizer, engine=engine, rtol=1e-3)
        for _ in range(4):
            if measured:
                found = monitor(model)
                eta = found.critical_lr
                fall, rise = after_real_steps(model, optimizer, [0.99 * eta, 1.01 * eta])
                assert (found.status, fall < found.base_loss < rise) == ("converged", True)
            optimizer.step()
            optimizer.zero_grad()
            model().backward()
        trained.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*trained, strict=True))


@by_engine
@by_layout
def test_a_displacement_that_was_seen_is_not_added_up(layout: Layout, engine: str) -> None:
    """Both parameters show what a step has made of their one memory."""
    model = Sharing(layout)
    optimizer = in_training(model)
    (after,) = after_real_steps(model, optimizer, [0.3], lambda: copy.deepcopy(model.state_dict()))
    for direction in (Direction.between(model, after, 0.3), Direction.between(model.state_dict(), after, 0.3)):
        direction = direction.bind(model)
        assert engine_losses(engine, model, model, direction, STEP_SIZES) == pytest.approx(
            after_real_steps(model, optimizer, STEP_SIZES), rel=1e-9
        )
        assert direction.norm_sq == pytest.approx(Direction.from_optimizer(optimizer).norm_sq)


def test_displacements_of_ones_own_have_to_agree() -> None:
    model = Sharing()
    delta = torch.randn(6, 6)
    with pytest.raises(ValueError, match=r"'a' and 'b' share memory and must move alike, .* pass the sum"):
        Direction.from_tensors({"a": delta, "b": delta}, model)
    given = [
        Direction.from_tensors(tensors, model).bind(model)
        for tensors in ({"a": delta, "b": delta.t()}, {"a": delta}, {"b": delta.t()})
    ]
    assert len({one.norm_sq for one in given}) == 1
    losses = [engine_losses("virtual", model, model, one, STEP_SIZES) for one in given]
    assert losses[0] == losses[1] == losses[2]
    assert len(set(losses[0])) == 3


@pytest.mark.parametrize("parts", [("a", "b"), ("a",)])
def test_a_step_is_gone_back_over_and_taken_again(parts: tuple[str, ...]) -> None:
    """Each parameter is exchanged with where it was: on one memory in turn, and back in the opposite order."""
    weights, measured = [], []
    for every in (10**9, 1):
        model = Sharing(LAYOUTS["windows"])
        optimizer = torch.optim.Adam([getattr(model, name) for name in parts], lr=0.02)
        steps = iter(range(10))
        around = around_step.AroundStep(
            optimizer,
            lambda steps=steps, every=every: (next(steps) + 1) % every == 0,
            lambda go_back, model=model: measured.append(sharpkern.critical_sharpness(model, model, go_back())),
        )
        for _ in range(4):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
        around.remove()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))
    assert [one.status for one in measured] == ["converged"] * 4


def test_an_interrupt_while_going_back_leaves_the_step_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, taken, write = Sharing(LAYOUTS["windows"]), [], around_step._write
    optimizer = in_training(model, steps=0)
    calls = iter(range(99))

    def interrupted(parameter: Tensor, value: Tensor) -> None:
        if next(calls) == 1:
            parameter.mul_(2)
            raise KeyboardInterrupt
        write(parameter, value)

    def measure(go_back: Callable[[], Direction]) -> None:
        taken.extend(p.detach().clone() for p in model.parameters())
        go_back()

    monkeypatch.setattr(around_step, "_write", interrupted)
    around_step.AroundStep(optimizer, lambda: True, measure)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), taken, strict=True))


def test_what_cannot_be_moved_as_one_is_refused() -> None:
    model = Sharing()
    bits = nn.Parameter(model.a.detach().view(torch.int64), requires_grad=False)
    model.register_parameter("bits", bits)
    with pytest.raises(
        ValueError, match=r"share memory must be of one dtype, got .*float64 and torch.int64 .* 'bits'; give"
    ):
        Direction.from_tensors({"a": torch.ones(6, 6)}, model).bind(model)
    model = Sharing(dtype=torch.bfloat16)
    optimizer, masters = in_training(model, steps=0), {p: p.detach().float() for p in model.parameters()}
    with pytest.raises(ValueError, match="must have no masters, each of which is stepped by itself, got masters"):
        Direction.from_optimizer(optimizer, masters=masters)
    model = nn.Linear(3, 4)
    model.weight = nn.Parameter(torch.randn(1, 3).expand(4, 3))
    model(torch.randn(2, 3)).sum().backward()
    with pytest.raises(ValueError, match=r"'weight' must have memory for each of its elements, got strides \[0, 1\]"):
        Direction.from_gradients(model)
    model = Sharing()
    with pytest.raises(ValueError, match=r"'a' and 'b' must not share memory"):
        sharpkern.hessian_sharpness(model, model)


def test_a_parameter_that_is_not_read_is_not_taken_for_one_that_is_read_unseen() -> None:
    model = Sharing()
    direction = Direction.from_tensors({"a": torch.randn(6, 6)}, model)
    loss_fn = lambda: (torch.tanh(model.x @ model.a.flatten()) - model.c).square().mean()
    assert sharpkern.critical_sharpness(model, loss_fn, direction, engine="virtual").status in ("converged", "ascent")


class Aliased(Sharing):
    """Reads its parameters also through tensors that were made of them before, in the ways that people keep such."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turned", self.a.detach().t(), persistent=False)
        self.parts = {"rows": [self.b.detach()[1:3]]}
        self.complex = torch.view_as_complex(self.a.detach().view(18, 2))

    def forward(self) -> Tensor:
        product = torch.matmul(self.turned, self.parts["rows"][0].t())
        return super().forward() + product.square().mean() + self.complex.conj().sum().imag


# The gradient is of what autograd sees, which the aliases are no part of.
@pytest.mark.filterwarnings("ignore::sharpkern.SlopeMismatchWarning")
@pytest.mark.parametrize("engine", ["auto", "virtual", "inplace"])
def test_aliases_made_before_move_with_the_memory(engine: str) -> None:
    model = Aliased()
    outside = model.b.detach()[0]
    loss_fn = lambda: model() + outside.square().sum()
    optimizer = in_training(model, steps=0)
    before = [p.detach().clone() for p in model.parameters()]
    direction = Direction.from_optimizer(optimizer)
    found = sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine)
    assert found.engine == ("inplace" if engine == "inplace" else "virtual")
    rates = [eta for eta, _ in found.probes]
    expected = after_real_steps(model, optimizer, rates, lambda: loss_fn().item())
    assert [loss for _, loss in found.probes] == pytest.approx(expected)
    # Also where the same step size is asked for again, with nothing written in between.
    assert len(set(engine_losses(found.engine, model, loss_fn, direction, (0.1, 0.1)))) == 1
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_what_an_alias_cannot_be_read_for_is_measured_otherwise_or_refused() -> None:
    model = Aliased()
    direction = Direction.from_tensors({"a": torch.randn(6, 6)}, model)
    with pytest.raises(sharpkern.EngineUnsupportedError, match="through a tensor that shares their memory"):
        sharpkern.critical_sharpness(model, model, direction, engine="batched")
    opaque = lambda: model() + float(model.turned.numpy().sum())
    with pytest.warns(sharpkern.EngineFallbackWarning, match="numpy reads parameters through a tensor"):
        found = sharpkern.critical_sharpness(model, opaque, direction)
    assert found.engine == "inplace"
    before = model.a.detach().clone()
    with pytest.raises(ValueError, match="got a write to a parameter by mul_"):
        sharpkern.critical_sharpness(model, lambda: model() + model.turned.mul_(2).sum(), direction)
    assert torch.equal(model.a, before)
