"""What ranks that nothing tells of are to each other, judged by what each says of itself; see `settling`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sharpkern.distributed.ranks import KINDS

_GRADIENTS = (
    "the ranks hold the same weights, and no gradients tell whether they train one model: each takes its own loss; "
    "measure after the backward pass, where the gradients of all ranks have been averaged, for the mean over ranks"
)
_OTHER_PLANS = (
    "ranks that train one model must measure alike, got other quantities, options or learning rates; call the same "
    "function with the same arguments on all ranks"
)
# Weights of data-parallel ranks are equal to the bit; those of others may differ by very little at first.
_SAME_WEIGHTS = 1e-8
_SAME = 1e-6


@dataclass(frozen=True)
class Facts:
    """What a rank says of itself.

    Attributes:
        theta_sq: |θ|² of what moves.
        along: θᵀΔθ.
        norm_sq: |Δθ|².
        loss: L(θ), reduced where there is a function for it; None where ranks were found to train one model before.
        plan: what is measured and how, the learning rate included.
        is_update: Δθ is one, and not the gradient that happens to be there.
        talks: its closure talks to other ranks, or that function does, or changes the loss.
        reduces: there is one.
    """

    theta_sq: float
    along: float
    norm_sq: float
    loss: float | None
    plan: str
    is_update: bool = True
    talks: bool = False
    reduces: bool = False

    def holds_as(self, other: "Facts") -> bool:
        """Whether both hold the same weights."""
        return _near(self.theta_sq, other.theta_sq, _SAME_WEIGHTS)

    def plans_as(self, other: "Facts") -> bool:
        """Whether both measure the same, with the same learning rate."""
        return self.plan == other.plan

    def moves_as(self, other: "Facts") -> bool:
        """Whether both would make the same update: Adam's first ones are all of one length."""
        reach = math.sqrt(self.theta_sq * self.norm_sq)
        return _near(self.norm_sq, other.norm_sq) and _near(self.along, other.along, within=_SAME * reach)

    def loses_as(self, other: "Facts") -> bool:
        """Whether both are known to have the same loss."""
        return self is other or (self.loss is not None and other.loss is not None and _near(self.loss, other.loss))


def _near(a: float, b: float, rel: float = _SAME, within: float = 0.0) -> bool:
    return math.isclose(a, b, rel_tol=rel, abs_tol=within) or (math.isnan(a) and math.isnan(b))


def judged(said: Sequence[Mapping[str, Any]], size: int) -> Mapping[str, Any]:
    """Judge what the ranks have said; see the table above."""
    failures = [sum(one.get("failure") == kind for one in said) for kind in KINDS]
    if any(failures[1:]):
        return {"failures": failures}
    if all("ready" in one for one in said) and len(said) == size:
        return {"ready": True} | decided(None)
    ranks = [Facts(**one) for one in said if "loss" in one]
    if any(one.reduces for one in ranks):
        return _judged_by_loss([one for one in ranks if one.talks])
    if len(ranks) < size:
        # Those that were together may be so again, and those without an update have one the next time.
        too_few = missed(len(said) - failures[0], size)
        if any(one.loss is None for one in ranks):
            return too_few | decided(None)
        return decided(None) if failures[0] else too_few
    groups = _grouped(ranks, Facts.holds_as)
    if len(groups) > 1 and any(one.talks for one in ranks):
        return {"error": _split(ranks)}
    for group in groups:
        first = group[0]
        if all(map(first.loses_as, group)):
            continue
        if not all(map(first.plans_as, group)):
            if first.loss is None:
                return {"error": _OTHER_PLANS}
            continue
        alike = all(map(first.moves_as, group))
        if not first.is_update and not (alike and first.norm_sq):
            return {**decided(None), "warning": _GRADIENTS}
        if not alike:
            return {"error": _unlike(group)}
        if len(groups) > 1:
            return {
                "error": f"model must say which ranks it is trained on, got {len(group)} of {len(ranks)} ranks with "
                "the same weights and update; measure the DistributedDataParallel around it, or pass "
                "ranks=sharpkern.Ranks(group) with the process group of these ranks"
            }
        return decided(together=True, mean=True)
    if len(groups) > 1:
        return decided(together=False)
    # At their first step ranks may be the same, or have the same loss by the way their weights are drawn.
    first = ranks[0]
    return decided(None, mean=all(first.moves_as(one) and first.plans_as(one) for one in ranks))


def _judged_by_loss(ranks: Sequence[Facts]) -> Mapping[str, Any]:
    """Judge ranks whose losses are reduced."""
    groups = _grouped(ranks, Facts.loses_as)
    for group in groups:
        first = group[0]
        if not all(first.moves_as(one) and first.plans_as(one) for one in group):
            return {"error": _unlike(group) if all(map(first.holds_as, group)) else _split(group)}
    if len(groups) > 1 and any(len(group) == 1 for group in groups):
        losses = [one.loss for one in ranks if one.loss is not None]
        return {
            "error": f"reduce must return the same loss on all ranks that work together, got {_span(losses)}; return "
            "what all of them see, such as an all-reduce does"
        }
    return decided(None)


def _grouped(ranks: Sequence[Facts], alike: Callable[[Facts, Facts], bool]) -> list[list[Facts]]:
    groups: list[list[Facts]] = []
    for one in ranks:
        group = next((group for group in groups if alike(group[0], one)), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    return groups


def decided(together: bool | None, *, mean: bool = False) -> dict[str, Any]:
    """A verdict: whether ranks train one model, as far as it is known, and whether to take their mean now."""
    return {"together": together, "mean": mean}


def missed(num_here: int, size: int) -> dict[str, Any]:
    """The verdict on ranks that not all have come."""
    return {
        **decided(together=False),
        "warning": f"{num_here} of {size} ranks measure, so that the ranks could not be compared: each takes "
        "its own loss; let all ranks measure where they train one model together",
    }


def _unlike(ranks: Sequence[Facts]) -> str:
    return (
        f"direction must be the same on every rank, got |Δθ|² = {_span([one.norm_sq for one in ranks])} for the same "
        "weights; measure where the gradients of all ranks have been averaged, or pass ranks='alone' where each rank "
        "trains a model of its own"
    )


def _split(ranks: Sequence[Facts]) -> str:
    return (
        f"model must be whole on every rank, got |θ|² = {_span([one.theta_sq for one in ranks])} on ranks whose losses "
        "depend on each other; where it is split over them (pipeline, tensor or expert parallelism by hand), pass "
        "ranks=sharpkern.Ranks(split=group), or split=a function of the parameter, so that slopes and norms are summed"
    )


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.6g} to {max(values):.6g}"
