"""Models under torch.func.vmap, layer by layer: right as they are, or refused with the cause; never silently wrong."""

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern
from sharpkern.engines.batched.engine import BatchedEngine
from sharpkern.engines.virtual.mode import VirtualParameters
from sharpkern.ops import arithmetic
from tests.engines.test_batched_closures import STEP_SIZES, X, assert_right, network
from tests.helpers.cases import Case
from tests.helpers.oracle import (
    LossFn,
    assert_as_exact_as_copies,
    deep_copy_losses,
    engine_losses,
    engine_on,
    random_direction,
)

TOKENS = torch.randint(0, 10, (4, 6), generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Calling(nn.Module):
    """A function of modules or parameters, and of the input."""

    def __init__(self, call: Callable[..., Tensor], *held: Any) -> None:
        super().__init__()
        self.held = nn.ModuleList(held) if isinstance(held[0], nn.Module) else nn.ParameterList(held)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, *self.held)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(4)))


def attending(**options: Any) -> nn.Module:
    def call(x: Tensor, layer: nn.Module) -> Tensor:
        x = x.view(2, 8, 16)
        return layer(x, x, x, **options)[0]

    return Calling(call, nn.MultiheadAttention(16, 4, dropout=0.1, batch_first=True))


def without_tokens(x: Tensor, *experts: Tensor) -> Tensor:
    """The last expert has none."""
    out = x[:, :5]
    for e in range(2):
        rows = torch.arange(e, 16, 2)
        out = out.index_add(0, rows, x[rows] @ experts[e])
    return out


def between(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), layer, nn.Linear(8, 4))


# The input, and models of it.
LAYERS: dict[str, tuple[Tensor, Callable[[], nn.Module]]] = {
    "0-dim parameters": (X, lambda: Calling(lambda x, g, b: (x * g).abs().pow(b), parameter(), parameter())),
    "tied": (X, lambda: Calling(lambda x, layer: F.linear(F.relu(layer(x)), layer.weight.t()), nn.Linear(16, 8))),
    "stacked": (
        X,
        lambda: Calling(lambda x, w: sum(x @ part for part in w) + torch.bmm(x[None], w[:1]), parameter(3, 16, 5)),
    ),
    "chunked": (X, lambda: Calling(lambda x, w: sum(x @ part.T for part in w.chunk(2)), parameter(8, 16))),
    "chosen experts": (
        X,
        lambda: Calling(lambda x, w: torch.einsum("bi,bio->bo", x, w[torch.arange(16) % 3]), parameter(3, 16, 5)),
    ),
    "without tokens": (X, lambda: Calling(without_tokens, *(parameter(16, 5) for _ in range(3)))),
    "concatenated": (X, lambda: Calling(lambda x, a, b: x @ torch.cat([a, b], 1), parameter(16, 4), parameter(16, 2))),
    "positions": (
        X,
        lambda: Calling(lambda x, p: (x + F.interpolate(p, 16, mode="linear")[0]).square(), parameter(1, 1, 9)),
    ),
    "cloned and written": (X, lambda: Calling(lambda x, w: x @ w.clone().mul_(2), parameter(16, 4))),
    "Conv1D": (X, lambda: Calling(lambda x, w, b: torch.addmm(b, x, w), parameter(16, 4), parameter(4))),
    "one output": (X, lambda: Calling(F.linear, parameter(16))),
    "bias of one element": (X, lambda: Calling(F.linear, parameter(4, 16), parameter(1))),
    # As many samples as step sizes, which are easily taken for each other.
    "0-dim bias": (X[:5], lambda: Calling(F.linear, parameter(4, 16), parameter())),
    "bias by sample": (X[:5], lambda: Calling(F.linear, parameter(4, 16), parameter(5, 1))),
    "plain bias by sample": (X, lambda: Calling(lambda x, w: F.linear(x, w, X[:, :1]), parameter(4, 16))),
    "in place": (X, lambda: between(nn.ReLU(inplace=True))),
    "LayerNorm": (X, lambda: between(nn.LayerNorm(8))),
    "LayerNorm without bias": (X, lambda: between(nn.LayerNorm(8, bias=False))),
    "RMSNorm": (X, lambda: between(nn.RMSNorm(8))),
    "GroupNorm": (X, lambda: between(nn.GroupNorm(2, 8))),
    "BatchNorm": (X, lambda: between(nn.BatchNorm1d(8, momentum=None))),
    "BatchNorm used twice": (
        X,
        lambda: Calling(lambda x, layer, norm: norm(norm(layer(x)).exp()), nn.Linear(16, 8), nn.BatchNorm1d(8)),
    ),
    "BatchNorm without statistics": (X, lambda: between(nn.BatchNorm1d(8, track_running_stats=False))),
    "PReLU": (X, lambda: between(nn.PReLU())),
    "spectral norm in eval": (X, lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(16, 8)).eval()),
    "weight norm": (X, lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 8))),
    "orthogonal": (X, lambda: nn.utils.parametrizations.orthogonal(nn.Linear(16, 8))),
    "bilinear": (X, lambda: Calling(lambda x, layer: layer(x, x), nn.Bilinear(16, 16, 4))),
    "embedding": (TOKENS, lambda: nn.Sequential(nn.Embedding(10, 8, padding_idx=3), nn.Linear(8, 4))),
    "embedding bag": (TOKENS, lambda: nn.Sequential(nn.EmbeddingBag(10, 8), nn.Linear(8, 4))),
    "convolutions": (
        IMAGES,
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), nn.MaxPool2d(2), nn.ConvTranspose2d(6, 3, 3)
        ),
    ),
    "channels last": (
        IMAGES,
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6)).to(memory_format=torch.channels_last),
    ),
    "attention": (X, attending),
    "attention without weights": (X, lambda: attending(need_weights=False)),
    "attention, fast path": (X, lambda: attending(need_weights=False).eval()),
    "encoder, fast path": (
        X,
        lambda: Calling(
            lambda x, layer: layer(x.view(2, 8, 16)),
            nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2),
        ).eval(),
    ),
    "recurrent cell": (X, lambda: Calling(lambda x, cell: cell(x), nn.GRUCell(16, 8))),
}


def mean_square(x: Tensor) -> Callable[[nn.Module], LossFn]:
    return lambda model: lambda: model(x).square().mean()


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_are_batched(name: str) -> None:
    x, build = LAYERS[name]
    assert_right(build(), mean_square(x))


def test_a_model_in_float64() -> None:
    model = network().double()
    direction = random_direction(model)
    closure = mean_square(X.double())
    expected = deep_copy_losses(model, closure, direction, STEP_SIZES)
    losses = engine_losses("batched", model, closure(model), direction, STEP_SIZES)
    assert losses == pytest.approx(expected, rel=1e-14, abs=0)


def widened(model: nn.Module) -> LossFn:
    """A loss that is not rounded to 16 bits."""

    def loss_fn() -> Tensor:
        y = model(X.to(model[0].weight))
        return y.to(torch.promote_types(y.dtype, torch.float32)).square().mean()

    return loss_fn


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_in_sixteen_bits(dtype: torch.dtype) -> None:
    build = lambda: nn.Sequential(nn.Linear(16, 256, bias=False), nn.GELU(), nn.Linear(256, 10, bias=False))
    assert_as_exact_as_copies(Case("network", build, widened), "batched", dtype)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_convolutions_along_a_direction_that_is_worked_out(amsgrad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weights are formed under torch.func.vmap, by one call for all step sizes."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    loss_fn = mean_square(IMAGES)(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=amsgrad)
    for _ in range(2):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
    direction = sharpkern.Direction.from_optimizer(optimizer, resident=False)
    one_by_one = engine_losses("virtual", model, loss_fn, direction, STEP_SIZES)
    formed: list[int] = []
    empty = arithmetic.empty_steps
    monkeypatch.setattr(
        arithmetic, "empty_steps", lambda like, num, *rest: (formed.append(num), empty(like, num, *rest))[1]
    )
    at_once = engine_losses("batched", model, loss_fn, direction, STEP_SIZES)
    assert at_once == pytest.approx(one_by_one, rel=1e-6)
    assert at_once[3] != pytest.approx(at_once[0], rel=1e-3)
    assert formed == [len(STEP_SIZES)] * 4


LAYERS_REFUSED: dict[str, tuple[Tensor, Callable[[], nn.Module], str]] = {
    "spectral norm": (X, lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(16, 8)), "div.out"),
    "recurrent": (X, lambda: Calling(lambda x, layer: layer(x)[0], nn.GRU(16, 8)), "gru"),
    "randomised": (X, lambda: between(nn.RReLU()), "rrelu"),
    "plain input written": (X, lambda: Calling(lambda x, w: x.clone().add_(w), parameter(16)), "broadcast shape"),
    "read by .item()": (X, lambda: Calling(lambda x, w: x * w.item(), parameter()), r"\.item\(\)"),
}


@pytest.mark.parametrize("name", LAYERS_REFUSED)
def test_layers_that_are_refused(name: str) -> None:
    x, build, reason = LAYERS_REFUSED[name]
    model = build()
    with pytest.raises(sharpkern.EngineUnsupportedError, match=reason):
        engine_losses("batched", model, mean_square(x)(model), random_direction(model), STEP_SIZES)
    assert_right(model, mean_square(x), "virtual")


def evaluated_after_training(model: nn.Module) -> LossFn:
    def loss_fn() -> Tensor:
        loss = model(X).square().mean()
        model.eval()
        loss = loss + model(X).square().mean()
        model.train()
        return loss

    return loss_fn


def penalised_by_variances(model: nn.Module) -> LossFn:
    return lambda: model(X).square().mean() + model[1].running_var.square().sum()


def normalised_again(model: nn.Module) -> LossFn:
    first, norm, last = model

    def loss_fn() -> Tensor:
        hidden = first(X)
        normed = norm(hidden)
        return last(normed + F.batch_norm(hidden, norm.running_mean, running_var=norm.running_var)).square().mean()

    return loss_fn


@pytest.mark.parametrize("closure", [evaluated_after_training, penalised_by_variances, normalised_again])
def test_running_statistics_that_are_updated_and_then_read(
    closure: Callable[[nn.Module], LossFn], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = between(nn.BatchNorm1d(8))
    loss_fn, direction = closure(model), random_direction(model)
    assert_right(model, closure, "virtual")
    with pytest.raises(
        sharpkern.EngineUnsupportedError, match="updates running statistics of a norm, and then reads them"
    ):
        engine_losses("batched", model, loss_fn, direction, STEP_SIZES)
    right = engine_losses("virtual", model, loss_fn, direction, STEP_SIZES)
    monkeypatch.setattr(VirtualParameters, "_watch_statistics", lambda *_: None)
    wrong = engine_losses("batched", model, loss_fn, direction, STEP_SIZES)
    assert wrong[3] != pytest.approx(right[3], rel=1e-3), "the trap no longer springs"


def test_running_statistics_may_be_read_before_their_update() -> None:
    closure = lambda model: lambda: model[1].running_var.square().sum() + model(X).square().mean()
    assert_right(between(nn.BatchNorm1d(8)), closure)


def max_norm() -> tuple[nn.Module, LossFn]:
    model = nn.Sequential(nn.Embedding(10, 8, max_norm=0.5), nn.Linear(8, 4))
    return model, mean_square(TOKENS)(model)


def aliased() -> tuple[nn.Module, LossFn]:
    """An alias where nobody looks for one: variables of Python modules are not followed."""
    model, elsewhere = nn.Linear(16, 4), ModuleType("elsewhere")
    elsewhere.weight = model.weight.detach()
    return model, lambda: F.linear(X, elsewhere.weight, model.bias).square().mean()


def aliased_in_reach() -> tuple[nn.Module, LossFn]:
    model = nn.Linear(16, 4)
    alias = model.weight.detach()
    return model, lambda: F.linear(X, alias, model.bias).square().mean()


def read_by_numpy() -> tuple[nn.Module, LossFn]:
    model = nn.Linear(16, 4)
    return model, lambda: model(X).square().mean() + float(model.weight.detach().numpy().std())


def read_in_another_thread() -> tuple[nn.Module, LossFn]:
    model = network()

    def loss_fn() -> Tensor:
        out: list[Tensor] = []
        grad = torch.is_grad_enabled()

        def work() -> None:
            with torch.set_grad_enabled(grad):
                out.append(model[0](X))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return model[2](out[0]).square().mean()

    return model, loss_fn


def statistics_of_what_is_shared() -> tuple[nn.Module, LossFn]:
    """All step sizes share the input of the norm, and each scales it by itself."""
    model = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 4))
    return model, lambda: model(X).square().mean() + model[0].running_var.square().sum()


def statistics_by_an_alias() -> tuple[nn.Module, LossFn]:
    model = between(nn.BatchNorm1d(8))
    variances = model[1].running_var.view(2, 4)
    return model, lambda: model(X).square().mean() + variances.square().sum()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (max_norm, "max_norm writes its weight"),
        (aliased, "aliases of weights"),
        (aliased_in_reach, "linear reads parameters through a tensor that shares their memory"),
        (read_by_numpy, r"memory by numpy\(\)"),
        (read_in_another_thread, "other threads"),
        (statistics_of_what_is_shared, "updates running statistics"),
        (statistics_by_an_alias, "updates running statistics"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_reads_that_nobody_sees_are_refused(make: Callable[[], tuple[nn.Module, LossFn]], reason: str) -> None:
    model, loss_fn = make()
    loss_fn().backward()
    direction = random_direction(model)
    with pytest.raises(sharpkern.EngineUnsupportedError, match=reason):
        engine_losses("batched", model, loss_fn, direction, STEP_SIZES)


def test_without_coverage_a_hidden_read_is_a_wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss_fn = aliased()
    direction = random_direction(model)
    right = engine_losses("inplace", model, loss_fn, direction, STEP_SIZES)
    monkeypatch.setattr(BatchedEngine, "_unread", lambda self: set())
    wrong = engine_losses("batched", model, loss_fn, direction, STEP_SIZES)
    assert wrong[3] != pytest.approx(right[3], rel=1e-3), "the trap no longer springs"


def test_unused_experts_are_looked_for_once() -> None:
    model = LAYERS["without tokens"][1]()
    calls: list[None] = []
    loss_fn = lambda: (calls.append(None), model(X).square().mean())[1]
    with engine_on("batched", model, loss_fn, random_direction(model)) as (engine, _):
        for num_calls in (3, 4, 5):
            engine.losses(STEP_SIZES)
            assert len(calls) == num_calls
