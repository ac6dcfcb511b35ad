"""The streaming kernels under pytest-benchmark: ``python -m pytest bench/bench_kernels.py``.

Times on their own, for comparing two versions of a kernel with pytest-benchmark's own tools; on a GPU the Triton
kernels, elsewhere plain torch. Shares of what the machine reaches, and everything else, are `sharpkern bench`'s.
"""

import pytest
import torch

from sharpkern.cli.bench.judge import judge
from sharpkern.cli.bench.machine import Machine
from sharpkern.cli.bench.streaming import kinds
from sharpkern.cli.bench.suite import Bench
from sharpkern.cli.bench.trials import Trials

BENCH = Bench(Machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")), quick=True, passed=frozenset())
KINDS = kinds(BENCH, BENCH.pick(gpu=1 << 28, cpu=1 << 20))


@pytest.fixture(scope="module")
def trials():
    """Checks of correctness by operation."""
    return Trials(BENCH).all()


@pytest.mark.parametrize("name", KINDS)
def test_speed(name, trials, benchmark):
    """Time one kind of call, once its operation has passed its checks."""
    kind = KINDS[name]
    # What is wrong is not timed.
    assert all(judge(BENCH, trial)["passed"] for trial in trials[kind.operation])
    load = kind.build()

    def call():
        load.run(backend=BENCH.backend)
        BENCH.machine.synchronize()

    benchmark(call)
