import itertools

import pytest
import torch
from sharpkern.kernels import reduce as module
from sharpkern.kernels._launch import Case, Config
from sharpkern.kernels.reduce import reduce

from tests.kernels.budget import DTYPES, SIZES, randn, same_bits


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(module, "_CONFIGS", (Case(None, None, None, Config(block=256, threads=64)),))
    monkeypatch.setattr(module, "_TILES", 4)


def exact(theta, delta, grad):
    def dot(a, b):
        return sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True))

    return torch.stack([dot(delta, grad), dot(delta, delta), dot(theta, theta), dot(grad, grad)])


def magnitude(theta, delta, grad):
    return exact(*([t.abs() for t in tensors] for tensors in (theta, delta, grad)))


@pytest.mark.parametrize(("theta_dtype", "delta_dtype", "grad_dtype"), list(itertools.product(DTYPES, DTYPES, DTYPES)))
def test_matches_the_oracle_to_fp64(theta_dtype, delta_dtype, grad_dtype):
    lists = [
        [randn(size, dtype=dtype, seed=10 * role + i) for i, size in enumerate(SIZES)]
        for role, dtype in enumerate((theta_dtype, delta_dtype, grad_dtype))
    ]
    # Products are exact and sums are fp64: only the order of additions differs.
    budget = 1e-14 * magnitude(*lists)
    assert ((reduce(*lists) - exact(*lists)).abs() <= budget).all()


def test_cancellation_costs_no_digits():
    delta = [torch.tensor([1e4, -1e4, 1e-4])]
    grad = [torch.tensor([1e4, 1e4, 1.0])]
    assert reduce(grad, delta, grad)[0].item() == delta[0][2].double().item()


def test_mixed_dtypes_and_alignments_in_one_call():
    theta = [randn(1001)[1:], randn(300, dtype=torch.bfloat16), randn(30, 40).t(), torch.empty(0)]
    delta = [randn(1001, seed=1)[1:], randn(300, seed=2), randn(30, 40, seed=3).t(), torch.empty(0)]
    grad = [randn(1001, seed=4)[1:], randn(300, seed=5), randn(30, 40, seed=6).t(), torch.empty(0)]
    assert torch.allclose(reduce(theta, delta, grad), exact(theta, delta, grad), rtol=1e-13, atol=0)


def test_more_chunks_than_one_block_of_the_second_stage(monkeypatch):
    monkeypatch.setattr(module, "_TOTAL_CONFIG", Config(block=4, threads=32))
    lists = [[randn(9000, seed=role)] for role in range(3)]
    assert torch.allclose(reduce(*lists), exact(*lists), rtol=1e-13, atol=0)


def test_runs_twice_to_the_same_bits():
    lists = [[randn(4097, seed=role)] for role in range(3)]
    assert same_bits(reduce(*lists), reduce(*lists))


def test_not_a_number_is_not_lost():
    tensors = [torch.tensor([1.0, torch.nan])]
    assert reduce(tensors, tensors, tensors).isnan().all()


def test_nothing_sums_to_zero():
    assert torch.equal(reduce([], [], []), torch.zeros(4, dtype=torch.float64))
    empty = [torch.empty(0)]
    assert torch.equal(reduce(empty, empty, empty), torch.zeros(4, dtype=torch.float64))
