"""The streaming kernels under pytest-benchmark: ``python -m pytest bench/bench_kernels.py``.

Times on their own, for comparing two versions of a kernel with pytest-benchmark's own tools; on a GPU the Triton
kernels, elsewhere plain torch. Shares of what the machine reaches, and everything else, are `sharpkern bench`'s.
"""

from functools import cache

import pytest
import torch

from sharpkern.cli.bench.judge import judged
from sharpkern.cli.bench.machine import Machine
from sharpkern.cli.bench.streaming import kinds
from sharpkern.cli.bench.suite import Bench
from sharpkern.cli.bench.trials import Trials

BENCH = Bench(Machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")), quick=True, passed=frozenset())
KINDS = kinds(BENCH, BENCH.pick(gpu=1 << 28, cpu=1 << 20))


@cache
def passes(operation):
    """Whether an operation passes its checks of correctness."""
    return all(row["passed"] for row in judged(BENCH, Trials(BENCH).all()[operation]()))


@pytest.mark.parametrize("name", KINDS)
def test_speed(name, benchmark):
    """Time one kind of call, once its operation has passed its checks."""
    kind = KINDS[name]
    assert passes(kind.operation), "what is wrong is not timed"
    load = kind.build()

    def call():
        load.run(backend=BENCH.backend)
        BENCH.machine.synchronize()

    benchmark(call)
