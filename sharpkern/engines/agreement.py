"""What steers a search, made one on all ranks: slope, norm and learning rate of the direction, and the base loss."""

import math
from dataclasses import replace
from typing import Any

import torch

from sharpkern.distributed.ranks import Peers
from sharpkern.errors import NoUpdateError


def agreed(
    ranks: Peers, direction: Any, known_base: float | None, *, is_part: bool = False
) -> tuple[Any, float | None]:
    """What steers the search, the same on every rank to the last bit."""
    slope, norm_sq = direction.slope, direction.norm_sq
    if ranks.splits:
        slope, norm_sq = _totals(ranks, direction, is_part=is_part)
    own = [slope, norm_sq, direction.lr, known_base]
    missing = [float(number is None) for number in own]
    sums = ranks.means([0.0 if number is None else number for number in own] + missing)
    lacking = sums[len(own) :]
    # Of the ranks that know it: a stage without a loss has no base loss, one that does not move has no learning rate.
    slope, mean_sq, lr, base = (None if no == 1 else one / (1 - no) for one, no in zip(sums, lacking, strict=False))
    assert mean_sq is not None
    unlike = (ranks.alike and lacking != missing) or not math.isclose(norm_sq, mean_sq, rel_tol=1e-3)
    if any(ranks.any_of([unlike])):
        raise ValueError(
            f"direction must be the same on every rank, got |Δθ|² = {norm_sq:.6g} here and {mean_sq:.6g} on "
            "average; measure where the gradients of all ranks have been averaged: not inside of no_sync(), and with "
            "the same arguments on every rank"
        )
    if (
        ranks.splits
        and ranks.any_of([direction.lr is not None and not math.isclose(direction.lr, lr or 0.0, rel_tol=1e-6)])[0]
    ):
        raise ValueError(
            f"direction must be per unit of the same learning rate on every rank, got {direction.lr} here; give the "
            "first group of each rank's optimizer the same rate"
        )
    if base is not None:
        # By the way that losses take, which may be the caller's own.
        device = next((parameter.device for parameter in direction.parameters), torch.device("cpu"))
        loss = None if known_base is None else torch.tensor(known_base, dtype=torch.float64, device=device)
        base = ranks.agree(loss).loss
    share = {"_is_share": True} if ranks.splits else {}
    return replace(direction, slope=slope, norm_sq=mean_sq, lr=lr, **share), base


def _totals(ranks: Peers, direction: Any, *, is_part: bool) -> tuple[float | None, float]:
    """Slope and |Δθ|² of all pieces of the model, of which this rank's direction knows its own."""
    shares = direction.shares()
    rows = [(slope, norm_sq) for _, slope, norm_sq in shares]
    # A piece that does not move leaves the slope to the others.
    unknown = direction.slope is None and bool(shares)
    slope, norm_sq = ranks.totals([piece for piece, *_ in shares], rows, 2)
    unknown, falls = ranks.any_of([unknown, any(share for _, share, _ in shares)])
    if not norm_sq or not (is_part or unknown or falls):
        raise NoUpdateError(
            "direction must move some parameter, got all zeros, or gradients of zero, on all ranks: measure between "
            "backward() and zero_grad(), and check that the loss depends on the parameters"
        )
    return None if unknown else slope, norm_sq
