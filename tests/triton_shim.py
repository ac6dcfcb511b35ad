"""Cure of two faults of Triton's CPU interpreter, for tests only: it truncates fp32 to bf16 instead of rounding.

Its round-to-nearest path does not round to even either, and loses carries into the exponent. The hardware does both.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """fp32 values as bf16 bit patterns, rounded to nearest even; NaN stays NaN."""
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def from_bf16_bits(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns as fp32 values, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def install() -> None:
    """Patch the interpreter's conversions between bf16 and fp32 in this process."""
    builder = interpreter.InterpreterBuilder
    stock_cast, stock_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def cast(self, src, dst_type):
        converted = _converted(src, dst_type)
        return stock_cast(self, src, dst_type) if converted is None else converted

    def fp_to_fp(self, src, dst_type, rounding_mode):
        converted = _converted(src, dst_type)
        return stock_fp_to_fp(self, src, dst_type, rounding_mode) if converted is None else converted

    builder.cast_impl, builder.create_fp_to_fp = cast, fp_to_fp


def _converted(src, dst_type):
    """The handle converted between bf16 and fp32, or None where the conversion is another."""
    kinds = src.dtype.scalar, dst_type.scalar
    if kinds == (tl.float32, tl.bfloat16):
        return interpreter.TensorHandle(to_bf16_bits(src.data), tl.bfloat16)
    if kinds == (tl.bfloat16, tl.float32):
        return interpreter.TensorHandle(from_bf16_bits(src.data), tl.float32)
    return None
