"""Which engine evaluates the losses."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import nn

from sharpkern.engines.batched import BatchedEngine
from sharpkern.engines.checks import Checks
from sharpkern.engines.closure import Closure, LossFn
from sharpkern.engines.compiled import Eagerly, FromGraphs
from sharpkern.engines.inplace import Backup, InPlaceEngine
from sharpkern.engines.layers import Kept
from sharpkern.engines.mode import VirtualParameters
from sharpkern.engines.ranks import as_one
from sharpkern.engines.table import Pair
from sharpkern.engines.virtual import VirtualEngine
from sharpkern.errors import EngineFallbackWarning, EngineUnsupportedError, warn
from sharpkern.shards import is_sharded

Result = TypeVar("Result")

ENGINES = ("auto", "virtual", "batched", "inplace")


class Engine(Protocol):
    """Evaluates losses along the direction, from the same random state each time."""

    name: str

    @property
    def rounded(self) -> set[int]:
        """Indices of the pairs whose θ + αΔθ was rounded to the weight's dtype."""

    def losses(self, step_sizes: Sequence[float]) -> list[float]:
        """Losses at θ − ηΔθ for each step size η."""

    def close(self) -> None:
        """Leave the parameters as they were, bit for bit."""


# What takes the place of an engine that is unable, and how that measures.
_NEXT = {
    "batched": ("virtual", "one step size at a time"),
    "virtual": ("inplace", "in place, θ is written and restored"),
}


def choose(engine: str, model: nn.Module, loss_fn: LossFn, checks: Checks, quickest: str = "virtual") -> str:
    """Name of the engine that ``engine`` stands for.

    Args:
        engine: what the caller asked for, "auto" or a name.
        model: that is evaluated.
        loss_fn: evaluates it.
        checks: what was found out before.
        quickest: the engine for ``"auto"`` where nothing speaks against it.

    Returns:
        str: ``"inplace"`` for ``"auto"`` where the model or the closure is compiled or scripted, or the parameters are
        sharded; otherwise the first of ``quickest`` and what takes its place that was not found unable before.

    Raises:
        EngineUnsupportedError: an engine was named that a scripted or sharded model does not show its reads to.
    """
    scripted = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    if engine in ("virtual", "batched") and scripted:
        raise EngineUnsupportedError("the model is scripted: its reads of parameters cannot be seen; use engine='auto'")
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    if engine in ("virtual", "batched") and sharded:
        raise EngineUnsupportedError(
            "the model's parameters are DTensors, of which the forward pass reads gathered copies; use engine='auto', "
            "which writes and restores this rank's shards"
        )
    if engine != "auto":
        return engine
    name = "inplace" if sharded or is_compiled(model, loss_fn) else quickest
    while name in checks.unsupported:
        name, _ = _NEXT[name]
    return name


def fall_back(run: Callable[[str], Result], name: str, asked: str, checks: Checks) -> Result:
    """Run with an engine, and with the next one in its place if it turns out unable and none was named.

    Args:
        run: takes the name of an engine.
        name: of the engine to begin with.
        asked: what the caller asked for, "auto" or a name.
        checks: told why an engine cannot be used.

    Returns:
        Result: what ``run`` returned.

    Raises:
        EngineUnsupportedError: the engine was named and is unable.
    """
    found: dict[str, str] = {}
    while True:
        # One step size at a time takes less memory.
        unable = (EngineUnsupportedError, torch.OutOfMemoryError) if name == "batched" else EngineUnsupportedError
        try:
            result = run(name)
        except unable as reason:
            if asked != "auto" or name not in _NEXT:
                raise
            found[name] = str(reason)
            name, how = _NEXT[name]
            warn(f"measuring {how}: {reason}", EngineFallbackWarning)
        else:
            # Where no engine is able, it is not the engines' fault.
            checks.unsupported |= found
            return result


@contextmanager
def open_engine(
    name: str,
    pairs: Sequence[Pair],
    closure: Closure,
    *,
    compiled: bool,
    kept: Kept | None = None,
    backup: Backup = "auto",
) -> Iterator[Engine]:
    """Make an engine, and close it whatever happens.

    Args:
        name: ``"virtual"``, ``"batched"`` or ``"inplace"``.
        pairs: the parameters that move.
        closure: evaluates the user's loss.
        compiled: the model or closure is compiled, so that no mode may look on.
        kept: formed weights that engines of other closures on the same pairs share.
        backup: where the in-place engine's copy is; see there.

    Yields:
        Engine: until the block ends.
    """
    engine: Engine
    if name == "virtual":
        engine = VirtualEngine(pairs, closure, kept=kept)
    elif name == "batched":
        engine = BatchedEngine(pairs, closure, kept)
    else:
        # Without pairs the mode only takes losses to float32 and notes the products' precision.
        watching = VirtualParameters((), closure.precision, closure.guard.parameters)
        with as_one(closure.ranks):
            engine = InPlaceEngine(pairs, closure, FromGraphs() if compiled else Eagerly(watching), backup)
    try:
        yield engine
    finally:
        try:
            engine.close()
        except KeyboardInterrupt:
            engine.close()
            raise


def is_compiled(model: nn.Module, loss_fn: LossFn) -> bool:
    """Whether the model, one of its modules or the closure was compiled by torch.compile or torch.jit."""
    if hasattr(loss_fn, "_torchdynamo_orig_callable") or isinstance(loss_fn, torch.jit.ScriptFunction):
        return True
    return any(
        isinstance(module, torch.jit.ScriptModule)
        or hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
