"""Make ``sharpkern.kernels`` and ``sharpkern.bench`` importable from a checkout, where their folders lie elsewhere."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

_HERE = Path(__file__).parents[1]
# As pyproject.toml maps them.
_FOLDERS = {"kernels": "kernels", "bench": "bench/harness"}


def expose_folders() -> None:
    """Register the checkout's folders as subpackages; does nothing in an installed wheel."""
    if not (_HERE.parent / "pyproject.toml").is_file():
        return
    for name, place in _FOLDERS.items():
        folder = _HERE.parent / place
        if folder.is_dir() and not (_HERE / name).is_dir():
            spec = ModuleSpec(f"sharpkern.{name}", None, is_package=True)
            spec.submodule_search_locations = [str(folder)]
            sys.modules.setdefault(spec.name, module_from_spec(spec))
