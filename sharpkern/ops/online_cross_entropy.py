"""Cross-entropy of logits that never exist as a whole: each token's statistics, carried on chunk by chunk."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sharpkern.ops import validation
from sharpkern.ops.registry import Backend, operation


@operation("cross_entropy", mutates=("maximum", "total", "target"))
def online_cross_entropy_(
    maximum: Tensor,
    total: Tensor,
    target: Tensor,
    logits: Tensor,
    labels: Tensor,
    first: int,
    *,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> None:
    """Carry every token's softmax statistics on by one chunk of the vocabulary.

    After the last chunk ``maximum + total.log() - target`` is the cross-entropy of each token, NaN where a label is
    outside the vocabulary or a logit is NaN.

    Args:
        maximum: largest logit so far, [T] float32 (float64 by torch alone), −inf at the start; written.
        total: Σ exp(logit − maximum) so far, likewise, 0 at the start; written.
        target: logit of the label, likewise, NaN until its chunk comes by; written.
        logits: of this chunk, [T, v], likewise; nothing happens where v is 0.
        labels: [T], int64 or int32.
        first: which entry of the vocabulary the chunk begins with.
        softcap: c of the cap c·tanh(z/c) on the logits, positive and finite, or None.
        backend: see `sharpkern.ops`.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape, device or number does not fit, or a written tensor overlaps itself or another.

    Memory:
        None on a GPU; with the torch backend up to two more of the chunk.

    Determinism:
        The same bits on every run with the same chunks.
    """
    _check({"maximum": maximum, "total": total, "target": target}, logits, labels, first, softcap)
    if logits.numel() == 0:
        return
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    after = torch.maximum(maximum, z.amax(-1))
    # Where every logit so far is −inf there is nothing to shift by, and −inf − (−inf) would be NaN.
    shift = torch.where(after == -math.inf, 0.0, after)
    total.mul_(torch.exp(maximum - shift)).add_(torch.exp(z - shift.unsqueeze(-1)).sum(-1))
    maximum.copy_(after)
    column = labels.long() - first
    here = (column >= 0) & (column < z.shape[-1])
    chosen = z.gather(-1, torch.where(here, column, 0).unsqueeze(-1)).squeeze(-1)
    target.copy_(torch.where(here, chosen, target))


def _check(statistics: Mapping[str, Tensor], logits: Tensor, labels: Tensor, first: int, softcap: float | None) -> None:
    """Refuse operands that do not fit each other."""
    validation.check_floats(logits=logits, **statistics)
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logits must be float32 or float64, got {logits.dtype}; sums of exponentials need the digits")
    for name, tensor in statistics.items():
        if tensor.dtype != logits.dtype:
            raise TypeError(f"{name} must be {logits.dtype}, as logits are, got {tensor.dtype}; convert one of them")
    validation.check_integers("labels", labels, logits.device, "class probabilities are not supported")
    if logits.dim() != 2:
        raise ValueError(
            f"logits must be a matrix [tokens, columns], got shape {list(logits.shape)}; flatten the tokens"
        )
    for name, tensor in (("labels", labels), *statistics.items()):
        if tensor.shape != logits.shape[:1]:
            raise ValueError(
                f"{name} must be a vector of one number per token, {logits.shape[0]}, got shape {list(tensor.shape)}; "
                "flatten it"
            )
    validation.check_no_overlap(statistics, [logits, labels])
    if first < 0:
        raise ValueError(f"first must not be negative, got {first}; pass the vocabulary row of the chunk's column 0")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be positive and finite, got {softcap}; leave it out for none")
