"""Adapters on a frozen base (LoRA and its kin, of peft): they alone move, whatever the base is made of."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import sharpkern
from tests.helpers.language_models import crossing, gpt2, learned, llama, next_token, with_gradient

pytestmark = [
    # peft asks transformers by an old name, and transformers has a word to say on it.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

MATRICES = {llama: ["q_proj", "v_proj", "up_proj"], gpt2: ["c_attn", "c_fc"]}


def adapted(model: nn.Module, kind: Callable[..., nn.Module], **options: Any) -> nn.Module:
    autocast = options.pop("autocast_adapter_dtype", True)
    options = {"target_modules": MATRICES[kind], "fan_in_fan_out": kind is gpt2, "lora_dropout": 0.0, **options}
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, **options), autocast_adapter_dtype=autocast)


@pytest.fixture(scope="module")
def base_of() -> Callable[..., nn.Module]:
    """Copies of bases, each of which has learned once."""
    made: dict[Any, nn.Module] = {}

    def base(kind: Callable[..., nn.Module], **values: Any) -> nn.Module:
        key = (kind, *values.items())
        if key not in made:
            torch.manual_seed(0)
            made[key] = learned(kind(**values))
        return copy.deepcopy(made[key])

    return base


def assert_measured(model: nn.Module, reference: nn.Module | None = None) -> None:
    """Fail where λ_c is not that of float64, by the virtual engine, or anything has moved."""
    optimizer = with_gradient(model)
    before = {name: (parameter.detach().clone(), parameter._version) for name, parameter in model.named_parameters()}
    direction = sharpkern.Direction.from_optimizer(optimizer)
    assert {id(p) for p in direction.parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    # A fallback warns, which is an error here.
    measured = sharpkern.critical_sharpness(model, next_token(model), direction, rtol=1e-3)
    assert (measured.status, measured.engine) == ("converged", "virtual")
    exact = crossing(reference or model, model, direction, measured.critical_lr)
    assert measured.critical_lr == pytest.approx(exact, rel=max(measured.error, 1e-4))
    for name, parameter in model.named_parameters():
        value, version = before[name]
        assert torch.equal(parameter, value), name
        assert parameter._version == version, name


@pytest.mark.parametrize("kind", [llama, gpt2], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}],
    ids=["LoRA", "DoRA", "LoRA and the head"],
)
def test_adapters_move_and_nothing_else(
    base_of: Callable[..., nn.Module], kind: Callable[..., nn.Module], options: dict[str, Any]
) -> None:
    assert_measured(adapted(base_of(kind), kind, **options))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_adapter_of_an_embedding_that_is_tied_to_the_head(base_of: Callable[..., nn.Module]) -> None:
    base = base_of(llama, tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert_measured(adapted(base, llama, target_modules=["q_proj", "embed_tokens"]))


def test_a_base_in_bfloat16_with_adapters_in_float32(base_of: Callable[..., nn.Module]) -> None:
    base = base_of(llama).bfloat16()
    # Noise hides the crossing of one adapter in three.
    torch.manual_seed(1)
    model = adapted(base, llama)
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, True), (torch.bfloat16, False)}
    assert_measured(model)


def test_merged_adapters_are_refused_and_unmerged_ones_measured(base_of: Callable[..., nn.Module]) -> None:
    model = adapted(base_of(llama), llama)
    loss_fn = next_token(model)
    direction = sharpkern.Direction.from_optimizer(with_gradient(model))
    model.merge_adapter()
    with pytest.raises(ValueError, match="loss_fn must depend on the parameters that the direction moves"):
        sharpkern.critical_sharpness(model, loss_fn, direction)
    model.unmerge_adapter()
    measured = sharpkern.critical_sharpness(model, loss_fn, direction)
    assert (measured.status, measured.engine) == ("converged", "virtual")


def test_training_is_bit_for_bit_the_same(base_of: Callable[..., nn.Module]) -> None:
    def trained(every: int | None) -> tuple[nn.Module, int]:
        torch.manual_seed(0)
        model = adapted(base_of(llama), llama, lora_dropout=0.2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        monitor = sharpkern.Monitor(model, optimizer, every=every) if every else None
        loss_fn = next_token(model)
        for _ in range(10):
            optimizer.zero_grad()
            loss_fn().backward()
            if monitor is not None:
                monitor(loss_fn)
            optimizer.step()
        return model, len(monitor.history) if monitor else 0

    (without, _), (measured, num_measured) = trained(None), trained(2)
    assert num_measured == 5
    for (name, a), b in zip(without.named_parameters(), measured.parameters(), strict=True):
        assert torch.equal(a, b), name
