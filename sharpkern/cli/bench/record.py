"""What a sitting found, as JSON that is on the disk after every step, so that nothing that ends it can lose it.

A file holds a list of sittings. A sitting is continued by a later call on the same machine and versions, see `Record`;
any other call adds a new one behind it. Earlier sittings are never changed.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sharpkern._files import replacing

Json = dict[str, Any]

# How a case can end. Only those that are done are kept when a sitting is continued.
DONE, WRONG, FAILED, CRASHED = "done", "wrong", "failed", "crashed"
TIMEOUT, INTERRUPTED, BLOCKED, NOT_RUN = "timeout", "interrupted", "blocked", "not run"
# How a section can stand besides "done": cases are missing or failed, it is under way, or it needs another machine.
INCOMPLETE, RUNNING, LEFT_OUT = "incomplete", "running", "left out"


class Record:
    """The current sitting in a file of sittings.

    The last sitting in the file is continued if its environment equals the present one (GPU, driver, versions, and the
    digest of sharpkern's own sources; the commit does not count, the sources do) and both are quick or both are not.
    Cases that are done are then kept, and only the others run.

    Args:
        path: the file; made on the first `save` if it is not there.
        environment: from `environment.look`.
        quick: whether the sitting is a quick one.

    Raises:
        ValueError: if the path is a folder or the file holds something else.

    Attributes:
        sections: {section: {"status", "seconds", "cases": {case: {"status", "seconds", "rows", "error"}}}}.
        resumed: whether a sitting of the file is continued.
    """

    def __init__(self, path: Path, environment: Json, quick: bool) -> None:
        self._path = path
        self._sittings = _read(path)
        last = self._sittings[-1] if self._sittings else None
        self.resumed = last is not None and last["quick"] == quick and _same(last["environment"], environment)
        if not self.resumed:
            started = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
            self._sittings.append({"started": started, "environment": environment, "quick": quick, "sections": {}})
        self._sitting = self._sittings[-1]

    @property
    def sections(self) -> Json:
        """What each section has found so far."""
        sections: Json = self._sitting["sections"]
        return sections

    @property
    def environment(self) -> Json:
        """The machine and versions of this sitting."""
        environment: Json = self._sitting["environment"]
        return environment

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
    """Return a value as JSON can hold it: nan and the infinities by name.

    Args:
        value: numbers, strings, lists and dictionaries of them.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _same(one: Json, other: Json) -> bool:
    """Whether two environments are the same machine, versions and sources."""
    differs = {"date", "commit", "dirty"}
    return {k: v for k, v in one.items() if k not in differs} == {k: v for k, v in other.items() if k not in differs}


def _read(path: Path) -> list[Json]:
    """Return the sittings in a file.

    Raises:
        ValueError: if it is a folder, or the file is something else, which must not be overwritten.
    """
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
