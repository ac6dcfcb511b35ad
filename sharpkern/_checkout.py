"""Make ``sharpkern.kernels`` importable from a checkout, where the folder is the top-level ``kernels/``."""

import sys
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).parent


def expose_kernels() -> None:
    """Register ``sharpkern.kernels`` on the checkout's ``kernels/`` folder; does nothing in an installed wheel."""
    folder = _HERE.parent / "kernels"
    if (_HERE / "kernels").is_dir() or not folder.is_dir() or not (_HERE.parent / "pyproject.toml").is_file():
        return
    module = ModuleType("sharpkern.kernels")
    module.__path__ = [str(folder)]
    sys.modules.setdefault("sharpkern.kernels", module)
