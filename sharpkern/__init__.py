"""Critical sharpness of neural networks while they train, with forward passes only."""

from sharpkern._checkout import expose_kernels

expose_kernels()

from sharpkern.critical import critical_sharpness as critical_sharpness  # noqa: E402
from sharpkern.direction import Direction as Direction  # noqa: E402
from sharpkern.measurement import Measurement as Measurement  # noqa: E402

__version__ = "0.1.0"
