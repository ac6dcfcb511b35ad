import itertools

import pytest
import torch
from sharpkern.kernels.form import _form_kernel, form

from tests.kernels.budget import DTYPES, SIZES, assert_within_budget, randn, same_bits

ALPHAS = torch.tensor([-1e-3, 0.0, 0.7])


def exact(W, D, alpha):
    alpha = alpha.double().reshape(-1, *[1] * W.dim())
    return W.double() + alpha * D.double()


def in_torch(W, D, alpha, dtype):
    return torch.stack([torch.add(W.float(), D.float(), alpha=a).to(dtype) for a in alpha.tolist()])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("W_dtype", "D_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_matches_the_oracle(size, W_dtype, D_dtype):
    W, D = randn(size, dtype=W_dtype), randn(size, dtype=D_dtype, seed=1)
    out = form(W, D, ALPHAS)
    assert_within_budget(out, exact(W, D, ALPHAS), in_torch(W, D, ALPHAS, W_dtype))
    assert same_bits(out[1], W)


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_dtype_is_free(dtype):
    W, D = randn(1000), randn(1000, seed=1)
    out = form(W, D, ALPHAS, dtype=dtype)
    assert_within_budget(out, exact(W, D, ALPHAS), in_torch(W, D, ALPHAS, dtype))


def test_alpha_zero_returns_w_with_its_signs_of_zero_and_whatever_d_holds():
    W, D = torch.tensor([-0.0, 0.0, 1.0, -0.0]), torch.tensor([1.0, 1.0, torch.inf, torch.nan])
    assert same_bits(form(W, D, torch.zeros(1))[0], W)


def test_rounds_once_as_a_fused_multiply_add_does():
    W, D = torch.tensor([-1.0]), torch.tensor([1 + 2**-12])
    alpha = torch.tensor([1 - 2**-12])
    assert form(W, D, alpha).item() == -(2**-24)


def test_walks_any_dense_layout_in_memory_order():
    W = randn(3, 40, 7).permute(2, 0, 1)
    D = torch.empty_like(W).copy_(randn(7, 3, 40, seed=1))
    out = form(W, D, ALPHAS)
    assert out[0].stride() == W.stride()
    assert_within_budget(out, exact(W, D, ALPHAS), in_torch(W, D, ALPHAS, W.dtype))


def test_writes_into_out_and_nowhere_else():
    W, D = randn(1000), randn(1000, seed=1)
    memory = torch.full((3, 1003), torch.nan)
    out = memory[:, :1000]
    version = out._version
    assert form(W, D, ALPHAS, out=out) is out
    assert torch.equal(out, form(W, D, ALPHAS))
    assert memory[:, 1000:].isnan().all()
    assert out._version > version


@pytest.mark.parametrize("num_steps", [1, 16])
def test_number_of_step_sizes(num_steps):
    W, D = randn(600, dtype=torch.bfloat16), randn(600, seed=1)
    alpha = torch.linspace(-1, 1, num_steps)
    assert_within_budget(form(W, D, alpha), exact(W, D, alpha), in_torch(W, D, alpha, W.dtype))


def test_offsets_beyond_int32(first_program):
    # Untouched memory is never mapped: three tensors of 4 GB cost a few pages each.
    torch.utils.deterministic.fill_uninitialized_memory = False
    n = 2**31 + 2048 + 5
    W, D, out = (torch.empty(n, dtype=torch.bfloat16) for _ in range(3))
    tail = slice(2**31, n)
    W[tail], D[tail], out[tail] = 1.0, 2.0, torch.nan
    first_program(2**31 // 2048)
    _form_kernel[(2,)](out, n, W, D, torch.tensor([0.5]), n, 0, K=1, STOCHASTIC=False, BLOCK=2048)
    assert (out[tail] == 2.0).all()


class TestStochasticRounding:
    W = randn(4097, dtype=torch.bfloat16, scale=0.02)
    D = randn(4097, seed=1)

    def test_alpha_zero_returns_w(self):
        assert same_bits(form(self.W, self.D, torch.zeros(1), seed=3)[0], self.W)

    @pytest.mark.long
    def test_keeps_small_displacements_on_average(self):
        alpha = torch.tensor([1e-5])
        kept = torch.stack([form(self.W, self.D, alpha, seed=seed)[0].double() - self.W.double() for seed in range(20)])
        wanted = alpha.double() * self.D.double()
        share = (kept.mean(0) * wanted).sum() / (wanted * wanted).sum()
        nearest = form(self.W, self.D, alpha)[0].double() - self.W.double()
        assert abs(share - 1) < 0.1
        assert (nearest * wanted).sum() / (wanted * wanted).sum() < 0.5

    def test_takes_one_of_the_two_neighbours(self):
        alpha = torch.tensor([1e-3])
        out = form(self.W, self.D, alpha, seed=3)[0].double()
        wanted = exact(self.W, self.D, alpha)[0]
        assert ((out - wanted).abs() <= torch.finfo(torch.bfloat16).eps * wanted.abs()).all()

    def test_same_random_numbers_for_every_step_size_and_call(self):
        alpha = torch.tensor([1e-3, 2e-4, 1e-3])
        out = form(self.W, self.D, alpha, seed=3)
        assert same_bits(out[0], out[2])
        assert same_bits(out[1], form(self.W, self.D, alpha[1:2], seed=3)[0])
        assert not same_bits(out, form(self.W, self.D, alpha, seed=4))

    def test_random_numbers_differ_between_elements(self):
        W, D = torch.zeros(4096, dtype=torch.bfloat16), torch.ones(4096)
        # Half way between two bf16 numbers: each element is one or the other.
        up = form(W, D, torch.tensor([1 + 2**-8]), seed=3)[0] > 1
        assert abs(up.double().mean() - 0.5) < 0.05
        assert abs((up[1:] == up[:-1]).double().mean() - 0.5) < 0.05

    def test_keeps_infinities_and_nan(self):
        # The last two NaN have all bits set: one added to them wraps around to zero.
        patterns = torch.tensor([0x7F800000, -0x00800000, 0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32)
        W = patterns.view(torch.float32)
        out = form(W, torch.zeros(5), torch.tensor([1.0]), dtype=torch.bfloat16, seed=3)[0]
        assert out[:2].tolist() == [torch.inf, -torch.inf]
        assert out[2:].isnan().all()


def test_runs_twice_to_the_same_bits():
    W, D = randn(4097, dtype=torch.bfloat16), randn(4097, dtype=torch.bfloat16, seed=1)
    assert same_bits(form(W, D, ALPHAS, seed=9), form(W, D, ALPHAS, seed=9))
