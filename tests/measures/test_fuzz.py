"""A few random cases, and that the tester notices what is wrong; ``python tests/fuzz.py`` runs as many as wanted."""

import pytest

from sharpkern.engines.evaluation.guard import Guard
from sharpkern.engines.inplace import InPlaceEngine
from sharpkern.engines.virtual.engine import VirtualEngine
from tests.fuzz import outcome


@pytest.mark.parametrize("seed", range(24))
def test_random_case(seed: int) -> None:
    how, wrong = outcome(seed)
    assert wrong == ""
    assert not how.startswith("cannot be trained")


@pytest.mark.parametrize(("engine", "seed"), [(InPlaceEngine, 1), (VirtualEngine, 3)])
def test_an_engine_that_is_off_is_noticed(
    engine: type, seed: int, monkeypatch: pytest.MonkeyPatch, no_swapping: None
) -> None:
    losses = engine.losses
    monkeypatch.setattr(engine, "losses", lambda self, step_sizes: losses(self, [1.01 * eta for eta in step_sizes]))
    assert outcome(seed)[0] == "DIFFERS, loss"


@pytest.mark.parametrize("part", ["_restore_gradients", "rewind"])
def test_a_restore_left_out_is_noticed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, part, lambda self: None)
    assert outcome(1)[0] == "DIFFERS, state"
