"""Causal language models by name, as their published configurations describe them, and from files; and their loss."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharpkern._support.optional import missing
from sharpkern.ops.linear_cross_entropy import linear_cross_entropy

HEADS = ("stock", "chunked")
# Registered with transformers under this name: whether attention needs a mask is otherwise read from values.
_ATTENTION = "sdpa_without_mask"

# Configuration class of transformers, and what differs from its defaults. Sources: the config.json that is published
# with each model.
_OLMO2 = {"vocab_size": 100352, "max_position_embeddings": 4096, "rope_theta": 500000.0}
_LLAMA3 = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
_QWEN3 = {"vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000.0, "head_dim": 128}


def _shape(width: int, hidden: int, layers: int, heads: int, key_value_heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }


ARCHITECTURES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "olmo2-1b": ("Olmo2Config", _OLMO2 | _shape(2048, 8192, 16, 16, 16)),
    "olmo2-7b": ("Olmo2Config", _OLMO2 | _shape(4096, 11008, 32, 32, 32)),
    "olmo2-13b": ("Olmo2Config", _OLMO2 | _shape(5120, 13824, 40, 40, 40)),
    "olmo2-32b": ("Olmo2Config", _OLMO2 | _shape(5120, 27648, 64, 40, 8)),
    "llama3-8b": ("LlamaConfig", _LLAMA3 | _shape(4096, 14336, 32, 32, 8)),
    "llama3-70b": ("LlamaConfig", _LLAMA3 | _shape(8192, 28672, 80, 64, 8)),
    "qwen3-0.6b": ("Qwen3Config", _QWEN3 | _shape(1024, 3072, 28, 16, 8) | {"tie_word_embeddings": True}),
    "qwen3-1.7b": ("Qwen3Config", _QWEN3 | _shape(2048, 6144, 28, 16, 8) | {"tie_word_embeddings": True}),
    "qwen3-4b": ("Qwen3Config", _QWEN3 | _shape(2560, 9728, 36, 32, 8) | {"tie_word_embeddings": True}),
    "qwen3-8b": ("Qwen3Config", _QWEN3 | _shape(4096, 12288, 36, 32, 8)),
    "qwen3-14b": ("Qwen3Config", _QWEN3 | _shape(5120, 17408, 40, 40, 8)),
    "qwen3-32b": ("Qwen3Config", _QWEN3 | _shape(5120, 25600, 64, 64, 8)),
}


def configuration(name: str) -> Any:
    """Return the configuration of a language model."""
    path = Path(name)
    if name.lower() not in ARCHITECTURES and not (path.is_file() or (path / "config.json").is_file()):
        lacks = ", a folder without config.json" if path.is_dir() else ""
        raise ValueError(
            f"model must be one of {', '.join(ARCHITECTURES)}, or a configuration file of transformers or its folder, "
            f"got {name!r}{lacks}; pass the path of a config.json for any other model"
        )
    try:
        import transformers
    except ImportError:
        raise missing("transformers", "transformers", "a model by name") from None
    if name.lower() in ARCHITECTURES:
        kind, options = ARCHITECTURES[name.lower()]
        return getattr(transformers, kind)(**options)
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except ImportError:
        raise
    except Exception as error:
        # A file that is cut off has it raise anything.
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"model must be a configuration of transformers, got {name!r}: {said}") from None
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"model must be a causal language model, got a {type(config).__name__} in {name!r}; build any other model "
            "on the meta device and pass it with its loss_fn"
        )
    return config


def language_model(name: str, dtype: torch.dtype | None) -> tuple[nn.Module, int]:
    """Return a causal language model on the meta device, and the size of its vocabulary."""
    config = configuration(name)
    import transformers
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    transformers.AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    config.use_cache = False
    dtype = dtype or config.dtype or torch.bfloat16
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_ATTENTION)
    return model.eval(), config.vocab_size


def language_loss(tokens: int, batch_size: int, head: str) -> Callable[[nn.Module], Tensor]:
    """Return the loss of such a model on one batch."""

    def loss(model: nn.Module) -> Tensor:
        rows = torch.zeros(batch_size, tokens, dtype=torch.int64)
        if head == "stock":
            whole: Tensor = model(input_ids=rows, labels=rows).loss
            return whole
        hidden = model.base_model(input_ids=rows).last_hidden_state  # type: ignore[operator]
        weight = model.get_output_embeddings().weight  # type: ignore[operator]
        return linear_cross_entropy(hidden[:, :-1], weight, rows[:, 1:])

    return loss


def check_positions(model: nn.Module, tokens: int) -> None:
    """Refuse more tokens than a model with learned positions has of these."""
    positions: int = getattr(model.config, "max_position_embeddings", tokens)
    learned = any(isinstance(m, nn.Embedding) and m.num_embeddings == positions for m in model.modules())
    if learned and tokens > positions:
        raise ValueError(f"tokens must be at most the model's {positions} positions, got {tokens}; pass fewer")
