"""Parts of a model that may move alone: those that the caller names, or its repeated layers and what is beside them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from sharpkern.directions.names import NameTable, bare_name

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def default_blocks(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the repeated layers of lists and Sequentials, and each module beside them; a tied weight comes once."""
    blocks: dict[str, list[nn.Parameter]] = {}
    taken: set[int] = set()

    def add(name: str, parameters: Iterable[nn.Parameter]) -> None:
        own = [parameter for parameter in parameters if id(parameter) not in taken]
        taken.update(map(id, own))
        if own:
            blocks.setdefault(bare_name(name), []).extend(own)

    def walk(module: nn.Module, prefix: str, is_outermost: bool) -> None:
        own, children = dict(module.named_parameters(recurse=False)), dict(module.named_children())
        if not is_outermost and not any(map(_repeats, module.modules())):
            add(prefix.removesuffix("."), module.parameters())
            return
        for name, parameter in own.items():
            add(prefix + name, [parameter])
        for name, child in children.items():
            if _repeats(module):
                add(prefix + name, child.parameters())
            else:
                # Of a wrapper it is the model that is looked into.
                walk(child, f"{prefix}{name}.", is_outermost and len(children) == 1 and not own)

    walk(model, "", True)
    return blocks


def _repeats(module: nn.Module) -> bool:
    """Whether it holds layers of one kind, two or more."""
    layers = [
        child
        for child in module.children()
        if any(True for _ in child.parameters())
        and not (isinstance(child, _CONTAINERS) and any(map(_repeats, child.modules())))
    ]
    return isinstance(module, _CONTAINERS) and max(Counter(map(type, layers)).values(), default=0) > 1


def items_of(which: Any) -> list[Any]:
    """Return parameters, modules, and patterns of names, one by one."""
    items = [which] if isinstance(which, (str, nn.Parameter, nn.Module)) else which
    items = list(items) if isinstance(items, Iterable) else [items]
    for item in items:
        if not isinstance(item, (str, nn.Parameter, nn.Module)):
            raise TypeError(
                f"what moves alone must be parameters, modules, or patterns of parameters' names, got "
                f"{type(item).__name__}; pass 'blocks.0.*', or list(layer.parameters())"
            )
    return items


def selected(items: Sequence[Any], model: nn.Module, *, may_lack: bool = False) -> list[nn.Parameter]:
    """Return the model's parameters that are meant; the name of a module stands for all that it holds.

    A model of which other ranks hold parts may lack what is named.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    own = {id(parameter) for parameter in named.values()}
    found: dict[int, nn.Parameter] = {}
    for item in items:
        if isinstance(item, str):
            hits = [p for name, p in named.items() if _matches(name, item) or _matches(bare_name(name), item)]
            if not hits and not may_lack:
                close = NameTable(named).close_to(item)
                raise ValueError(
                    f"patterns must match parameters of the model, got {item!r}, which matches none; near it: {close}"
                )
        else:
            hits = [item] if isinstance(item, nn.Parameter) else list(item.parameters())
            if any(id(parameter) not in own for parameter in hits):
                raise ValueError(
                    f"what moves alone must belong to the model, got a parameter of shape {list(hits[0].shape)} of "
                    "another; take it from model.named_parameters()"
                )
        found.update({id(parameter): parameter for parameter in hits})
    return list(found.values())


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
