import pytest
import torch
import torch.nn.functional as F
from sharpkern.kernels.norm import _norm_kernel, layer_norm, rms_norm

from tests.kernels.budget import DTYPES, TRIPLES, assert_within_budget, randn, same_bits

ALPHAS = torch.tensor([-0.3, 0.0, 0.7])
EPS = 1e-5


def moved(vector, direction, alpha, dtype):
    if vector is None:
        return None
    return vector.to(dtype) if direction is None else vector.to(dtype) + alpha * direction.to(dtype)


def in_torch(x, weight, weight_direction, bias, bias_direction, dtype, *, centered):
    """The norm by torch in another dtype, weights perturbed in it and never rounded."""
    rows = []
    for k, alpha in enumerate(ALPHAS.tolist()):
        w = moved(weight, weight_direction, alpha, dtype)
        shape = x.shape[-1:]
        if centered:
            b = moved(bias, bias_direction, alpha, dtype)
            rows.append(F.layer_norm(x[k].to(dtype), shape, w, b, EPS))
        else:
            rows.append(F.rms_norm(x[k].to(dtype), shape, w, EPS))
    return torch.stack(rows)


def assert_matches(out, x, *vectors, centered):
    exact = in_torch(x, *vectors, torch.float64, centered=centered)
    single = in_torch(x, *vectors, torch.float32, centered=centered).to(out.dtype)
    # Rows are summed in another order: a few fp32 roundings at the size of a normalised element.
    assert_within_budget(out, exact, single, roundings=1.0, floor=2e-6 * exact.abs().mean().item())


LENGTHS = [1, 63, 127, 1000, 4097]


@pytest.mark.parametrize(
    ("length", "x_dtype", "w_dtype", "d_dtype"),
    [(length, dtype, dtype, dtype) for length in LENGTHS for dtype in DTYPES] + [(127, *dtypes) for dtypes in TRIPLES],
)
def test_rms_norm_matches_the_oracle(length, x_dtype, w_dtype, d_dtype):
    x = randn(3, 2, length, dtype=x_dtype)
    w, d = randn(length, dtype=w_dtype, seed=1), randn(length, dtype=d_dtype, seed=2)
    assert_matches(rms_norm(x, w, d, ALPHAS, eps=EPS), x, w, d, None, None, centered=False)


@pytest.mark.parametrize(
    ("length", "dtype", "given"),
    [(max(length, 2), dtype, "wdbd") for length in LENGTHS for dtype in DTYPES]
    + [(127, torch.float32, given) for given in ("w", "wd", "wdb", "wbd")],
)
def test_layer_norm_matches_the_oracle(length, dtype, given):
    x = randn(3, 2, length, dtype=dtype, scale=2.0) + 0.5
    weight, bias = randn(length, dtype=dtype, seed=1), randn(length, seed=3) if "b" in given else None
    weight_direction = randn(length, seed=2) if given.startswith("wd") else None
    bias_direction = randn(length, dtype=dtype, seed=4) if given.endswith("bd") else None
    vectors = weight, weight_direction, bias, bias_direction
    assert_matches(layer_norm(x, *vectors, ALPHAS, eps=EPS), x, *vectors, centered=True)


def test_small_steps_of_bf16_weights_near_one_survive():
    x = randn(1, 4, 64, dtype=torch.bfloat16)
    w, d = torch.ones(64, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)
    out = rms_norm(x, w, d, torch.tensor([1e-3]), eps=EPS, dtype=torch.float32)
    still = rms_norm(x, w, d, torch.tensor([0.0]), eps=EPS, dtype=torch.float32)
    assert torch.allclose(out, still * 1.001, rtol=1e-6)
    assert torch.equal((w.float() + 1e-3).to(torch.bfloat16), w)


def test_rows_at_any_distance_and_any_layout():
    memory = randn(3, 5, 200)
    for x in (memory[..., 7:107], memory[:, ::2], memory.permute(0, 2, 1)[:, 3:8]):
        w, d = randn(x.shape[-1], seed=1), randn(x.shape[-1], seed=2)
        out = rms_norm(x, w, d, ALPHAS, eps=EPS)
        assert out.is_contiguous()
        assert_matches(out, x, w, d, None, None, centered=False)


def test_mean_much_larger_than_the_deviation():
    x = randn(3, 2, 1000) + 1000
    w, d = randn(1000, seed=1), randn(1000, seed=2)
    out = layer_norm(x, w, d, None, None, ALPHAS, eps=EPS)
    exact = in_torch(x, w, d, None, None, torch.float64, centered=True)
    single = in_torch(x, w, d, None, None, torch.float32, centered=True)
    assert (out - exact).abs().max() <= 2 * (single - exact).abs().max() + 1e-4


def test_offsets_beyond_int32(first_program):
    # Untouched memory is never mapped: two tensors of 4 GB cost a few pages each.
    torch.utils.deterministic.fill_uninitialized_memory = False
    num_rows = 2**21 + 1
    x, out = (torch.empty(num_rows, 1024, dtype=torch.bfloat16) for _ in range(2))
    x[-1], out[-1] = 3.0, torch.nan
    w = torch.ones(1024)
    first_program(2**21)
    constants = {"EPS": EPS, "CENTERED": False, "BLOCK": 1024}
    _norm_kernel[(1,)](out, x, 1024, w, w, None, None, torch.tensor([1.0]), num_rows, 1024, **constants)
    assert torch.allclose(out[-1].float(), torch.tensor(2.0), rtol=1e-2)


@pytest.mark.parametrize("shape", [(3, 0, 8), (3, 2, 0)])
def test_empty(shape):
    vector = torch.ones(shape[-1])
    assert rms_norm(torch.ones(shape), vector, vector, ALPHAS, eps=EPS).shape == shape


def test_runs_twice_to_the_same_bits():
    x, w, d = randn(3, 2, 1000), randn(1000, seed=1), randn(1000, seed=2)
    assert same_bits(rms_norm(x, w, d, ALPHAS, eps=EPS), rms_norm(x, w, d, ALPHAS, eps=EPS))
