"""Memory plans of large language models: ``python bench/bench_memory.py --json bench/results/memory.json``.

Counts, and measures no time: the figures are the same on every machine that has the same torch and transformers.
"""

import argparse
from pathlib import Path

import ledger
import torch

from sharpkern import memory_plan

# AdamW with float32 moments on bfloat16 weights, one sequence of 4096 tokens on each GPU: model, GPUs.
PLANS = [("olmo2-1b", 1), ("olmo2-7b", 1), ("olmo2-13b", 1), ("olmo2-32b", 8), ("llama3-70b", 16)]
QUICK = [("olmo2-1b", 1)]


def main() -> None:
    """Make the plans, print them, and add them to the ledger."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="results file to which the record is added")
    parser.add_argument("--quick", action="store_true", help="the smallest model alone")
    arguments = parser.parse_args()
    sitting = ledger.Sitting(arguments.quick)
    plans = []
    for model, num_gpus in QUICK if arguments.quick else PLANS:
        plan = memory_plan(model, num_gpus=num_gpus)
        print(plan)
        plans.append(plan.to_json())
    if arguments.json is not None:
        ledger.append(arguments.json, sitting.record(plans=plans))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
