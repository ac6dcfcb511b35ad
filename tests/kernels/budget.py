"""How far a kernel may be from the fp64 oracle: as far as torch in the same dtype, and a rounding more."""

import torch
from torch import Tensor

from sharpkern.bench.accuracy import bits as bits
from sharpkern.bench.accuracy import excess

SIZES = (0, 1, 63, 127, 1000, 4097)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of three operands: any two roles have every pair of dtypes.
TRIPLES = [(DTYPES[i], DTYPES[j], DTYPES[(i + j) % 3]) for i in range(3) for j in range(3)]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


def assert_within_budget(got: Tensor, exact: Tensor, in_torch: Tensor, *, roundings: float = 0.5, floor: float = 0.0):
    """Fail where an element's error exceeds torch's error there by more than a number of roundings of the dtype.

    Args:
        got: what the kernel returned.
        exact: the same in fp64.
        in_torch: the same from torch operations on the same inputs, in the dtype of ``got``.
        roundings: units in the last place of the exact value that are added to torch's error; 0.5 is one rounding.
        floor: absolute error that is added, for sums whose terms are larger than the result.
    """
    assert got.shape == exact.shape == in_torch.shape
    assert got.dtype == in_torch.dtype
    worst = excess(got, exact, in_torch, roundings=roundings, floor=floor)
    assert worst <= 1, f"largest error is {worst:.3g} times its budget"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))
