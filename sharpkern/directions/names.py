"""Finding a parameter by name, whatever wrappers the name went through."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

_T = TypeVar("_T")

# torch.compile, FSDP and activation checkpointing put their name wherever they wrap; DDP only in front.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_OUTER_WRAPPER = "module"


def bare_name(name: str) -> str:
    """Return ``name`` without the prefixes of wrapper modules.

    Examples:
        >>> bare_name("_orig_mod.module.blocks.0.weight")
        'blocks.0.weight'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == _OUTER_WRAPPER:
        del parts[0]
    return ".".join(parts)


class NameTable(Generic[_T]):
    """Looks things up by name: an exact match first, then a match without wrapper prefixes on either side."""

    def __init__(self, named: Mapping[str, _T]) -> None:
        self._exact = dict(named)
        self._bare: dict[str, _T] = {}
        ambiguous = set()
        for name, thing in named.items():
            bare = bare_name(name)
            if self._bare.setdefault(bare, thing) is not thing:
                ambiguous.add(bare)
        for bare in ambiguous:
            del self._bare[bare]

    def find(self, name: str) -> _T | None:
        """Return what ``name`` stands for."""
        if name in self._exact:
            return self._exact[name]
        return self._bare.get(bare_name(name))

    def close_to(self, name: str) -> str:
        """Return a hint for an error about an unknown ``name``."""
        names = {bare_name(known): known for known in self._exact}
        close = difflib.get_close_matches(bare_name(name), names, n=3, cutoff=0.6)
        return listed(names[bare] for bare in close) if close else listed(list(self._exact)[:3])


def listed(names: Iterable[str]) -> str:
    """Return quoted names in one line, for error messages."""
    return ", ".join(f"'{name}'" for name in names) or "none"
