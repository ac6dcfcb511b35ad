"""The largest eigenvalue against dense Hessians, scipy's Lanczos, and what the definitions say."""

import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.nn import functional as F

from sharpkern.measures.hessian import hessian_sharpness
from tests.helpers.models import OutOfSight


class Quadratic(nn.Module):
    """½ xᵀAx with a chosen spectrum in a random basis."""

    def __init__(self, eigenvalues, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        eigenvalues = torch.as_tensor(eigenvalues, dtype=dtype)
        basis = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=dtype, generator=generator)).Q
        self.register_buffer("matrix", basis @ torch.diag(eigenvalues) @ basis.T)
        self.point = nn.Parameter(torch.ones(len(eigenvalues), dtype=dtype))

    def forward(self):
        return self.point @ self.matrix @ self.point / 2


def dense_hessian(model, loss_of):
    """The whole Hessian by autograd; ``loss_of`` takes the table of named parameters."""
    names, shapes = zip(*((n, p.shape) for n, p in model.named_parameters()), strict=True)

    def flat_loss(flat):
        pieces = flat.split([s.numel() for s in shapes])
        return loss_of({n: piece.view(s) for n, piece, s in zip(names, pieces, shapes, strict=True)})

    return torch.autograd.functional.hessian(flat_loss, nn.utils.parameters_to_vector(model.parameters()))


def classifier(dtype=torch.float64, dropout=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 3, bias=False)
    ).to(dtype)
    inputs, labels = torch.randn(32, 5, dtype=dtype), torch.randint(0, 3, (32,))
    return model, inputs, labels


@pytest.mark.parametrize(
    "eigenvalues",
    [[2.0], [-3.0], [3.0, 1.0], [-5.0, 0.5, 2.0], [0.0, 0.0], [4.0, 4.0, 4.0], [-2.0, -1.0], list(range(1, 9))],
    ids=str,
)
def test_tiny_models(eigenvalues):
    model = Quadratic(eigenvalues)
    result = hessian_sharpness(model, model, tol=1e-6)
    assert result.converged
    assert result.value == pytest.approx(max(eigenvalues), abs=1e-9)
    assert result.iterations <= len(eigenvalues)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_takes_the_largest_algebraic_eigenvalue_not_the_largest_magnitude(dtype):
    eigenvalues = torch.linspace(-19.3, 2.5, 200)
    model = Quadratic(eigenvalues, dtype)
    result = hessian_sharpness(model, model, tol=1e-3, max_iter=500)
    matrix = model.matrix.double().numpy()
    assert eigsh(matrix, k=1, which="LM")[0].item() == pytest.approx(-19.3, rel=1e-5)
    assert result.converged
    assert result.value == pytest.approx(2.5, rel=1e-3)


def test_equals_the_dense_hessian_of_a_network():
    model, inputs, labels = classifier()
    dense = dense_hessian(
        model, lambda table: F.cross_entropy(torch.func.functional_call(model, table, inputs), labels)
    )
    result = hessian_sharpness(model, lambda: F.cross_entropy(model(inputs), labels), tol=1e-7)
    assert result.converged
    assert result.value == pytest.approx(torch.linalg.eigvalsh(dense)[-1].item(), rel=1e-6)
    vector = result.vector
    assert vector.norm().item() == pytest.approx(1, abs=1e-9)
    explicit = (dense @ vector - result.value * vector).norm() / abs(result.value)
    assert result.residual < 1e-7
    assert explicit.item() < 2e-7


def test_agrees_with_scipy_through_restarts():
    # 300 crowded eigenvalues: the basis fills up and is restarted many times.
    model = Quadratic(torch.linspace(0, 1, 300).square())
    result = hessian_sharpness(model, model, tol=1e-8, max_iter=1000)
    matrix = model.matrix.numpy()
    oracle = eigsh(
        LinearOperator(matrix.shape, matvec=lambda v: matrix @ v, dtype=np.float64), k=1, which="LA", tol=1e-8
    )
    assert result.converged
    assert result.iterations > 32
    assert result.value == pytest.approx(oracle[0].item(), rel=1e-9)


def test_rounding_does_not_grow_copies_of_eigenvalues_through_restarts():
    # A basis that loses its orthogonality gives 15 in place of 1 here.
    model = Quadratic(torch.linspace(-1000, 1, 300), torch.float32)
    result = hessian_sharpness(model, model, tol=1e-5, max_iter=300)
    assert result.value == pytest.approx(1, rel=1e-3)
    assert result.vector.norm().item() == pytest.approx(1, abs=1e-6)


def test_the_residual_reported_is_the_true_one():
    model = Quadratic(torch.linspace(-1, 1, 100))
    result = hessian_sharpness(model, model, tol=0.1)
    vector = result.vector
    explicit = (model.matrix @ vector - result.value * vector).norm() / result.value
    assert 1e-6 < explicit < 0.1
    assert result.residual == pytest.approx(explicit.item(), rel=1e-6)


def test_out_of_iterations_is_said_and_gives_a_lower_bound():
    model = Quadratic(torch.linspace(-1, 1, 100))
    result = hessian_sharpness(model, model, tol=1e-9, max_iter=5)
    assert not result.converged
    assert result.iterations == 5
    assert 0 < result.value < 1
    assert result.residual > 1e-9


def test_warm_start_is_cheaper_and_equal():
    model = Quadratic(torch.linspace(-1, 1, 400))
    cold = hessian_sharpness(model, model, tol=1e-2)
    warm = hessian_sharpness(model, model, tol=1e-2, v0=cold.vector)
    assert warm.iterations < cold.iterations
    assert warm.value == pytest.approx(cold.value, rel=1e-2)


def test_warm_start_on_the_wrong_eigenvector_still_finds_the_top():
    model = Quadratic([1.0] + [0.5] * 50)
    with torch.no_grad():
        values, vectors = torch.linalg.eigh(model.matrix)
    result = hessian_sharpness(model, model, v0=vectors[:, 0])
    assert values[0].item() == pytest.approx(0.5)
    assert result.value == pytest.approx(1.0, rel=1e-3)


def attention_loss(model, hidden):
    """Causal self-attention through the fused operator."""
    q, k, v = model(hidden).chunk(3, dim=-1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).square().mean()


def test_fused_attention_is_differentiated_twice():
    torch.manual_seed(0)
    model, hidden = nn.Linear(4, 12, bias=False), torch.randn(2, 2, 6, 4)
    fused = attention_loss(model, hidden)
    with pytest.raises(RuntimeError, match="is not implemented"):
        # What the operator does by itself: no second derivative.
        torch.autograd.grad(torch.autograd.grad(fused, model.weight, create_graph=True)[0].sum(), model.weight)

    def written_out(table):
        q, k, v = (hidden @ table["weight"].T).chunk(3, dim=-1)
        scores = (q @ k.transpose(-1, -2) / 2).masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
        return (scores.softmax(-1) @ v).square().mean()

    result = hessian_sharpness(model, lambda: attention_loss(model, hidden), tol=1e-3)
    expected = torch.linalg.eigvalsh(dense_hessian(model, written_out))[-1].item()
    assert result.value == pytest.approx(expected, rel=1e-4)


class Undifferentiable(torch.autograd.Function):
    """Stands for an operator that says itself that it has no second derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("no derivative of this kernel")


def test_a_loss_without_second_derivative_is_refused_with_the_cause():
    model = nn.Linear(2, 1)
    with pytest.raises(
        RuntimeError, match=r"cannot be differentiated twice \(no derivative .*\); run .*critical_sharp"
    ):
        hessian_sharpness(model, lambda: Undifferentiable.apply(model.weight).sum())


class OnceDifferentiable(OutOfSight):
    """The same, and it says so; torch.autograd.grad does not notice."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


@pytest.mark.parametrize("operator", [OnceDifferentiable, OutOfSight])
def test_a_backward_that_autograd_does_not_see_is_not_measured_in_silence(operator):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), torch.randn(20, 6)
    with pytest.raises(
        RuntimeError, match=r"must be differentiable, got \|g\|² = .* of which autograd sees .*without fused"
    ):
        hessian_sharpness(model, lambda: model[1](operator.apply(model[0](inputs))).square().mean())


def test_out_of_memory_is_passed_on_as_it_is(monkeypatch):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("full")

    model = Quadratic([1.0, 2.0])
    monkeypatch.setattr(torch.autograd, "grad", no_memory)
    with pytest.raises(torch.OutOfMemoryError, match=r"^full$"):
        hessian_sharpness(model, model)


def test_leaves_no_trace():
    model, inputs, labels = classifier(torch.float32, dropout=0.5)
    F.cross_entropy(model(inputs), labels).backward()
    gradients = [p.grad for p in model.parameters()]
    contents = [g.clone() for g in gradients]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    stream = torch.get_rng_state()
    result = hessian_sharpness(model, lambda: F.cross_entropy(model(inputs), labels))
    again = hessian_sharpness(model, lambda: F.cross_entropy(model(inputs), labels))
    assert result == again
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(g, c) for g, c in zip(gradients, contents, strict=True))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_works_where_gradients_are_switched_off():
    model = Quadratic([1.0, 2.0])
    with torch.no_grad():
        assert hessian_sharpness(model, model).value == pytest.approx(2.0)


def test_a_nan_loss_gives_nan_and_no_convergence():
    model = Quadratic([1.0, math.nan])
    result = hessian_sharpness(model, model)
    assert math.isnan(result.value)
    assert not result.converged


@pytest.mark.parametrize("settings", [{}, {"amsgrad": True}, {"weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_preconditioned_by_the_definition(kind, settings):
    model = Quadratic([-9.0, 1.0, 2.0, 3.0, 7.0])
    optimizer = kind([model.point], lr=1e-2, betas=(0.8, 0.9), eps=1e-3, **settings)
    # Gradients that shrink, so that amsgrad's maximum is not the latest second moment.
    for fade in (1.0, 0.1, 0.01):
        optimizer.zero_grad()
        (fade * model()).backward()
        optimizer.step()
    state = optimizer.state[model.point]
    second_moment = state["max_exp_avg_sq"] if settings.get("amsgrad") else state["exp_avg_sq"]
    preconditioner = (1 - 0.8**3) * ((second_moment / (1 - 0.9**3)).sqrt() + 1e-3)
    scaled = model.matrix / torch.outer(preconditioner, preconditioner).sqrt()
    result = hessian_sharpness(model, model, preconditioner=optimizer, tol=1e-8)
    assert result.value == pytest.approx(torch.linalg.eigvalsh(scaled)[-1].item(), rel=1e-9)


def test_preconditioner_follows_the_groups_learning_rates_and_leaves_out_what_does_not_move():
    model = nn.ParameterList([nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(3)])
    groups = [{"params": [p], "lr": lr} for p, lr in zip(model, [0.01, 0.03, 0.0], strict=True)]
    optimizer = torch.optim.AdamW(groups, eps=0.0)

    def loss():
        return model[0].square().sum() + model[1].square().sum() + 100 * model[2].square().sum()

    loss().backward()
    optimizer.step()
    # One step: P = (1 − β₁)|g|, so H/P is 2/(0.1·2) for the first and three times that for the faster group.
    result = hessian_sharpness(model, loss, preconditioner=optimizer, tol=1e-6)
    assert result.value == pytest.approx(30, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_without_a_value_has_no_sharpness(value):
    model = Quadratic([1.0, 2.0])
    result = hessian_sharpness(model, lambda: model() + value)
    assert math.isnan(result.value)
    assert (result.converged, result.iterations) == (False, 0)


def test_what_was_frozen_after_it_had_moved_is_not_counted():
    model = nn.ParameterList([nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=0.0)
    loss = lambda: model[0].square().sum() + 50 * model[1].square().sum()
    loss().backward()
    optimizer.step()
    model[1].requires_grad_(False)
    result = hessian_sharpness(model, loss, preconditioner=optimizer, tol=1e-6)
    # P = (1 − β₁)|g|.
    assert result.value == pytest.approx(2 / 0.2, rel=1e-6)


def test_the_optimizer_of_another_model_is_refused():
    model, other = Quadratic([1.0, 2.0]), Quadratic([3.0, 4.0])
    optimizer = torch.optim.Adam(other.parameters())
    other().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="preconditioner must hold parameters of the model alone, got others; pass"):
        hessian_sharpness(model, model, preconditioner=optimizer)


def test_frozen_parameters_are_not_counted():
    model = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(2)])
    model[1].requires_grad_(False)
    result = hessian_sharpness(model, lambda: model[0].square().sum() + 50 * model[1].square().sum())
    assert result.value == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("size", [3, 30])
def test_a_loss_linear_in_its_parameters_has_no_curvature(size):
    model = nn.Linear(size, 1)
    result = hessian_sharpness(model, lambda: model.weight.sum())
    assert (result.value, result.residual, result.converged) == (0.0, 0.0, True)


LINEAR = nn.Linear(2, 1)
ADAM = torch.optim.Adam(LINEAR.parameters())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tol": 0.0}, ValueError, r"tol must be a number in \(0, 1\), got 0.0; leave it out for 0.01"),
        ({"tol": 1.0}, ValueError, r"tol must be .*, got 1.0"),
        ({"max_iter": 0}, ValueError, "max_iter must be at least 1, got 0; leave it out for 100"),
        (
            {"v0": torch.ones(7)},
            ValueError,
            r"v0 must be a vector of the 3 parameters, got shape \[7\]; give the vector",
        ),
        ({"v0": torch.zeros(3)}, ValueError, "v0 must be finite and not zero, got one that is not; leave it out"),
        ({"v0": [1.0]}, ValueError, "v0 must be a vector of the 3 parameters, got shape list; give the vector"),
        ({"max_iter": 2.5}, ValueError, "max_iter must be at least 1, got 2.5"),
        ({"tol": "a"}, ValueError, r"tol must be a number in \(0, 1\), got a; leave it out"),
        ({"preconditioner": torch.optim.SGD(LINEAR.parameters())}, TypeError, "Adam or AdamW, got SGD; leave it out"),
        ({"preconditioner": ADAM}, ValueError, r"must have taken a step .*; call optimizer.step\(\) first"),
        ({"loss_fn": lambda: LINEAR.weight}, ValueError, r"scalar, got a tensor of shape \[1, 2\]; reduce it"),
        ({"loss_fn": lambda: 1.0}, TypeError, "0-dim .* got float 1.0; return the loss itself"),
        ({"loss_fn": lambda: LINEAR.weight.sum().detach()}, ValueError, "loss with its graph, got one without; remove"),
        ({"model": nn.Identity()}, ValueError, "parameters that require gradients, got none; unfreeze"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(settings, error, message):
    arguments = {"model": LINEAR, "loss_fn": lambda: LINEAR.weight.square().sum()} | settings
    with pytest.raises(error, match=message):
        hessian_sharpness(**arguments)
    assert not ADAM.state
