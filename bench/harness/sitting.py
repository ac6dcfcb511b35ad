"""One sitting at a machine, of which nothing can get lost.

Every section runs in processes of its own and within its own time. Crashes, hangs, faults of the device and wrong
results are recorded as that, and the next case goes on. The record is on the disk after every step, and a later call on
the same machine, versions and sources goes on where it ended.
"""

import contextlib
import gc
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sharpkern._support.files import replacing
from sharpkern.errors import SharpkernWarning

from .cases import Bench, BlockedError
from .environment import child_environment, look_from_outside
from .timing import Json, machine_here

# How a case can end. Only those that are done are kept when a sitting is continued.
DONE, WRONG, FAILED, CRASHED = "done", "wrong", "failed", "crashed"
TIMEOUT, INTERRUPTED, BLOCKED, NOT_RUN = "timeout", "interrupted", "blocked", "not run"
# How a section can stand besides "done": cases are missing or failed, it is under way, or it needs another machine.
INCOMPLETE, RUNNING, LEFT_OUT = "incomplete", "running", "left out"
# Seconds between two looks at the workers, between two writes of the record, and that a worker may take to import what
# it needs, wake the device, and tidy up between cases.
_TICK, _SAVE_EVERY, _STARTUP = 0.1, 1.0, 60.0


@dataclass(frozen=True)
class Section:
    """A part of the bench that runs in processes of its own."""

    name: str  # what --section takes, and the key in the record
    title: str  # for the table
    module: str  # has the cases, as what its function `cases`, or the one named after a colon, returns for a bench
    limit: float  # seconds for the whole section on a GPU
    patience: float  # seconds that a case may give no row before its process is ended and the next case begun
    lanes: int = 1  # processes at once; more than one only where nothing is timed
    gated: bool = False  # whether it times kernels, which have to have passed their check
    cpu: bool = True  # whether it has something to do without a GPU


# Where correctness is checked, and hence what a gated section waits for.
GATE = "correctness"

# In order of worth, as a sitting may end early: whether the numbers are right, what a user sees, then what each kernel
# reaches. Ten minutes on a lent machine end at the 600th second: these limits and the look at the machine add up to 9½.
SECTIONS = (
    Section(GATE, "Correctness against float64", "sharpkern.bench.accuracy", 105, 80, lanes=8),
    Section("model", "Whole model", "sharpkern.bench.whole_model:measurements", 120, 90, gated=True),
    Section("ceilings", "Ceilings: copy and matrix product", "sharpkern.bench.timing", 30, 30),
    Section("streaming", "Streaming kernels", "sharpkern.bench.kernels:streaming", 90, 30, gated=True),
    Section("passes", "Several step sizes in one pass", "sharpkern.bench.whole_model:passes", 65, 40, gated=True),
    Section("head", "LM head and cross-entropy", "sharpkern.bench.kernels:head", 35, 25, gated=True),
    Section("linear", "Linear layer", "sharpkern.bench.linear", 75, 20, gated=True),
    Section(
        "compiled", "Registers and shared memory", "sharpkern.bench.kernels:compiled", 30, 20, gated=True, cpu=False
    ),
)
BUDGET = 570.0


def with_gate(sections: Sequence[Section], names: Sequence[str]) -> list[Section]:
    """Return the named sections, or all, in the order of the plan; the check too where one of them needs it."""
    known = [section.name for section in sections]
    for name in names:
        if name not in known:
            raise ValueError(f"section must be one of {', '.join(known)}, got {name!r}; leave it out for all")
    chosen = [section for section in sections if not names or section.name in names]
    gated = any(section.gated for section in chosen)
    return [section for section in sections if section in chosen or (gated and section.name == GATE)]


def begin(
    output: Path, names: Sequence[str], *, quick: bool, limit: float, commit: str | None
) -> tuple["Record", list[Section]]:
    """Look at the machine and open the record, before anything is measured."""
    sections = with_gate(SECTIONS, names)
    environment = look_from_outside(limit)
    environment["commit"] = environment["commit"] or commit
    record = Record(output, environment, quick)
    try:
        record.save()
    except OSError as error:
        said = f"output must be a file that can be written, got {output}"
        raise ValueError(f"{said} ({error.strerror}: {error.filename}); choose another name") from error
    return record, sections


# -- the record -------------------------------------------------------------------------------------------------------


class Record:
    """The current sitting in a file of sittings.

    The last sitting in the file is continued if its environment equals the present one (GPU, driver, versions, and the
    digest of sharpkern's own sources; the commit does not count) and both are quick or both are not. Its cases that are
    done are then kept. Any other call adds a new sitting; earlier ones are never changed.
    """

    def __init__(self, path: Path, environment: Json, quick: bool) -> None:
        self._path, self._sittings = path, _read(path)
        last = self._sittings[-1] if self._sittings else None
        differs = dict.fromkeys(("date", "commit", "dirty"))
        known = last and {**last["environment"], **differs, "quick": last["quick"]}
        self.resumed = known == {**environment, **differs, "quick": quick}
        if not self.resumed:
            started = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
            self._sittings.append({"started": started, "environment": environment, "quick": quick, "sections": {}})
        # {section: {"status", "seconds", "cases": {case: {"status", "seconds", "rows", "error"}}}}
        self.sections: Json = self._sittings[-1]["sections"]
        self.environment: Json = self._sittings[-1]["environment"]

    def cases(self, section: str) -> Json:
        """Return the cases of a section, empty if it has not run."""
        cases: Json = self.sections.get(section, {}).get("cases", {})
        return cases

    def done(self, section: str) -> list[str]:
        """Return the names of the cases of a section that are done."""
        return [name for name, case in self.cases(section).items() if case["status"] == DONE]

    def save(self) -> None:
        """Write the file as one step: a reader, or the next call, sees the old contents or the new ones."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._path) as beside:
            beside.write_text(json.dumps(self._sittings, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: nan and the infinities by name."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _read(path: Path) -> list[Json]:
    """Return the sittings in a file; ValueError if it is something else, which must not be overwritten."""
    if path.is_dir():
        raise ValueError(f"output must be a file, got the folder {path}; name one in it: {path / 'bench.json'}")
    if not path.exists():
        return []
    try:
        sittings = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(sittings, list) and all({"environment", "quick", "sections"} <= set(one) for one in sittings):
            return sittings
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
        pass
    raise ValueError(f"output must be a file of an earlier bench or none yet, got {path}; choose another name")


# -- the process that runs cases --------------------------------------------------------------------------------------


def worker(job: str, path: str) -> None:
    """Run the cases of a job, given as JSON, and keep in a file how they stand."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    cases: Json = {}

    def save() -> None:
        with replacing(path) as beside:
            beside.write_text(json.dumps(plain(cases)), encoding="utf-8")

    work(cases, save, **json.loads(job))


def work(
    cases: Json,
    save: Callable[[], None],
    *,
    module: str,
    quick: bool,
    passed: Sequence[str],
    share: Sequence[int],
    skip: Sequence[str],
) -> None:
    """Run a section's i-th, (i + n)-th case and so on, but not those to skip.

    What begins is written down before it does, so that a crash has a name.
    """
    bench = Bench(machine_here(), quick, frozenset(passed))
    module, _, function = module.partition(":")
    made = getattr(importlib.import_module(module), function or "cases")(bench)
    first, step = share
    cases |= {name: {"status": NOT_RUN} for name in list(made)[first::step] if name not in skip}
    save()
    for name, entry in cases.items():
        entry |= {"status": RUNNING, "rows": []}
        save()
        started = time.perf_counter()
        try:
            # What falls back to something else is not to pass for what it fell back from.
            with torch.no_grad(), warnings.catch_warnings(record=True) as given:
                warnings.simplefilter("always", SharpkernWarning)
                for row in made[name]():
                    entry["rows"].append(row)
                    entry |= _said(given)
                    save()
            entry |= _said(given)
            bench.machine.synchronize()
            # A row that has not passed makes the case wrong.
            wrong = sum(row.get("passed") is False for row in entry["rows"])
            status, error = (WRONG, f"{wrong} wrong") if wrong else (DONE, None)
        except BlockedError as blocked:
            status, error = BLOCKED, str(blocked)
        except Exception as failure:
            status, error = FAILED, without_paths(f"{type(failure).__name__}: {failure}")
        entry |= {"status": status, "error": error, "seconds": round(time.perf_counter() - started, 3)}
        save()
        gc.collect()
        # A fault of the device leaves it unusable for this process: the next one goes on.
        bench.machine.synchronize()
        torch.cuda.empty_cache()


def _said(given: Sequence[warnings.WarningMessage]) -> Json:
    """Return what our own warnings have said, each once; nothing where there were none."""
    said = [without_paths(str(one.message)) for one in given if issubclass(one.category, SharpkernWarning)]
    return {"warnings": list(dict.fromkeys(said))} if said else {}


def without_paths(text: str, limit: int = 400) -> str:
    """Return a message shortened, and without the folders of the machine it comes from."""
    return re.sub(r"(?<![\w.])~?(/[\w.+@-]+)+/", "", " ".join(text.split()))[:limit]


def _end_with(parent: int) -> None:
    """End this process and whatever it started once its parent has gone: nobody else would free the device."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


# -- its supervisor ---------------------------------------------------------------------------------------------------


class Lane:
    """The part of a section's cases that run one after another, in one worker process after another.

    A crash or a hang costs one case. The lane writes the cases of its job into ``cases``, those of the record.
    """

    def __init__(self, job: Json, patience: float, cases: Json) -> None:
        self._job, self._patience, self._cases = job, patience, cases
        # What ended a worker before it began a case, and whether cases are left and a worker is at them.
        self.error: str | None = None
        self.running = True
        self._start()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._file, self._words = (Path(self._folder.name) / name for name in ("cases.json", "words"))
        run_worker = f"import sys; from {__name__} import worker; worker(*sys.argv[1:])"
        command = [sys.executable, "-c", run_worker, json.dumps(self._job), str(self._file)]
        output: Any = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "env": child_environment()}
        with self._words.open("wb") as words:
            # Whatever a worker starts, such as a compiler, ends with it: it leads a group of its own.
            self._process = subprocess.Popen(command, stdout=words, start_new_session=True, **output)
        self._seen, self._timed_out = b"{}", False
        self._own: Json = {}
        self._last_sign = time.monotonic()

    def look(self) -> None:
        """Take what the worker has written into the record; end it where it is silent too long, and go on after it."""
        # Asked first: what was written before the end is then there to be read.
        code = self._process.poll()
        seen = self._file.read_bytes() if self._file.exists() else self._seen
        if seen != self._seen:
            self._seen, self._last_sign = seen, time.monotonic()
            self._own = json.loads(seen)
            self._cases.update(self._own)
        if code is not None:
            self._ended(code)
        elif time.monotonic() - self._last_sign > (self._patience if self.begun else _STARTUP):
            self._timed_out = True
            self._kill()

    @property
    def begun(self) -> list[Json]:
        """The case that the worker is at, if it is at one."""
        return [case for case in self._own.values() if case["status"] == RUNNING]

    def _ended(self, code: int) -> None:
        """Say how the worker has ended, and start another one if cases are left."""
        why = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        if lines := self._words.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-1]:
            why += f": {without_paths(lines)}"
        hung = TIMEOUT, f"no sign of life for {self._patience:.0f} s"
        self._close(*(hung if self._timed_out else (CRASHED, why)))
        left = [name for name, case in self._own.items() if case["status"] == NOT_RUN]
        through = self._own.keys() - left
        if not through and (left or code != 0):
            # Not one case begun: the next worker would fare no better.
            self.error = why
        self.running = bool(left) and self.error is None
        if self.running:
            self._job = {**self._job, "skip": sorted({*self._job["skip"], *through})}
            self._start()

    def stop(self, status: str, error: str | None) -> None:
        """End the worker for good, and its case with this status and error."""
        if self.running:
            self.running = False
            self._kill()
            self._process.wait()
            self._close(status, error)

    def _close(self, status: str, error: str | None) -> None:
        """Write how the case that was begun ended, if one was."""
        for case in self.begun:
            case |= {"status": status, "seconds": None, "error": error}
        self._folder.cleanup()

    def _kill(self) -> None:
        # It may just have ended by itself.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def run(
    record: Record, sections: Sequence[Section], *, quick: bool, budget: float, tell: Callable[[str], None]
) -> None:
    """Run what is missing of a sitting, for ``budget`` seconds; nothing that a section does ends the sitting."""
    deadline = time.monotonic() + budget
    gpu = record.environment["gpu"] is not None
    for section in sections:
        if not gpu and not section.cpu:
            record.sections[section.name] = {"status": LEFT_OUT, "error": "needs a GPU", "cases": {}}
        elif record.sections.get(section.name, {}).get("status") == DONE:
            tell(f"{section.name}: done in an earlier call")
        else:
            limit = min(section.limit, deadline - time.monotonic())
            tell(f"{section.name}: at most {max(limit, 0):.0f} s")
            _run_section(record, section, quick=quick, gpu=gpu, limit=limit)
            entry = record.sections[section.name]
            tell(f"{section.name}: {entry['status']} after {entry['seconds']:.0f} s")
        record.save()


def _run_section(record: Record, section: Section, *, quick: bool, gpu: bool, limit: float) -> None:
    """Run the cases of a section that are not done, for at most ``limit`` seconds."""
    started = time.monotonic()
    done = record.done(section.name)
    cases = {name: record.cases(section.name)[name] for name in done}
    entry: Json = {"status": RUNNING, "seconds": 0.0, "cases": cases}
    record.sections[section.name] = entry
    record.save()
    if limit <= 0:
        entry |= {"status": INCOMPLETE, "error": f"{NOT_RUN}: the budget was used up"}
        return
    lanes: list[Lane] = []
    # Until the clock has ended it, whatever ends it does so from outside: Ctrl-C.
    ended: tuple[str, str | None] = INTERRUPTED, None
    try:
        num_lanes = max(1, min(section.lanes, (os.cpu_count() or 1) // 2)) if gpu else 1
        for i in range(num_lanes):
            job = {"module": section.module, "quick": quick, "passed": record.done(GATE)}
            job |= {"share": (i, num_lanes), "skip": done}
            lanes.append(Lane(job, section.patience, cases))
        _follow(lanes, started + limit, record)
        ended = TIMEOUT, "the section's time was up"
    finally:
        # Also on Ctrl-C: no process outlives the bench.
        for lane in lanes:
            lane.stop(*ended)
        errors = [lane.error for lane in lanes if lane.error]
        complete = bool(cases) and all(case["status"] == DONE for case in cases.values()) and not errors
        entry |= {"status": DONE if complete else INCOMPLETE, "seconds": round(time.monotonic() - started, 1)}
        if errors:
            entry["error"] = errors[0]
        record.save()


def _follow(lanes: Sequence[Lane], deadline: float, record: Record) -> None:
    """Take in what the workers say until they are through or the time is up."""
    saved = time.monotonic()
    while (running := [lane for lane in lanes if lane.running]) and time.monotonic() < deadline:
        for lane in running:
            lane.look()
        if time.monotonic() - saved > _SAVE_EVERY:
            record.save()
            saved = time.monotonic()
        time.sleep(_TICK)
