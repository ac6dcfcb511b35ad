"""What one method takes, and the cards that hold it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Memory that cards are sold with, GB.
CARDS = (24, 40, 48, 80, 96, 141, 192)
# Of as many GiB, bytes that tensors can have: some cards show less than that, context and libraries take some, and what
# is free may lie in pieces.
USABLE = 0.92 * 2**30


@dataclass(frozen=True)
class MethodMemory:
    """What one method takes, on each GPU.

    Attributes:
        method: its name.
        direction: where Δθ is: "resident" in memory in the widest dtype of parameter and state, "bf16" in memory as the
            weights are, "state" worked out of the optimizer's, "" where there is none.
        num_steps: step sizes of one pass.
        parts: bytes at the peak by what they are for.
        host_bytes: on the host besides.
    """

    method: str
    direction: str
    num_steps: int
    parts: Mapping[str, int]
    host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Bytes at the peak, on each GPU."""
        return sum(self.parts.values())

    def sum(self, parts: Iterable[str]) -> int:
        """Bytes of some parts at the peak."""
        return sum(self.parts.get(part, 0) for part in parts)

    @property
    def card(self) -> int | None:
        """The smallest of `CARDS` that holds it, in GB; None where none does."""
        return next((card for card in CARDS if self.peak_bytes <= USABLE * card), None)
