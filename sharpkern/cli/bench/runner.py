"""Runs the sections of a sitting one after another, each within its time, and keeps the record on the disk."""

import os
import queue
import time
from collections.abc import Callable, Sequence

from sharpkern.cli.bench.lane import Inbox, Lane
from sharpkern.cli.bench.plan import GATE, Section
from sharpkern.cli.bench.record import (
    DONE,
    INCOMPLETE,
    INTERRUPTED,
    LEFT_OUT,
    NOT_RUN,
    RUNNING,
    TIMEOUT,
    Json,
    Record,
)
from sharpkern.cli.bench.worker import Job

# Seconds between two looks at the clock, and between two writes of the record while rows come in.
_TICK = 0.2
_SAVE_EVERY = 1.0

Tell = Callable[[str], None]


def run(record: Record, sections: Sequence[Section], *, quick: bool, budget: float, tell: Tell) -> None:
    """Run what is missing of a sitting. Nothing that a section does ends the sitting.

    Args:
        record: of the sitting; written to the disk at every step.
        sections: to run, in order.
        quick: whether to take the small sizes.
        budget: seconds for everything; what does not fit is marked as not run, for the next call.
        tell: takes a line for people when a section begins and ends.
    """
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
    inbox: Inbox = queue.Queue()
    lanes: list[Lane] = []
    # Until the clock has ended it, whatever ends it does so from outside: Ctrl-C.
    ended: tuple[str, str | None] = INTERRUPTED, None
    try:
        num_lanes = max(1, min(section.lanes, (os.cpu_count() or 1) // 2)) if gpu else 1
        for i in range(num_lanes):
            job = Job(section.module, quick, "cuda:0" if gpu else "cpu", record.done(GATE), (i, num_lanes), done)
            lanes.append(Lane(job, section.patience, cases, inbox))
        _listen(lanes, inbox, started + limit, record)
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


def _listen(lanes: Sequence[Lane], inbox: Inbox, deadline: float, record: Record) -> None:
    """Take in what the workers say until they are through or the time is up."""
    saved = time.monotonic()
    while any(lane.running for lane in lanes) and time.monotonic() < deadline:
        try:
            lane, message = inbox.get(timeout=_TICK)
        except queue.Empty:
            pass
        else:
            lane.hear(message)
        for lane in lanes:
            lane.check_patience()
        if time.monotonic() - saved > _SAVE_EVERY:
            record.save()
            saved = time.monotonic()
