"""Memory of the engines, counted in bytes of live tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sharpkern
from sharpkern.engines.batched.engine import NUM_PARALLEL
from sharpkern.engines.virtual import linear
from sharpkern.memory.counter import bytes_of, peak_bytes
from tests.helpers.models import GPT
from tests.helpers.oracle import random_direction


def scene() -> tuple[nn.Module, object, sharpkern.Direction]:
    model = GPT(vocabulary=512, width=128, layers=4, dropout=0.0)
    x = torch.randint(0, 512, (1, 16))
    return model, lambda: F.cross_entropy(model(x).flatten(0, 1), x.flip(1).flatten()), random_direction(model)


def extra_and_plain_bytes(engine: str) -> tuple[int, int, nn.Module]:
    """Peak of a measurement above that of a plain forward pass, and this. The first two have run checks."""
    model, loss_fn, direction = scene()

    def measure() -> None:
        sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine)

    measure()
    measure()
    with torch.no_grad():
        plain = peak_bytes(loss_fn)
    return peak_bytes(measure) - plain, plain, model


def test_the_virtual_engine_needs_the_largest_weight_matrix() -> None:
    extra, _, model = extra_and_plain_bytes("virtual")
    largest = max(bytes_of([p]) for p in model.parameters())
    assert largest / 2 < extra <= 1.1 * largest


def test_the_in_place_engine_needs_one_copy_of_the_parameters() -> None:
    extra, _, model = extra_and_plain_bytes("inplace")
    copy = bytes_of(model.parameters())
    assert 0.9 * copy < extra <= 1.1 * copy


@pytest.mark.long
def test_the_batched_engine_needs_the_activations_of_every_step_size(monkeypatch: pytest.MonkeyPatch) -> None:
    # Besides, formed rows of a layer, as many as fit into the cache.
    monkeypatch.setattr(linear, "CACHE_BYTES", 2**14)
    extra, plain, _ = extra_and_plain_bytes("batched")
    others = NUM_PARALLEL - 1
    assert 0.9 * others * plain < extra <= 1.1 * others * plain


@pytest.mark.parametrize("engine", ["virtual", "batched", "inplace"])
def test_nothing_is_kept_between_measurements(engine: str) -> None:
    import gc

    model, loss_fn, direction = scene()
    live = lambda: sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine)
    gc.collect()
    before = live()
    sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine)
    gc.collect()
    assert live() == before


def test_masters_make_the_backup_free() -> None:
    model, loss_fn, _ = scene()
    masters = {p: p.detach().clone() for p in model.parameters()}
    model.bfloat16()
    loss_fn().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    copy = bytes_of(model.parameters())
    peaks = []
    for direction in (
        sharpkern.Direction.from_optimizer(optimizer),
        sharpkern.Direction.from_optimizer(optimizer, masters=masters),
    ):
        peaks.append(
            peak_bytes(
                lambda d=direction: sharpkern.critical_sharpness(model, loss_fn, d, engine="inplace", noise=1e-3)
            )
        )
    assert peaks[0] - peaks[1] > 0.8 * copy
