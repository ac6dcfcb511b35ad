"""What measuring takes of the host on a GPU: launches, kernels to compile, refusals, reads."""

import pytest

from tests.helpers.launch_counts import PASSES, committed, counts


@pytest.fixture(scope="module")
def found(gpu):
    pytest.importorskip("transformers", reason="the model is of transformers")
    return counts(gpu)


def test_counts_are_the_committed_ones(found):
    assert found == committed(), "look at the change, then python -m bench.launch_counts"


def test_a_pass_takes_one_launch_for_each_matrix_and_few_others(found):
    matrices = 7 * 32
    for name in ("virtual, from state", "virtual, resident"):
        assert sum(found[name]["launches"].values()) <= matrices + 150
    assert sum(found["virtual, no step"]["launches"].values()) < 10
    assert sum(found["in place, from state"]["launches"].values()) == 1
    assert sum(found["direction from state"]["launches"].values()) == 2


def test_passes_load_no_kernel_that_the_first_has_not_loaded_and_refuse_nothing(found):
    for name in PASSES:
        assert found[name]["loaded"] == {}
        assert found[name]["refused"] == {}


def test_the_first_measurements_load_few_kernels(found):
    for engine in ("virtual", "batched", "inplace"):
        assert sum(found[f"ten measurements, {engine}"]["loaded"].values()) <= 8
