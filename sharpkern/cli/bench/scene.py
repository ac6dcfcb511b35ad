"""A language model in training: real gradients and an AdamW state, as large as the GPU holds."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product

import torch

import sharpkern
from sharpkern.cli.bench.language_model import LARGE, SMALL, TINY, LanguageModel, Preset
from sharpkern.cli.bench.machine import Machine
from sharpkern.cli.bench.record import Json
from sharpkern.cli.bench.side_by_side import engines

_BETAS = (0.9, 0.95)
_STEPS_TAKEN = 100
# Of the GPU's free memory; the rest is for activations and what the allocator cannot use.
USABLE = 0.93


def presets(machine: Machine, quick: bool) -> Iterator[Preset]:
    """Yield what could be measured on a machine, the best first and the last without regard to memory."""
    if not machine.is_gpu:
        yield TINY if quick else SMALL
        return
    for preset, moments in product(LARGE, (torch.float32, torch.bfloat16)):
        yield replace(preset, moments=moments)


def fitting(machine: Machine, quick: bool) -> Preset:
    """Return the largest preset that fits the memory that is free; on a CPU one of two, by ``quick``."""
    candidates = list(presets(machine, quick))
    room = USABLE * machine.memory
    return next((preset for preset in candidates if preset.training_bytes <= room), candidates[-1])


class Scene(LanguageModel):
    """A model in training, at the moment between backward and step.

    Args:
        machine: where it lies.
        preset: its shape.

    Attributes:
        model: from transformers, in eval mode.
        optimizer: AdamW, with moments as after some steps of gradients like this one.
    """

    def __init__(self, machine: Machine, preset: Preset) -> None:
        super().__init__(machine, preset)
        with torch.enable_grad():
            self.loss().backward()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=_BETAS, weight_decay=0.1)
        self._fill_state()

    def _fill_state(self) -> None:
        """Give every parameter the moments of a hundred gradients that point about where the present one does."""
        generator = self.machine.generator(2)
        beta1, beta2 = _BETAS
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            g = parameter.grad.float()
            noise = torch.empty_like(g).normal_(1.0, 0.3, generator=generator)
            exp_avg = (noise.mul_(g) * (1 - beta1**_STEPS_TAKEN)).to(self.preset.moments)
            # Where a gradient is small once, others were not.
            exp_avg_sq = ((g.square() + 0.1 * g.square().mean()) * (1 - beta2**_STEPS_TAKEN)).to(self.preset.moments)
            step = torch.tensor(float(_STEPS_TAKEN))
            self.optimizer.state[parameter] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    @cached_property
    def measured(self) -> sharpkern.Measurement:
        """λ_c from the optimizer's state, begun at its learning rate: the first measurement, with all checks."""
        return self.measure("auto", self.direction(resident=False))

    @cached_property
    def losses(self) -> tuple[tuple[float, float], ...]:
        """Step sizes and losses there, as the virtual engine has them from the state: what every way has to find."""
        step_sizes = [0.0, self.start / 2, self.start]
        return tuple(
            zip(step_sizes, self.losses_by("virtual", self.direction(resident=False), step_sizes), strict=True)
        )

    def losses_by(self, engine: str, direction: sharpkern.Direction, step_sizes: Sequence[float]) -> list[float]:
        """Return the losses at step sizes by one engine, outside of any search."""
        with engines([engine], self.model, self.loss, direction) as (opened,):
            return opened.losses(step_sizes)

    @property
    def start(self) -> float:
        """The learning rate to begin a search at: near η_c, as in a training run that is watched."""
        eta = self.measured.critical_lr
        return eta if 0 < eta < math.inf else self.optimizer.param_groups[0]["lr"]

    def direction(self, *, resident: bool) -> sharpkern.Direction:
        """Return the optimizer's next update."""
        return sharpkern.Direction.from_optimizer(self.optimizer, resident=resident)

    def measure(
        self, engine: str, direction: sharpkern.Direction, initial_lr: float | None = None
    ) -> sharpkern.Measurement:
        """Measure λ_c by one engine, from a first guess of η_c."""
        return sharpkern.critical_sharpness(self.model, self.loss, direction, engine=engine, initial_lr=initial_lr)

    def about(self) -> Json:
        """Return what the figures are of."""
        return {**super().about(), "moments": str(self.preset.moments).removeprefix("torch.")}
