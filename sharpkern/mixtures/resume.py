"""Results of a long run, on the disk as they come: what is stopped goes on where it was.

A file of JSON lines: the settings first, then one row for each piece of work that is done.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Row = dict[str, Any]
_Kind = TypeVar("_Kind")

_BEGINNING = b'{"settings": '
# How far apart the same number may be on another machine, or in another order of summation.
_ROUNDING = 1e-3
_NUMBERS = (float, int)


class ResumableLog:
    """Rows that are kept in memory, and in a file if there is one.

    Attributes:
        rows: all of them, those found in the file first.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        settings: Mapping[str, Any],
        *,
        losses: Mapping[str, float] | None = None,
        check: Callable[[Any], object] | None = None,
    ) -> None:
        self._path = None if path is None else Path(path)
        head = {"settings": dict(settings), **({} if losses is None else {"losses": dict(losses)})}
        self._head: Row = json.loads(json.dumps(head))
        self.rows: list[Row] = []
        if self._path is None:
            return
        if self._path.exists():
            self._take_up(self._path, check)
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists() or not self._path.stat().st_size:
            self._write(self._head)

    def add(self, row: Row) -> None:
        """Keep one row, on the disk before this returns."""
        self._write(row)
        self.rows.append(row)

    def _write(self, row: Row) -> None:
        if self._path is None:
            return
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        written = 0
        with self._path.open("ab", buffering=0) as file:
            try:
                while written < len(line):
                    written += file.write(line[written:])
            except BaseException:
                # The disk is full. Rows behind half a line could not be read.
                if written:
                    file.truncate(file.tell() - written)
                raise

    def _take_up(self, path: Path, check: Callable[[Any], object] | None) -> None:
        """Read what is there, and cut off a last line that was not written to its end."""
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]
        try:
            head = json.loads(lines[0]) if lines else self._head
            begun = bool(lines) or _BEGINNING.startswith(content[: len(_BEGINNING)])
            if not begun or not isinstance(head["settings"], dict) or not isinstance(head.get("losses", {}), dict):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path} must be a journal that this function wrote, got something else; give another path"
            ) from None
        differing = [*_differences(head["settings"], self._head["settings"])]
        differing = differing or [*_other_losses(head.get("losses", {}), self._head.get("losses", {}))]
        ours = head.keys() <= {"settings", "losses"} and head["settings"].keys() == self._head["settings"].keys()
        if differing and len(lines) == 1 and ours:
            # Stopped before there was any row: nothing is lost by beginning anew.
            whole, lines, differing = b"", [], []
        if differing:
            raise ValueError(
                f"{path} must be of the same settings to go on with, got others: {'; '.join(differing)}; give another "
                "path, or the same settings again"
            )
        rows = [_checked(path, number, line, check) for number, line in enumerate(lines[1:], 2)]
        if whole != content:
            with path.open("r+b") as file:
                file.truncate(len(whole))
        self.rows = rows


def _checked(path: Path, number: int, line: bytes, check: Callable[[Any], object] | None) -> Row:
    """Return a row of a file, refused where it is none that the caller wrote."""
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise TypeError(f"it is a {type(row).__name__}")
        if check is not None:
            check(row)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} must hold the rows that this function wrote, got another in line {number} ({error}); delete that "
            "line to have it measured again, or give another path"
        ) from None
    return row


def _differences(found: Row, given: Row) -> Iterator[str]:
    """Name every setting that is not the same."""
    for name in {**found, **given}:
        if found.get(name) != given.get(name):
            yield f"{name} was {found.get(name)!r}, is {given.get(name)!r}"


def _other_losses(found: Row, given: Row) -> Iterator[str]:
    """Name every loss that is not the same but for rounding."""
    for name, value in given.items():
        before = found.get(name)
        near = isinstance(before, float) and math.isclose(before, value, rel_tol=_ROUNDING, abs_tol=1e-9)
        # nan is nothing's equal.
        if not near and repr(before) != repr(value):
            yield f"the loss of {name} was {before!r}, is {value!r}"


def restored(kind: type[_Kind], entry: Any) -> _Kind:
    """Make a dataclass of what ``asdict`` and JSON made of it."""
    hints = get_type_hints(kind)
    # Those with a default came later than some files.
    needed = {field.name for field in fields(cast(Any, kind)) if field.default is MISSING}
    if not isinstance(entry, dict) or not needed <= entry.keys() <= hints.keys():
        raise ValueError(f"a {kind.__name__} has the fields {', '.join(hints)}")
    values = {}
    for name, value in entry.items():
        try:
            values[name] = _as(hints[name], value)
        except ValueError:
            raise ValueError(f"{name} is {value!r}") from None
    return kind(**values)


def _as(hint: Any, value: Any) -> Any:
    """Return a value as a field of this type has it; ValueError where it is none."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        for argument in arguments:
            with suppress(ValueError):
                return _as(argument, value)
    elif kind is tuple and isinstance(value, list):
        parts = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        if len(parts) == len(value):
            return tuple(map(_as, parts, value))
    elif value in arguments if kind is Literal else type(value) in (_NUMBERS if kind is float else (kind,)):
        return value
    raise ValueError
