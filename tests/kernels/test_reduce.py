import pytest
import torch
import triton.language as tl
from sharpkern.kernels import _tables
from sharpkern.kernels import reduce as module
from sharpkern.kernels._launch import Case, Config
from sharpkern.kernels.reduce import _chunk_sums_kernel, reduce

from tests.kernels.budget import SIZES, TRIPLES, randn, same_bits


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(module, "_CONFIGS", (Case(None, None, None, Config(block=256, threads=64)),))
    monkeypatch.setattr(module, "_TILES", 4)


def exact(theta, delta, grad):
    """The sums of every tensor in fp64, a row each."""
    rows = [[t.double() for t in row] for row in zip(theta, delta, grad, strict=True)]
    return torch.stack([torch.stack([(d * g).sum(), (d * d).sum(), (t * t).sum(), (g * g).sum()]) for t, d, g in rows])


def assert_exact_to_fp64(theta, delta, grad):
    got = reduce(theta, delta, grad)
    assert got.dtype == torch.float64
    assert got.shape == (len(theta), 4)
    # Products are exact and sums are fp64: only the order of additions differs.
    budget = 1e-14 * exact(*([t.abs() for t in tensors] for tensors in (theta, delta, grad)))
    assert ((got - exact(theta, delta, grad)).abs() <= budget).all()


@pytest.mark.parametrize(("theta_dtype", "delta_dtype", "grad_dtype"), TRIPLES)
def test_matches_the_oracle_to_fp64(theta_dtype, delta_dtype, grad_dtype):
    dtypes = (theta_dtype, delta_dtype, grad_dtype)
    # The largest takes four fifths of the time.
    sizes = SIZES if len(set(dtypes)) == 1 else SIZES[:-1]
    assert_exact_to_fp64(
        *(
            [randn(size, dtype=dtype, seed=10 * role + i) for i, size in enumerate(sizes)]
            for role, dtype in enumerate(dtypes)
        )
    )


def test_cancellation_costs_no_digits():
    delta = [torch.tensor([1e4, -1e4, 1e-4])]
    grad = [torch.tensor([1e4, 1e4, 1.0])]
    assert reduce(grad, delta, grad)[0, 0].item() == delta[0][2].double().item()


def test_rows_keep_the_order_of_the_lists_whatever_launch_a_tensor_is_in():
    """Empty tensors first, in between and last; one chunk and many; dtypes and alignments that alternate."""
    bf16, fp16 = torch.bfloat16, torch.float16

    def role(seed, odd):
        return [
            torch.empty(0),
            randn(5000, seed=seed),
            randn(300, dtype=odd, seed=seed + 1),
            torch.empty(0, 3, dtype=odd),
            randn(1001, seed=seed + 2)[1:],
            randn(30, 40, seed=seed + 3).t(),
            randn(3000, dtype=odd, seed=seed + 4),
            randn(1, seed=seed + 5)[0],
            torch.empty(0),
        ]

    assert_exact_to_fp64(role(0, bf16), role(10, torch.float32), role(20, fp16))


def test_more_chunks_than_one_block_of_the_second_stage(monkeypatch):
    monkeypatch.setattr(_tables, "_SUM_CONFIG", Config(block=4, threads=32))
    assert_exact_to_fp64(*([randn(9000, seed=role), randn(20, seed=role)] for role in range(3)))


def test_runs_twice_to_the_same_bits():
    lists = [[randn(4097, seed=role), randn(300, seed=role + 3)] for role in range(3)]
    assert same_bits(reduce(*lists), reduce(*lists))


def test_not_a_number_stays_in_its_row():
    tensors = [torch.ones(3), torch.tensor([1.0, torch.nan]), torch.ones(3)]
    assert reduce(tensors, tensors, tensors).isnan().all(dim=1).tolist() == [False, True, False]


def test_nothing_sums_to_zero():
    assert torch.equal(reduce([], [], []), torch.zeros(0, 4, dtype=torch.float64))
    empty = [torch.empty(0), torch.empty(0, 3)]
    assert torch.equal(reduce(empty, empty, empty), torch.zeros(2, 4, dtype=torch.float64))


def test_offsets_beyond_int32():
    # Untouched memory is never mapped: three tensors of 4 GB cost a few pages each.
    torch.utils.deterministic.fill_uninitialized_memory = False
    n = 2**31 + 1000
    tensors = [torch.empty(n, dtype=torch.bfloat16) for _ in range(3)]
    for role, tensor in enumerate(tensors):
        tensor[2**31 :] = role + 1.0
    rows = torch.tensor([[*(tensor.data_ptr() for tensor in tensors), n, 0]])
    chunks = torch.tensor([[0, 2**31 // 1024]], dtype=torch.int32)
    partial = torch.full((2**21 + 1, 4), torch.nan, dtype=torch.float64)
    kinds = [tl.bfloat16] * 3
    _chunk_sums_kernel[(1,)](partial, rows, chunks, *kinds, True, CHUNK=1024, BLOCK=256, LANE=8)
    assert partial[-1].tolist() == [6000.0, 4000.0, 1000.0, 9000.0]
    assert partial[:-1].isnan().all()
