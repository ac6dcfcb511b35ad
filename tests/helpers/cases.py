"""The models that engines are tested on: name, how to build one, how to make a closure for one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import models

LossFn = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    closure: Callable[[nn.Module], LossFn]


def _classify(*shape: int) -> Callable[[nn.Module], LossFn]:
    def closure(model: nn.Module) -> LossFn:
        generator = torch.Generator().manual_seed(1)
        x, y = torch.randn(*shape, generator=generator), torch.randint(0, 10, (shape[0],), generator=generator)
        first = next(model.parameters())
        x, y = x.to(first), y.to(first.device)
        return lambda: F.cross_entropy(model(x), y)

    return closure


def tokens(vocabulary: int = 128, batch: int = 4, length: int = 24) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def _next_token(model: nn.Module) -> LossFn:
    x = tokens().to(next(model.parameters()).device)
    return lambda: F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


def _hugging_face(model: nn.Module) -> LossFn:
    x = tokens().to(next(model.parameters()).device)
    return lambda: model(input_ids=x, labels=x).loss


def _masked(model: nn.Module) -> LossFn:
    x = tokens()
    labels = x.where(torch.arange(24) % 3 == 0, -100)
    return lambda: model(input_ids=x, attention_mask=torch.ones_like(x), labels=labels).loss


def _image(model: nn.Module) -> LossFn:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(4, 3, 16, 16, generator=generator), torch.randint(0, 10, (4,), generator=generator)
    return lambda: F.cross_entropy(model(pixel_values=x).logits, y)


def _transformers(architecture: str, config: str, **values: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
        return getattr(transformers, architecture)(
            getattr(transformers, config)(**{**shape, **heads, **ends, **values})
        )

    return build


TORCH_CASES = [
    Case("mlp", models.MLP, _classify(16, 16)),
    Case("gpt", models.GPT, _next_token),
    Case("gpt-eval", lambda: models.GPT().eval(), _next_token),
    Case("resnet", models.ResNet, _classify(8, 1, 8, 8)),
    Case("resnet-eval", lambda: models.ResNet().eval(), _classify(8, 1, 8, 8)),
    Case("weight-norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 10)), _classify(16, 16)),
    Case("encoder", models.Encoder, _classify(8, 5, 16)),
    Case("encoder-eval", lambda: models.Encoder().eval(), _classify(8, 5, 16)),
    Case("lstm", models.LastState, _classify(8, 5, 8)),
    Case("stacked-experts", models.StackedExperts, _classify(16, 16)),
]

TRANSFORMERS_CASES = [
    Case("olmo2", _transformers("Olmo2ForCausalLM", "Olmo2Config"), _hugging_face),
    Case("llama", _transformers("LlamaForCausalLM", "LlamaConfig"), _hugging_face),
    Case("gpt2", _transformers("GPT2LMHeadModel", "GPT2Config", n_inner=64), _hugging_face),
    Case("qwen3", _transformers("Qwen3ForCausalLM", "Qwen3Config", head_dim=8), _hugging_face),
    Case("gpt-neox", _transformers("GPTNeoXForCausalLM", "GPTNeoXConfig"), _hugging_face),
    Case(
        "gemma2",
        _transformers(
            "Gemma2ForCausalLM",
            "Gemma2Config",
            head_dim=8,
            sliding_window=8,
            attn_logit_softcapping=1.0,
            final_logit_softcapping=2.0,
            # The only one that caps the attention's logits.
            attn_implementation="eager",
        ),
        _hugging_face,
    ),
    Case("mixtral", _transformers("MixtralForCausalLM", "MixtralConfig", num_local_experts=4), _hugging_face),
    Case(
        "olmoe", _transformers("OlmoeForCausalLM", "OlmoeConfig", num_experts=4, num_experts_per_tok=2), _hugging_face
    ),
    Case("mamba", _transformers("MambaForCausalLM", "MambaConfig", state_size=4), _hugging_face),
    Case("bert", _transformers("BertForMaskedLM", "BertConfig"), _masked),
    Case(
        "vit",
        _transformers("ViTForImageClassification", "ViTConfig", image_size=16, patch_size=4, num_labels=10),
        _image,
    ),
    Case(
        "t5",
        _transformers("T5ForConditionalGeneration", "T5Config", d_model=32, d_kv=8, d_ff=64, decoder_start_token_id=0),
        _hugging_face,
    ),
]

CASES = TORCH_CASES + TRANSFORMERS_CASES
