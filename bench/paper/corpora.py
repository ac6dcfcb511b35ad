"""English and code that ship with Python."""

import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

# Of the standard library's modules in alphabetical order: about as much as there is of English.
_CODE_BYTES = 500_000


def english() -> str:
    """Return Python's help topics."""
    return "\n".join(topics.values())


def code() -> str:
    """Return modules of the standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    modules, size = [], 0
    for path in sorted(folder.glob("*.py")):
        if size < _CODE_BYTES:
            modules.append(path.read_text(encoding="utf-8"))
            size += len(modules[-1])
    return "\n".join(modules)
