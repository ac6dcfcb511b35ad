"""The kernels under pytest-benchmark: ``pytest bench/ --benchmark-only``.

Times on their own, for comparing two versions of a kernel with pytest-benchmark's own tools; on a GPU the Triton
kernels, elsewhere plain torch. Shares of what the machine reaches, and everything else, are `sharpkern bench`'s.
"""

from functools import cache

import pytest

from sharpkern.bench.accuracy import checked
from sharpkern.bench.cases import Bench, timed
from sharpkern.bench.timing import machine_here

BENCH = Bench(machine_here(), quick=True)
CASES = timed(BENCH, BENCH.pick(gpu=1 << 28, cpu=1 << 20))
# Checked once for all cases of an operation.
after_check = cache(checked)


@pytest.mark.parametrize("name", CASES)
def test_speed(name, benchmark):
    """Time one case, once its operation has passed its check: what has not is not handed out."""
    bench = after_check(BENCH, CASES[name].operation)
    load = CASES[name].load(bench)

    def call():
        load.run(bench.backend)
        bench.machine.synchronize()

    benchmark(call)
