"""A linear layer whose weight moves, for several step sizes at once: y[k] = x[k] (W + α_k D)ᵀ, the quickest way.

Three ways, which differ in what is read, written and multiplied for K step sizes of M tokens each:

- "products": x Wᵀ + α_k (x D ᵀ), two products over all K·M rows. W and D are read once and nothing is formed, for twice
  the arithmetic: for few tokens, where reading weights is what takes the time. Nothing of W + α_k D is rounded either.
- "formed": W + α_k D of all k, formed from one reading of W and D some rows at a time, and K products.
- "fused": one kernel that forms tiles on the way to the matrix units (`ops.linear`).
"""

import functools
import math
from itertools import product

import torch
from torch import Tensor

from sharpkern import ops
from sharpkern.engines.tracked import formed
from sharpkern.ops.linear_cross_entropy import VOCABULARY_CHUNK
from sharpkern.ops.matmul import accumulates_in_fp32, accumulator_dtype, matmul_operand, mixed_matmul
from sharpkern.ops.update import ParamUpdate
from sharpkern.tensors.fake import device_kind
from sharpkern.tensors.free import free_bytes

# Memory for formed rows. The product of 1024 rows of width 4096 fills a GPU: 64 MiB for 8 step sizes. But each part of
# a matrix is two launches more for the host, so that as much as `_LARGE_SCRATCH` is taken where it is a small part of
# what is free. A CPU forms for one step size after the other what stays in its cache, with W and D.
SCRATCH_BYTES = 64 * 2**20
_LARGE_SCRATCH, _SHARE = 2**30, 32
CACHE_BYTES = 2**21

# Below this many tokens per step size "products" are the quickest of 8, and "formed" from there on. Of "cpu" measured
# (bench/results/bench.json, section linear); of "cuda" counted: forming 8 at a time leaves M/(M + 230) of a product's
# speed, two products leave half of it.
FEW_TOKENS = {"cpu": 12, "cuda": 230}


def choose(device: torch.device, dtype: torch.dtype, num_tokens: int) -> str:
    """Return the way that is taken."""
    # A product of 16-bit factors is rounded to 16 bits on some devices, and its sum with another one once more; and in
    # float16 a direction may be too small to be seen.
    exact = dtype.itemsize >= 4 or (dtype == torch.bfloat16 and accumulates_in_fp32(device))
    return "products" if exact and num_tokens < FEW_TOKENS.get(device_kind(device), 0) else "formed"


def moving_linear(
    x: Tensor,
    weight: Tensor,
    move: ParamUpdate,
    alpha: Tensor,
    *,
    dtype: torch.dtype,
    way: str,
    bias: Tensor | None = None,
) -> Tensor:
    """Return x[k] (W + α_k D)ᵀ + b[k]."""
    num_steps, shape = len(alpha), x.shape[1:-1]
    x = x.to(dtype).reshape(len(x), -1, x.shape[-1])
    if way == "products":
        y = _products(x, weight, move, alpha, dtype, bias)
    elif way == "fused":
        y = ops.linear(x, move.base, move.update(), alpha, dtype=dtype)
        y = y if bias is None else y.add_(bias.unsqueeze(1))
    else:
        y = _formed(x, weight, move, alpha, bias)
    return y.reshape(num_steps, *shape, len(weight))


def with_weights(x: Tensor, weights: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return x[k] W[k]ᵀ + b[k], rounded once."""
    if bias is None:
        return torch.bmm(x, weights.mT, out=out)
    return torch.baddbmm(bias.unsqueeze(1), x, weights.mT, out=out)


def _products(
    x: Tensor, weight: Tensor, move: ParamUpdate, alpha: Tensor, dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    rows = matmul_operand(x.flatten(0, 1), dtype)
    still, moving = (
        mixed_matmul(rows, matmul_operand(matrix, dtype).t(), _empty_rows(rows, matrix)).unflatten(0, x.shape[:2])
        for matrix in (weight, move.update())
    )
    steps = alpha.view(-1, 1, 1)
    summed = still.addcmul_(moving, steps) if len(x) == len(alpha) else torch.addcmul(still, moving, steps)
    if bias is not None:
        summed += bias.unsqueeze(1)
    return summed.to(dtype)


def _empty_rows(rows: Tensor, matrix: Tensor) -> Tensor:
    return rows.new_empty(len(rows), len(matrix), dtype=accumulator_dtype(rows.dtype))


def _block(x: Tensor, num_rows: int, width: int, num_steps: int) -> tuple[int, int]:
    """Return how many step sizes, and rows of each, are formed at a time."""
    num_bytes = max(1, width * x.element_size())
    if device_kind(x.device) != "cpu":
        return num_steps, min(num_rows, max(1, _scratch_bytes(x.device) // (num_steps * num_bytes)))
    height = min(num_rows, max(1, CACHE_BYTES // num_bytes))
    return min(num_steps, max(1, CACHE_BYTES // (height * num_bytes))), height


def rows_of_head(hidden: Tensor) -> int | None:
    """Return how many rows of a head are formed at a time for hidden states [K, T, C]; None for what is usual.

    Each chunk is three launches of a GPU: those of few tokens are as high as for one step size, where there is memory.
    """
    on_gpu = ops.has_kernels(hidden.device) or device_kind(hidden.device) == "cuda"
    num_steps, num_tokens, width = hidden.shape
    num_bytes = num_steps * VOCABULARY_CHUNK * width * hidden.element_size()
    is_small = num_steps * num_tokens <= VOCABULARY_CHUNK and num_bytes <= _scratch_bytes(hidden.device)
    return VOCABULARY_CHUNK if on_gpu and is_small else None


def _scratch_bytes(device: torch.device) -> int:
    """Memory that formed rows may take on a device; in a plan as much as they may take on any."""
    if device.type == "cuda":
        return max(SCRATCH_BYTES, min(_LARGE_SCRATCH, _free_at_first(device) // _SHARE))
    return _LARGE_SCRATCH if device_kind(device) == "cuda" else SCRATCH_BYTES


@functools.cache
def _free_at_first(device: torch.device) -> int:
    """Asked for once: what a run leaves free changes little."""
    return free_bytes(device)


def scratch(x: Tensor, num_elements: int) -> Tensor:
    """Memory for formed weights, of the dtype and on the device of ``x``."""
    return x.new_empty(num_elements)


def _formed(x: Tensor, weight: Tensor, move: ParamUpdate, alpha: Tensor, bias: Tensor | None) -> Tensor:
    (num_rows, width), (num_steps, num_tokens) = weight.shape, (len(alpha), x.shape[1])
    at_once, height = _block(x, num_rows, width, num_steps)
    x = x.expand(num_steps, -1, -1)
    y = x.new_empty(num_steps, num_tokens, num_rows)
    memory = scratch(x, at_once * height * width)
    for first, step in product(range(0, num_rows, height), range(0, num_steps, at_once)):
        rows, steps = slice(first, min(first + height, num_rows)), slice(step, min(step + at_once, num_steps))
        shape = (steps.stop - step, rows.stop - first, width)
        weights = formed(move.rows(rows), alpha[steps], x.dtype, memory[: math.prod(shape)].view(shape))
        with_weights(x[steps], weights, None if bias is None else bias[steps, rows], y[steps, :, rows])
    return y
