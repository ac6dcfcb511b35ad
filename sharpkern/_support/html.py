"""What a notebook shows of a result."""

from collections.abc import Mapping
from html import escape


def table_html(rows: Mapping[str, str]) -> str:
    """Return a table of two columns; rows without a value are left out."""
    cells = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items() if value)
    return f"<table>{''.join(cells)}</table>"
