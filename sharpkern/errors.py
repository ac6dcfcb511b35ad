"""Warnings and errors of sharpkern's own."""

import os
import sys
import warnings


class SharpkernWarning(UserWarning):
    """Base class of every warning of this package, so that one filter catches them all."""


class SlopeMismatchWarning(SharpkernWarning):
    """The closure's loss is not the one that was trained: of another batch, mode or scale than the gradient's."""


class RetainedWarning(SharpkernWarning):
    """Rounding to the weights' dtype swallowed a part of the displacement."""


class LossPrecisionWarning(SharpkernWarning):
    """The closure returned its loss in 16 bits, too coarse for differences between nearby step sizes."""


class EngineFallbackWarning(SharpkernWarning):
    """``engine="auto"`` could not use the virtual engine and took the in-place one."""


class KernelWarning(SharpkernWarning):
    """Triton does not work on a GPU, where plain torch took the place of the kernels."""


class UncheckedWarning(SharpkernWarning):
    """A check that is made once for each model could not be made."""


class HeadroomWarning(SharpkernWarning):
    """The critical learning rate has come closer to the learning rate than the ratio that was asked for."""


class UnmovedWarning(SharpkernWarning):
    """Parameters of the model hold gradients, and no optimizer that the monitor knows of moves them."""


class SampleWarning(SharpkernWarning):
    """The whole batch was measured in place of a sample of its micro-batches, which may have misled."""


class RankError(RuntimeError):
    """The measurement failed on another rank of a distributed run, and so on all of them."""


class NoUpdateError(ValueError):
    """The next step would move nothing, or not to finite weights: learning rate 0, gradients 0, nan or inf."""


class EngineUnsupportedError(RuntimeError):
    """The virtual engine cannot evaluate this model or closure correctly; the in-place engine can."""


def warn(message: str, category: type[SharpkernWarning]) -> None:
    """Warn at the line of the user's code that called into the package.

    Args:
        message: what, and the remedy.
        category: of the warning.
    """
    package = os.path.dirname(__file__) + os.sep
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
