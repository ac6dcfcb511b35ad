"""The in-place engine's copy of θ on the host, where the device has no room for it: the same losses, the same bits."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sharpkern
from sharpkern.engines.inplace import Backup
from sharpkern.engines.session import Session, in_session
from tests.helpers.models import GPT

STEP_SIZES = (1e-3, 0.0, 0.02, 1e-3)


class Trained:
    """A small language model in a dtype after a few steps of AdamW, with the next gradient."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model = GPT(vocabulary=64, layers=1).to(dtype)
        self.tokens = torch.randint(0, 64, (4, 9))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        for step in range(3):
            self.optimizer.zero_grad()
            self.loss().backward()
            if step < 2:
                self.optimizer.step()

    def loss(self) -> Tensor:
        logits = self.model(self.tokens[:, :-1]).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())

    def losses(self, backup: Backup, *, resident: bool) -> list[float]:
        direction = sharpkern.Direction.from_optimizer(self.optimizer, resident=resident)

        def evaluate(session: Session) -> list[float]:
            with session.open(session.target(self.loss), "inplace", backup=backup) as engine:
                return engine.losses(STEP_SIZES)

        return in_session(evaluate, self.model, direction, [self.loss])


def without_room(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    """Have clones of a model's parameters fail."""
    clone, places = Tensor.clone, {p.data_ptr() for p in model.parameters()}

    def fails(tensor: Tensor, **options: Any) -> Tensor:
        if tensor.data_ptr() in places:
            raise torch.OutOfMemoryError("out of memory")
        return clone(tensor, **options)

    monkeypatch.setattr(Tensor, "clone", fails)


@pytest.mark.parametrize("resident", [True, False], ids=["in memory", "from state"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_weights_are_those_of_a_copy_on_the_device(dtype: torch.dtype, resident: bool) -> None:
    trained = Trained(dtype)
    before = [p.detach().clone() for p in trained.model.parameters()]
    expected = trained.losses("device", resident=resident)
    assert trained.losses("host", resident=resident) == expected
    assert expected[0] == expected[3] != expected[2]
    assert all(map(torch.equal, before, trained.model.parameters()))


def test_the_host_is_taken_where_the_device_has_no_room_and_that_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = Trained(torch.float32)
    without_room(monkeypatch, trained.model)
    with pytest.warns(sharpkern.EngineFallbackWarning, match="on the host, since the device has no room for it"):
        losses = trained.losses("auto", resident=True)
    assert losses == trained.losses("host", resident=True)
    with pytest.raises(torch.OutOfMemoryError):
        trained.losses("device", resident=True)


def test_a_measurement_goes_on_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(torch.float32)
    without_room(monkeypatch, trained.model)
    direction = sharpkern.Direction.from_optimizer(trained.optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sharpkern.EngineFallbackWarning)
        found = sharpkern.critical_sharpness(trained.model, trained.loss, direction, engine="inplace")
    virtual = sharpkern.critical_sharpness(trained.model, trained.loss, direction, engine="virtual")
    assert found.sharpness == pytest.approx(virtual.sharpness, rel=1e-3)
