"""What a measurement takes by each method, and which card holds it."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sharpkern._support.files import replacing
from sharpkern.memory.cards import MethodMemory


@dataclass(frozen=True)
class MemoryPlan:
    """Peak memory of every method, on each GPU.

    Attributes:
        model: its name.
        conditions: what it holds for: parameters, tokens, batch size, dtype, optimizer, GPUs, head.
        rows: one for each method.
    """

    model: str
    conditions: Mapping[str, Any]
    rows: tuple[MethodMemory, ...]

    def __getitem__(self, key: str | tuple[str, str]) -> MethodMemory:
        """The row of a method whose name begins so, and of where the direction is: ``plan["virtual", "state"]``."""
        name, direction = (key, None) if isinstance(key, str) else key
        for row in self.rows:
            if row.method.startswith(name) and direction in (None, row.direction):
                return row
        raise KeyError(key)

    def to_json(self) -> dict[str, Any]:
        """As plain data, with totals and cards."""
        rows = [
            {**asdict(row), "parts": dict(row.parts), "peak_bytes": row.peak_bytes, "card_gb": row.card}
            for row in self.rows
        ]
        return {"model": self.model, "conditions": dict(self.conditions), "rows": rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "MemoryPlan":
        """The plan that `to_json` gave."""
        names = {field.name for field in fields(MethodMemory)}
        rows = (MethodMemory(**{name: row[name] for name in names}) for row in data["rows"])
        return cls(data["model"], data["conditions"], tuple(rows))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` into a file."""
        with replacing(path) as beside:
            beside.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the parts of every method as stacked bars, with lines for what cards hold, into an image file.

        Args:
            path: the file; its ending says the format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from sharpkern.memory.report import draw

        draw(self, path)

    def __rich__(self) -> Any:
        from sharpkern.memory.report import told

        return told(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=150, color_system=None, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get()
