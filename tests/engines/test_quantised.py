"""Adapters on a frozen base whose weights are quantised: those are passed over, and the adapters measured."""

import copy
from collections.abc import Callable

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.quantization.quantize_.workflows import Int8Tensor

import sharpkern
from tests.helpers.language_models import crossing, learned, llama, next_token, with_gradient

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # peft would have to know how to quantise anew, to merge.
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning"),
]


class Integers(nn.Linear):
    """A linear layer with integers for a parameter, which its forward pass sets anew, as those of bitsandbytes do."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.scale = layer.weight.detach().abs().amax() / 127
        self.integers = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(self.integers.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype) * self.scale)
        self.weight.data = self.integers
        return y


def by_torchao(model: nn.Module) -> None:
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=_is_inner)


def in_integers(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if _is_inner(module, name):
            model.set_submodule(name, Integers(module))


def _is_inner(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name != "lm_head"


def dequantised(model: nn.Module) -> nn.Module:
    """A copy with the values that the quantised weights stand for, in floating point."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Integers):
            layer = nn.Linear(module.in_features, module.out_features, bias=False)
            layer.weight = nn.Parameter(module.integers * module.scale, requires_grad=False)
            model.set_submodule(name, layer)
        elif isinstance(module, nn.Linear):
            module.weight = nn.Parameter(plain(module.weight), requires_grad=False)
    return model


def plain(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if isinstance(tensor, Int8Tensor) else tensor


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    return learned(llama())


def adapted(base: nn.Module, quantise: Callable[[nn.Module], None]) -> nn.Module:
    model = copy.deepcopy(base)
    quantise(model)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))


@pytest.mark.parametrize("quantise", [by_torchao, in_integers])
def test_adapters_on_a_quantised_base(base: nn.Module, quantise: Callable[[nn.Module], None]) -> None:
    model = adapted(base, quantise)
    optimizer = with_gradient(model)
    direction = sharpkern.Direction.from_optimizer(optimizer)
    assert len(direction.parameters) == 12
    assert all(parameter.requires_grad for parameter in direction.parameters)
    before = copy.deepcopy(model.state_dict())
    measured = sharpkern.critical_sharpness(model, next_token(model), direction, rtol=1e-3)
    assert (measured.status, measured.engine) == ("converged", "virtual")
    exact = crossing(dequantised(model), model, direction, measured.critical_lr)
    assert measured.critical_lr == pytest.approx(exact, rel=max(measured.error, 1e-4))
    for name, value in model.state_dict().items():
        assert torch.equal(plain(value), plain(before[name])), name
    in_place = sharpkern.critical_sharpness(model, next_token(model), direction, rtol=1e-3, engine="inplace")
    assert in_place.critical_lr == pytest.approx(measured.critical_lr, rel=1e-5)


def test_frozen_weights_of_torchao_may_stand_in_the_optimizer(base: nn.Module) -> None:
    """They have no gradient, and so the step passes them over."""
    model = adapted(base, by_torchao)
    next_token(model)().backward()
    direction = sharpkern.Direction.from_optimizer(torch.optim.SGD(model.parameters(), lr=1e-3))
    assert all(parameter.requires_grad for parameter in direction.parameters)


def test_integers_in_the_optimizer_are_passed_over(base: nn.Module) -> None:
    model = adapted(base, in_integers)
    next_token(model)().backward()
    direction = sharpkern.Direction.from_optimizer(torch.optim.SGD(model.parameters(), lr=1e-3))
    assert all(parameter.is_floating_point() for parameter in direction.parameters)
