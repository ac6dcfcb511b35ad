"""Linear layer with perturbed weights for several step sizes at once: y[k] = x[k] (W + α_k D)ᵀ.

The perturbed weight exists one tile at a time, in registers: formed in fp32 by one fused multiply-add, rounded once to
the dtype of x, as a layer would hold it, and multiplied with fp32 accumulation.

Few tokens, M ≤ 64 per step size: memory-bound. A program reads a tile of W and D once for up to eight blocks of 16
tokens, of one step size or of several: 4 bytes move per bf16 weight with K = 8 and M = 16, forming and multiplying
separately moves 36. More tokens: a program takes one step size, and its neighbours take the same weights for the others
out of the L2 cache.

Where there are fewer tiles than a GPU has room for programs, several of them share the columns of one. Each leaves its
sum in fp32, and a second kernel adds those up in a fixed order: no atomics, the same bits on every run.

Source: Kalra et al. 2026, Def. 2.1 (W − ηΔθ at every probe of the line search).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._accepts import check_alpha, check_dtype, check_floats, check_rows
from ._launch import STREAMING, Case, Launcher, architecture, choose, grid, is_hopper, on_device, options

# Up to here a program reads its weights once for several step sizes.
FEW_TOKENS = 64

# Of the kernel for few tokens: rows of a block, the least that matrix instructions take, and sums that a program keeps
# in registers. With 16 of them there is room for half as many programs.
_BLOCK = 16
_BLOCKS = 8

# Columns of a tile's row that are worth a program of their own.
_MIN_COLUMNS = 256


# GPUs on which tiles are spilled to memory: Turing, whose matrix instructions are of another kind, and RDNA.
_WITHOUT_REGISTERS = ("sm_7", "gfx10", "gfx11", "gfx12")


class Tile(NamedTuple):
    """One launch configuration.

    Attributes:
        rows: of W in a tile.
        tokens: of x, per step size.
        depth: columns that are multiplied at a time.
        stages: of those that are loaded ahead, and the one at work.
        programs: that a GPU has room for; fewer tiles are divided.
        threads: per program.
        registers: of a thread at most, or None: so that two programs fit a multiprocessor.
    """

    rows: int
    tokens: int
    depth: int
    stages: int
    programs: int
    threads: int
    registers: int | None = None


# Of inputs in 16 bits. The last row of each table is for any GPU, and for rows at any address: its tile fits 64 KiB of
# shared memory, float32 weights included.
_FEW = (
    *(
        Case(arch, None, None, Tile(64, _BLOCK, depth=32, stages=4, programs=512, threads=256, registers=128))
        for arch in ("sm_80", "sm_90", "sm_100", "sm_103")
    ),
    Case(None, None, None, Tile(64, _BLOCK, depth=32, stages=2, programs=512, threads=256)),
)
# Bounded by the number of tokens per step size.
_MANY = (
    Case("sm_90", None, 129, Tile(128, 128, depth=64, stages=3, programs=128, threads=256)),
    Case("sm_90", 2, None, Tile(128, 256, depth=64, stages=3, programs=128, threads=256)),
    *(
        Case(arch, None, None, Tile(128, 128, depth=64, stages=3, programs=128, threads=256))
        for arch in ("sm_80", "sm_90", "sm_100", "sm_103")
    ),
    Case(None, None, None, Tile(64, 128, depth=32, stages=2, programs=128, threads=256)),
)
# Of inputs in float32, which NVIDIA's matrix instructions would round.
_FEW_FP32 = Tile(64, _BLOCK, depth=16, stages=2, programs=512, threads=256)
_MANY_FP32 = Tile(64, 128, depth=16, stages=2, programs=128, threads=256)


@triton.jit(do_not_specialize=["num_steps", "num_tokens", "num_parts"])
def _few_tokens_kernel(
    out,
    out_stride,
    x,
    x_stride,
    x_row_stride,
    W,
    W_stride,
    D,
    D_stride,
    alpha,
    num_steps,
    num_tokens,
    num_rows,
    num_columns,
    num_parts,
    columns_per_part,
    SHARED: tl.constexpr,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(num_steps, K)
    # The last group starts where it is full; what it has in common with the one before is the same, bit for bit.
    first_step = tl.minimum(pid % groups * K, num_steps - K)
    part = pid // groups % num_parts
    rows = pid // groups // num_parts * ROWS + tl.arange(0, ROWS)[None, :]
    tokens = tl.arange(0, TOKENS)[:, None]
    start = part * columns_per_part
    stop = tl.minimum(start + columns_per_part, num_columns)

    # What lies beyond the last row or token is computed as if it were the last, and not stored.
    W += tl.minimum(rows, num_rows - 1) * W_stride + tl.arange(0, DEPTH)[:, None]
    D += tl.minimum(rows, num_rows - 1) * D_stride + tl.arange(0, DEPTH)[:, None]
    x_rows = ()
    for block in tl.static_range(BLOCKS):
        token = tl.minimum(tokens + block * TOKENS, num_tokens - 1).to(tl.int64)
        x_rows += (x + first_step * x_stride + token * x_row_stride + tl.arange(0, DEPTH)[None, :],)
    # A vector of equal step sizes, since a scalar would keep the compiler from forming weights where the product takes
    # them, and send each through shared memory.
    alphas = ()
    sums = ()
    for k in tl.static_range(K):
        alphas += (tl.load(alpha + first_step + k + tl.zeros([1, ROWS], tl.int32)),)
        for _ in tl.static_range(BLOCKS):
            sums += (tl.zeros([TOKENS, ROWS], tl.float32),)

    for column in tl.range(start, stop, DEPTH, num_stages=STAGES):
        inside = tl.arange(0, DEPTH) < stop - column
        w = tl.load(W + column, mask=inside[:, None], other=0.0).to(tl.float32)
        d = tl.load(D + column, mask=inside[:, None], other=0.0).to(tl.float32)
        new_sums = ()
        for k in tl.static_range(K):
            # Where α = 0 nothing of D counts, not even an infinity.
            moves = tl.where(alphas[k] == 0.0, 0.0, d)
            formed = tl.fma(moves, tl.broadcast_to(alphas[k], d.shape), w).to(x.dtype.element_ty)
            offset = column if SHARED else column + k * tl.cast(x_stride, tl.int64)
            for block in tl.static_range(BLOCKS):
                inputs = tl.load(x_rows[block] + offset, mask=inside[None, :], other=0.0)
                new_sums += (tl.dot(inputs, formed, sums[k * BLOCKS + block], input_precision="ieee"),)
        sums = new_sums

    out += part * out_stride
    for k in tl.static_range(K):
        for block in tl.static_range(BLOCKS):
            token = tokens + block * TOKENS
            known = (token < num_tokens) & (rows < num_rows)
            offsets = ((first_step + k) * num_tokens + token) * num_rows + rows
            tl.store(out + offsets, sums[k * BLOCKS + block].to(out.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["num_steps", "num_tokens", "num_parts"])
def _many_tokens_kernel(
    out,
    out_stride,
    x,
    x_stride,
    x_row_stride,
    W,
    W_stride,
    D,
    D_stride,
    alpha,
    num_steps,
    num_tokens,
    num_rows,
    num_columns,
    num_parts,
    columns_per_part,
    FENCED: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    step = pid % num_steps
    part = pid // num_steps % num_parts
    tile = pid // num_steps // num_parts
    blocks = tl.cdiv(num_tokens, TOKENS)
    tokens = tile % blocks * TOKENS + tl.arange(0, TOKENS)[None, :]
    rows = tile // blocks * ROWS + tl.arange(0, ROWS)[:, None]
    start = part * columns_per_part
    stop = tl.minimum(start + columns_per_part, num_columns)

    # As above; the product is the transposed one, whose first operand matrix instructions take from registers.
    W += tl.minimum(rows, num_rows - 1) * W_stride + tl.arange(0, DEPTH)[None, :]
    D += tl.minimum(rows, num_rows - 1) * D_stride + tl.arange(0, DEPTH)[None, :]
    x += step * x_stride + tl.minimum(tokens, num_tokens - 1) * x_row_stride + tl.arange(0, DEPTH)[:, None]
    alphas = tl.load(alpha + step + tl.zeros([ROWS, 1], tl.int32))
    # Where α = 0 nothing of D is read.
    D_stop = tl.where(tl.load(alpha + step) == 0.0, start, stop)
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for column in tl.range(start, stop, DEPTH, num_stages=STAGES):
        inside = tl.arange(0, DEPTH) < stop - column
        w = tl.load(W + column, mask=inside[None, :], other=0.0).to(tl.float32)
        d = tl.load(D + column, mask=tl.arange(0, DEPTH)[None, :] < D_stop - column, other=0.0).to(tl.float32)
        inputs = tl.load(x + column, mask=inside[:, None], other=0.0)
        formed = tl.fma(d, tl.broadcast_to(alphas, d.shape), w).to(x.dtype.element_ty)
        sums = tl.dot(formed, inputs, sums, input_precision="ieee")
        if FENCED:
            # Products run asynchronously on Hopper, and Triton 3.6 to 3.8 let the next weights overwrite the registers
            # that one still reads (triton-lang/triton#9433). An instruction that needs its sums has to wait for it.
            sums = tl.inline_asm_elementwise("", "=f,0", [sums], dtype=tl.float32, is_pure=True, pack=1)

    offsets = (step * num_tokens + tokens) * num_rows + rows
    known = (tokens < num_tokens) & (rows < num_rows)
    tl.store(out + part * out_stride + offsets, sums.to(out.dtype.element_ty), mask=known)


@triton.jit
def _sum_parts_kernel(out, parts, parts_stride, num_parts, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    offsets = pid * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(num_parts):
        total += tl.load(parts + part * parts_stride + offsets, mask=offsets < n, other=0.0)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=offsets < n)


@Launcher
def linear(x: Tensor, W: Tensor, D: Tensor, alpha: Tensor, *, dtype: torch.dtype | None = None) -> Callable[[], Tensor]:
    """Launch `sharpkern.ops.linear`; x is copied unless elements of a row lie next to each other."""
    num_steps = _check(x, W, D, alpha)
    dtype = dtype or x.dtype
    check_dtype(dtype)
    if x.stride(2) != 1:
        x = x.contiguous()
    shared = x.shape[0] == 1
    num_tokens, num_rows, num_columns = x.shape[1], *W.shape

    few = num_tokens <= FEW_TOKENS
    tile = _tile(few, x, W, D)
    blocks = triton.cdiv(num_tokens, tile.tokens)
    groups = triton.cdiv(num_steps, _BLOCKS // max(1, blocks)) if few else num_steps
    tiles = triton.cdiv(num_rows, tile.rows) * groups * (1 if few else blocks)
    num_parts, columns_per_part = _parts(tiles, num_columns, tile)
    programs = grid(tiles * num_parts, tile)
    n = num_steps * num_tokens * num_rows
    config = choose(STREAMING, x.device, dtype.itemsize, n)
    sum_programs = grid(triton.cdiv(n, config.block), config) if num_parts > 1 else ()

    def launch() -> Tensor:
        out = torch.empty(num_steps, num_tokens, num_rows, dtype=dtype, device=x.device)
        if n == 0 or num_columns == 0:
            return out.zero_()
        # A start at a multiple of 16 elements lets the sums of every part be read 16 bytes at a time.
        sums = out if num_parts == 1 else x.new_empty(num_parts, triton.cdiv(n, 16) * 16, dtype=torch.float32)
        inputs = (x, 0 if shared else x.stride(0), x.stride(1), W, W.stride(0), D, D.stride(0), alpha)
        sizes = (num_steps, num_tokens, num_rows, num_columns, num_parts, columns_per_part)
        constants = {
            "ROWS": tile.rows,
            "TOKENS": tile.tokens,
            "DEPTH": tile.depth,
            "STAGES": tile.stages,
            **options(tile, x),
        }
        if tile.registers is not None:
            constants["maxnreg"] = tile.registers
        with on_device(x):
            if few:
                # Of the groups, as few as possible, all have the same number of step sizes.
                K = triton.cdiv(num_steps, groups)
                _few_tokens_kernel[programs](sums, sums.stride(0), *inputs, *sizes, shared, K, blocks, **constants)
            else:
                _many_tokens_kernel[programs](sums, sums.stride(0), *inputs, *sizes, is_hopper(x), **constants)
            if num_parts > 1:
                _sum_parts_kernel[sum_programs](
                    out, sums, sums.stride(0), num_parts, n, BLOCK=config.block, **options(config, x)
                )
        return out

    return launch


def _check(x: Tensor, W: Tensor, D: Tensor, alpha: Tensor) -> int:
    """Refuse operands that do not fit and return K."""
    check_floats(x=x, W=W, D=D)
    check_rows(W=W, D=D)
    arch = architecture(x.device)
    if arch.startswith(_WITHOUT_REGISTERS):
        raise ValueError(
            f"linear must run on a GPU whose registers its tiles fit, got {arch}; use the torch implementation"
        )
    num_steps = check_alpha(alpha, x)
    if x.dim() != 3 or x.shape[0] not in {1, num_steps} or x.shape[2] != W.shape[1]:
        raise ValueError(
            f"x must have shape [{num_steps} or 1, M, {W.shape[1]}], one input per step size or one for all, got "
            f"{list(x.shape)}; flatten the dimensions between"
        )
    return num_steps


def _tile(few: bool, x: Tensor, W: Tensor, D: Tensor) -> Tile:
    """Return the configuration, which is fixed by the arguments: nothing is timed or tried."""
    if x.dtype == torch.float32:
        return _FEW_FP32 if few else _MANY_FP32
    table = _FEW if few else _MANY
    # Where rows start between addresses of 16 bytes, tiles pass through registers on their way to shared memory.
    numbers = [x.shape[2]]
    for operand in (x, W, D):
        rows = zip(operand.stride()[:-1], operand.shape, strict=False)
        numbers += [operand.data_ptr(), *(stride for stride, size in rows if size > 1)]
    table = table[-1:] if any(number % 16 for number in numbers) else table
    return choose(table, W.device, W.element_size(), x.shape[1])


def _parts(tiles: int, num_columns: int, tile: Tile) -> tuple[int, int]:
    """Return among how many programs the columns of a tile are divided, and how many each takes: whole depths."""
    room = triton.cdiv(tile.programs, max(1, tiles))
    columns = triton.cdiv(num_columns, max(1, min(room, num_columns // _MIN_COLUMNS)))
    columns = max(1, triton.cdiv(columns, tile.depth)) * tile.depth
    return max(1, triton.cdiv(num_columns, columns)), columns
