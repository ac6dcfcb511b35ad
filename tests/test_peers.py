"""The largest eigenvalue and the curvature along an update, against other packages' exact Hessian-vector products."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hessian_eigenthings import HessianOperator


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/bench_peers.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    return importlib.import_module("bench_peers")


def test_hessian_eigenthings_agrees(peers: ModuleType) -> None:
    trained = peers.Trained()
    (top, along), (their_top, their_along) = trained.ours(), peers.eigenthings(trained)
    # The error of an eigenvalue is of the order of the square of its residual.
    assert top == pytest.approx(their_top, rel=10 * peers.TOL**2)
    assert along == pytest.approx(their_along, rel=1e-9)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_curvlinops_agrees(peers: ModuleType) -> None:
    reason = "what curvlinops depends on does not go with every torch: bench/bench_peers.py says how to install it"
    pytest.importorskip("curvlinops", reason=reason)
    (top, along), (their_top, their_along) = peers.Trained().ours(), peers.curvlinops(peers.Trained())
    assert top == pytest.approx(their_top, rel=10 * peers.TOL**2)
    assert along == pytest.approx(their_along, rel=1e-9)


def test_eigenthings_fails_on_fused_attention_and_ours_does_not(peers: ModuleType) -> None:
    trained = peers.Trained()
    operator = HessianOperator(trained.model, [None], lambda model, batch: trained.loss())
    with pytest.raises(RuntimeError, match="is not implemented"):
        operator.matvec(torch.ones(operator.size, dtype=torch.float64))
    assert all(value > 0 for value in trained.ours())
