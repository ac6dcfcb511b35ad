"""Optional packages: what to install when one is missing."""

from collections.abc import Mapping
from importlib.util import find_spec


def missing(package: str, extra: str, purpose: str) -> ImportError:
    """Return the error that names the extra."""
    verb = "are" if " and " in package else "is"
    return ImportError(f"{purpose} needs {package}, which {verb} not installed; run: pip install 'sharpkern[{extra}]'")


def require(purpose: str, modules: Mapping[str, str]) -> None:
    """Raise one error that names all extras, by the module of each, that are missing."""
    lacking = {module.partition(".")[0]: extra for module, extra in modules.items() if not _is_there(module)}
    if lacking:
        raise missing(" and ".join(lacking), ",".join(lacking.values()), purpose)


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
