"""Cross-entropy of logits that never exist as a whole: each token's statistics, carried on chunk by chunk.

loss_t = m + log s − z_label,   m = max_v z_tv,   s = Σ_v exp(z_tv − m)

A chunk of logits is read once and not kept: m and s of all logits so far follow from those before it and the chunk's
own. 4 bytes move per logit. Logits of a soft-capped model are capped here, c·tanh(z/c), in fp32.

One program takes the chunk of one token in one block: 4096 logits in 256 threads, 16 each in four 16-byte loads; 1024
in 128 threads where the chunk is no wider. A narrow last chunk of a large vocabulary leaves lanes masked. They cost
neither memory traffic nor a further compiled kernel, and one chunk of many: a block fitted to each width would be worth
less than its compilation.

Source: Milakov and Gimelshein 2018 (online normaliser of softmax).
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._accepts import check_device, check_no_overlap
from ._launch import Case, Config, Launcher, choose, grid, on_device, options

# The widest chunk: 16 logits in each of 256 threads.
MAX_WIDTH = 4096

# Bounded by the width of a chunk, which one block holds.
_CONFIGS = (
    Case(None, None, 1025, Config(block=1024, threads=128)),
    Case(None, None, None, Config(block=MAX_WIDTH, threads=256)),
)


@triton.jit
def _capped(z, SOFTCAP: tl.constexpr):
    """Return c·tanh(z/c), or z without a cap."""
    if SOFTCAP is not None:
        z = SOFTCAP * (1.0 - 2.0 / (1.0 + tl.exp(z * (2.0 / SOFTCAP))))
    return z


# Labels are read one by one, and begin anywhere: they are shifted against the tokens.
@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["labels"])
def _online_cross_entropy_kernel(
    maximum, total, target, logits, logits_stride, labels, first, width, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):
    pid = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    logits += pid * logits_stride
    z = tl.load(logits + columns, mask=columns < width, other=float("-inf"))
    z = tl.where(columns < width, _capped(z, SOFTCAP), float("-inf"))

    before = tl.load(maximum + pid)
    after = tl.maximum(before, tl.max(z))
    # Where every logit so far is −inf there is nothing to shift by, and −inf − (−inf) would be NaN.
    shift = tl.where(after == float("-inf"), 0.0, after)
    total_before = tl.load(total + pid)
    tl.store(total + pid, tl.fma(total_before, tl.exp(before - shift), tl.sum(tl.exp(z - shift))))
    tl.store(maximum + pid, after)

    label = tl.load(labels + pid).to(tl.int64) - first
    if (label >= 0) & (label < width):
        tl.store(target + pid, _capped(tl.load(logits + label), SOFTCAP))


@Launcher
def online_cross_entropy_(
    maximum: Tensor,
    total: Tensor,
    target: Tensor,
    logits: Tensor,
    labels: Tensor,
    first: int,
    *,
    softcap: float | None = None,
) -> Callable[[], None]:
    """Launch `sharpkern.ops.online_cross_entropy_`."""
    _check(maximum, total, target, logits, labels, first, softcap)
    num_tokens, width = logits.shape
    config = choose(_CONFIGS, logits.device, logits.element_size(), width)
    programs = grid(num_tokens, config)

    def launch() -> None:
        if logits.numel() == 0:
            return
        with on_device(logits):
            _online_cross_entropy_kernel[programs](
                maximum,
                total,
                target,
                logits,
                logits.stride(0),
                labels,
                first,
                width,
                SOFTCAP=softcap,
                BLOCK=config.block,
                **options(config, logits),
            )
        torch.autograd.graph.increment_version([maximum, total, target])

    return launch


def _check(
    maximum: Tensor, total: Tensor, target: Tensor, logits: Tensor, labels: Tensor, first: int, softcap: float | None
) -> None:
    """Refuse what does not fit."""
    statistics = {"maximum": maximum, "total": total, "target": target}
    check_device(logits=logits, labels=labels, **statistics)
    for name, tensor in (("logits", logits), *statistics.items()):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {tensor.dtype}; sums of exponentials need the digits")
    if labels.dtype not in {torch.int64, torch.int32}:
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}; class probabilities are not supported")
    if logits.dim() != 2 or logits.shape[1] > MAX_WIDTH or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(
            f"logits must be a matrix [tokens, at most {MAX_WIDTH}] with the elements of a row next to each other, got "
            f"shape {list(logits.shape)} with strides {list(logits.stride())}; call once per part of the vocabulary"
        )
    for name, tensor in (("labels", labels), *statistics.items()):
        if tensor.shape != logits.shape[:1] or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous vector of one number per token, {logits.shape[0]}, got shape "
                f"{list(tensor.shape)} with strides {list(tensor.stride())}; flatten it"
            )
    check_no_overlap(list(statistics.values()), [logits, labels])
    if first < 0:
        raise ValueError(f"first must not be negative, got {first}; pass the vocabulary row of the chunk's column 0")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be positive and finite, got {softcap}; leave it out for none")
