"""Activation checkpointing: λ_c is that of the model without it, and the run is bit for bit the same."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sharpkern
from tests.helpers.cases import tokens
from tests.helpers.language_models import gpt2, llama
from tests.helpers.models import GPT

Made = tuple[nn.Module, Callable[[], Tensor]]


class Checkpointed(GPT):
    """Recomputes its blocks, dropout among them, in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__(dropout=0.2)
        self.reentrant = reentrant

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.tokens(tokens_BT) + self.positions(torch.arange(tokens_BT.shape[1]))
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


def by_torch(reentrant: bool | None) -> Made:
    model, x = Checkpointed(reentrant), tokens()
    return model, lambda: F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


def _of_transformers(model: nn.Module, reentrant: bool | None) -> Made:
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    x = tokens()
    # They are made in evaluation mode, in which nothing is checkpointed.
    return model.train(), lambda: model(input_ids=x, labels=x, use_cache=False).loss


def by_llama(reentrant: bool | None) -> Made:
    return _of_transformers(llama(attention_dropout=0.2, attn_implementation="eager"), reentrant)


def by_gpt2(reentrant: bool | None) -> Made:
    return _of_transformers(gpt2(resid_pdrop=0.2), reentrant)


class Run:
    """Training from the same start; with a monitor if an engine is named.

    Attributes:
        weights: after the last step.
        measured: of every second step.
    """

    def __init__(self, make: Callable[..., Made], reentrant: bool | None, engine: str | None) -> None:
        torch.manual_seed(0)
        model, loss_fn = make(reentrant)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        monitor = sharpkern.Monitor(model, optimizer, every=2, engine=engine) if engine else None
        for _ in range(NUM_STEPS[make]):
            optimizer.zero_grad()
            loss_fn().backward()
            if monitor is not None:
                monitor(loss_fn)
            optimizer.step()
        self.weights = [parameter.detach().clone() for parameter in model.parameters()]
        self.measured = [] if monitor is None else [record.measurement for record in monitor.history]


NUM_STEPS = {by_torch: 20, by_llama: 4, by_gpt2: 4}


@pytest.fixture(scope="module", params=NUM_STEPS, ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Callable[..., Made]:
    return request.param


@pytest.fixture(scope="module")
def without(make: Callable[..., Made]) -> list[sharpkern.Measurement]:
    """What is measured of the model without checkpoints."""
    return Run(make, None, "auto").measured


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_the_same_is_measured_and_the_same_is_trained(
    make: Callable[..., Made], without: list[sharpkern.Measurement], reentrant: bool
) -> None:
    plain, measured = Run(make, reentrant, None), Run(make, reentrant, "auto")
    assert all(map(torch.equal, plain.weights, measured.weights))
    assert len(measured.measured) == NUM_STEPS[make] // 2
    for m, w in zip(measured.measured, without, strict=True):
        assert (m.status, m.engine) == ("converged", "virtual")
        assert m.critical_lr == pytest.approx(w.critical_lr, rel=1e-5)


def test_in_place_too() -> None:
    plain, measured = Run(by_gpt2, True, None), Run(by_gpt2, True, "inplace")
    assert all(map(torch.equal, plain.weights, measured.weights))
    by_virtual = Run(by_gpt2, True, "virtual").measured
    for m, v in zip(measured.measured, by_virtual, strict=True):
        assert m.critical_lr == pytest.approx(v.critical_lr, rel=1e-5)


def test_a_pass_without_gradients_raises_no_false_alarm_and_changes_no_filter() -> None:
    """A reentrant checkpoint warns where no input has a gradient, once in a run, which would then miss a true one."""
    model, loss_fn = by_torch(True)
    loss_fn().backward()
    direction = sharpkern.Direction.from_gradients(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        before = list(warnings.filters)
        for _ in range(2):
            warnings.warn("of the run, to be given once", UserWarning, stacklevel=1)
            sharpkern.critical_sharpness(model, loss_fn, direction)
        assert warnings.filters == before
        with torch.no_grad():
            loss_fn()
    assert [str(warning.message)[:27] for warning in caught] == [
        "of the run, to be given onc",
        "None of the inputs have req",
    ]
