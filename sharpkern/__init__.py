"""Critical sharpness of neural networks while they train, with forward passes only."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sharpkern._support.checkout import expose_folders

expose_folders()

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sharpkern import ops as ops
    from sharpkern.directions.direction import Direction as Direction
    from sharpkern.distributed.declared import Ranks as Ranks
    from sharpkern.errors import EngineFallbackWarning as EngineFallbackWarning
    from sharpkern.errors import EngineUnsupportedError as EngineUnsupportedError
    from sharpkern.errors import HeadroomWarning as HeadroomWarning
    from sharpkern.errors import KernelWarning as KernelWarning
    from sharpkern.errors import LossPrecisionWarning as LossPrecisionWarning
    from sharpkern.errors import NoUpdateError as NoUpdateError
    from sharpkern.errors import RankError as RankError
    from sharpkern.errors import RetainedWarning as RetainedWarning
    from sharpkern.errors import SampleWarning as SampleWarning
    from sharpkern.errors import SharpkernWarning as SharpkernWarning
    from sharpkern.errors import SlopeMismatchWarning as SlopeMismatchWarning
    from sharpkern.errors import UncheckedWarning as UncheckedWarning
    from sharpkern.errors import UnmovedWarning as UnmovedWarning
    from sharpkern.measures.batch_directions import adamw_direction as adamw_direction
    from sharpkern.measures.batch_directions import gradient_direction as gradient_direction
    from sharpkern.measures.blockwise import blockwise_critical_sharpness as blockwise_critical_sharpness
    from sharpkern.measures.critical import critical_sharpness as critical_sharpness
    from sharpkern.measures.directional import DirectionalSharpness as DirectionalSharpness
    from sharpkern.measures.directional import directional_sharpness as directional_sharpness
    from sharpkern.measures.hessian import HessianResult as HessianResult
    from sharpkern.measures.hessian import hessian_sharpness as hessian_sharpness
    from sharpkern.measures.losses import losses_along as losses_along
    from sharpkern.measures.micro_batches import MicroBatch as MicroBatch
    from sharpkern.measures.micro_batches import split as split
    from sharpkern.measures.relative import relative_critical_sharpness as relative_critical_sharpness
    from sharpkern.measures.result import Measurement as Measurement
    from sharpkern.measures.thresholds import stability_threshold as stability_threshold
    from sharpkern.memory.plan import MemoryPlan as MemoryPlan
    from sharpkern.memory.planning import memory_plan as memory_plan
    from sharpkern.mixtures.results import MixtureSweep as MixtureSweep
    from sharpkern.mixtures.results import SweetSpot as SweetSpot
    from sharpkern.mixtures.sweep import mixture_sweep as mixture_sweep
    from sharpkern.monitoring.lr_cap import LRCap as LRCap
    from sharpkern.monitoring.lr_finder import LRSuggestion as LRSuggestion
    from sharpkern.monitoring.lr_finder import find_lr as find_lr
    from sharpkern.monitoring.monitor import Monitor as Monitor
    from sharpkern.monitoring.monitor import Record as Record
    from sharpkern.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy

# Loaded when first asked for: importing the package costs next to nothing on top of torch.
_HOME = {
    "adamw_direction": "measures.batch_directions",
    "gradient_direction": "measures.batch_directions",
    "blockwise_critical_sharpness": "measures.blockwise",
    "critical_sharpness": "measures.critical",
    "Direction": "directions.direction",
    "Ranks": "distributed.declared",
    "DirectionalSharpness": "measures.directional",
    "directional_sharpness": "measures.directional",
    "EngineFallbackWarning": "errors",
    "EngineUnsupportedError": "errors",
    "HeadroomWarning": "errors",
    "KernelWarning": "errors",
    "LossPrecisionWarning": "errors",
    "NoUpdateError": "errors",
    "RankError": "errors",
    "RetainedWarning": "errors",
    "SampleWarning": "errors",
    "SharpkernWarning": "errors",
    "SlopeMismatchWarning": "errors",
    "UncheckedWarning": "errors",
    "UnmovedWarning": "errors",
    "linear_cross_entropy": "ops.linear_cross_entropy",
    "HessianResult": "measures.hessian",
    "hessian_sharpness": "measures.hessian",
    "losses_along": "measures.losses",
    "Measurement": "measures.result",
    "MicroBatch": "measures.micro_batches",
    "split": "measures.micro_batches",
    "MemoryPlan": "memory.plan",
    "memory_plan": "memory.planning",
    "mixture_sweep": "mixtures.sweep",
    "LRCap": "monitoring.lr_cap",
    "LRSuggestion": "monitoring.lr_finder",
    "find_lr": "monitoring.lr_finder",
    "Monitor": "monitoring.monitor",
    "Record": "monitoring.monitor",
    "relative_critical_sharpness": "measures.relative",
    "MixtureSweep": "mixtures.results",
    "SweetSpot": "mixtures.results",
    "stability_threshold": "measures.thresholds",
}

# What help(sharpkern) lists.
__all__ = sorted([*_HOME, "ops"])


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("sharpkern.ops")
    if name not in _HOME:
        raise AttributeError(f"module 'sharpkern' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"sharpkern.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "ops"})
