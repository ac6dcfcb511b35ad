"""Warnings that sharpkern raises, and the error its engines use to hand over to one another."""


class SharpkernWarning(UserWarning):
    """Base class of every warning of this package, so that one filter catches them all."""


class SlopeMismatchWarning(SharpkernWarning):
    """The loss does not fall as the gradient says: the closure and the gradient are of different batches or scales."""


class RetainedWarning(SharpkernWarning):
    """Rounding to the weights' dtype swallowed a part of the displacement."""


class LossPrecisionWarning(SharpkernWarning):
    """The closure returned its loss in 16 bits, too coarse for differences between nearby step sizes."""


class EngineFallbackWarning(SharpkernWarning):
    """``engine="auto"`` could not use the virtual engine and took the in-place one."""


class EngineUnsupportedError(RuntimeError):
    """The virtual engine cannot evaluate this model or closure correctly; the in-place engine can."""
