"""Language models of Olmo2's form with random weights, as large as the GPU holds, and engines on them."""

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sharpkern
from sharpkern._support.optional import missing
from sharpkern.engines.session import Engine, open_session

from .timing import Json, Machine

# Relative difference of losses that are the same. In place 16-bit norm weights are rounded, which the virtual engine
# spares them.
SAME_LOSS = {torch.bfloat16: 5e-3, torch.float32: 1e-5}
# Share of the GPU's free memory; the rest is for activations and what the allocator cannot use.
USABLE = 0.93
_STEPS_TAKEN = 100


class Preset(NamedTuple):
    """The shape of a model, and of its training where it is trained; ``tokens`` in the one sequence of the batch."""

    name: str
    width: int
    hidden: int
    layers: int
    heads: int
    vocabulary: int
    tokens: int = 4096
    dtype: torch.dtype = torch.bfloat16
    moments: torch.dtype = torch.float32

    @property
    def num_parameters(self) -> int:
        """Elements of all weight matrices."""
        return 2 * self.vocabulary * self.width + self.layers * self.width * (4 * self.width + 3 * self.hidden)

    @property
    def training_bytes(self) -> int:
        """Bytes of weights and a copy, gradients, moments, a direction in memory, and a forward's logits."""
        per_parameter = 3 * self.dtype.itemsize + 3 * self.moments.itemsize
        return per_parameter * self.num_parameters + 10 * self.tokens * self.vocabulary


LARGE = (
    Preset("7B", 4096, 11008, 32, 32, 100352),
    Preset("1.5B", 2048, 8192, 16, 16, 100352),
    Preset("0.2B", 1024, 2816, 8, 16, 50304),
)
TINY = Preset("tiny", 64, 256, 2, 4, 512, tokens=64, dtype=torch.float32)
# Enough of both that matrix products count for more than calls, and these for more than forming weights.
SMALL = Preset("small", 256, 704, 4, 4, 4096, tokens=1024, dtype=torch.float32)


def fitting(machine: Machine, quick: bool) -> Preset:
    """Return the largest preset that can be trained in the memory that is free, or the least; on a CPU by ``quick``."""
    if not machine.is_gpu:
        return TINY if quick else SMALL
    candidates = [one._replace(moments=moments) for one in LARGE for moments in (torch.float32, torch.bfloat16)]
    room = USABLE * machine.memory
    return next((preset for preset in candidates if preset.training_bytes <= room), candidates[-1])


class LanguageModel:
    """A model from transformers, in eval mode, and one sequence of tokens."""

    def __init__(self, machine: Machine, preset: Preset) -> None:
        try:
            transformers = importlib.import_module("transformers")
        except ImportError as error:
            raise missing("transformers", "test", "the model of the bench") from error
        self.machine, self.preset = machine, preset
        config = transformers.Olmo2Config(
            hidden_size=preset.width,
            intermediate_size=preset.hidden,
            num_hidden_layers=preset.layers,
            num_attention_heads=preset.heads,
            num_key_value_heads=preset.heads,
            vocab_size=preset.vocabulary,
            max_position_embeddings=preset.tokens,
            use_cache=False,
            pad_token_id=None,
            eos_token_id=None,
        )
        torch.manual_seed(0)
        # Built where it will be used: a machine may have less memory of its own than its GPU.
        with machine.device:
            self.model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=preset.dtype).eval()
        self._tokens = machine.integers(preset.vocabulary, 1, preset.tokens, seed=1)

    def loss(self, model: nn.Module | None = None, num_tokens: int | None = None) -> Tensor:
        """Return the loss of a copy of the model, or of itself, on the first tokens; logits are whole."""
        tokens = self._tokens[:, :num_tokens]
        loss: Tensor = (model or self.model)(input_ids=tokens, labels=tokens).loss
        return loss

    def chunked_loss(self) -> Tensor:
        """Return the same loss by the chunked head: what a forward pass needs at least."""
        hidden = self.model.model(input_ids=self._tokens).last_hidden_state
        return sharpkern.linear_cross_entropy(hidden[:, :-1], self.model.lm_head.weight, self._tokens[:, 1:])

    @property
    def seconds(self) -> float:
        """How long to time forward passes."""
        return 1.5 if self.machine.is_gpu else 0.2

    def about(self) -> Json:
        """Return what the figures are of."""
        parameters = sum(p.numel() for p in self.model.parameters())
        about = {"model": self.preset.name, "parameters": parameters, "tokens": self.preset.tokens}
        return {**about, "weight_bytes": sum(p.nbytes for p in self.model.parameters())}


class Moving(LanguageModel):
    """A model, and a direction of random numbers in memory."""

    def __init__(self, machine: Machine, preset: Preset) -> None:
        super().__init__(machine, preset)
        parameters = self.model.parameters()
        tensors = {p: machine.randn(*p.shape, dtype=p.dtype, seed=seed) for seed, p in enumerate(parameters)}
        self.direction = sharpkern.Direction.from_tensors(tensors, self.model)


class Training(LanguageModel):
    """A model in training, between backward and step: real gradients, and AdamW's moments as after some steps."""

    def __init__(self, machine: Machine, preset: Preset) -> None:
        super().__init__(machine, preset)
        with torch.enable_grad():
            self.loss().backward()
        beta1, beta2 = betas = 0.9, 0.95
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=betas, weight_decay=0.1)
        generator = machine.generator(2)
        # The moments of a hundred gradients that point about where the present one does.
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            g = parameter.grad.float()
            noise = torch.empty_like(g).normal_(1.0, 0.3, generator=generator)
            exp_avg = (noise.mul_(g) * (1 - beta1**_STEPS_TAKEN)).to(preset.moments)
            # Where a gradient is small once, others were not.
            exp_avg_sq = ((g.square() + 0.1 * g.square().mean()) * (1 - beta2**_STEPS_TAKEN)).to(preset.moments)
            step = torch.tensor(float(_STEPS_TAKEN))
            self.optimizer.state[parameter] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    @cached_property
    def measured(self) -> sharpkern.Measurement:
        """λ_c from the optimizer's state, begun at its learning rate: the first measurement, with all checks."""
        return sharpkern.critical_sharpness(self.model, self.loss, self.direction(resident=False))

    @cached_property
    def losses(self) -> tuple[tuple[float, float], ...]:
        """Step sizes and losses there, as the virtual engine has them from the state: what every way has to find."""
        step_sizes = [0.0, self.start / 2, self.start]
        found = self.losses_by("virtual", self.direction(resident=False), step_sizes)
        return tuple(zip(step_sizes, found, strict=True))

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

    def about(self) -> Json:
        """Return what the figures are of."""
        return {**super().about(), "moments": str(self.preset.moments).removeprefix("torch.")}


@contextmanager
def engines(
    names: Sequence[str], model: nn.Module, loss_fn: Callable[[], Tensor], direction: sharpkern.Direction
) -> Iterator[list[Engine]]:
    """Open engines on one model, outside of any search; "inplace" alone, since it writes what others read."""
    with open_session(model, direction, [loss_fn]) as session, ExitStack() as stack:
        yield [stack.enter_context(session.open(session.target(loss_fn), name)) for name in names]
