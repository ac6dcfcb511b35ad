import pytest
import torch
from sharpkern.kernels.linear import FEW_TOKENS, linear

from tests.kernels.budget import DTYPES, TRIPLES, assert_within_budget, randn, same_bits

FP32, BF16 = torch.float32, torch.bfloat16


def steps(num):
    return torch.linspace(-0.3, 0.5, num)


def formed(W, D, alpha, dtype):
    """Weights by one fused multiply-add in fp32, rounded to the dtype of the input."""
    exact = W.double() + alpha.double()[:, None, None] * D.double()
    return exact.float().to(dtype)


def assert_matches(y, x, W, D, alpha):
    """Fail where a result is further from fp64 than the rounding of the result and of sums in fp32 allow."""
    weights = formed(W, D, alpha, x.dtype)
    exact = x.double() @ weights.double().mT
    single = (x.float() @ weights.float().mT).to(y.dtype)
    size = (x.double().abs() @ weights.double().abs().mT).max().item() if exact.numel() else 0.0
    assert_within_budget(y, exact, single, floor=4 * torch.finfo(FP32).eps * size)


def operands(K, M, N, C, x_dtype=FP32, W_dtype=None, D_dtype=None):
    return (
        randn(K, M, C, dtype=x_dtype),
        randn(N, C, dtype=W_dtype or x_dtype, seed=1),
        randn(N, C, dtype=D_dtype or x_dtype, seed=2),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("K", "M"),
    [(1, 1), (16, 1), (3, 16), (8, 16), (16, 16), (8, 17), (5, 48), (1, 64), (3, 64), (16, 64), (1, 65), (3, 130)],
)
def test_matches_the_oracle(K, M, dtype):
    x, W, D = operands(K, M, 70, 33, dtype)
    assert_matches(linear(x, W, D, steps(K)), x, W, D, steps(K))


@pytest.mark.parametrize("M", [3, 65])
@pytest.mark.parametrize(("N", "C"), [(1, 1), (64, 64), (65, 600), pytest.param(130, 1100, marks=pytest.mark.long)])
def test_columns_divided_among_programs(M, N, C):
    x, W, D = operands(3, M, N, C, BF16)
    assert_matches(linear(x, W, D, steps(3)), x, W, D, steps(3))


@pytest.mark.parametrize("M", [3, 65])
@pytest.mark.parametrize("dtypes", TRIPLES)
def test_every_operand_has_its_own_dtype(M, dtypes):
    x, W, D = operands(2, M, 20, 33, *dtypes)
    assert_matches(linear(x, W, D, steps(2)), x, W, D, steps(2))


@pytest.mark.parametrize("M", [3, 65])
def test_result_dtype_is_free(M):
    x, W, D = operands(2, M, 20, 600, BF16)
    wide = linear(x, W, D, steps(2), dtype=FP32)
    assert_matches(wide, x, W, D, steps(2))
    assert same_bits(wide.to(BF16), linear(x, W, D, steps(2)))


@pytest.mark.parametrize("M", [3, 20, 65])
def test_one_input_for_all_step_sizes(M):
    x, W, D = operands(1, M, 20, 600)
    shared = linear(x, W, D, steps(3))
    assert same_bits(shared, linear(x.repeat(3, 1, 1), W, D, steps(3)))
    assert same_bits(shared, linear(x.expand(3, -1, -1), W, D, steps(3)))


@pytest.mark.parametrize("M", [3, 65])
def test_rows_at_any_distance(M):
    memory = [torch.full(shape, torch.nan) for shape in ((5, M + 4, 70), (80, 90), (90, 60))]
    x, W, D = memory[0][1:4, 2:-2, 7:40], memory[1][9:39, 11:44], memory[2][60:, 20:53]
    for part, values in zip((x, W, D), operands(3, M, 30, 33), strict=True):
        part.copy_(values)
    y = linear(x, W, D, steps(3))
    assert y.is_contiguous()
    assert same_bits(y, linear(*operands(3, M, 30, 33), steps(3)))
    assert same_bits(y, linear(x.mT.contiguous().mT, W, D, steps(3)))


# NumPy, with which the interpreter computes, warns where the hardware goes on without a word.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("M", [3, 65])
def test_alpha_zero_takes_w_whatever_d_holds(M):
    x, W, D = operands(2, M, 20, 33, BF16, FP32)
    D[3], D[5] = torch.inf, torch.nan
    alpha = torch.tensor([0.0, 0.5])
    y = linear(x, W, D, alpha)
    assert same_bits(y[0], linear(x, W, torch.zeros_like(D), alpha)[0])
    assert y[1, :, 5].isnan().all()


def test_both_kernels_round_a_weight_once():
    # The weight is −2⁻²⁴ by one fused multiply-add, 0 by a product and a sum.
    W, D = torch.full((1, 1), -1.0), torch.full((1, 1), 1 + 2**-12)
    alpha = torch.tensor([1 - 2**-12])
    for M in (FEW_TOKENS, FEW_TOKENS + 1):
        assert (linear(torch.ones(1, M, 1), W, D, alpha) == -(2**-24)).all()


@pytest.mark.parametrize("M", [2, 65])
def test_offsets_beyond_int32(M):
    # Untouched memory is never mapped: 6 and 7 GB cost some hundred pages.
    torch.utils.deterministic.fill_uninitialized_memory = False
    x = torch.empty(3, 2**30, dtype=BF16).as_strided((3, M, 16), (2**30, 16, 1))
    W = torch.empty(70, 2**25 + 2**24, dtype=BF16)[:, :16]
    x[:], W[:] = 1.0, 2.0
    y = linear(x, W, W, torch.tensor([0.0, 0.5, 1.0]))
    assert (y == 32 * torch.tensor([1.0, 1.5, 2.0])[:, None, None]).all()


@pytest.mark.parametrize(("M", "N", "C"), [(0, 4, 3), (3, 0, 4), (3, 4, 0), (65, 4, 0)])
def test_empty(M, N, C):
    y = linear(torch.ones(1, M, C), torch.ones(N, C), torch.ones(N, C), steps(2))
    assert torch.equal(y, torch.zeros(2, M, N))


@pytest.mark.parametrize("M", [3, 65])
@pytest.mark.long
def test_runs_twice_to_the_same_bits(M):
    x, W, D = operands(3, M, 70, 1100, BF16)
    assert same_bits(linear(x, W, D, steps(3)), linear(x, W, D, steps(3)))
