"""One worker process after another, until the cases of a lane are through: a crash or a hang costs one case."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from typing import IO

from sharpkern.cli.bench.environment import child_environment
from sharpkern.cli.bench.record import CRASHED, NOT_RUN, RUNNING, TIMEOUT, Json
from sharpkern.cli.bench.worker import Job, without_paths

# What the workers of all lanes put in: their lane, and a message; None when the worker has ended.
Inbox = queue.Queue[tuple["Lane", Json | None]]

# Seconds that a worker may take to import what it needs, wake the device, and tidy up between cases.
_STARTUP = 60.0


class Lane:
    """The part of a section's cases that run one after another.

    Args:
        job: what its workers do.
        patience: seconds that a case may give no row.
        cases: the record's cases of the section; this lane writes its own.
        inbox: where its workers' messages go.

    Attributes:
        running: whether cases are left and a worker is at them.
        error: what ended a worker before it began a case, or None.
    """

    def __init__(self, job: Job, patience: float, cases: Json, inbox: Inbox) -> None:
        self._job = job
        self._patience = patience
        self._cases = cases
        self._inbox = inbox
        self._begun: str | None = None
        self._announced: list[str] = []
        self.error: str | None = None
        self.running = True
        self._start()

    def _start(self) -> None:
        # Whatever a worker starts, such as a compiler, ends with it: it leads a group of its own.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - open for as long as the worker runs
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sharpkern.cli.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=child_environment(),
            start_new_session=True,
            encoding="utf-8",
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # A worker that dies at once leaves its reason on the error stream.
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(self._job.to_json())
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()
        self._last_sign = time.monotonic()
        self._timed_out = self._progressed = False

    def _listen(self, stdout: IO[str]) -> None:
        """Pass on what a worker says, and that it has ended."""
        with stdout:
            for line in stdout:
                # The last line of a worker that is killed may have no end.
                if line.endswith("\n"):
                    self._inbox.put((self, json.loads(line)))
        self._inbox.put((self, None))

    def hear(self, message: Json | None) -> None:
        """Take a worker's message into the record; start another worker if it ended with cases left.

        Args:
            message: what it said; None when it has ended.
        """
        self._last_sign = time.monotonic()
        if message is None:
            self._ended()
        elif "cases" in message:
            self._announced = message["cases"]
            self._cases.update({name: {"status": NOT_RUN} for name in self._announced})
        elif "begin" in message:
            self._begun, self._progressed = message["begin"], True
            self._cases[self._begun] = {"status": RUNNING, "rows": []}
        elif "row" in message:
            assert self._begun is not None
            self._cases[self._begun]["rows"].append(message["row"])
        else:
            self._close(message["status"], message["error"], message["seconds"])

    def _ended(self) -> None:
        code = self._process.wait()
        said = self._last_words()
        self._stderr.close()
        if self._begun is not None:
            if self._timed_out:
                self._close(TIMEOUT, f"no sign of life for {self._patience:.0f} s")
            else:
                self._close(CRASHED, f"{_ending(code)}{said}")
        left = [name for name in self._announced if self._cases[name]["status"] == NOT_RUN]
        if not self._progressed and (left or code != 0):
            # Not one case begun: the next worker would fare no better.
            self.error = f"{_ending(code)}{said}"
        self.running = bool(left) and self.error is None
        if self.running:
            through = [name for name, case in self._cases.items() if case["status"] != NOT_RUN]
            self._job = replace(self._job, skip=sorted({*self._job.skip, *through}))
            self._start()

    def _close(self, status: str, error: str | None, seconds: float | None = None) -> None:
        """Write how the case that was begun ended."""
        assert self._begun is not None
        case = self._cases[self._begun]
        case["status"], case["seconds"], case["error"] = status, seconds, error
        self._begun = None

    def check_patience(self) -> None:
        """End a worker that has been silent for too long; its next message is that it has ended."""
        allowed = _STARTUP if self._begun is None else self._patience
        if self.running and time.monotonic() - self._last_sign > allowed:
            self._timed_out = True
            self._kill()

    def stop(self, status: str, error: str | None) -> None:
        """End the worker for good.

        Args:
            status: of the case that it was at.
            error: why, in words, where the status does not say it.
        """
        if self.running:
            self.running = False
            self._kill()
            self._process.wait()
            self._stderr.close()
            if self._begun is not None:
                self._close(status, error)

    def _kill(self) -> None:
        # It may just have ended by itself.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _last_words(self) -> str:
        """Return the last line that the worker left on its error stream."""
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").split("\n")
        words = next((line for line in reversed(lines) if line.strip()), "")
        return f": {without_paths(words)}" if words else ""


def _ending(code: int) -> str:
    """Return how a process ended, in words."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with code {code}"
