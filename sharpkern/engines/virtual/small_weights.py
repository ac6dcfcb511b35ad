"""Small parameters of a model on a GPU, formed together: a launch of its own would take each longer than its forming.

A launch or two at the first read of one of them in a pass form all. They stay in float32, or in what is wider, and must
be consumed at once, as a norm or an elementwise operation does: the next pass has the same memory.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor

from sharpkern import ops
from sharpkern.engines.tracked import Step, TrackedParam, stream_of
from sharpkern.ops.together import kind_of, prepared_together
from sharpkern.ops.update import LazyUpdate

# Elements that a small parameter has at most.
_SMALL = 1 << 16

# Launches write 16 bytes at a time.
_LINE = 16


class SmallWeights:
    """θ + αΔθ of the small parameters of a table, for one measurement."""

    def __init__(self, pairs: Iterable[TrackedParam]) -> None:
        self._groups: dict[int, _Group] = {}
        alike: dict[Hashable, list[TrackedParam]] = {}
        for pair in pairs:
            move = pair.move
            if pair.weight.dim() == 1 and pair.weight.numel() <= _SMALL and ops.has_kernels(move.base.device):
                alike.setdefault((move.base.device, move.wide, kind_of(move)), []).append(pair)
        for members in alike.values():
            if members[0].move.wide == torch.float32 and len(members) > 1:
                group = _Group(members)
                self._groups |= dict.fromkeys((id(pair) for pair in members), group)

    def formed(self, pair: TrackedParam, step: Step) -> Tensor | None:
        """θ + αΔθ of a parameter, or None where it is not one of them; not to be kept, nor to be written."""
        group = self._groups.get(id(pair))
        return None if group is None else group.formed(step).get(id(pair))

    def update(self, pair: TrackedParam) -> Tensor:
        """Δθ of a parameter, worked out once; not to be written."""
        group = self._groups.get(id(pair))
        found = None if group is None else group.updates().get(id(pair))
        return pair.move.update() if found is None else found


class _Group:
    """Parameters that one launch forms."""

    def __init__(self, pairs: Sequence[TrackedParam]) -> None:
        self._pairs = pairs
        self._step: Step | None = None
        # By the stream that they are formed on.
        self._launches: dict[int, Callable[..., object] | None] = {}
        self._outputs: dict[int, dict[int, Tensor]] = {}
        self._formed_on: set[int] = set()
        self._places: list[int] = []
        self._updates: dict[int, Tensor] | None = None

    def formed(self, step: Step) -> dict[int, Tensor]:
        """θ + αΔθ by the pairs' identity, empty where no kernel forms them."""
        device = self._pairs[0].move.base.device
        stream = stream_of(device)
        if step is not self._step:
            self._step, self._formed_on = step, set()
            places = [pair.move.base.data_ptr() for pair in self._pairs]
            if places != self._places:
                # A closure may have given them other memory, as a flattened LSTM does.
                self._places, self._launches, self._outputs = places, {}, {}
        if stream not in self._formed_on:
            alpha = step.on(device)
            if stream not in self._launches:
                outputs = self._memory()
                moves = [pair.move for pair in self._pairs]
                self._launches[stream] = prepared_together(moves, list(outputs.values()), alpha)
                self._outputs[stream] = {} if self._launches[stream] is None else outputs
            launch = self._launches[stream]
            if launch is not None:
                launch(alpha=alpha)
            self._formed_on.add(stream)
        return self._outputs[stream]

    def updates(self) -> dict[int, Tensor]:
        """Δθ by the pairs' identity."""
        if self._updates is None:
            moves = [pair.move for pair in self._pairs]
            self._updates = {}
            if all(isinstance(move, LazyUpdate) for move in moves):
                outputs = self._memory()
                launch = prepared_together(moves, list(outputs.values()), None)
                if launch is not None:
                    launch()
                    self._updates = outputs
        return self._updates

    def _memory(self) -> dict[int, Tensor]:
        """Memory for all of them, each from an address of 16 bytes on."""
        sizes = [-(-pair.weight.numel() // _LINE) * _LINE for pair in self._pairs]
        device = self._pairs[0].move.base.device
        parts = torch.empty(sum(sizes), dtype=torch.float32, device=device).split(sizes)
        return {
            id(pair): part[: pair.weight.numel()].as_strided(pair.weight.shape, pair.weight.stride())
            for pair, part in zip(self._pairs, parts, strict=True)
        }
