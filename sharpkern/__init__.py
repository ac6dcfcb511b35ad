"""Critical sharpness of neural networks while they train, with forward passes only."""

# ruff: noqa: E402

from sharpkern._checkout import expose_kernels

expose_kernels()

from sharpkern.critical import critical_sharpness as critical_sharpness
from sharpkern.direction import Direction as Direction
from sharpkern.directional import directional_sharpness as directional_sharpness
from sharpkern.errors import EngineFallbackWarning as EngineFallbackWarning
from sharpkern.errors import EngineUnsupportedError as EngineUnsupportedError
from sharpkern.errors import KernelWarning as KernelWarning
from sharpkern.errors import LossPrecisionWarning as LossPrecisionWarning
from sharpkern.errors import NoUpdateError as NoUpdateError
from sharpkern.errors import RetainedWarning as RetainedWarning
from sharpkern.errors import SharpkernWarning as SharpkernWarning
from sharpkern.errors import SlopeMismatchWarning as SlopeMismatchWarning
from sharpkern.errors import UncheckedWarning as UncheckedWarning
from sharpkern.head import linear_cross_entropy as linear_cross_entropy
from sharpkern.hessian import HessianResult as HessianResult
from sharpkern.hessian import hessian_sharpness as hessian_sharpness
from sharpkern.measurement import Measurement as Measurement
from sharpkern.monitor import Monitor as Monitor
from sharpkern.monitor import Record as Record
from sharpkern.relative import relative_critical_sharpness as relative_critical_sharpness
from sharpkern.thresholds import stability_threshold as stability_threshold

__version__ = "0.1.0"
