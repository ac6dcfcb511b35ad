import itertools

import pytest
import torch
import torch.nn.functional as F
from sharpkern.kernels.embedding import embedding

from tests.kernels.budget import DTYPES, assert_within_budget, randn, same_bits

ALPHAS = torch.tensor([-0.3, 0.0, 0.7])


def exact(indices, W, D, alpha):
    return torch.stack([F.embedding(indices, W.double() + a * D.double()) for a in alpha.tolist()])


def in_torch(indices, W, D, alpha, dtype):
    return torch.stack([F.embedding(indices, W.float() + a * D.float()).to(dtype) for a in alpha.tolist()])


@pytest.mark.parametrize("length", [1, 63, 127, 1000, 4097])
@pytest.mark.parametrize(("W_dtype", "D_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_matches_the_oracle(W_dtype, D_dtype, length):
    W, D = randn(11, length, dtype=W_dtype), randn(11, length, dtype=D_dtype, seed=1)
    indices = torch.tensor([[10, 0], [3, 3]])
    out = embedding(indices, W, D, ALPHAS)
    assert_within_budget(out, exact(indices, W, D, ALPHAS), in_torch(indices, W, D, ALPHAS, W_dtype))
    assert same_bits(out[1], F.embedding(indices, W))


def test_rows_at_any_distance_and_indices_in_any_order():
    W, D = randn(20, 70)[::2, :65], randn(10, 100, seed=1)[:, 5:70]
    indices = torch.arange(10, dtype=torch.int32).view(2, 5).t()
    out = embedding(indices, W, D, ALPHAS, dtype=torch.float32)
    assert_within_budget(out, exact(indices, W, D, ALPHAS), in_torch(indices, W, D, ALPHAS, W.dtype))


def test_float32_result_keeps_what_bf16_rounds_away():
    W, D = torch.ones(4, 64, dtype=torch.bfloat16), randn(4, 64, dtype=torch.bfloat16)
    indices = torch.arange(4)
    alpha = torch.tensor([1e-5])
    out = embedding(indices, W, D, alpha, dtype=torch.float32)
    assert_within_budget(out, exact(indices, W, D, alpha), in_torch(indices, W, D, alpha, torch.float32))
    assert same_bits(embedding(indices, W, D, alpha)[0], W)


@pytest.mark.parametrize("index", [-1, 4])
def test_unknown_index_gives_nan(index):
    out = embedding(torch.tensor([0, index]), torch.ones(4, 8), torch.ones(4, 8), ALPHAS)
    assert out[:, 0].isfinite().all()
    assert out[:, 1].isnan().all()


def test_offsets_beyond_int32():
    # Untouched memory is never mapped: two tables of 4 GB cost a few pages each.
    torch.utils.deterministic.fill_uninitialized_memory = False
    W, D = (torch.empty(2**20 + 1, 2048, dtype=torch.bfloat16) for _ in range(2))
    W[-1], D[-1] = 1.0, 2.0
    out = embedding(torch.tensor([2**20]), W, D, torch.tensor([0.5]))
    assert (out == 2.0).all()


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens(shape):
    assert embedding(torch.zeros(shape, dtype=torch.int64), randn(4, 8), randn(4, 8), ALPHAS).shape == (3, *shape, 8)


def test_runs_twice_to_the_same_bits():
    W, D, indices = randn(11, 300), randn(11, 300, seed=1), torch.arange(11)
    assert same_bits(embedding(indices, W, D, ALPHAS), embedding(indices, W, D, ALPHAS))
