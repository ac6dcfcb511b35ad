"""Small parameters of a model on a GPU, formed together: a launch of its own would take each longer than its forming.

A launch or two at the first read of one of them in a pass form all. They stay in float32, or in what is wider, and must
be consumed at once, as a norm or an elementwise operation does: the next pass has the same memory.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor

from sharpkern import ops
from sharpkern.engines.batched.vmap import outside_vmap
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
            if (
                pair.weight.dim() == 1
                and pair.weight.numel() <= _SMALL
                and pair.weight.is_contiguous()
                and ops.has_kernels(move.base.device)
            ):
                alike.setdefault((move.base.device, move.wide, kind_of(move)), []).append(pair)
        for members in alike.values():
            if members[0].move.wide == torch.float32 and len(members) > 1:
                group = _Group(members)
                self._groups |= dict.fromkeys((id(pair) for pair in members), group)

    def begin(self) -> None:
        """Start a pass."""
        for group in set(self._groups.values()):
            group.begin()

    def formed(self, pair: TrackedParam, step: Step) -> Tensor | None:
        """θ + αΔθ of a parameter, or None where it is not one of them; not to be kept, nor to be written."""
        group = self._groups.get(id(pair))
        if group is None or not group.can_form(step):
            return None
        if not step.is_several:
            return group.formed(1, lambda: [step.on(pair.weight.device)])[id(pair)][0]

        def of_all(alpha: Tensor) -> Tensor:
            def each() -> Sequence[Tensor]:
                # Each from an address of 16 bytes on, as that of one step.
                steps = alpha.new_zeros(len(alpha), _LINE, dtype=torch.float32)
                steps[:, 0] = alpha
                return steps[:, :1].unbind()

            return group.formed(alpha.numel(), each)[id(pair)]

        def rule(num_steps: int, several: Sequence[bool], tensors: Sequence[Tensor]) -> Tensor:
            return of_all(tensors[0].flatten())

        return outside_vmap(of_all, rule, step.of(pair.move))

    def update(self, pair: TrackedParam) -> Tensor:
        """Δθ of a parameter, worked out once; not to be written."""
        group = self._groups.get(id(pair))
        found = None if group is None else group.updates().get(id(pair))
        return pair.move.update() if found is None else found


class _Group:
    """Parameters that one launch forms for a step."""

    def __init__(self, pairs: Sequence[TrackedParam]) -> None:
        self._pairs = pairs
        self._moves = [pair.move for pair in pairs]
        self._places: list[int] = []
        # By the stream that they are formed on and the number of steps.
        self._memory: dict[tuple[int, int], tuple[dict[int, Tensor], list[Callable[..., object]]]] = {}
        self._formed_on: set[tuple[int, int]] = set()
        self._able: bool | None = None
        self._updates: dict[int, Tensor] | None = None

    def can_form(self, step: Step) -> bool:
        """Whether a kernel takes them."""
        if self._able is None:
            device = self._moves[0].base.device
            written = [outputs[0] for outputs in self._new_memory(1).values()]
            self._able = prepared_together(self._moves, written, torch.zeros(1, device=device)) is not None
        return self._able and bool(step)

    def formed(self, num_steps: int, make_alphas: Callable[[], Sequence[Tensor]]) -> dict[int, Tensor]:
        """θ + α_k Δθ, [K, *shape], by the pairs' identity."""
        key = (stream_of(self._moves[0].base.device), num_steps)
        if key in self._formed_on:
            return self._memory[key][0]
        places = [move.base.data_ptr() for move in self._moves]
        if places != self._places:
            # A closure may have given them other memory, as a flattened LSTM does.
            self._places, self._memory = places, {}
        alphas = make_alphas()
        if key not in self._memory:
            outputs = self._new_memory(num_steps)
            launches = [
                prepared_together(self._moves, [output[k] for output in outputs.values()], alpha)
                for k, alpha in enumerate(alphas)
            ]
            self._memory[key] = outputs, [launch for launch in launches if launch is not None]
        outputs, ready = self._memory[key]
        for launch, alpha in zip(ready, alphas, strict=True):
            launch(alpha=alpha)
        self._formed_on.add(key)
        return outputs

    def begin(self) -> None:
        """Forget what was formed."""
        self._formed_on = set()

    def updates(self) -> dict[int, Tensor]:
        """Δθ by the pairs' identity, empty where no kernel works it out."""
        if self._updates is None:
            self._updates = {}
            if all(isinstance(move, LazyUpdate) for move in self._moves):
                outputs = {pair: output[0] for pair, output in self._new_memory(1).items()}
                launch = prepared_together(self._moves, list(outputs.values()), None)
                if launch is not None:
                    launch()
                    self._updates = outputs
        return self._updates

    def _new_memory(self, num_steps: int) -> dict[int, Tensor]:
        """Memory for all of them and some steps, each from an address of 16 bytes on."""
        sizes = [-(-pair.weight.numel() // _LINE) * _LINE for pair in self._pairs]
        memory = torch.empty(num_steps, sum(sizes), dtype=torch.float32, device=self._moves[0].base.device)
        return {
            id(pair): part[:, : pair.weight.numel()]
            for pair, part in zip(self._pairs, memory.split(sizes, dim=1), strict=True)
        }
