import pytest
import torch
import triton.language as tl
from sharpkern.kernels import axpy
from sharpkern.kernels._launch import Case, Config
from sharpkern.kernels._tables import tables
from sharpkern.kernels.axpy import _axpy_kernel, axpy_

from tests.kernels.budget import SIZES, TRIPLES, assert_within_budget, randn, same_bits

ALPHA = torch.tensor([-0.3])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Chunks of 1024 elements, so that small tensors have several, the last of them ragged."""
    monkeypatch.setattr(axpy, "_CONFIGS", (Case(None, None, None, Config(block=256, threads=64)),))
    monkeypatch.setattr(axpy, "_TILES", 4)


def assert_moved(theta, base, delta):
    for t, b, d in zip(theta, base, delta, strict=True):
        exact = b.double() + ALPHA.item() * d.double()
        assert_within_budget(t, exact, torch.add(b.float(), d.float(), alpha=ALPHA.item()).to(t.dtype))


def model(theta_dtype, base_dtype, delta_dtype, sizes=SIZES):
    theta = [torch.full((size,), torch.nan, dtype=theta_dtype) for size in sizes]
    base = [randn(size, dtype=base_dtype, seed=size) for size in sizes]
    delta = [randn(size, dtype=delta_dtype, seed=size + 1) for size in sizes]
    return theta, base, delta


@pytest.mark.parametrize(("theta_dtype", "base_dtype", "delta_dtype"), TRIPLES)
def test_matches_the_oracle(theta_dtype, base_dtype, delta_dtype):
    theta, base, delta = model(theta_dtype, base_dtype, delta_dtype)
    axpy_(theta, base, delta, ALPHA)
    assert_moved(theta, base, delta)


def test_alpha_zero_restores_every_bit():
    theta, base, delta = model(torch.bfloat16, torch.bfloat16, torch.float32)
    base[3][0] = -0.0
    delta[3][1] = torch.nan
    axpy_(theta, base, delta, ALPHA)
    axpy_(theta, base, delta, torch.zeros(1))
    assert all(same_bits(t, b) for t, b in zip(theta, base, strict=True))


def test_mixed_dtypes_layouts_and_alignments_in_one_call():
    matrix = torch.empty(40, 30, dtype=torch.bfloat16).t()
    unaligned = torch.empty(1001)[1:]
    theta = [matrix, unaligned, torch.empty(5, dtype=torch.float16), torch.empty(()), torch.empty(0, 3)]
    base = [randn(t.numel(), seed=i).as_strided(t.shape, t.stride()) for i, t in enumerate(theta)]
    delta = [torch.empty_like(t).copy_(randn(*t.shape, seed=9)) for t in theta]
    axpy_(theta, base, delta, ALPHA)
    assert_moved(theta, base, delta)


def test_operands_are_batched_by_dtypes_and_alignment():
    wide, narrow, off = torch.empty(1000), torch.empty(70, dtype=torch.bfloat16), torch.empty(1001)[1:]
    lists = [wide, off, torch.empty(0), narrow, wide], [wide, wide, wide, narrow, wide]
    rows, batches, num_chunks = tables(256, *lists, lists[0])
    assert [batch.aligned for batch in batches] == [True, False, True]
    assert [batch.dtypes for batch in batches] == [(tl.float32,) * 3, (tl.float32,) * 3, (tl.bfloat16,) * 3]
    assert [batch.chunks[:, 0].unique().tolist() for batch in batches] == [[0, 4], [1], [3]]
    assert batches[0].chunks.tolist() == [[row, part] for row in (0, 4) for part in range(4)]
    addresses = [[a.data_ptr(), b.data_ptr(), a.data_ptr()] for a, b in zip(*lists, strict=True)]
    assert rows[:, :3].tolist() == addresses
    assert rows[:, 3:].tolist() == [[1000, 0], [1000, 4], [0, 8], [70, 8], [1000, 9]]
    assert num_chunks == 13


def test_writes_nothing_around_a_tensor():
    memory = torch.full((1100,), 7.0)
    axpy_([memory[40:1040]], [torch.zeros(1000)], [torch.ones(1000)], ALPHA)
    assert (memory[:40] == 7).all()
    assert (memory[1040:] == 7).all()
    assert (memory[40:1040] == ALPHA).all()


def test_autograd_notices_the_write():
    theta = torch.ones(8, requires_grad=True)
    loss = (theta * theta).sum()
    axpy_([theta], [torch.zeros(8)], [torch.ones(8)], ALPHA)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tables_of_freed_tensors_are_never_used_for_others():
    for size in (1000, 3000, 1000, 500, 3000):
        theta, base, delta = model(torch.float32, torch.float32, torch.float32, sizes=[size, size])
        axpy_(theta, base, delta, ALPHA)
        assert_moved(theta, base, delta)


def test_offsets_beyond_int32():
    # Untouched memory is never mapped: three tensors of 4 GB cost a few pages each.
    torch.utils.deterministic.fill_uninitialized_memory = False
    n = 2**31 + 1000
    theta, base, delta = (torch.empty(n, dtype=torch.bfloat16) for _ in range(3))
    tail = slice(2**31, n)
    theta[tail], base[tail], delta[tail] = torch.nan, 1.0, 2.0
    rows = torch.tensor([[theta.data_ptr(), base.data_ptr(), delta.data_ptr(), n, 0]])
    chunks = torch.tensor([[0, 2**31 // 1024]], dtype=torch.int32)
    kinds = [tl.bfloat16] * 3
    _axpy_kernel[(1,)](rows, chunks, torch.tensor([0.5]), *kinds, True, CHUNK=1024, BLOCK=256)
    assert (theta[tail] == 2.0).all()


def test_no_tensors_is_nothing_to_do():
    axpy_([], [], [], ALPHA)
