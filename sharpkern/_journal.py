"""Results of a long run, on the disk as they come: what is stopped goes on where it was.

A file of JSON lines: the settings first, then one row for each piece of work that is done.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_BEGINNING = b'{"settings": '


class Journal:
    """Rows that are kept in memory, and in a file if there is one.

    Args:
        path: of the file, made if it is not there; None to keep the rows in memory alone.
        settings: what the rows depend on, of values that JSON knows. A file of other settings is not gone on with.

    Attributes:
        rows: all of them, those found in the file first.

    Raises:
        ValueError: the file holds something else, or was written with other settings.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._settings: Row = json.loads(json.dumps(dict(settings)))
        self.rows: list[Row] = []
        if self._path is None:
            return
        if self._path.exists():
            self._take_up(self._path)
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists() or not self._path.stat().st_size:
            self._write({"settings": self._settings})

    def add(self, row: Row) -> None:
        """Keep one row, on the disk before this returns.

        Args:
            row: of values that JSON knows; nan and inf are kept too.
        """
        self._write(row)
        self.rows.append(row)

    def _write(self, row: Row) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(row))

    def _take_up(self, path: Path) -> None:
        """Read what is there, and cut off a last line that was not written to its end."""
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.decode("utf-8").split("\n")[:-1]]
            found = lines[0]["settings"] if lines else self._settings
            begun = bool(lines) or _BEGINNING.startswith(content[: len(_BEGINNING)])
            if not begun or not isinstance(found, dict):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path} must be a journal that this function wrote, got something else; give another path"
            ) from None
        if lines == [{"settings": found}] and found != self._settings and found.keys() == self._settings.keys():
            # Stopped before there was any row: nothing is lost by beginning anew.
            whole, lines = b"", []
        differing = list(_differences(found, self._settings)) if lines else []
        if differing:
            raise ValueError(
                f"{path} must be of the same settings to go on with, got others: {'; '.join(differing)}; give another "
                "path, or the same settings again"
            )
        if whole != content:
            with path.open("r+b") as file:
                file.truncate(len(whole))
        self.rows = lines[1:]


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _differences(found: Row, given: Row) -> Iterator[str]:
    """Name every setting that is not the same."""
    for name in {**found, **given}:
        if found.get(name) != given.get(name):
            yield f"{name} was {found.get(name)!r}, is {given.get(name)!r}"
