"""Small language models of transformers that have learned a little, and λ_c of what trains them, in float64."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sharpkern
from tests.helpers.cases import tokens

SHAPE = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(**values: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **size, **heads, **values}))


def gpt2(**values: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False}
    return GPT2LMHeadModel(GPT2Config(**{**SHAPE, **size, **plain, **values}))


def next_token(model: nn.Module) -> Callable[[], Tensor]:
    """The loss of one batch, which is large enough for 16-bit losses to be told apart."""
    x = tokens(batch=16, length=64)
    return lambda: model(input_ids=x, labels=x).loss


def learned(model: nn.Module, steps: int = 30) -> nn.Module:
    """The model after some steps on the batch: what an untrained one does not know, no step can unlearn."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loss_fn = next_token(model)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


def with_gradient(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    """An optimizer of what trains, after one step and with the gradient of the next."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    loss_fn = next_token(model)
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        loss_fn().backward()
    return optimizer


@torch.no_grad()
def crossing(reference: nn.Module, model: nn.Module, direction: sharpkern.Direction, near: float) -> float:
    """η_c in float64, of a model to which the same parameters belong by name; it must lie near the given one."""
    from scipy.optimize import brentq

    reference = copy.deepcopy(reference).double()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = dict(reference.named_parameters())
    moving = [
        (parameters[names[id(p)]], delta.double())
        for p, delta in zip(direction.parameters, direction.tensors, strict=True)
    ]
    start = [parameter.clone() for parameter, _ in moving]
    loss_fn = next_token(reference)

    def loss(eta: float) -> float:
        for (parameter, delta), theta in zip(moving, start, strict=True):
            parameter.copy_(theta - eta * delta)
        return loss_fn().item()

    base = loss(0.0)
    return brentq(lambda eta: loss(eta) - base, near / 1.3, near * 1.3, rtol=1e-6)
