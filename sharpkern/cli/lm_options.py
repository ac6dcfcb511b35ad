"""What the commands for language models have in common: the kind of update, where and in which precision to measure."""

import math
from enum import Enum
from functools import partial

import torch

from sharpkern.measures.batch_directions import adamw_direction, gradient_direction
from sharpkern.mixtures.sweep import MakeDirection


class Kind(str, Enum):
    """Whose update is made of batches."""

    ADAMW = "adamw"
    SGD = "sgd"


class Dtype(str, Enum):
    """Precision of the weights."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def maker(kind: Kind, beta2: float, weight_decay: float) -> MakeDirection:
    """Return the function that makes a direction."""
    if kind is Kind.SGD:
        return gradient_direction
    return partial(adamw_direction, betas=(0.9, beta2), weight_decay=weight_decay)


def listed(option: str, words: str) -> list[str]:
    """Take a list with commas apart."""
    found = [word.strip() for word in words.split(",") if word.strip()]
    if words and not found:
        raise ValueError(f"{option} must hold something between commas, got {words!r}; leave it out for the default")
    return found


def sample_of(words: str | None) -> float | str | None:
    """Take a sample's size as `sharpkern.critical_sharpness` does."""
    if words in (None, "auto"):
        return words
    try:
        sample = int(words) if words.isdecimal() else float(words)
    except ValueError:
        sample = math.nan
    if not (sample >= 4 if isinstance(sample, int) else 0 < sample <= 1):
        raise ValueError(
            f"--sample must be auto, a share in (0, 1], or a number of batches from 4 on, got {words!r}; pass auto for "
            "as many as needed"
        )
    return sample


def device_of(name: str | None) -> torch.device:
    """Return the device that was named, or the GPU if there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.empty(0, device=name).is_meta:
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be a device of this machine, got {name!r}: {error}") from None
    return torch.device(name)
