"""Every operation of `sharpkern.ops`, and the head made of them, against float64. What fails here is not timed."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from sharpkern import ops
from sharpkern.cli.bench.judge import Trial, judged, poisoned
from sharpkern.cli.bench.record import Json
from sharpkern.cli.bench.suite import Bench, Case
from sharpkern.cli.bench.trials import BF16, FP32, Trials
from sharpkern.ops.linear_cross_entropy import cross_entropy_of_rows, linear_cross_entropy

# Relative error of a mean over tokens. Products of 16-bit numbers are exact in fp32, so that only sums differ; where
# torch cannot widen on the way, a bf16 logit is off by 2⁻⁹, which averages out.
_HEAD_TOLERANCE = {FP32: 1e-5, BF16: 1e-4}


def cases(bench: Bench) -> dict[str, Case]:
    """Return one case per operation."""

    def case(trials: Callable[[], Iterator[Trial]]) -> Case:
        return lambda: judged(bench, trials())

    operations = {name: case(trials) for name, trials in Trials(bench).all().items()}
    return {**operations, "linear_cross_entropy": lambda: head(bench)}


def head(bench: Bench) -> Iterator[Json]:
    """Compare the chunked loss with that of logits in float64: of a weight, and of one formed chunk by chunk."""
    machine = bench.machine
    vocabulary, width, num_tokens = 9001, 256, 129
    alpha = torch.tensor([-0.3], device=machine.device)
    labels = torch.randint(0, vocabulary, (num_tokens,), generator=machine.generator(1), device=machine.device)
    labels[3] = -100
    for dtype, tolerance in _HEAD_TOLERANCE.items():
        if dtype == BF16 and machine.runs_kernels and not machine.is_gpu:
            # Triton's interpreter rounds bf16 wrongly.
            continue
        hidden = machine.randn(num_tokens, width, dtype=dtype)
        W, D = (machine.randn(vocabulary, width, dtype=dtype, seed=seed, scale=0.1) for seed in (1, 2))
        formed = ops.form(W, D, alpha, backend="torch")[0]

        def rows(part: slice, W: torch.Tensor = W, D: torch.Tensor = D) -> torch.Tensor:
            return ops.form(W[part], D[part], alpha, backend=bench.backend_to_check)[0]

        with poisoned():
            found = {
                "weight": linear_cross_entropy(hidden, W, labels, backend=bench.backend_to_check),
                "formed rows": cross_entropy_of_rows(hidden, vocabulary, rows, labels, backend=bench.backend_to_check),
            }
        for name, weight in (("weight", W), ("formed rows", formed)):
            exact = F.cross_entropy(hidden.double() @ weight.double().T, labels)
            error = float((found[name].double() - exact).abs() / exact)
            about = {"of": name, "dtypes": str(dtype).removeprefix("torch."), "error": error, "tolerance": tolerance}
            yield {"operation": "linear_cross_entropy", **about, "passed": error <= tolerance}
