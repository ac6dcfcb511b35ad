"""RMSNorm and LayerNorm with perturbed weights, the perturbation never rounded.

    out[k] = (x[k] − mean) / √(mean of squares + ε) · (W + α_k D) + (b + α_k d)

RMSNorm takes no mean off and adds no bias. Norm weights lie near 1, where bf16 steps by 2⁻⁷: rounded to it, W + αD
would not move at all at the learning rates of large models. Here it stays fp32 until it has met x. One program
normalises one row, which it holds in registers: x is read once, 4 bytes move per element with bf16 operands.

Source: Zhang and Sennrich 2019 (RMSNorm); Ba et al. 2016 (LayerNorm); Kalra et al. 2026, Def. 2.1.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._accepts import check_alpha, check_dtype, check_floats
from ._launch import Case, Config, Launcher, choose, grid, load_tile, on_device, options, perturbed, store_tile

# The longest row: 16 elements in each of 1024 threads. Twice as many would spill registers.
MAX_LENGTH = 16384

# Bounded by the length of a row, which decides the block as well.
_CONFIGS = (
    Case(None, None, 1025, Config(block=1024, threads=128)),
    Case(None, None, 4097, Config(block=4096, threads=256)),
    Case(None, None, None, Config(block=MAX_LENGTH, threads=1024)),
)


@triton.jit
def _perturbed_vector(values, direction, alpha, columns, inside):
    """Return w + αd of a vector, or w where there is no direction."""
    w = load_tile(values + columns, inside, True)
    if direction is not None:
        w = perturbed(w, load_tile(direction + columns, inside, True), alpha)
    return w


@triton.jit(do_not_specialize=["rows_per_step"])
def _norm_kernel(
    out,
    x,
    x_stride,
    weight,
    weight_direction,
    bias,
    bias_direction,
    alpha,
    rows_per_step,
    length,
    EPS: tl.constexpr,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < length
    alpha = tl.load(alpha + pid // rows_per_step)

    x = load_tile(x + pid * x_stride + columns, inside, True)
    if CENTERED:
        x = tl.where(inside, x - tl.sum(x) / length, 0.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x) / length + EPS))
    y = x * scale * _perturbed_vector(weight, weight_direction, alpha, columns, inside)
    if bias is not None:
        y += _perturbed_vector(bias, bias_direction, alpha, columns, inside)
    store_tile(out + pid * length + columns, y, inside, True)


@Launcher
def rms_norm(
    x: Tensor,
    weight: Tensor,
    weight_direction: Tensor | None,
    alpha: Tensor,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Callable[[], Tensor]:
    """Launch `sharpkern.ops.rms_norm`; x is copied unless its rows are each in one piece, at equal distances."""
    return _norm(x, weight, weight_direction, None, None, alpha, eps, dtype, centered=False)


@Launcher
def layer_norm(
    x: Tensor,
    weight: Tensor,
    weight_direction: Tensor | None,
    bias: Tensor | None,
    bias_direction: Tensor | None,
    alpha: Tensor,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Callable[[], Tensor]:
    """Launch `sharpkern.ops.layer_norm`; x is copied as by `rms_norm`."""
    if bias is None and bias_direction is not None:
        raise ValueError("bias_direction must be None without a bias, got a tensor; pass the bias that it moves")
    return _norm(x, weight, weight_direction, bias, bias_direction, alpha, eps, dtype, centered=True)


def _norm(
    x: Tensor,
    weight: Tensor,
    weight_direction: Tensor | None,
    bias: Tensor | None,
    bias_direction: Tensor | None,
    alpha: Tensor,
    eps: float,
    dtype: torch.dtype | None,
    *,
    centered: bool,
) -> Callable[[], Tensor]:
    """Check, and return the launch."""
    vectors = {
        "weight": weight,
        "weight_direction": weight_direction,
        "bias": bias,
        "bias_direction": bias_direction,
    }
    check_floats(x=x, **vectors)
    num_steps = check_alpha(alpha, x)
    if x.dim() < 2 or x.shape[0] != num_steps or x.shape[-1] > MAX_LENGTH:
        raise ValueError(
            f"x must have shape [{num_steps}, ..., C] with one input per step size and C at most {MAX_LENGTH}, got "
            f"{list(x.shape)}; expand it if the inputs are equal"
        )
    length = x.shape[-1]
    for name, vector in vectors.items():
        if vector is not None and (vector.shape != (length,) or not vector.is_contiguous()):
            raise ValueError(
                f"{name} must be a contiguous vector of the length of x's rows, {length}, got shape "
                f"{list(vector.shape)} with strides {list(vector.stride())}; pass a contiguous copy"
            )
    dtype = dtype or x.dtype
    check_dtype(dtype)
    config = choose(_CONFIGS, x.device, x.element_size(), length)
    programs = grid(x.shape[:-1].numel(), config)

    def launch() -> Tensor:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        if out.numel() == 0:
            return out
        rows = x.reshape(-1, length)
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        with on_device(x):
            _norm_kernel[programs](
                out,
                rows,
                rows.stride(0),
                *vectors.values(),
                alpha,
                len(rows) // num_steps,
                length,
                EPS=eps,
                CENTERED=centered,
                BLOCK=min(config.block, triton.next_power_of_2(length)),
                **options(config, x),
            )
        return out

    return launch
