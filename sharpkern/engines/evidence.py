"""What one measurement after the other says about whether a closure's loss is the one whose gradient there is.

A single comparison has to let pass what rounding, curvature or dropout masks may explain. A mistake in the loop is made
every time: several comparisons together show it where each one alone would not.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

# Comparisons that are looked at together.
_WINDOW = 16
# Comparisons that must agree before the loss that was trained takes the place of an evaluated one, and how often it is
# compared after that.
_FIRST, _EVERY = 3, 20
# Differences this many times as large as masks explain are worth another comparison.
_STANDS_OUT = 3.0
# Log of the product of all differences, each divided by what masks explain, that a right closure does not reach: of
# normal losses 2 runs of 10 000 do, each of 40 comparisons.
_ODDS = 11.0
# Relative spread of ratios that are one ratio, and how far from 1 that is for a mistake of scale.
_ALIKE, _SCALED = 0.01, 0.2
# The loss falls by less than this share of what the gradient says, where curvature and noise cannot be the reason.
LEAST_CERTAIN_RATIO = 0.95
# So many times; once it did, so many more measurements are looked at.
_LOW, _LATELY = 3, 8


class Comparison(NamedTuple):
    """Losses that are compared at the same parameters.

    Attributes:
        trained: the loss that was trained.
        evaluated: the closure's.
        other: the closure's with other random numbers, the same where it draws none.
        tolerance: relative difference that arithmetic explains.
        scale: what differences are relative to.
    """

    trained: float
    evaluated: float
    other: float
    tolerance: float
    scale: float

    @property
    def difference(self) -> float:
        """Between the two."""
        return abs(self.trained - self.evaluated) / self.scale

    @property
    def explained(self) -> float:
        """What masks or arithmetic explain of it."""
        return max(abs(self.other - self.evaluated) / self.scale, self.tolerance / 2)


@dataclass
class TrainedLoss:
    """Compares the loss that was trained with what the closure returns at the same parameters.

    A right closure that draws no random numbers returns the same, but for rounding. One with dropout returns a loss of
    other masks: it differs from the trained one as much as from itself with yet other masks.

    Attributes:
        num: measurements that were handed a loss.
        num_same: comparisons in a row that found the same number.
        comparisons: the last ones.
        stands_out: the last difference was larger than masks explain.
        told: the user was warned.
    """

    num: int = 0
    num_same: int = 0
    comparisons: deque[Comparison] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    stands_out: bool = False
    told: bool = False

    @property
    def is_due(self) -> bool:
        """Whether this is one of the measurements that compare: the first three and every twentieth."""
        return self.num < _FIRST or (self.num + 1) % _EVERY == 0

    @property
    def is_known(self) -> bool:
        """Whether the loss that was trained may take the place of an evaluated one."""
        return self.num_same >= _FIRST and not self.is_due

    @property
    def needs_other_masks(self) -> bool:
        """Whether a closure that draws random numbers is to be evaluated with other ones too."""
        return not self.told and (self.is_due or self.stands_out)

    def note(
        self, trained: float, evaluated: float, other: float | None, tolerance: float, scale: float, *, same: bool
    ) -> None:
        """Enter a comparison."""
        self.num_same = self.num_same + 1 if same else 0
        # The same masks again, as where nothing was trained in between, are no further evidence.
        again = other != evaluated and bool(self.comparisons) and self.comparisons[-1][:2] == (trained, evaluated)
        if other is not None and not again:
            self.comparisons.append(Comparison(trained, evaluated, other, tolerance, scale))
        self.stands_out = abs(trained - evaluated) / scale > _STANDS_OUT * self._explained

    @property
    def _explained(self) -> float:
        """What masks or arithmetic explain, root mean square."""
        return _rms([one.explained for one in self.comparisons]) if self.comparisons else math.inf

    @property
    def differs(self) -> bool:
        """Whether the differences are more than chance, over at least three comparisons."""
        odds = [math.log(max(one.difference, 1e-12) / self._explained) for one in self.comparisons]
        return len(odds) >= _FIRST and sum(odds) > _ODDS

    @property
    def factor(self) -> float | None:
        """Trained loss over the closure's where that is one number other than 1 every time, otherwise None."""
        if any(one.evaluated == 0 for one in self.comparisons):
            return None
        ratios = [one.trained / one.evaluated for one in self.comparisons]
        middle = median(ratios)
        masks = _rms([one.other / one.evaluated - 1 for one in self.comparisons])
        slack = (_ALIKE + _STANDS_OUT * masks) * abs(middle)
        alike = all(abs(ratio - middle) <= slack for ratio in ratios)
        return middle if alike and abs(middle - 1) > max(_SCALED, slack) else None

    def told_as(self, *, in_eval_mode: bool) -> str:
        """Say what was seen, the likely mistake, and what mends it."""
        self.told = True
        factor, last = self.factor, self.comparisons[-1]
        if factor is not None:
            return (
                f"the loss that was handed over is {_times(factor)} what loss_fn returns, at each of the last "
                f"{len(self.comparisons)} comparisons: both must be the loss whose gradient the parameters hold. With "
                "gradient accumulation add up what backward() is called on, `total += loss.item()`, keep the "
                "micro-batches, `batches.append(batch)`, and call `monitor(lambda: sum(map(loss_of, batches)) / "
                "len(batches), loss=total)`; with a GradScaler hand over the loss before scaler.scale(loss)"
            )
        seen = (
            f"loss_fn returns another loss than the one that was trained, by "
            f"{median(one.difference for one in self.comparisons):.2g} of it in the last {len(self.comparisons)} "
            f"comparisons, now {last.evaluated:.6g} in place of {last.trained:.6g}: "
        )
        if in_eval_mode:
            return seen + (
                "it likely evaluates the model in eval mode, while the gradient is of train mode; call `model.train()` "
                "before the monitor, and leave `model.eval()` out of loss_fn"
            )
        return seen + KEEP_THE_BATCH


# What to do where the closure is of another batch.
KEEP_THE_BATCH = (
    "it likely evaluates another batch than the gradient's. A loop that fetches the next batch before backward() must "
    "keep the one that is trained on: `batch = x, y` before the next is fetched, then "
    "`monitor(lambda: loss_of(*batch), loss=loss)`. With gradient accumulation keep every micro-batch and not the last "
    "alone: `batches.append((x, y))`, then `monitor(lambda: sum(loss_of(*b) for b in batches) / len(batches), "
    "loss=total)`"
)


def _rms(numbers: Sequence[float]) -> float:
    return math.sqrt(sum(number**2 for number in numbers) / len(numbers))


def _times(factor: float) -> str:
    """A factor as people say it."""
    parts = round(1 / factor) if factor else 0
    if parts > 1 and math.isclose(parts * factor, 1, rel_tol=0.02):
        return f"1/{parts} of"
    return f"{factor:.4g} times"


@dataclass
class Slopes:
    """How fast the loss falls along the direction, over what the gradient says, where that is certain.

    It never falls more slowly for the gradient's own batch; faster it may, where gradients are clipped. Another batch,
    or one of several micro-batches, scatters.

    Attributes:
        num: measurements along a direction that a gradient belongs to.
        ratios: the last ones.
        told: the user was warned.
    """

    num: int = 0
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    told: bool = False

    @property
    def is_due(self) -> bool:
        """Whether the slope is to be looked at: in measurements 1, 2, 4, 8 and so on, and after one that was low."""
        lately = list(self.ratios)[-_LATELY:]
        return is_power(self.num + 1) or (not self.told and any(ratio < LEAST_CERTAIN_RATIO for ratio in lately))

    def note(self, ratio: float | None) -> None:
        """Enter a measurement, with a ratio where it is certain."""
        self.num += 1
        if ratio is not None:
            self.ratios.append(ratio)

    @property
    def differ(self) -> bool:
        """Whether several were too low."""
        return sum(ratio < LEAST_CERTAIN_RATIO for ratio in self.ratios) >= _LOW

    def told_as(self) -> str:
        """Say what was seen, the likely mistake, and what mends it."""
        self.told = True
        shown = ", ".join(f"{ratio:.2f}" for ratio in self.ratios)
        return (
            f"the loss falls along the direction by {shown} times what its gradient says, in the last "
            f"{len(self.ratios)} measurements that looked; of the gradient's own loss it is never less than 1: "
            "loss_fn is not the loss whose gradient the parameters hold, and "
            + KEEP_THE_BATCH
            + ". It is harmless where each forward pass changes a state that the next one computes with"
        )


def is_power(number: int) -> bool:
    """Whether a positive number is 1, 2, 4, 8 and so on."""
    return number & (number - 1) == 0
