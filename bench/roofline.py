"""What a probe of Llama-7B should take on an H200, and whether device or host decides: arithmetic, not a timing.

    python bench/roofline.py [--quick] [--json PATH]

Bytes and operations over the device's bandwidth and arithmetic, beside the host's time. That of a plain forward pass is
assumed, and what measuring takes of it is from the last record of bench/results/host.json.
"""

from dataclasses import dataclass
from typing import Any

import ledger

# An H200: bytes and bf16 operations per second. Attention reaches a share of the latter.
BANDWIDTH, ARITHMETIC, ATTENTION = 4.3e12, 790e12, 0.6
# Of a plain forward pass of a model of transformers, assumed: some 1500 launches.
HOST_SECONDS = 0.025
# Elementwise passes over the hidden states in a layer, as transformers writes it.
_PASSES = 45

WIDTH, HIDDEN, LAYERS, VOCABULARY = 4096, 11008, 32, 32000
_BODY = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN)
_WEIGHTS = _BODY + VOCABULARY * WIDTH


@dataclass(frozen=True)
class Way:
    """How weights are formed.

    Attributes:
        case: in the record of host times.
        at_once: step sizes in one pass.
        read: bytes read of each weight.
        written: bytes written of it for each step size.
    """

    case: str
    at_once: int
    read: int
    written: int


# bf16 weights and gradients, fp32 moments; Δθ in memory in bf16.
WAYS = {
    "virtual, from state": Way("virtual, from state", 1, 12, 2),
    "virtual, resident": Way("virtual, resident", 1, 4, 2),
    "in place, from state": Way("in place, from state", 1, 12, 2),
    "in place, resident": Way("in place, resident", 1, 4, 2),
    "batched, 8, from state": Way("batched, 8, from state", 8, 12, 2),
}


def plain_seconds(tokens: int) -> float:
    """The device's time for a forward pass of one sequence."""
    products = 2 * tokens * _WEIGHTS / ARITHMETIC
    attention = LAYERS * 2 * tokens * tokens * WIDTH / (ATTENTION * ARITHMETIC)
    elementwise = LAYERS * _PASSES * 2 * tokens * WIDTH * 2 / BANDWIDTH
    return products + attention + elementwise + tokens * VOCABULARY * 8 / BANDWIDTH


def roofline(quick: bool) -> dict[str, Any]:
    """Return device and host times of every way by the number of tokens."""
    record = ledger.latest("host")
    hosts = {row["case"]: row["plain_forwards"] for row in record["rows"]}
    rows = []
    for tokens in (512, 4096, 16384):
        plain = plain_seconds(tokens)
        for name, way in WAYS.items():
            formed = _WEIGHTS * (way.read + way.written * way.at_once) / BANDWIDTH
            device = way.at_once * plain + formed
            host = HOST_SECONDS * hosts[way.case]
            took = max(device, host)
            rows.append(
                {
                    "tokens": tokens,
                    "way": name,
                    "gigabytes_formed": formed * BANDWIDTH / 1e9,
                    "device_ms": 1e3 * device,
                    "host_ms": 1e3 * host,
                    "ms_per_loss": 1e3 * took / way.at_once,
                    "plain_forwards_per_loss": took / way.at_once / max(plain, HOST_SECONDS),
                    "decides": "host" if host > device else "device",
                }
            )
    ledger.show("A probe of Llama-7B on an H200, by arithmetic", rows, " ".join(rows[0]))
    return {"assumed": {"bandwidth": BANDWIDTH, "arithmetic": ARITHMETIC, "host_seconds": HOST_SECONDS}, "rows": rows}


if __name__ == "__main__":
    ledger.main(__doc__, roofline)
