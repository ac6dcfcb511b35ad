"""The process that runs cases of one section: it says what it begins before it does, so that a crash has a name.

``python -m sharpkern.cli.bench.worker`` reads a job as JSON from its input and writes one JSON message per line: the
names of its cases, then for each case that it begins, every row found, and how it ended.
"""

import gc
import importlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sharpkern.cli.bench.machine import Machine
from sharpkern.cli.bench.record import BLOCKED, DONE, FAILED, WRONG, Json, plain
from sharpkern.cli.bench.suite import Bench, BlockedError, Case

Send = Callable[..., None]


@dataclass(frozen=True)
class Job:
    """What a worker is to do.

    Attributes:
        module: of the section.
        quick: whether to take the small sizes.
        device: "cuda:0" or "cpu".
        passed: operations whose check of correctness has passed.
        share: (i, n): of all cases take the i-th, (i + n)-th and so on.
        skip: names of the cases that are through.
    """

    module: str
    quick: bool
    device: str
    passed: list[str]
    share: tuple[int, int]
    skip: list[str]

    def to_json(self) -> str:
        """Return the job as `from_json` takes it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """Return the job of a JSON text."""
        fields = json.loads(text)
        return cls(**{**fields, "share": tuple(fields["share"])})


def work(job: Job, send: Send) -> None:
    """Run the cases of a job.

    Args:
        job: what to do.
        send: takes the fields of a message.
    """
    if job.device == "cpu":
        # Threads that share cores with other work wait for each other: one gives steadier figures.
        torch.set_num_threads(1)
    bench = Bench(Machine(torch.device(job.device)), job.quick, frozenset(job.passed))
    first, step = job.share
    cases = importlib.import_module(job.module).cases(bench)
    mine = {name: cases[name] for name in list(cases)[first::step] if name not in job.skip}
    send(cases=list(mine))
    for name, case in mine.items():
        send(begin=name)
        started = time.perf_counter()
        status, error = _run(bench, case, send)
        send(end=name, status=status, error=error, seconds=round(time.perf_counter() - started, 3))
        gc.collect()
        # A fault of the device leaves it unusable for this process: the next one goes on.
        bench.machine.synchronize()
        bench.machine.release_memory()


def _run(bench: Bench, case: Case, send: Send) -> tuple[str, str | None]:
    """Run one case and return how it ended; a wrong result is one whose row says that it has not passed."""
    wrong = 0
    try:
        with torch.no_grad():
            for row in case():
                wrong += row.get("passed") is False
                send(row=row)
        bench.machine.synchronize()
    except BlockedError as error:
        return BLOCKED, str(error)
    except Exception as error:
        return FAILED, without_paths(f"{type(error).__name__}: {error}")
    return (WRONG, f"{wrong} wrong") if wrong else (DONE, None)


def without_paths(text: str, limit: int = 400) -> str:
    """Return a message shortened, and without the folders of the machine it comes from.

    Args:
        text: the message.
        limit: most characters to return.
    """
    return re.sub(r"(?<![\w.])~?(/[\w.+@-]+)+/", "", " ".join(text.split()))[:limit]


def _end_with(parent: int) -> None:
    """End this process and whatever it started once its parent has gone: nobody else would free the device."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Do the job that stands on the input."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    # Messages have the standard output to themselves: whatever else prints goes to the error stream.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(**message: Any) -> None:
        fields: Json = plain(message)
        channel.write(json.dumps(fields) + "\n")
        channel.flush()

    work(Job.from_json(sys.stdin.read()), send)


if __name__ == "__main__":
    main()
