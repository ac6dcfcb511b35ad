"""The largest eigenvalue and the curvature along an update, against other packages' exact Hessian-vector products."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hessian_eigenthings import HessianOperator

import sharpkern

MISSING = "is not of the extra `peers`: bench/other_methods.py says why, and how to install it"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/other_methods.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    return importlib.import_module("other_methods")


def ours(peers: ModuleType, training: Any, loss_fn: Any) -> tuple[float, float]:
    """λ_max and λ_dir of the next update."""
    direction = sharpkern.Direction.from_optimizer(training.optimizer)
    along = sharpkern.directional_sharpness(training.model, loss_fn, direction, method="hvp")
    return sharpkern.hessian_sharpness(training.model, loss_fn, tol=peers.TOL).value, along


def test_hessian_eigenthings_agrees(peers: ModuleType) -> None:
    training, loss_fn = peers.trained()
    (top, along), theirs = ours(peers, training, loss_fn), peers.EigenThings(training.model, loss_fn.loss.batch)
    # The error of an eigenvalue is of the order of the square of its residual.
    assert top == pytest.approx(theirs.top(peers.TOL, "lanczos", 40).value, rel=10 * peers.TOL**2)
    assert along == pytest.approx(peers.along(training, theirs.product), rel=1e-9)
    assert theirs.top(1e-2, "deflated_power_iteration").value == pytest.approx(top, rel=1e-2)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_curvlinops_agrees(peers: ModuleType) -> None:
    pytest.importorskip("curvlinops", reason=f"curvlinops {MISSING}")
    training, loss_fn = peers.trained()
    (top, along), theirs = ours(peers, training, loss_fn), peers.CurvLinOps(training.model, loss_fn.loss.batch)
    assert top == pytest.approx(theirs.top(peers.TOL).value, rel=10 * peers.TOL**2)
    assert along == pytest.approx(peers.along(training, theirs.product), rel=1e-9)


def test_pyhessian_agrees_as_far_as_power_iteration_goes(peers: ModuleType) -> None:
    pytest.importorskip("pyhessian", reason=f"PyHessian {MISSING}")
    training, loss_fn = peers.trained()
    before = [parameter.grad.clone() for parameter in training.model.parameters()]
    found = peers.PyHessian(training.model, loss_fn.loss.batch).top(peers.TOL)
    assert found.value == pytest.approx(ours(peers, training, loss_fn)[0], rel=1e-2)
    assert 1 < found.products <= 100
    assert all(map(torch.equal, before, (parameter.grad for parameter in training.model.parameters())))


def test_eigenthings_fails_on_fused_attention_and_ours_does_not(peers: ModuleType) -> None:
    training, loss_fn = peers.trained()
    operator = HessianOperator(training.model, [None], lambda model, batch: loss_fn())
    with pytest.raises(RuntimeError, match="is not implemented"):
        operator.matvec(torch.ones(operator.size, dtype=torch.float64))
    assert all(value > 0 for value in ours(peers, training, loss_fn))
