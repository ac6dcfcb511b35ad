"""Models that accelerate lays out over devices by a map: hooks that move inputs, and weights kept elsewhere."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn

import sharpkern
from tests.helpers.language_models import learned, llama, next_token, with_gradient
from tests.helpers.oracle import engine_losses

OUTER = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    return learned(llama())


def measured(model: nn.Module, engine: str = "auto") -> sharpkern.Measurement:
    direction = sharpkern.Direction.from_optimizer(with_gradient(model))
    return sharpkern.critical_sharpness(model, next_token(model), direction, engine=engine)


def test_hooks_that_move_inputs_change_nothing(base: nn.Module) -> None:
    expected = measured(copy.deepcopy(base))
    for engine in ("auto", "inplace"):
        model = dispatch_model(copy.deepcopy(base), {"": "cpu"}, force_hooks=True)
        assert hasattr(model, "_hf_hook")
        assert measured(model, engine).critical_lr == pytest.approx(expected.critical_lr, rel=1e-6)


def test_a_frozen_part_may_be_kept_elsewhere(base: nn.Module, tmp_path: Path) -> None:
    """Its weights are on the meta device between passes, and nobody minds."""

    def partly_frozen() -> nn.Module:
        model = copy.deepcopy(base).requires_grad_(False)
        model.model.layers[0].requires_grad_(True)
        return model

    expected = measured(partly_frozen())
    for engine in ("auto", "inplace"):
        places = dict.fromkeys([*OUTER, "model.layers.0"], "cpu") | {"model.layers.1": "disk"}
        model = dispatch_model(
            partly_frozen(), places, main_device="cpu", offload_dir=tmp_path / engine, force_hooks=True
        )
        assert {parameter.device.type for parameter in model.model.layers[1].parameters()} == {"meta"}
        assert measured(model, engine).critical_lr == pytest.approx(expected.critical_lr, rel=1e-6)
        assert {parameter.device.type for parameter in model.model.layers[1].parameters()} == {"meta"}


def to_disk(model: nn.Module, folder: Path) -> None:
    disk_offload(model, folder, execution_device=torch.device("cpu"))


def to_memory(model: nn.Module, folder: Path) -> None:
    cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("offload", [to_memory, to_disk])
def test_what_trains_must_not_be_kept_elsewhere(
    base: nn.Module, tmp_path: Path, offload: Callable[[nn.Module, Path], None]
) -> None:
    model = copy.deepcopy(base)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    offload(model, tmp_path)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    for attempt in (
        lambda: sharpkern.Direction.from_optimizer(torch.optim.SGD(model.parameters(), lr=0.1)),
        lambda: sharpkern.Direction.from_tensors({p: torch.ones_like(p) for p in model.parameters()}, model),
    ):
        with pytest.raises(ValueError, match="must hold values, got a meta tensor"):
            attempt()
    # An optimizer of before holds the parameters of before.
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match="direction must belong to the model's own parameters"):
        sharpkern.critical_sharpness(model, next_token(model), sharpkern.Direction.from_optimizer(optimizer))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA or HIP devices")
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "from the state"])
def test_parameters_on_two_devices(base: nn.Module, resident: bool) -> None:
    step_sizes = (0.0, 1e-4, 1e-3)
    alone = copy.deepcopy(base)
    direction = sharpkern.Direction.from_optimizer(with_gradient(alone))
    expected = engine_losses("virtual", alone, next_token(alone), direction, step_sizes)
    expected_lr = sharpkern.critical_sharpness(alone, next_token(alone), direction).critical_lr

    places = dict.fromkeys([*OUTER, "model.layers.0"], 0) | {"model.layers.1": 1}
    model = dispatch_model(copy.deepcopy(base), places)
    assert {parameter.device.index for parameter in model.parameters()} == {0, 1}
    direction = sharpkern.Direction.from_optimizer(with_gradient(model), resident=resident)
    before = {name: (parameter.clone(), parameter.device) for name, parameter in model.named_parameters()}
    for engine in ("virtual", "inplace"):
        assert engine_losses(engine, model, next_token(model), direction, step_sizes) == pytest.approx(
            expected, rel=1e-5
        )
        measured = sharpkern.critical_sharpness(model, next_token(model), direction, engine=engine)
        assert measured.critical_lr == pytest.approx(expected_lr, rel=1e-3)
        for name, parameter in model.named_parameters():
            assert parameter.device == before[name][1]
            assert torch.equal(parameter, before[name][0])
