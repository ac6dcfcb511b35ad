"""A model with the layers of Llama-7B, as narrow as can be, in training: all its tensors, and little arithmetic."""

import torch
from torch import Tensor

_BETAS, _STEPS = (0.9, 0.95), 100


class TrainedLlama:
    """The model in bf16 between backward and step, AdamW's moments in fp32 as after some steps.

    Attributes:
        model: 32 layers have 291 tensors, as those of Llama-7B.
        optimizer: AdamW over all of them.
        layers: how many.
    """

    def __init__(self, layers: int = 32, *, width: int = 16, vocabulary: int = 32_000, tokens: int = 8) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=-(-width * 11_008 // 4096),
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=vocabulary,
            max_position_embeddings=64,
            use_cache=False,
        )
        torch.manual_seed(0)
        self.layers = layers
        self.model = LlamaForCausalLM(config).bfloat16()
        self._tokens = torch.randint(0, vocabulary, (1, tokens))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=_BETAS, weight_decay=0.1)
        self.loss().backward()
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            g = parameter.grad.float()
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(_STEPS)),
                "exp_avg": g * (1 - _BETAS[0] ** _STEPS),
                "exp_avg_sq": (g.square() + 0.1 * g.square().mean()) * (1 - _BETAS[1] ** _STEPS),
            }

    def loss(self) -> Tensor:
        """The loss of the next token."""
        loss: Tensor = self.model(input_ids=self._tokens, labels=self._tokens).loss
        return loss
