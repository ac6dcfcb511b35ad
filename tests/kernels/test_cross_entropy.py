"""The loss that the statistics give after all chunks, against torch's on all logits at once."""

import math

import pytest
import torch
import torch.nn.functional as F
from sharpkern.kernels.cross_entropy import MAX_WIDTH, _online_cross_entropy_kernel, online_cross_entropy_

from tests.kernels.budget import randn, same_bits


def start(num_tokens):
    """Statistics before the first chunk."""
    return torch.full((num_tokens,), -torch.inf), torch.zeros(num_tokens), torch.full((num_tokens,), torch.nan)


def token_losses(logits, labels, width, softcap=None):
    maximum, total, target = start(len(logits))
    for first in range(0, logits.shape[1], width):
        chunk = logits[:, first : first + width]
        online_cross_entropy_(maximum, total, target, chunk, labels, first, softcap=softcap)
    return maximum.double() + total.double().log() - target.double()


def in_torch(logits, labels, dtype, softcap=None):
    logits = logits.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction="none").double()


def case(vocabulary=200, num_tokens=17, scale=4.0):
    labels = torch.randint(vocabulary, (num_tokens,), generator=torch.Generator().manual_seed(1))
    return randn(num_tokens, vocabulary, scale=scale), labels


def assert_matches(logits, labels, width, softcap=None):
    got = token_losses(logits, labels, width, softcap)
    exact = in_torch(logits, labels, torch.float64, softcap)
    single = in_torch(logits, labels, torch.float32, softcap)
    # Maximum, logarithm and label's logit are each rounded at the size of the largest logit, capped or not.
    largest = logits.abs().max().item() if softcap is None else min(softcap, logits.abs().max().item())
    slack = 2 * torch.finfo(torch.float32).eps * (1 + largest)
    assert ((got - exact).abs() <= (single - exact).abs() + slack).all(), (got, exact, single)


@pytest.mark.parametrize("width", [7, 63, 64, 199, 200])
def test_chunks_of_any_width(width):
    assert_matches(*case(num_tokens=3), width)


@pytest.mark.parametrize("vocabulary", [1, 1000, 1024, 1025, 4096, 4097, 10000])
def test_vocabularies_of_any_size_in_the_widest_chunks(vocabulary):
    assert_matches(*case(vocabulary, num_tokens=5), MAX_WIDTH)


# NumPy, with which the interpreter computes, warns where the hardware goes to infinity without a word.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("softcap", [5.0, 30.0])
@pytest.mark.parametrize("scale", [4.0, 100.0])
def test_softcap(softcap, scale):
    assert_matches(*case(scale=scale), 64, softcap)


def test_logits_of_hundreds_do_not_overflow():
    assert_matches(*case(scale=300.0), 64)


def test_rows_at_any_distance_and_narrow_labels():
    logits, labels = case()
    memory = torch.full((17, 300), torch.nan)
    memory[:, 50:250] = logits
    assert_matches(memory[:, 50:250], labels, 64)
    assert same_bits(token_losses(memory[:, 50:250], labels.int(), 64), token_losses(logits, labels, 64))


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_chunks_of_minus_infinity_wherever_they_are(softcap):
    logits, labels = case()
    logits[:, :64], logits[:, 128:] = -torch.inf, -torch.inf
    labels[:] = 100
    assert_matches(logits, labels, 64, softcap)


def test_every_logit_minus_infinity_is_what_torch_makes_of_it():
    logits, labels = torch.full((2, 200), -torch.inf), torch.tensor([3, 150])
    assert in_torch(logits, labels, torch.float64).isnan().all()
    assert token_losses(logits, labels, 64).isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 70, 199])
def test_a_logit_that_is_no_number_stays_in_its_row(column, value):
    logits, labels = case()
    logits[3, column] = value
    assert token_losses(logits, labels, 64).isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("label", [-100, -1, 200, 2**40])
def test_label_outside_the_vocabulary_gives_nan(label):
    logits, labels = case()
    labels[3] = label
    assert token_losses(logits, labels, 64).isnan().nonzero().tolist() == [[3]]


def test_chunks_without_tokens_or_logits_change_nothing():
    statistics = start(17)
    before = [tensor.clone() for tensor in statistics]
    logits, labels = case()
    online_cross_entropy_(*statistics, logits[:, :0], labels, 0)
    online_cross_entropy_(*start(0), logits[:0], labels[:0], 0)
    assert all(same_bits(a, b) for a, b in zip(statistics, before, strict=True))


def test_autograd_notices_the_write():
    statistics = start(17)
    online_cross_entropy_(*statistics, *case(), 0)
    assert all(tensor._version > fresh._version for tensor, fresh in zip(statistics, start(17), strict=True))


def test_offsets_beyond_int32(first_program):
    # Untouched memory is never mapped: 9 GB of logits cost a few pages.
    torch.utils.deterministic.fill_uninitialized_memory = False
    num_tokens, width = 2**19 + 1, MAX_WIDTH
    logits = torch.empty(num_tokens, width)
    logits[-1] = 0.0
    maximum, total, target = start(num_tokens)
    labels = torch.zeros(num_tokens, dtype=torch.int64)
    first_program(2**19)
    _online_cross_entropy_kernel[(1,)](
        maximum, total, target, logits, width, labels, 0, width, SOFTCAP=None, BLOCK=width
    )
    assert maximum[-1] == 0
    assert total[-1] == width
    assert math.isinf(maximum[0])


def test_runs_twice_to_the_same_bits():
    assert same_bits(token_losses(*case(), 64), token_losses(*case(), 64))
