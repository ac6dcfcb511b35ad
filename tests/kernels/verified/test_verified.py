"""Fresh verdicts are the committed ones: python -m pytest -m verify tests/kernels/verified."""

import pytest

pytest.importorskip("triton", reason="triton is a Linux package")

from tests.kernels.verified.cases import ARCHITECTURES, CASES
from tests.kernels.verified.planted import FAULTS
from tests.kernels.verified.record import VERIFIER, committed, found_fault, said, verdicts

pytestmark = [pytest.mark.verify, pytest.mark.usefixtures("verifier")]


def test_the_verifier_is_the_one_of_the_record():
    from importlib.metadata import version

    assert f"sentryward {version('sentryward')}" == VERIFIER


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", CASES)
def test_kernel(name, architecture):
    stored = committed()
    if stored is None:
        pytest.skip("no verdicts with this Triton")
    fresh = said(verdicts(name, architecture))
    assert fresh == said(stored["cases"][name][architecture]), "python -m bench.verified_table"


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault(name):
    fault = FAULTS[name]
    assert found_fault(name)["proved"] == fault.left
