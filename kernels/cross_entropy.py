"""Language-model head and cross-entropy in one pass over the vocabulary, with perturbed weights and without the logits.

loss[k] = Σ_t (log Σ_v exp z_tv − z_t,label) / number of labels,   z = hidden[k] (W + α_k D)ᵀ

The vocabulary is taken in chunks of 4096 rows: one chunk of W + α_k D is formed, one matrix product gives its logits in
fp32, and one kernel carries each token's maximum, sum of exponentials and label's logit on. A logits chunk is written
by the product and read once: 8 bytes per token and vocabulary entry instead of the 12 to 24 of stock operations, and
0.1 GB of extra memory where all logits would take gigabytes. Chunks combine in a fixed order, tokens add up in fp64.

Source: Milakov and Gimelshein 2018 (online normaliser of softmax); Kalra et al. 2026, Def. 2.1.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Case, Config, choose, load_tile, on_device, options, perturbed, store_tile
from ._operands import check_alpha, check_device, check_floats, check_layout

VOCABULARY_CHUNK = 4096

_FORM_CONFIGS = (Case(None, None, None, Config(block=2048, threads=256)),)
_UPDATE_CONFIGS = (Case(None, None, None, Config(block=VOCABULARY_CHUNK, threads=256)),)

# Products of 16-bit matrices with an fp32 result: torch 2.8 and later, with CUDA.
_HAS_WIDE_PRODUCT = torch.version.hip is None and "dtype_out" in torch.ops.aten.mm.overloads()


@triton.jit(do_not_specialize=["k"])
def _form_chunk_kernel(out, W, D, alpha, k, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    offsets = pid * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    w = load_tile(W + offsets, inside, True)
    if D is not None:
        w = perturbed(w, load_tile(D + offsets, inside, True), tl.load(alpha + k))
    store_tile(out + offsets, w, inside, True)


@triton.jit
def _capped(z, SOFTCAP: tl.constexpr):
    """Return c·tanh(z/c), or z without a cap."""
    if SOFTCAP is not None:
        z = SOFTCAP * (1.0 - 2.0 / (1.0 + tl.exp(z * (2.0 / SOFTCAP))))
    return z


@triton.jit
def _update_kernel(maximum, total, target, logits, labels, first, width, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    logits += pid * width
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


@torch.no_grad()
def linear_cross_entropy(
    hidden: Tensor,
    W: Tensor,
    D: Tensor | None,
    labels: Tensor,
    alpha: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    softcap: float | None = None,
) -> Tensor:
    """Return the cross-entropy of hidden[k] (W + α_k D)ᵀ with the labels, for K step sizes.

    Args:
        hidden: last hidden states, one set per step size, [K, T, C], float32, float16 or bfloat16, CUDA.
        W: weight of the head, [V, C], contiguous, any of the three dtypes; the perturbed chunk is rounded to
            ``hidden.dtype`` for the product.
        D: its direction, likewise; None if the head does not move.
        labels: [T] int64 or int32, already shifted.
        alpha: signed step sizes, [K] float32, K ≤ 16.
        ignore_index: label of tokens that do not count.
        reduction: "mean" over the tokens that count, or "sum".
        softcap: c of the cap c·tanh(z/c) on the logits, or None.

    Returns:
        Tensor: [K] float64, without gradient; NaN where a label that counts is outside [0, V), or no token counts
        and the mean is asked for.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a device, shape, stride, reduction or softcap does not fit.

    Memory:
        4096 C elements of ``hidden.dtype``, 4096 T of fp32 and 3 T of fp32. Before torch 2.8, and with HIP, 16-bit
        products need the chunk and the hidden states of one step size in fp32 as well, and run at fp32 speed.

    Determinism:
        Chunks combine in a fixed order without atomics: the same bits on every run if the matrix product gives them.
    """
    num_steps = _check(hidden, W, D, labels, alpha, reduction, softcap)
    (num_tokens, _), num_rows = hidden.shape[1:], len(W)
    labels = labels.contiguous()
    counted = labels != ignore_index
    height = min(VOCABULARY_CHUNK, num_rows)
    chunk = torch.empty(height, W.shape[1], dtype=hidden.dtype, device=W.device)
    memory = torch.empty(num_tokens * height, dtype=torch.float32, device=W.device)
    losses = torch.zeros(num_steps, dtype=torch.float64, device=W.device)
    for k in range(num_steps if num_tokens else 0):
        maximum = torch.full((num_tokens,), -torch.inf, dtype=torch.float32, device=W.device)
        total = torch.zeros(num_tokens, dtype=torch.float32, device=W.device)
        # A label that no chunk contains leaves NaN.
        target = torch.full((num_tokens,), torch.nan, dtype=torch.float32, device=W.device)
        for first in range(0, num_rows, height):
            rows = slice(first, min(first + height, num_rows))
            weight = _form_chunk(chunk[: rows.stop - first], W[rows], None if D is None else D[rows], alpha, k)
            logits = _product(hidden[k], weight, memory[: num_tokens * len(weight)].view(num_tokens, -1))
            _update(maximum, total, target, logits, labels, first, softcap)
        token_losses = maximum.double() + total.double().log() - target.double()
        losses[k] = torch.where(counted, token_losses, 0.0).sum()
    return losses / counted.sum() if reduction == "mean" else losses


def _form_chunk(out: Tensor, W: Tensor, D: Tensor | None, alpha: Tensor, k: int) -> Tensor:
    """Write some rows of W + α_k D, in the dtype of ``out``."""
    config = choose(_FORM_CONFIGS, W, W.numel())
    with on_device(W):
        _form_chunk_kernel[(triton.cdiv(W.numel(), config.block),)](
            out, W, D, alpha, k, W.numel(), BLOCK=config.block, **options(config, W)
        )
    return out


def _product(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Write the logits of one chunk in fp32. Outputs given by name also keep autocast away from the product."""
    if hidden.dtype != torch.float32 and _HAS_WIDE_PRODUCT and hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    return torch.mm(hidden.float(), weight.float().t(), out=out)


def _update(
    maximum: Tensor,
    total: Tensor,
    target: Tensor,
    logits: Tensor,
    labels: Tensor,
    first: int,
    softcap: float | None,
) -> None:
    """Carry the statistics of every token on by one chunk of logits."""
    config = choose(_UPDATE_CONFIGS, logits, logits.numel())
    with on_device(logits):
        _update_kernel[(len(logits),)](
            maximum,
            total,
            target,
            logits,
            labels,
            first,
            logits.shape[1],
            SOFTCAP=softcap,
            BLOCK=config.block,
            **options(config, logits),
        )


def _check(
    hidden: Tensor,
    W: Tensor,
    D: Tensor | None,
    labels: Tensor,
    alpha: Tensor,
    reduction: str,
    softcap: float | None,
) -> int:
    """Refuse what does not fit, and return the number of step sizes.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a device, shape, stride, reduction or softcap does not fit.
    """
    check_floats(hidden=hidden, W=W, D=D)
    check_device(hidden=hidden, labels=labels)
    check_layout(W=W, D=D)
    num_steps = check_alpha(alpha, hidden)
    if W.dim() != 2 or W.shape[0] == 0 or not W.is_contiguous():
        raise ValueError(
            f"W must be a contiguous matrix [vocabulary, hidden size], got shape {list(W.shape)} with strides "
            f"{list(W.stride())}; pass a contiguous copy"
        )
    if hidden.dim() != 3 or hidden.shape[0] != num_steps or hidden.shape[2] != W.shape[1]:
        raise ValueError(
            f"hidden must have shape [{num_steps}, tokens, {W.shape[1]}], got {list(hidden.shape)}; flatten batch and "
            "sequence"
        )
    if labels.shape != hidden.shape[1:2]:
        raise ValueError(
            f"labels must have shape {list(hidden.shape[1:2])}, one per token, got {list(labels.shape)}; flatten and "
            "shift them"
        )
    if labels.dtype not in {torch.int64, torch.int32}:
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}; class probabilities are not supported")
    if reduction not in {"mean", "sum"}:
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}; leave it out for 'mean'")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}; leave it out for none")
    return num_steps
