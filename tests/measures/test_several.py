"""The micro-batches of one step for every measure: their weighted mean, and the same errors."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern
from sharpkern import Direction, MicroBatch
from tests.engines.test_non_intrusive import differing, snapshot
from tests.helpers.models import MLP

WEIGHTS = [1.0, 4.0, 2.0, 0.5]
ETAS = [0.0, 0.3, -0.1, 1.0]
MEASURES: dict[str, Callable[..., Any]] = {
    "losses": partial(sharpkern.losses_along, step_sizes=ETAS),
    "blocks": sharpkern.blockwise_critical_sharpness,
    "forward": sharpkern.directional_sharpness,
    "gradient": partial(sharpkern.directional_sharpness, method="gradient", step_size=1e-3),
    "hvp": partial(sharpkern.directional_sharpness, method="hvp"),
    "hessian": lambda model, loss_fn, direction, **options: sharpkern.hessian_sharpness(model, loss_fn, **options),
    "tasks": lambda model, loss_fn, direction: sharpkern.relative_critical_sharpness(
        model, {"one": loss_fn, "other": loss_fn}, direction
    ),
}


class Scene:
    """A model, the micro-batches of a step with their weights, and their weighted mean as one closure."""

    def __init__(self, model: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        self.model = (model or MLP()).double()
        rows = [2, 8, 4, 1]
        data = [(torch.randn(n, 16, dtype=torch.float64), torch.randint(0, 10, (n,))) for n in rows]
        self.parts = [lambda x=x, y=y: F.cross_entropy(self.model(x), y) for x, y in data]
        self.whole().backward()
        self.direction = Direction.from_gradients(self.model)

    def whole(self) -> Tensor:
        losses = [part() * (weight / sum(WEIGHTS)) for part, weight in zip(self.parts, WEIGHTS, strict=True)]
        return torch.stack(losses).sum()

    @property
    def pairs(self) -> list[tuple[Callable[[], Tensor], float]]:
        return list(zip(self.parts, WEIGHTS, strict=True))


def numbers(found: Any) -> list[float]:
    """What a measure found, as numbers."""
    if isinstance(found, dict):
        return [number for m in found.values() for number in (m.critical_lr, m.base_loss, m.exponent)]
    if isinstance(found, Tensor):
        return list(map(float, found))
    return [found.value if isinstance(found, sharpkern.HessianResult) else float(found)]


@pytest.mark.parametrize("name", MEASURES)
def test_several_closures_are_the_one_that_computes_their_weighted_mean(name: str) -> None:
    scene, measure = Scene(), MEASURES[name]
    expected = numbers(measure(scene.model, scene.whole, scene.direction))
    before = snapshot(scene.model, torch.optim.SGD(scene.model.parameters(), lr=0.1))
    assert numbers(measure(scene.model, scene.pairs, scene.direction)) == pytest.approx(expected, rel=1e-9)
    if name != "tasks":
        found = measure(scene.model, scene.parts, scene.direction, weights=WEIGHTS)
        assert numbers(found) == pytest.approx(expected, rel=1e-9)
        # Weights are relative.
        found = measure(scene.model, scene.parts, scene.direction, weights=[3 * weight for weight in WEIGHTS])
        assert numbers(found) == pytest.approx(expected, rel=1e-9)
    assert differing(before, snapshot(scene.model, torch.optim.SGD(scene.model.parameters(), lr=0.1))) == []


@pytest.mark.parametrize("engine", ["virtual", "batched", "inplace"])
def test_every_engine_takes_several(engine: str) -> None:
    scene = Scene()
    expected = sharpkern.losses_along(scene.model, scene.whole, scene.direction, ETAS).tolist()
    found = sharpkern.losses_along(scene.model, scene.pairs, scene.direction, ETAS, engine=engine)
    assert found.tolist() == pytest.approx(expected, rel=1e-13)
    blocks = sharpkern.blockwise_critical_sharpness(scene.model, scene.whole, scene.direction, engine=engine)
    several = sharpkern.blockwise_critical_sharpness(scene.model, scene.pairs, scene.direction, engine=engine)
    assert numbers(several) == pytest.approx(numbers(blocks), rel=1e-9)


@pytest.mark.parametrize("name", MEASURES)
def test_what_is_no_micro_batch_is_refused_alike(name: str) -> None:
    scene, measure = Scene(), MEASURES[name]
    call = partial(measure, scene.model, direction=scene.direction)
    for wrong in ([], [scene.whole, 3], [(scene.whole,)], [scene.whole, ("a", 1.0)]):
        with pytest.raises(TypeError, match=r"a sequence of closures or \(closure, weight\), one for each micro-batch"):
            call(loss_fn=wrong)
    for weight in (-1.0, 0.0, math.inf, math.nan, "1"):
        with pytest.raises(ValueError, match="weights must be 2 positive finite numbers"):
            call(loss_fn=[(scene.whole, 1.0), (scene.whole, weight)])
    with pytest.raises(TypeError, match="loss_fn must be callable without arguments, got Tensor"):
        call(loss_fn=torch.ones(()))
    if name == "tasks":
        return
    for weights in ([1.0], [1.0, 2.0, 3.0], [1.0, -1.0], "ab", []):
        with pytest.raises(ValueError, match="weights must be 2 positive finite numbers"):
            call(loss_fn=[scene.whole, scene.whole], weights=weights)
    with pytest.raises(TypeError, match=r"loss_fn must be a sequence of closures with sample= or weights="):
        call(loss_fn=scene.whole, weights=[1.0])


@pytest.mark.parametrize("name", MEASURES)
def test_micro_batches_keep_the_masks_of_training(name: str) -> None:
    """Also in measures that differentiate, and without a trace in what the micro-batch knows."""
    scene = Scene(nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Dropout(0.5), nn.Linear(12, 10)))
    parts = [MicroBatch(part) for part in scene.parts]
    scene.model.zero_grad()
    trained = [part() for part in parts]
    torch.stack(trained).mean().backward()
    direction = Direction.from_gradients(scene.model)
    torch.rand(3)
    seen = []

    def watched(part: MicroBatch) -> Tensor:
        loss = part()
        seen.append(loss.item())
        return loss

    MEASURES[name](scene.model, [partial(watched, part) for part in parts], direction)
    # Other masks take them further off than a small step does.
    assert all(min(abs(loss.item() - one) for one in seen) < 1e-2 for loss in trained)
    assert [part.loss for part in parts] == trained


def test_all_micro_batches_are_reached() -> None:
    """Random streams that a closure brings along, of each part and not of the first alone."""
    scene = Scene()
    generators = [torch.Generator().manual_seed(k) for k in range(4)]
    parts = [
        lambda part=part, g=g: part() + 0 * torch.rand((), generator=g)
        for part, g in zip(scene.parts, generators, strict=True)
    ]
    before = [g.get_state() for g in generators]
    for measure in MEASURES.values():
        measure(scene.model, parts, scene.direction)
        assert all(map(torch.equal, before, [g.get_state() for g in generators]))
