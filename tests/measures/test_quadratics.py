"""λ_c, λ_dir and λ_max of ½θᵀAθ, of which everything is known, along the updates of three optimizers."""

import math

import pytest
import torch

from sharpkern.directions.direction import Direction
from sharpkern.measures.critical import critical_sharpness
from sharpkern.measures.directional import directional_sharpness
from sharpkern.measures.hessian import hessian_sharpness
from tests.measures.test_hessian import Quadratic

SPECTRA = {
    "one": [3.0],
    "even": [1.0, 2.0, 3.0, 4.0, 5.0],
    "over four decades": [10 ** (k / 4 - 2) for k in range(17)],
    "clustered at the top": [0.01 * k for k in range(20)] + [10.0, 10.0, 10.001, 9.999],
    "one outlier": [1e-3] * 20 + [50.0],
    "far below zero": [-19.3, -7.0, -1.0, 0.5, 2.0, 2.5],
    "singular": [0.0, 0.0, 0.0, 1.0, 4.0],
    "all negative": [-3.0, -2.0, -1.0],
}
LR = 0.01


def along_gradient(model, matrix, theta):
    """Δθ = Aθ."""
    model().backward()
    return Direction.from_gradients(model), matrix @ theta


def along_momentum(model, matrix, theta):
    """Δθ = μb + Aθ after four steps, (θ, b) being multiplied by one matrix at each."""
    momentum, size = 0.9, len(theta)
    unit = torch.eye(size).to(theta)
    step = torch.cat(
        [torch.cat([unit - LR * matrix, -LR * momentum * unit], 1), torch.cat([matrix, momentum * unit], 1)]
    )
    state = torch.linalg.matrix_power(step, 4) @ torch.cat([theta, torch.zeros_like(theta)])
    optimizer = torch.optim.SGD([model.point], lr=LR, momentum=momentum)
    for _ in range(4):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    optimizer.zero_grad()
    model().backward()
    return Direction.from_optimizer(optimizer), momentum * state[size:] + matrix @ state[:size]


def along_adamw(model, matrix, theta):
    """Δθ = g/(|g| + ε) + γθ at the first step."""
    optimizer = torch.optim.AdamW([model.point], lr=LR, eps=0.1, weight_decay=0.5)
    model().backward()
    gradient = matrix @ theta
    return Direction.from_optimizer(optimizer), gradient / (gradient.abs() + 0.1) + 0.5 * theta


@pytest.mark.parametrize("update", [along_gradient, along_momentum, along_adamw])
@pytest.mark.parametrize("eigenvalues", SPECTRA.values(), ids=SPECTRA.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_sharpness_is_right_to_a_thousandth(update, eigenvalues, dtype):
    model = Quadratic(eigenvalues, dtype)
    matrix = model.matrix.double()
    direction, delta = update(model, matrix, model.point.detach().double().clone())
    slope, curvature = delta @ matrix @ model.point.detach().double(), delta @ matrix @ delta
    expected = (curvature / slope).item()

    assert directional_sharpness(model, model, direction, method="hvp") == pytest.approx(expected, rel=1e-3)
    forward = directional_sharpness(model, model, direction)
    assert abs(forward - expected) <= forward.error * abs(forward)
    if dtype == torch.float64:
        assert forward == pytest.approx(expected, rel=1e-3)

    m = critical_sharpness(model, model, direction, rtol=1e-3)
    if slope < 0:
        assert (m.status, m.sharpness) == ("ascent", math.inf)
    elif curvature < 0:
        assert m.status == "unbounded"
    else:
        assert m.status == "converged"
        # The loss is a parabola along any line: λ_c is λ_dir.
        assert m.sharpness == pytest.approx(expected, rel=1e-3)

    top = hessian_sharpness(model, model)
    assert top.converged
    assert top.value == pytest.approx(max(eigenvalues), rel=1e-3)
    if update is along_gradient:
        assert expected <= max(eigenvalues) * (1 + 1e-6)
