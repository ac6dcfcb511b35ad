"""Under autocast products take weights that were formed in its dtype at once: the same bits, by fewer bytes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sharpkern.engines.virtual import mode
from tests.helpers.cases import CASES, LossFn
from tests.helpers.oracle import engine_losses, engine_on, random_direction

BY_NAME = {case.name: case for case in CASES}
STEP_SIZES = (0.0, 0.01, 0.3)


def under_autocast(loss_fn: LossFn, dtype: torch.dtype = torch.bfloat16) -> LossFn:
    def cast() -> Tensor:
        with torch.autocast("cpu", dtype):
            return loss_fn()

    return cast


class Cast(TorchDispatchMode):
    """Notes the shapes of matrices that are rounded to 16 bits by an operator of its own."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype.itemsize == 2 and args[0].dtype == torch.float32:
            self.shapes.append(result.shape)
        return result


def casts_of_weights(model: nn.Module, loss_fn: LossFn) -> int:
    """How many tensors with the shape of a weight a pass rounds by themselves."""
    matrices = {p.shape for p in model.parameters() if p.dim() > 1}
    with engine_on("virtual", model, loss_fn, random_direction(model)) as (engine, _):
        engine.losses([0.01])
        with Cast() as cast:
            engine.losses([0.02])
    return sum(shape in matrices for shape in cast.shapes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["gpt", "resnet", "stacked-experts"])
def test_a_formed_weight_has_the_bits_of_one_that_autocast_rounds(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    model = case.build()
    loss_fn, direction = under_autocast(case.closure(model), dtype), random_direction(model)
    losses = engine_losses("virtual", model, loss_fn, direction, STEP_SIZES)
    assert losses == engine_losses("inplace", model, loss_fn, direction, STEP_SIZES)
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("name", ["gpt", "resnet"])
def test_no_weight_is_left_for_autocast_to_round(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME[name]
    model = case.build()
    loss_fn = under_autocast(case.closure(model))
    assert casts_of_weights(model, loss_fn) == 0
    monkeypatch.setattr(mode, "product_dtype", lambda weight: weight.dtype)
    assert casts_of_weights(model, loss_fn) > 0


def test_weights_of_16_bits_are_rounded_twice_as_in_any_pass() -> None:
    """Formed in bf16, which the model holds, and then taken to autocast's float16."""
    model = nn.Linear(16, 10).bfloat16()
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    loss: Callable[[], Tensor] = lambda: model(x).float().square().mean()
    loss_fn, direction = under_autocast(loss, torch.float16), random_direction(model)
    virtual, inplace = (engine_losses(name, model, loss_fn, direction, STEP_SIZES) for name in ("virtual", "inplace"))
    assert virtual == inplace
