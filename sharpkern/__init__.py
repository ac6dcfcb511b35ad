"""Critical sharpness of neural networks while they train, with forward passes only."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sharpkern._checkout import expose_folders

expose_folders()

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sharpkern import ops as ops
    from sharpkern.accumulate import adamw_direction as adamw_direction
    from sharpkern.accumulate import gradient_direction as gradient_direction
    from sharpkern.critical import critical_sharpness as critical_sharpness
    from sharpkern.direction import Direction as Direction
    from sharpkern.directional import DirectionalSharpness as DirectionalSharpness
    from sharpkern.directional import directional_sharpness as directional_sharpness
    from sharpkern.errors import EngineFallbackWarning as EngineFallbackWarning
    from sharpkern.errors import EngineUnsupportedError as EngineUnsupportedError
    from sharpkern.errors import HeadroomWarning as HeadroomWarning
    from sharpkern.errors import KernelWarning as KernelWarning
    from sharpkern.errors import LossPrecisionWarning as LossPrecisionWarning
    from sharpkern.errors import NoUpdateError as NoUpdateError
    from sharpkern.errors import RankError as RankError
    from sharpkern.errors import RetainedWarning as RetainedWarning
    from sharpkern.errors import SharpkernWarning as SharpkernWarning
    from sharpkern.errors import SlopeMismatchWarning as SlopeMismatchWarning
    from sharpkern.errors import UncheckedWarning as UncheckedWarning
    from sharpkern.errors import UnmovedWarning as UnmovedWarning
    from sharpkern.hessian import HessianResult as HessianResult
    from sharpkern.hessian import hessian_sharpness as hessian_sharpness
    from sharpkern.measurement import Measurement as Measurement
    from sharpkern.memory.plan import MemoryPlan as MemoryPlan
    from sharpkern.memory.planning import memory_plan as memory_plan
    from sharpkern.mixture import mixture_sweep as mixture_sweep
    from sharpkern.monitor import Monitor as Monitor
    from sharpkern.monitor import Record as Record
    from sharpkern.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from sharpkern.relative import relative_critical_sharpness as relative_critical_sharpness
    from sharpkern.sweep import MixtureSweep as MixtureSweep
    from sharpkern.sweep import SweetSpot as SweetSpot
    from sharpkern.thresholds import stability_threshold as stability_threshold

# Loaded when first asked for: importing the package costs next to nothing on top of torch.
_HOME = {
    "adamw_direction": "accumulate",
    "gradient_direction": "accumulate",
    "critical_sharpness": "critical",
    "Direction": "direction",
    "DirectionalSharpness": "directional",
    "directional_sharpness": "directional",
    "EngineFallbackWarning": "errors",
    "EngineUnsupportedError": "errors",
    "HeadroomWarning": "errors",
    "KernelWarning": "errors",
    "LossPrecisionWarning": "errors",
    "NoUpdateError": "errors",
    "RankError": "errors",
    "RetainedWarning": "errors",
    "SharpkernWarning": "errors",
    "SlopeMismatchWarning": "errors",
    "UncheckedWarning": "errors",
    "UnmovedWarning": "errors",
    "linear_cross_entropy": "ops.linear_cross_entropy",
    "HessianResult": "hessian",
    "hessian_sharpness": "hessian",
    "Measurement": "measurement",
    "MemoryPlan": "memory.plan",
    "memory_plan": "memory.planning",
    "mixture_sweep": "mixture",
    "Monitor": "monitor",
    "Record": "monitor",
    "relative_critical_sharpness": "relative",
    "MixtureSweep": "sweep",
    "SweetSpot": "sweep",
    "stability_threshold": "thresholds",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("sharpkern.ops")
    if name not in _HOME:
        raise AttributeError(f"module 'sharpkern' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"sharpkern.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "ops"})
