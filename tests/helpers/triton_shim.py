"""Cures of faults of Triton's CPU interpreter, for tests only, so that it computes what the hardware computes.

- fp32 is truncated to bf16; the path that rounds does not round to even, and loses carries into the exponent.
- A product of bf16 matrices multiplies their bit patterns.
- Up to 3.8 a fused multiply-add rounds twice, and bounds of loops that are known at run time fail with numpy 2.4.
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
    """Patch the interpreter of this process."""
    builder = interpreter.InterpreterBuilder
    stock_cast, stock_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    stock_dot = builder.create_dot
    stock_patch_tensor = interpreter._patch_lang_tensor

    def cast(self, src, dst_type):
        converted = _converted(src, dst_type)
        return stock_cast(self, src, dst_type) if converted is None else converted

    def fp_to_fp(self, src, dst_type, rounding_mode):
        converted = _converted(src, dst_type)
        return stock_fp_to_fp(self, src, dst_type, rounding_mode) if converted is None else converted

    def dot(self, a, b, *options):
        return stock_dot(self, _widened(a), _widened(b), *options)

    def patch_tensor(tensor, scope):
        stock_patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    builder.cast_impl, builder.create_fp_to_fp = cast, fp_to_fp
    builder.create_fma, builder.create_dot = _fma, dot
    interpreter._patch_lang_tensor = patch_tensor


def _fma(self, x, y, z):
    """x·y + z of fp32 values: the product is exact in fp64, and so is the sum but for one case in 2²⁹."""
    with np.errstate(invalid="ignore"):
        total = x.data.astype(np.float64) * y.data + z.data
    return interpreter.TensorHandle(total.astype(z.data.dtype), z.dtype.scalar)


def _widened(handle):
    """The handle, bf16 as fp32: an exact product of two of them needs no more."""
    converted = _converted(handle, tl.float32)
    return handle if converted is None else converted


def _converted(src, dst_type):
    """The handle converted between bf16 and fp32, or None where the conversion is another."""
    kinds = src.dtype.scalar, dst_type.scalar
    if kinds == (tl.float32, tl.bfloat16):
        return interpreter.TensorHandle(to_bf16_bits(src.data), tl.bfloat16)
    if kinds == (tl.bfloat16, tl.float32):
        return interpreter.TensorHandle(from_bf16_bits(src.data), tl.float32)
    return None
