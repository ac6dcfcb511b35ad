"""Memory plans of large language models: ``python bench/bench_memory.py --json bench/results/memory.json``.

Counts, and measures no time: the figures are the same on every machine that has the same torch and transformers.
"""

from typing import Any

import ledger

from sharpkern import memory_plan

# AdamW with float32 moments on bfloat16 weights, one sequence of 4096 tokens on each GPU: model, GPUs.
PLANS = [("olmo2-1b", 1), ("olmo2-7b", 1), ("olmo2-13b", 1), ("olmo2-32b", 8), ("llama3-70b", 16)]
QUICK = [("olmo2-1b", 1)]


def measure(quick: bool) -> dict[str, Any]:
    """Make the plans and print them."""
    plans = [memory_plan(model, num_gpus=num_gpus) for model, num_gpus in (QUICK if quick else PLANS)]
    print(*plans, sep="\n")
    return {"plans": [plan.to_json() for plan in plans]}


if __name__ == "__main__":
    ledger.main(__doc__, measure)
