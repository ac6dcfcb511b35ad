"""The loss of a mix of several data sources at given shares, of the same samples whenever it is asked for."""

import math
import operator
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

Shares = tuple[float, ...]
Ratio = float | Sequence[float] | Mapping[str, float]

_SUM_TOLERANCE = 1e-6


def positive_int(name: str, value: Any) -> int:
    """Return a count as an int."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}; leave it out for the default")
    return operator.index(value)


class MixSampler:
    """Gives the losses of mixed batches.

    The samples of a source come in an order that depends on the seed, the repeat and the number of the batch, and a
    share takes the first of them: batches of two mixes have as many samples in common as can be.

    Attributes:
        sources: as given.
        batch_size: as given.
    """

    def __init__(
        self,
        sources: Mapping[str, Any],
        batch_loss: Callable[[Any], Tensor] | None,
        batch_size: int,
        seed: int,
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        if not isinstance(sources, Mapping):
            raise TypeError(f"mix must map names to samples, got {type(sources).__name__}; pass {{'name': samples}}")
        if len(sources) < 2:
            raise ValueError(f"mix must hold at least two sources, got {len(sources)}; pass {{'old': …, 'new': …}}")
        self._of_losses = all(callable(source) and not hasattr(source, "__getitem__") for source in sources.values())
        for name, source in sources.items():
            if self._of_losses:
                continue
            indexed = hasattr(source, "__len__") and hasattr(source, "__getitem__")
            if not indexed or isinstance(source, (str, Mapping)):
                raise TypeError(
                    f"source {name!r} must have a length and an index, as a tensor of samples or a Dataset has, got "
                    f"{type(source).__name__}; make a list of its samples, or pass a closure for every source"
                )
            if not len(source):
                raise ValueError(f"source {name!r} must hold samples, got none; check where it was read from")
        if batch_loss is None and not self._of_losses:
            raise TypeError("batch_loss must be a function of a batch where data is given, got None; pass one")
        self.sources = dict(sources)
        self._batch_loss = batch_loss
        self.batch_size, self._seed, self._collate = positive_int("batch_size", batch_size), seed, collate

    def shares(self, ratio: Ratio) -> Shares:
        """Return the share of every source."""
        names = list(self.sources)
        if isinstance(ratio, Mapping):
            unknown = set(ratio) - set(names)
            if unknown:
                raise ValueError(f"ratios must name sources of {names}, got {sorted(unknown)} besides; leave those out")
            values = [ratio.get(name, 0.0) for name in names]
        elif isinstance(ratio, Sequence) and not isinstance(ratio, str):
            values = list(ratio)
        elif hasattr(ratio, "__float__") and not isinstance(ratio, bool):
            if len(names) != 2:
                raise ValueError(
                    f"a ratio of {len(names)} sources must hold the share of each, got the number {ratio}; pass "
                    f"{{{', '.join(f'{name!r}: …' for name in names)}}}"
                )
            # Not 0.19999999999999996.
            values = [float(ratio), round(1 - float(ratio), 12)]
        else:
            raise TypeError(f"a ratio must be a number in [0, 1] or the shares of all sources, got {ratio!r}")
        return self._checked(ratio, [float(value) for value in values])

    def _checked(self, ratio: Ratio, values: list[float]) -> Shares:
        names = list(self.sources)
        if len(values) != len(names):
            raise ValueError(f"a ratio must hold one share for each of {names}, got {ratio}; pass them by name")
        if not all(0 <= value <= 1 for value in values):
            raise ValueError(f"a ratio must be within [0, 1], got {ratio}; shares are parts of 1")
        if abs(math.fsum(values) - 1) > _SUM_TOLERANCE:
            raise ValueError(
                f"the shares of a ratio must add up to 1, got {ratio}; divide them by {math.fsum(values):g}"
            )
        shares = tuple(values)
        if self._of_losses:
            return shares
        for name, share, count in zip(names, shares, self._counts(shares), strict=True):
            if share and not count:
                raise ValueError(
                    f"a share of {share:g} of {name!r} must be at least one sample of a batch, got a batch_size of "
                    f"{self.batch_size}; raise batch_size"
                )
            if count > len(self.sources[name]):
                raise ValueError(
                    f"source {name!r} must hold at least the {count} samples of one batch at a share of {share:g}, got "
                    f"{len(self.sources[name])}; lower batch_size, or pass more data"
                )
        return shares

    def loss(self, shares: Shares, repeat: int, number: int) -> Tensor:
        """Return the loss of a mixed batch."""
        if self._batch_loss is None or self._of_losses:
            terms = [share * source() for share, source in zip(shares, self.sources.values(), strict=True) if share]
            return torch.stack(terms).sum()
        return self._batch_loss(self.batch(shares, repeat, number))

    def batch(self, shares: Shares, repeat: int, number: int) -> Any:
        """Draw a batch."""
        picked = []
        for (name, source), count in zip(self.sources.items(), self._counts(shares), strict=True):
            order = random.Random(f"{self._seed}/{repeat}/{number}/{name}")
            picked.append((source, order.sample(range(len(source)), min(len(source), self.batch_size))[:count]))
        if all(isinstance(source, Tensor) for source, _ in picked):
            return torch.cat([source[rows] for source, rows in picked])
        return self._collate([source[row] for source, rows in picked for row in rows])

    def _counts(self, shares: Shares) -> list[int]:
        """Return samples per source: rounded down, the rest by largest remainders, of equal ones to small shares."""
        exact = [share * self.batch_size for share in shares]
        # A share such as 0.29 of 100 is a little below 29.
        counts = [math.floor(value + 1e-9) for value in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: (round(counts[i] - exact[i], 9), exact[i]))
        for i in by_remainder[: self.batch_size - sum(counts)]:
            counts[i] += 1
        return counts
