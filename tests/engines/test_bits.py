"""Weights that are read as another dtype: as complex numbers, which they are pairs of, or bit by bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern
from tests.helpers.oracle import LossFn, deep_copy_losses, engine_losses, engine_on

STEP_SIZES = (0.0, 0.01, 0.1)


class Spectral(nn.Module):
    """A Fourier layer that keeps its complex weight as a real one."""

    def __init__(self, how: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.randn(2, 2, 5, 2, dtype=dtype) * 0.3)
        self.scale = nn.Parameter(torch.ones(5, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(x)[..., :5]
        weight, kind = self.weight, modes.dtype
        match self.how:
            case "view_as_complex":
                weight = torch.view_as_complex(weight)
            case "view":
                weight = weight.view(kind).squeeze(-1)
            case "view by name":
                weight = weight[:].view(dtype=kind)[..., 0].conj().resolve_conj().conj()
            case "conjugate":
                weight = torch.view_as_complex(weight.transpose(0, 1)).conj()
            case "parts":
                weight = torch.complex(*torch.view_as_real(torch.view_as_complex(weight)).unbind(-1))
        return torch.fft.irfft(torch.einsum("bix,iox->box", modes * self.scale, weight), n=x.shape[-1])


def fitted(model: nn.Module) -> LossFn:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 8, 2, 16, generator=generator).to(next(model.parameters()).dtype)
    return lambda: F.mse_loss(model(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["view_as_complex", "view", "view by name", "conjugate", "parts"])
def test_complex_weights_that_are_kept_as_real_ones(how: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(Spectral(how, dtype), nn.Tanh(), Spectral(how, dtype))
    loss_fn = fitted(model)
    loss_fn().backward()
    direction = sharpkern.Direction.from_gradients(model)
    expected = deep_copy_losses(model, fitted, direction, STEP_SIZES)
    for engine in ("virtual", "batched", "inplace"):
        assert engine_losses(engine, model, loss_fn, direction, STEP_SIZES) == pytest.approx(expected, rel=1e-5)
    with engine_on("virtual", model, loss_fn, direction) as (opened, _):
        assert opened.oracle_loss(0.1) == pytest.approx(expected[2], rel=1e-5)
    measured = sharpkern.critical_sharpness(model, loss_fn, direction)
    assert (measured.status, measured.engine) == ("converged", "virtual")
    found = [sharpkern.directional_sharpness(model, loss_fn, direction, method=m) for m in ("forward", "hvp")]
    assert found[0] == pytest.approx(found[1], rel=0.02)


class Signs(nn.Module):
    """Reads the sign bits of its weight, which no sum of two weights' bits is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2, 0.1, -0.4]))

    def forward(self) -> Tensor:
        negative = self.weight.view(torch.int32) < 0
        return (self.weight.square() * torch.where(negative, 3.0, 1.0)).sum()


@pytest.mark.parametrize("engine", ["auto", "virtual", "batched", "inplace"])
def test_bits_are_those_of_the_weight_that_moved(engine: str) -> None:
    model = Signs()
    direction = sharpkern.Direction.from_tensors({"weight": torch.tensor([1.0, -1.0, 0.5, -0.5])}, model)
    measured = sharpkern.critical_sharpness(model, model, direction, engine=engine)
    expected = deep_copy_losses(model, lambda moved: moved, direction, [eta for eta, _ in measured.probes])
    assert [loss for _, loss in measured.probes] == pytest.approx(expected, rel=1e-5)
    assert any(eta > 0.4 for eta, _ in measured.probes)
