"""Files that are written anew: beside the old one, whose place they take when they are whole.

A full disk, an interrupt or an error on the way leaves what was there.
"""

import csv
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file so that it is there whole or not at all.

    A link stays a link, and a file keeps its permissions. What cannot be replaced, such as a pipe or a device, is
    written as it stands.
    """
    target = Path(os.path.realpath(path))
    if not _replaceable(target):
        yield Path(path)
        return
    beside = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
    try:
        yield beside
        if target.exists():
            shutil.copymode(target, beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def write_rows(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table as CSV."""
    with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def append_line(path: str | os.PathLike[str], row: Mapping[str, Any]) -> None:
    """Append a line of JSON, with null for numbers that it does not have; half a line of a crash ends before it."""
    known = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    with open(path, "a+b") as file:
        torn = file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * bool(torn) + json.dumps(known, ensure_ascii=False).encode() + b"\n")


def _replaceable(target: Path) -> bool:
    """Whether another file may take this one's place, which a file that must not be written keeps."""
    if target.exists() and not (target.is_file() and os.access(target, os.W_OK)):
        return False
    return os.access(target.parent, os.W_OK)
