"""Closures under torch.func.vmap: right as they are, or refused with the cause; never silently wrong."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sharpkern
from tests.helpers.models import OutOfSight
from tests.helpers.oracle import LossFn, deep_copy_losses, engine_losses, random_direction

STEP_SIZES = (0.0, 1e-3, 1e-2, 0.1, 0.0)
X = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))

# What is made of the output [16, 10] of a network of X.
Use = Callable[[Tensor], Tensor]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 10))


def ids(function: Any) -> str:
    return str(function.__name__)


# -- what is made of activations --------------------------------------------------------------------------------------


def written_in_place(y: Tensor) -> Tensor:
    y += X[:, :10]
    y *= 2
    y[:, 0] = 0
    return F.relu(y.clamp_(max=3), inplace=True).square().mean()


def plain_tensor_written(y: Tensor) -> Tensor:
    mask = torch.zeros(16, 10)
    mask[3:] = 1
    return (y * mask.mul_(2)).square().mean()


def filled(y: Tensor) -> Tensor:
    out = y.new_zeros(16, 10)
    out[:8] = y[:8]
    return torch.zeros_like(y).copy_(out).square().mean()


def drawn_rows(y: Tensor) -> Tensor:
    return y[torch.randperm(16)[: int(torch.randint(4, 9, ()))]].square().mean()


def noisy(y: Tensor) -> Tensor:
    y = y + torch.empty_like(y).normal_() * torch.rand_like(y.t()).t()
    return (y * torch.empty_like(y).bernoulli_(0.5) + F.gumbel_softmax(y)).square().mean()


def generated(y: Tensor) -> Tensor:
    return (y * torch.rand(y.shape, generator=torch.Generator().manual_seed(7))).square().mean()


def sampled(y: Tensor) -> Tensor:
    actions = torch.distributions.Categorical(logits=y)
    return -actions.log_prob(actions.sample()).mean()


def dropped(y: Tensor) -> Tensor:
    y = F.alpha_dropout(F.dropout(y, 0.2), 0.2, training=True)
    y = F.dropout2d(F.dropout1d(F.dropout(y, 0.1, inplace=True), 0.2).view(2, 8, 2, 5), 0.2)
    return (F.feature_alpha_dropout(y, 0.2, training=True) + F.dropout3d(y, 0.2)).square().mean()


def largest(y: Tensor) -> Tensor:
    return y.flatten().topk(10).values.mean() + y.argmax(1).float().mean() + X.flatten()[y.argmax()]


def chosen_by_a_plain_mask(y: Tensor) -> Tensor:
    return y[X[:, 0] > 0].square().mean()


def printed(y: Tensor) -> Tensor:
    assert "tensor" in repr(y).lower()
    return y.square().mean()


def in_float64(y: Tensor) -> Tensor:
    return y.double().square().mean()


def one_element(y: Tensor) -> Tensor:
    return y.square().mean().view(1, 1)


@torch.inference_mode()
def in_inference_mode(y: Tensor) -> Tensor:
    return y.square().mean()


def margins(y: Tensor) -> Tensor:
    """Functions without a rule."""
    return F.multi_margin_loss(y, torch.arange(16) % 10) + torch.bincount(y.argmax(1), minlength=10).float().var()


def decomposed(y: Tensor) -> Tensor:
    return torch.logdet(y.T @ y + torch.eye(10)) + torch.linalg.svdvals(y).sum()


class WithRule(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


def function_with_a_rule(y: Tensor) -> Tensor:
    return WithRule.apply(y).mean()


RIGHT = [
    written_in_place,
    plain_tensor_written,
    filled,
    drawn_rows,
    noisy,
    generated,
    sampled,
    dropped,
    largest,
    chosen_by_a_plain_mask,
    printed,
    in_float64,
    one_element,
    in_inference_mode,
    margins,
    decomposed,
    function_with_a_rule,
]


def as_closure(use: Use) -> Callable[[nn.Module], LossFn]:
    return lambda model: lambda: use(model(X))


def assert_right(model: nn.Module, closure: Callable[[nn.Module], LossFn], engine: str = "batched") -> None:
    """Fail unless the losses are those of deep copies."""
    direction = random_direction(model)
    expected = deep_copy_losses(model, closure, direction, STEP_SIZES)
    losses = engine_losses(engine, model, closure(model), direction, STEP_SIZES)
    assert losses == pytest.approx(expected, rel=1e-6, abs=0)
    # A product may sum in another order in another place of the batch.
    assert losses[0] == pytest.approx(losses[4], rel=2e-7, abs=0)
    assert losses[0] != pytest.approx(losses[3], rel=2e-7, abs=0)


@pytest.mark.parametrize("use", RIGHT, ids=ids)
def test_closures_that_are_batched(use: Use) -> None:
    assert_right(network(), as_closure(use))


def item(y: Tensor) -> Tensor:
    assert y.mean().item() < 9
    return y.square().mean()


def branch(y: Tensor) -> Tensor:
    loss = y.square().mean()
    return loss if loss < 1e9 else 0 * loss


def total_in_place(y: Tensor) -> Tensor:
    total = torch.zeros(())
    for row in y:
        total += row.square().mean()
    return total


def python_float(y: Tensor) -> Tensor:
    return y.square().mean() * (1 + 0 * float(y.sum()))


def formatted(y: Tensor) -> Tensor:
    assert f"{y.sum():.3f}"
    return y.square().mean()


def listed(y: Tensor) -> Tensor:
    assert y.tolist()
    return y.square().mean()


def numpy_array(y: Tensor) -> Tensor:
    return torch.from_numpy(numpy.square(y.detach().numpy())).mean()


def pointer(y: Tensor) -> Tensor:
    assert y.data_ptr()
    return y.square().mean()


def deep_copied(y: Tensor) -> Tensor:
    return copy.deepcopy(y.detach()).square().mean()


def masked(y: Tensor) -> Tensor:
    return y[y > 0].mean()


def nonzero(y: Tensor) -> Tensor:
    return y.flatten()[(y > -1e9).flatten().nonzero()].square().mean()


def asserted(y: Tensor) -> Tensor:
    assert torch.isfinite(y).all()
    return y.square().mean()


def compared(y: Tensor) -> Tensor:
    return y.square().mean() * (2 if torch.equal(y, y) else 1)


def largest_in_python(y: Tensor) -> Tensor:
    return max(row.square().mean() for row in y)


def out_given(y: Tensor) -> Tensor:
    return torch.mul(y, y, out=torch.empty(16, 10)).mean()


def into_a_plain_tensor(y: Tensor) -> Tensor:
    out = torch.zeros(16, 10)
    out[:8] = y[:8]
    return out.square().mean()


def added_to_a_view(y: Tensor) -> Tensor:
    out = X.clone()
    part = out[:, :10]
    part += y
    return out.square().mean()


def data_set(y: Tensor) -> Tensor:
    out = torch.zeros(16, 10)
    out.data = y.detach()
    return out.square().mean()


def forward_derivative(y: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dropped = F.dropout(forward_ad.make_dual(y, torch.ones_like(y)), 0.5)
        return forward_ad.unpack_dual(dropped.square()).tangent.mean()


def function_without_a_rule(y: Tensor) -> Tensor:
    return OutOfSight.apply(y).mean()


@torch.library.custom_op("sharpkern_tests::square_", mutates_args=("x",))
def square_(x: Tensor) -> None:
    x.mul_(x)


def operation_that_writes(y: Tensor) -> Tensor:
    torch.ops.sharpkern_tests.square_(y)
    return y.mean()


def sparse(y: Tensor) -> Tensor:
    return (X.relu().to_sparse() @ y).square().mean()


REFUSED = {
    item: r"\.item\(\)",
    branch: "data-dependent control flow",
    total_in_place: "broadcast shape",
    python_float: r"\.item\(\)",
    formatted: r"\.item\(\)",
    listed: "data pointer",
    numpy_array: "data pointer",
    pointer: "data pointer",
    deep_copied: "storage",
    masked: "dynamic shape",
    nonzero: "dynamic shape",
    asserted: "data-dependent control flow",
    compared: "aten::equal",
    largest_in_python: "data-dependent control flow",
    out_given: "out=",
    into_a_plain_tensor: "not being vmapped",
    added_to_a_view: "broadcast shape",
    data_set: r"\.data",
    forward_derivative: "dual|forward AD",
    function_without_a_rule: "setup_context",
    operation_that_writes: "sharpkern_tests::square_",
    sparse: "Sparse",
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("use", REFUSED, ids=ids)
def test_closures_that_are_refused_and_handed_on(use: Use) -> None:
    model = network()
    with pytest.raises(
        sharpkern.EngineUnsupportedError, match=f"cannot be had from one call .*engine='virtual'.*{REFUSED[use]}"
    ):
        engine_losses("batched", model, as_closure(use)(model), random_direction(model), STEP_SIZES)
    assert_right(model, as_closure(use), "virtual")


# -- closures that do more than call the model ------------------------------------------------------------------------


def slope_by_inputs(model: nn.Module) -> LossFn:
    return lambda: 100 * torch.func.grad(lambda x: model(x).square().mean())(X).square().sum()


def jacobian(model: nn.Module) -> LossFn:
    return lambda: torch.func.jacrev(model)(X[0]).square().mean()


def by_parameters(model: nn.Module) -> LossFn:
    return lambda: torch.func.functional_call(model, dict(model.named_parameters()), (X,)).square().mean()


def weight_decay(model: nn.Module) -> LossFn:
    flat = lambda: nn.utils.parameters_to_vector(model.parameters())
    return lambda: model(X).square().mean() + 1e-2 * flat().square().sum() + sum(p.norm() for p in model.parameters())


def looked_up_in_the_weight(model: nn.Module) -> LossFn:
    def loss_fn() -> Tensor:
        y = model(X)
        weight, chosen = model[2].weight, y.argmax(1)
        rows = F.embedding(chosen, weight) + weight[chosen] + weight[[0, 3, 3]].mean()
        return y.square().mean() + rows.square().mean()

    return loss_fn


def weights_as_inputs(model: nn.Module) -> LossFn:
    first, last = model[0].weight, model[2].weight
    return lambda: F.linear(first.T, last).square().mean() + torch.einsum("ij,jk->ik", last, first).square().mean()


def rows_of_a_weight(model: nn.Module) -> LossFn:
    rows = torch.tensor([0, 3, 3, 5])
    linear = model[0]
    return lambda: F.linear(X, linear.weight[rows], linear.bias[rows]).square().mean() + linear(X[:0]).sum()


def checkpointed(model: nn.Module) -> LossFn:
    return lambda: model[2](checkpoint(model[:2], X, use_reentrant=False)).square().mean()


def with_gradients_on(model: nn.Module) -> LossFn:
    @torch.enable_grad()
    def loss_fn() -> Tensor:
        return model[2](checkpoint(model[:2], X, use_reentrant=False)).square().mean()

    return loss_fn


@pytest.mark.parametrize(
    "closure",
    [
        slope_by_inputs,
        jacobian,
        by_parameters,
        weight_decay,
        looked_up_in_the_weight,
        weights_as_inputs,
        rows_of_a_weight,
        checkpointed,
        with_gradients_on,
    ],
    ids=ids,
)
def test_other_closures_that_are_batched(closure: Callable[[nn.Module], LossFn]) -> None:
    assert_right(network(), closure)


def residual(model: nn.Module) -> LossFn:
    """Of a differential equation."""

    @torch.enable_grad()
    def loss_fn() -> Tensor:
        x = X.clone().requires_grad_()
        u = model(x).sum()
        (slope,) = torch.autograd.grad(u, x, create_graph=True)
        return (slope - u).square().mean()

    return loss_fn


def residual_at_kept_inputs(model: nn.Module) -> LossFn:
    x = X.clone().requires_grad_()

    @torch.enable_grad()
    def loss_fn() -> Tensor:
        u = model(x)
        (slope,) = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)
        return (slope - u.mean()).square().mean()

    return loss_fn


def gradient_penalty(model: nn.Module) -> LossFn:
    @torch.enable_grad()
    def loss_fn() -> Tensor:
        loss = model(X).square().mean()
        slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return loss + sum(slope.square().sum() for slope in slopes)

    return loss_fn


def per_example(model: nn.Module) -> LossFn:
    return lambda: torch.func.vmap(lambda row: model(row).square().mean())(X).mean()


def reentrant(model: nn.Module) -> LossFn:
    return lambda: model[2](checkpoint(model[:2], X, use_reentrant=True)).square().mean()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize(
    ("closure", "reason"),
    [
        (residual, "requires_grad_"),
        (residual_at_kept_inputs, "does not require grad"),
        (gradient_penalty, "does not require grad"),
        (per_example, "batches a layer by torch.func.vmap itself"),
        (reentrant, "setup_context"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_closures_that_are_refused(closure: Callable[[nn.Module], LossFn], reason: str) -> None:
    model = network()
    with pytest.raises(sharpkern.EngineUnsupportedError, match=reason):
        engine_losses("batched", model, closure(model), random_direction(model), STEP_SIZES)
    assert_right(model, closure, "virtual")


@pytest.mark.parametrize("draw", [random.random, numpy.random.rand, lambda: float(torch.rand(()))])
def test_batches_that_are_drawn_alike(draw: Callable[[], float]) -> None:
    """Every stream is put back before every pass."""
    model = network()
    loss_fn = lambda: model(X[int(9 * draw()) :]).square().mean()
    direction = random_direction(model)
    losses = engine_losses("batched", model, loss_fn, direction, [*STEP_SIZES, *STEP_SIZES])
    assert losses[5:] == pytest.approx(losses[:5], rel=1e-6)
    assert losses == pytest.approx(engine_losses("virtual", model, loss_fn, direction, [*STEP_SIZES] * 2), rel=1e-6)


def test_batches_of_an_iterator_are_refused() -> None:
    model = network()
    batches = iter(torch.randn(99, 16, 16))
    with pytest.raises(ValueError, match=r"same loss .* fetch the batch once"):
        sharpkern.critical_sharpness(
            model, lambda: model(next(batches)).square().mean(), random_direction(model), engine="batched"
        )


def test_a_loss_without_the_parameters_is_refused() -> None:
    model = network()
    with pytest.raises(sharpkern.EngineUnsupportedError, match="the same at every step size"):
        sharpkern.critical_sharpness(
            model, lambda: X.square().mean() + 0 * model(X).sum(), random_direction(model), engine="batched"
        )
