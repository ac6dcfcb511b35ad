"""What a section's cases are given, and what they give."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sharpkern.cli.bench.machine import Machine
from sharpkern.cli.bench.record import Json
from sharpkern.ops.registry import Backend

# A case yields its rows as it finds them, so that those before a crash are kept. A row with "passed": False says that a
# result was wrong; one with "share" and "target" is judged in the table.
Case = Callable[[], Iterator[Json]]


class BlockedError(Exception):
    """A case times something that has not passed its check of correctness."""


@dataclass(frozen=True)
class Bench:
    """What cases are given.

    Attributes:
        machine: times and measures.
        quick: whether to take the small sizes.
        passed: operations whose check of correctness has passed.
    """

    machine: Machine
    quick: bool
    passed: frozenset[str]

    @property
    def backend(self) -> Backend:
        """The backend to time: Triton on a GPU, plain torch elsewhere."""
        return "triton" if self.machine.is_gpu else "torch"

    @property
    def backend_to_check(self) -> Backend:
        """The backend to check: Triton where kernels run, which is under its interpreter too."""
        return "triton" if self.machine.runs_kernels else "torch"

    def require(self, *operations: str) -> None:
        """Go on only where operations have passed their check.

        Args:
            operations: cases of the section "correctness".

        Raises:
            BlockedError: if one has not.
        """
        missing = [operation for operation in operations if operation not in self.passed]
        if missing:
            raise BlockedError(f"not timed: {', '.join(missing)} did not pass the check of correctness")

    def pick(self, gpu: int, cpu: int, quick: int | None = None) -> int:
        """Return the size for this machine: ``quick`` in quick sittings on a CPU, where it is given."""
        if self.machine.is_gpu:
            return gpu
        return quick if self.quick and quick is not None else cpu
