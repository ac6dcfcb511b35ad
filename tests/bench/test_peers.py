"""The largest eigenvalue and the curvature along an update, against other packages' exact Hessian-vector products."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hessian_eigenthings import HessianOperator

MISSING = "is not of the extra `peers`: bench/other_methods.py says why, and how to install it"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/other_methods.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    return importlib.import_module("other_methods")


def test_hessian_eigenthings_agrees(peers: ModuleType) -> None:
    trained = peers.Trained()
    (top, along), (their_top, their_along) = trained.ours(), trained.eigenthings()
    # The error of an eigenvalue is of the order of the square of its residual.
    assert top == pytest.approx(their_top, rel=10 * peers.TOL**2)
    assert along == pytest.approx(their_along, rel=1e-9)
    assert peers.EigenThings(trained.model, trained.batch).power(1e-2).value == pytest.approx(top, rel=1e-2)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_curvlinops_agrees(peers: ModuleType) -> None:
    pytest.importorskip("curvlinops", reason=f"curvlinops {MISSING}")
    trained = peers.Trained()
    (top, along), (their_top, their_along) = trained.ours(), trained.curvlinops()
    assert top == pytest.approx(their_top, rel=10 * peers.TOL**2)
    assert along == pytest.approx(their_along, rel=1e-9)


def test_pyhessian_agrees_as_far_as_power_iteration_goes(peers: ModuleType) -> None:
    pytest.importorskip("pyhessian", reason=f"PyHessian {MISSING}")
    trained = peers.Trained()
    before = [parameter.grad.clone() for parameter in trained.model.parameters()]
    found = peers.PyHessian(trained.model, trained.batch).power(peers.TOL)
    assert found.value == pytest.approx(trained.ours()[0], rel=1e-2)
    assert 1 < found.products <= 100
    assert all(map(torch.equal, before, (parameter.grad for parameter in trained.model.parameters())))


def test_eigenthings_fails_on_fused_attention_and_ours_does_not(peers: ModuleType) -> None:
    trained = peers.Trained()
    operator = HessianOperator(trained.model, [None], lambda model, batch: trained.loss())
    with pytest.raises(RuntimeError, match="is not implemented"):
        operator.matvec(torch.ones(operator.size, dtype=torch.float64))
    assert all(value > 0 for value in trained.ours())
