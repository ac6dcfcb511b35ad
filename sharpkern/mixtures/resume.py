"""Results of a long run, on the disk as they come: what is stopped goes on where it was.

A file of JSON lines: the settings first, then one row for each piece of work that is done. Runs of other settings may
be in the same file; each row names the settings that it belongs to.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from sharpkern.errors import SharpkernWarning, warn

Row = dict[str, Any]
_Kind = TypeVar("_Kind")

_BEGINNING = b'{"settings": '
# How far apart the same number may be on another machine, or in another order of summation.
_ROUNDING = 1e-3
_NUMBERS = (float, int)


class ResumableLog:
    """Rows that are kept in memory, and in a file if there is one.

    Attributes:
        rows: all that belong to these settings, those found in the file first.
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
        self._run = _digest(self._head)
        self.rows: list[Row] = []
        if self._path is None:
            return
        if self._path.exists():
            begun = self._take_up(self._path, check)
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            begun = False
        if not begun:
            self._write(self._head)

    def add(self, row: Row) -> None:
        """Keep one row, on the disk before this returns."""
        self._write({"run": self._run, **row})
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

    def _take_up(self, path: Path, check: Callable[[Any], object] | None) -> bool:
        """Read what is there, cut off a last line without an end, and say whether the settings are there."""
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        rows = [*_read(path, whole.split(b"\n")[:-1])]
        if not (self._is_head(rows[0][1]) if rows else _BEGINNING.startswith(content[: len(_BEGINNING)])):
            raise ValueError(
                f"{path} must be a journal that this function wrote, got something else; give another path"
            )
        heads = [row for _, row in rows if self._is_head(row)]
        differing = [self._differing(head) for head in heads]
        same = [head for head, differs in zip(heads, differing, strict=True) if not differs]
        if same:
            self._run = _digest(same[0])
        for number, row in rows:
            # Older files hold one run, whose rows do not name it.
            if row not in heads and row.pop("run", _digest(heads[0])) == self._run:
                self.rows.append(_checked(path, number, row, check))
        if whole != content:
            with path.open("r+b") as file:
                file.truncate(len(whole))
        if not same and len(rows) > len(heads):
            warn(
                f"{path} holds results of other settings: {'; '.join(differing[-1])}; they are kept, and those of "
                "these settings are measured and added",
                SharpkernWarning,
            )
        return bool(same)

    def _is_head(self, row: Row) -> bool:
        """Whether a row holds settings of the same kind as these."""
        settings, losses, ours = row.get("settings"), row.get("losses", {}), self._head["settings"].keys()
        alike = isinstance(settings, dict) and (ours <= settings.keys() or set() < settings.keys() < ours)
        return alike and isinstance(losses, dict) and row.keys() <= {"settings", "losses"}

    def _differing(self, head: Row) -> list[str]:
        """Name every setting that is not the same, or else every loss."""
        differing = [*_differences(head["settings"], self._head["settings"])]
        return differing or [*_other_losses(head.get("losses", {}), self._head.get("losses", {}))]


def _digest(head: Row) -> str:
    return hashlib.sha256(json.dumps(head).encode()).hexdigest()[:12]


def _read(path: Path, lines: Sequence[bytes]) -> Iterator[tuple[int, Row]]:
    """Return the rows of a file, each with the number of its line."""
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError(f"it is a {type(row).__name__}")
        except (ValueError, TypeError) as error:
            raise _refusal(path, number, error) from None
        yield number, row


def _checked(path: Path, number: int, row: Row, check: Callable[[Any], object] | None) -> Row:
    """Return a row of a file, refused where it is none that the caller wrote."""
    try:
        if check is not None:
            check(row)
    except (ValueError, TypeError, KeyError) as error:
        raise _refusal(path, number, error) from None
    return row


def _refusal(path: Path, number: int, error: Exception) -> ValueError:
    if number == 1:
        return ValueError(f"{path} must be a journal that this function wrote, got something else; give another path")
    return ValueError(
        f"{path} must hold the rows that this function wrote, got another in line {number} ({error}); delete that "
        "line to have it measured again, or give another path"
    )


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
