"""Closures and models off the beaten track: right, or refused, or handed to the other engine; never silently wrong."""

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern
from tests.engines.test_non_intrusive import differing, snapshot
from tests.helpers.models import MLP
from tests.helpers.oracle import deep_copy_losses, engine_losses, random_direction

STEP_SIZES = (0.0, 0.01, 0.1)
ENGINES = ["virtual", "inplace"]
Closure = Callable[[nn.Module], Callable[[], Tensor]]


def squared(model: nn.Module) -> Callable[[], Tensor]:
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
    return lambda: model(x).square().mean()


def gradient_penalty(model: nn.Module) -> Callable[[], Tensor]:
    loss_fn = squared(model)

    def penalised() -> Tensor:
        with torch.enable_grad():
            loss = loss_fn()
            gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            return loss + sum(g.square().sum() for g in gradients)

    return penalised


def per_example(model: nn.Module) -> Callable[[], Tensor]:
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
    return lambda: torch.vmap(lambda row: model(row).square().mean())(x).mean()


def jacobian(model: nn.Module) -> Callable[[], Tensor]:
    x = torch.randn(16, generator=torch.Generator().manual_seed(3))
    return lambda: torch.func.jacrev(model)(x).square().mean()


@pytest.mark.parametrize("closure", [gradient_penalty, per_example, jacobian])
@pytest.mark.parametrize("engine", ENGINES)
def test_closures_that_transform_or_differentiate(closure: Closure, engine: str) -> None:
    model = MLP()
    direction = random_direction(model)
    expected = deep_copy_losses(model, closure, direction, STEP_SIZES)
    assert engine_losses(engine, model, closure(model), direction, STEP_SIZES) == pytest.approx(expected, rel=1e-6)


def labelled_by_itself(model: nn.Module) -> Callable[[], Tensor]:
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))

    def loss_fn() -> Tensor:
        with torch.inference_mode():
            labels = model(x).argmax(-1)
        return F.cross_entropy(model(x), labels)

    return loss_fn


def compared_with_itself(model: nn.Module) -> Callable[[], Tensor]:
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))

    def loss_fn() -> Tensor:
        soft = model(x).softmax(-1)
        with torch.inference_mode():
            sharp = (2 * model(x)).softmax(-1)
        return F.mse_loss(soft, sharp)

    return loss_fn


@pytest.mark.parametrize("closure", [labelled_by_itself, compared_with_itself])
@pytest.mark.parametrize("engine", ENGINES)
def test_some_passes_through_the_model_in_inference_mode(closure: Closure, engine: str) -> None:
    model = MLP()
    direction = random_direction(model)
    expected = deep_copy_losses(model, closure, direction, STEP_SIZES)
    assert engine_losses(engine, model, closure(model), direction, STEP_SIZES) == pytest.approx(expected, rel=1e-6)
    assert expected[2] != pytest.approx(expected[0], rel=1e-3)


def test_a_weight_read_in_another_thread_leads_to_the_engine_that_writes() -> None:
    class Threaded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: list[Tensor] = []
            grad = torch.is_grad_enabled()

            def work() -> None:
                with torch.set_grad_enabled(grad):
                    out.append(self.first(x))

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            return self.second(out[0])

    model = Threaded()
    loss_fn = squared(model)
    loss_fn().backward()
    direction = sharpkern.Direction.from_gradients(model)
    with pytest.warns(sharpkern.EngineFallbackWarning, match="other threads"):
        measured = sharpkern.critical_sharpness(model, loss_fn, direction)
    right = sharpkern.critical_sharpness(model, loss_fn, direction, engine="inplace")
    assert (measured.engine, measured.critical_lr) == ("inplace", right.critical_lr)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_module_may_hold_an_alias_of_a_weight(engine: str) -> None:
    class Aliased(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(16, 4))
            self.alias = self[0].weight.detach()
            self.register_buffer("view", self[0].weight.detach()[:1], persistent=False)

    model = Aliased()
    direction = random_direction(model)
    expected = deep_copy_losses(model, squared, direction, STEP_SIZES)
    assert engine_losses(engine, model, squared(model), direction, STEP_SIZES) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_with_max_norm_is_measured_in_place_and_put_back(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(10, 4, max_norm=0.5), nn.Flatten(0, -2), nn.Linear(4, 1))
    tokens = torch.randint(0, 10, (6, 3))
    loss_fn = lambda: model(tokens).square().mean()
    direction = random_direction(model)
    before = snapshot(model)
    with pytest.warns(sharpkern.EngineFallbackWarning, match="max_norm writes its weight"):
        measured = sharpkern.critical_sharpness(model, loss_fn, direction)
    assert measured.engine == "inplace"
    assert differing(before, snapshot(model)) == []
    with pytest.raises(RuntimeError, match="stop"):
        sharpkern.critical_sharpness(model, lambda: loss_fn() + stop(), direction, engine="inplace")
    assert differing(before, snapshot(model)) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_a_frozen_embedding_with_max_norm_is_not_written(engine: str) -> None:
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=0.5), nn.Linear(4, 1))
    tokens = torch.arange(10)
    direction = sharpkern.Direction.from_tensors({"1.weight": torch.ones(1, 4)}, model)
    before = snapshot(model)
    losses = engine_losses(engine, model, lambda: model(tokens).square().mean(), direction, (0.0, 0.1))
    assert losses[0] != losses[1]
    assert differing(before, snapshot(model)) == []


def stop() -> Tensor:
    raise RuntimeError("stop")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_momentum_encoder_is_not_moved_behind_the_runs_back(engine: str) -> None:
    class Momentum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online, self.target = nn.Linear(16, 4), nn.Linear(16, 4).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                for q, k in zip(self.online.parameters(), self.target.parameters(), strict=True):
                    k.mul_(0.99).add_(q, alpha=0.01)
            return self.online(x) - self.target(x)

    model = Momentum()
    direction = sharpkern.Direction.from_tensors({p: torch.ones_like(p) for p in model.online.parameters()}, model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"got a write to a parameter by mul_; .* momentum encoders"):
        sharpkern.critical_sharpness(model, squared(model), direction, engine=engine)
    assert differing(before, snapshot(model)) == []


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("engine", ENGINES)
def test_sparse_buffers(layout: torch.layout, engine: str) -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("adjacency", (torch.rand(16, 16) > 0.7).float().to_sparse(layout=layout))
            self.linear = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.adjacency @ x)

    model = Graph()
    loss_fn = squared(model)
    loss_fn().backward()
    measured = sharpkern.critical_sharpness(model, loss_fn, sharpkern.Direction.from_gradients(model), engine=engine)
    assert measured.status == "converged"


@pytest.mark.parametrize("engine", ENGINES)
def test_tensors_whose_memory_was_freed_are_left_alone(engine: str) -> None:
    model = MLP()
    model.cache = torch.randn(1000, 1000)
    model.register_buffer("gathered", torch.randn(1000, 1000))
    for tensor in (model.cache, model.gathered):
        tensor.untyped_storage().resize_(0)
    loss_fn = squared(model)
    assert sharpkern.critical_sharpness(model, loss_fn, random_direction(model), engine=engine).forwards > 2
    assert model.cache.untyped_storage().nbytes() == model.gathered.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_generators_of_a_module_are_rewound(engine: str) -> None:
    class Dropping(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(16, 32), nn.Linear(32, 4))
            self.generator = torch.Generator().manual_seed(5)
            self.history = [torch.zeros(1)]

        def forward(self, x: Tensor) -> Tensor:
            self.history[0] += 1
            hidden = self[0](x)
            return self[1](hidden * (torch.rand(hidden.shape, generator=self.generator) > 0.5))

    model = Dropping()
    state = model.generator.get_state()
    measured = sharpkern.critical_sharpness(model, squared(model), random_direction(model), engine=engine)
    assert measured.forwards > 2
    assert torch.equal(model.generator.get_state(), state)
    assert model.history[0] == 0


def test_a_base_loss_of_another_dropout_mask_is_compared_and_not_used() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5), nn.Linear(64, 4))
    loss_fn = squared(model)
    direction = random_direction(model)
    own = sharpkern.critical_sharpness(model, loss_fn, direction)
    torch.manual_seed(11)
    stale = loss_fn().item()
    torch.manual_seed(12)
    for _ in range(5):
        measured = sharpkern.critical_sharpness(model, loss_fn, direction, base_loss=stale)
        assert measured.base_loss not in (stale, own.base_loss)
        assert measured.status == "converged"


def test_a_closure_with_a_backward_pass_is_told_so() -> None:
    model = MLP()
    loss_fn = squared(model)
    loss_fn().backward()

    def stepping() -> Tensor:
        loss = loss_fn()
        loss.backward()
        return loss

    before = snapshot(model)
    with pytest.raises(ValueError, match=r"take backward\(\) out of it, or wrap .*enable_grad"):
        sharpkern.critical_sharpness(model, stepping, random_direction(model))
    assert differing(before, snapshot(model)) == []


def test_warnings_point_at_the_callers_line() -> None:
    model = MLP()
    loss_fn = squared(model)
    with pytest.warns(sharpkern.LossPrecisionWarning) as caught:
        sharpkern.critical_sharpness(model, lambda: loss_fn().bfloat16(), random_direction(model))
    assert caught[0].filename == __file__


def test_ignored_labels_do_not_make_the_loss_more_exact() -> None:
    from sharpkern.engines.evaluation.precision import LossPrecision

    precision = LossPrecision()
    labels = torch.tensor([1, 2, -100, -100])
    precision.widen_loss((torch.zeros(4, 5), labels), {})
    assert precision.num_targets == 2
    assert F.cross_entropy(torch.zeros(4, 5), labels) > 0


@pytest.mark.parametrize("engine", ["virtual", "batched", "inplace"])
def test_what_a_failed_pass_held_is_freed_at_once(engine: str) -> None:
    model, x = MLP(), torch.randn(4, 16)
    model(x).sum().backward()
    direction = sharpkern.Direction.from_gradients(model)
    held, calls = weakref.WeakSet(), 0

    def loss_fn() -> torch.Tensor:
        nonlocal calls
        calls += 1
        activations = model(x)
        held.add(activations)
        raise ValueError("no loss")

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ValueError, match="no loss"):
            sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine)
        assert (len(held), calls > 0) == (0, True)
    finally:
        gc.enable()


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_closure_that_runs_out_of_batches_says_so(tasks: int) -> None:
    model = MLP()
    model(torch.ones(1, 16)).sum().backward()
    direction = sharpkern.Direction.from_gradients(model)
    batches = iter([torch.ones(4, 16)] * 4)
    loss_fn = lambda: model(next(batches)).square().mean()
    names = ["a", "b"][:tasks]
    with pytest.raises(StopIteration):
        sharpkern.relative_critical_sharpness(model, dict.fromkeys(names, loss_fn), direction)
