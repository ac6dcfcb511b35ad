"""A language model of Olmo2's form with random weights, and one batch for it."""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharpkern._extras import missing
from sharpkern.cli.bench.machine import Machine
from sharpkern.cli.bench.record import Json
from sharpkern.ops.linear_cross_entropy import linear_cross_entropy

# Relative difference of losses that are the same. In place 16-bit norm weights are rounded, which the virtual engine
# spares them.
SAME_LOSS = {torch.bfloat16: 5e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Preset:
    """The shape of a model, and of its training where it is trained.

    Attributes:
        name: for the table.
        width: of the hidden states.
        hidden: of the MLP.
        layers: how many.
        heads: of the attention.
        vocabulary: entries.
        tokens: in the one sequence of the batch.
        dtype: of the weights.
        moments: dtype of the optimizer's moments.
    """

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


class LanguageModel:
    """A model and one sequence of tokens.

    Args:
        machine: where it lies.
        preset: its shape.

    Attributes:
        model: from transformers, in eval mode.
    """

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
        self._tokens = torch.randint(
            0, preset.vocabulary, (1, preset.tokens), generator=machine.generator(1), device=machine.device
        )

    def loss(self, model: nn.Module | None = None, num_tokens: int | None = None) -> Tensor:
        """Return the loss as transformers computes it, from logits of the whole vocabulary.

        Args:
            model: a copy of the scene's own, or None for that.
            num_tokens: how many to take, from the first; None for all.
        """
        tokens = self._tokens[:, :num_tokens]
        loss: Tensor = (model or self.model)(input_ids=tokens, labels=tokens).loss
        return loss

    def chunked_loss(self) -> Tensor:
        """Return the same loss by the chunked head: what a forward pass needs at least."""
        hidden = self.model.model(input_ids=self._tokens).last_hidden_state
        return linear_cross_entropy(hidden[:, :-1], self.model.lm_head.weight, self._tokens[:, 1:])

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def about(self) -> Json:
        """Return what the figures are of."""
        return {
            "model": self.preset.name,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "tokens": self.preset.tokens,
            "weight_bytes": self.weight_bytes,
        }
