import itertools

import pytest
import torch
import torch.nn.functional as F
from sharpkern.kernels import cross_entropy as module
from sharpkern.kernels._launch import Case, Config
from sharpkern.kernels.cross_entropy import _update_kernel, linear_cross_entropy

from tests.kernels.budget import DTYPES, randn, same_bits

ALPHAS = torch.tensor([-0.3, 0.0, 0.7])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Chunks of 64 rows, so that small vocabularies have several, the last of them ragged."""
    use_chunks_of(64, monkeypatch)


def use_chunks_of(height, monkeypatch):
    monkeypatch.setattr(module, "VOCABULARY_CHUNK", height)
    monkeypatch.setattr(module, "_UPDATE_CONFIGS", (Case(None, None, None, Config(block=height, threads=64)),))


def case(vocabulary=200, tokens=17, width=24, dtype=torch.float32, W_dtype=None, D_dtype=None, scale=1.0):
    hidden = randn(3, tokens, width, dtype=dtype, scale=scale)
    W = randn(vocabulary, width, dtype=W_dtype or dtype, seed=1)
    D = randn(vocabulary, width, dtype=D_dtype or dtype, seed=2)
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(3))
    return hidden, W, D, labels


def in_torch(hidden, W, D, labels, dtype, *, softcap=None, **kwargs):
    """The losses by stock operations in a dtype, from a perturbed weight that is rounded as the kernel rounds it."""
    losses = []
    for k, alpha in enumerate(ALPHAS.tolist()):
        weight = (
            W.float() if D is None else torch.where(torch.tensor(alpha == 0), W.float(), W.float() + alpha * D.float())
        )
        logits = hidden[k].to(dtype) @ weight.to(hidden.dtype).to(dtype).t()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        losses.append(F.cross_entropy(logits, labels, **kwargs))
    return torch.stack(losses).double()


def assert_matches(hidden, W, D, labels, **kwargs):
    got = linear_cross_entropy(hidden, W, D, labels, ALPHAS, **kwargs)
    exact = in_torch(hidden, W, D, labels, torch.float64, **kwargs)
    single = in_torch(hidden, W, D, labels, torch.float32, **kwargs)
    # Rounding of fp32 logits and, with 16-bit weights, of the few elements that fall to the other side of a half.
    slack = (2e-6 if hidden.dtype == torch.float32 else 2e-4) * exact.abs()
    assert got.dtype == torch.float64
    assert ((got - exact).abs() <= (single - exact).abs() + slack).all(), (got, exact, single)


@pytest.mark.parametrize(("dtype", "W_dtype", "D_dtype"), list(itertools.product(DTYPES, DTYPES, DTYPES)))
def test_matches_the_oracle(dtype, W_dtype, D_dtype):
    assert_matches(*case(dtype=dtype, W_dtype=W_dtype, D_dtype=D_dtype, vocabulary=100, tokens=7))


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 127, 1000])
def test_chunks_of_any_number(vocabulary):
    assert_matches(*case(vocabulary=vocabulary, tokens=5))


def test_chunks_of_full_height(monkeypatch):
    use_chunks_of(4096, monkeypatch)
    assert_matches(*case(vocabulary=4097, tokens=5))


@pytest.mark.parametrize("kwargs", [{"reduction": "sum"}, {"softcap": 5.0}, {"softcap": 30.0, "reduction": "sum"}])
def test_options(kwargs):
    assert_matches(*case(scale=4.0), **kwargs)


@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_ignored_tokens_do_not_count(ignore_index):
    hidden, W, D, labels = case()
    labels[[0, 5, 16]] = ignore_index
    assert_matches(hidden, W, D, labels, ignore_index=ignore_index)
    assert_matches(hidden, W, D, labels, ignore_index=ignore_index, reduction="sum")


def test_head_that_does_not_move():
    hidden, W, _, labels = case()
    assert_matches(hidden, W, None, labels)


def test_logits_of_hundreds_do_not_overflow():
    assert_matches(*case(scale=100.0))


def test_a_chunk_of_minus_infinity_and_of_nan():
    hidden, W, D, labels = torch.ones(3, 4, 2), torch.ones(200, 2), torch.zeros(200, 2), torch.full((4,), 150)
    W[:64] = -torch.inf
    assert torch.allclose(
        linear_cross_entropy(hidden, W, D, labels, ALPHAS), in_torch(hidden, W, D, labels, torch.float64)
    )
    W[3] = torch.nan
    assert linear_cross_entropy(hidden, W, D, labels, ALPHAS).isnan().all()


@pytest.mark.parametrize("label", [-1, 200])
def test_label_outside_the_vocabulary_gives_nan(label):
    hidden, W, D, labels = case()
    labels[3] = label
    assert linear_cross_entropy(hidden, W, D, labels, ALPHAS).isnan().all()


def test_no_token_counts():
    hidden, W, D, labels = case()
    labels[:] = -100
    assert linear_cross_entropy(hidden, W, D, labels, ALPHAS).isnan().all()
    assert (linear_cross_entropy(hidden, W, D, labels, ALPHAS, reduction="sum") == 0).all()
    empty = linear_cross_entropy(hidden[:, :0], W, D, labels[:0], ALPHAS, reduction="sum")
    assert (empty == 0).all()


def test_offsets_beyond_int32(first_program):
    # Untouched memory is never mapped: 9 GB of logits cost a few pages.
    torch.utils.deterministic.fill_uninitialized_memory = False
    num_tokens, width = 2**19 + 1, 4096
    logits = torch.empty(num_tokens, width)
    logits[-1] = 0.0
    maximum, total, target = torch.full((num_tokens,), -torch.inf), torch.zeros(num_tokens), torch.zeros(num_tokens)
    labels = torch.zeros(num_tokens, dtype=torch.int64)
    first_program(2**19)
    _update_kernel[(1,)](maximum, total, target, logits, labels, 0, width, SOFTCAP=None, BLOCK=4096)
    assert maximum[-1] == 0
    assert total[-1] == width


def test_runs_twice_to_the_same_bits():
    operands = case()
    assert same_bits(linear_cross_entropy(*operands, ALPHAS), linear_cross_entropy(*operands, ALPHAS))


def test_parameters_that_require_gradients_are_taken_as_they_are():
    hidden, W, D, labels = case()
    loss = linear_cross_entropy(hidden.requires_grad_(), torch.nn.Parameter(W), D, labels, ALPHAS)
    assert not loss.requires_grad
