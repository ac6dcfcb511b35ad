"""Runs functions on several processes of one gloo group, with a deadline; what one raises is its result."""

import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

Jobs = Mapping[str, Callable[[int], Any]]

# Imported once, by the process that the ranks are forked from.
PRELOADED = ["torch.distributed.tensor", "sharpkern.monitoring.monitor", "transformers.trainer", "accelerate"]


def worker(rank: int, jobs: Jobs, folder: Path, num_ranks: int) -> None:
    """Run every job, in order, in a process of its own."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=30),
    )
    results = {}
    for name, job in jobs.items():
        try:
            results[name] = job(rank)
        except Exception:
            results[name] = traceback.format_exc()
        torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def on_ranks(jobs: Jobs, num_ranks: int, folder: Path, seconds: float = 180) -> list[dict[str, Any]]:
    """What each job gave on each rank.

    Args:
        jobs: functions of the rank by name, that can be pickled.
        num_ranks: how many processes.
        folder: an empty one, for what they tell.
        seconds: the deadline.

    Returns:
        The results by rank and name.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    processes = multiprocessing.start_processes(
        worker, (jobs, folder, num_ranks), nprocs=num_ranks, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + seconds
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, f"the ranks have not come to an end in {seconds} s"
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num_ranks)]
