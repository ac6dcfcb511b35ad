"""Several optimizers that step together: around their steps, in Lightning's manual optimisation and in torchtitan."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import sharpkern
from sharpkern.integrations.around_step import AroundStep

SGD, ADAMW, ADAFACTOR = torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor
Loop = Callable[[list[Optimizer], Callable[[], Tensor]], None]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 32, bias=False), nn.Tanh(), nn.Linear(32, 4))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(64, 12, generator=generator), torch.randint(4, (64,), generator=generator)


KINDS: dict[str, Callable[[nn.Sequential], list[Optimizer]]] = {
    "SGD, AdamW": lambda model: [
        SGD(model[0].parameters(), lr=0.05, momentum=0.9),
        ADAMW(model[2:].parameters(), lr=3e-3),
    ],
    "Adafactor, AdamW, SGD": lambda model: [
        ADAFACTOR(model[0].parameters(), lr=1e-2),
        ADAMW(model[2].parameters(), lr=3e-3),
        SGD(model[4].parameters(), lr=0.05),
    ],
}
if hasattr(torch.optim, "Muon"):
    KINDS["Muon, AdamW"] = lambda model: [
        torch.optim.Muon([model[0].weight, model[2].weight], lr=0.02),
        ADAMW([model[0].bias, *model[4].parameters()], lr=3e-3),
    ]


def train(
    name: str, how: str, steps: int = 4, loop: Loop | None = None
) -> tuple[sharpkern.Monitor | None, list[Tensor]]:
    """A run with warm-up, in double precision, measured "before" the steps, "around" them, or not at all."""
    model = network().double()
    made = KINDS[name](model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: min(1.0, (step + 1) / 4)) for one in made]
    monitor = sharpkern.Monitor(model, made)
    loss_fn: Callable[[], Tensor]
    if how == "around":
        AroundStep(made, lambda: True, lambda direction: monitor(lambda: loss_fn(), direction=direction))
    for step in range(steps):
        x, y = batch(step)
        loss_fn = lambda x=x, y=y: F.cross_entropy(model(x.double()), y)
        if loop is not None:
            loop(made, loss_fn)
        else:
            model.zero_grad()
            loss_fn().backward()
            if how == "before":
                monitor(loss_fn)
            for one in made:
                one.step()
        for schedule in schedules:
            schedule.step()
    return monitor, [p.detach() for p in model.parameters()]


def assert_same(one: sharpkern.Monitor, other: sharpkern.Monitor, slopes: bool = True) -> None:
    assert not other.skipped
    assert len(one.history) == len(other.history)
    for a, b in zip(one.history, other.history, strict=True):
        assert (a.step, a.lr, a.measurement.status) == (b.step, b.lr, "converged")
        assert b.measurement.sharpness == pytest.approx(a.measurement.sharpness, rel=1e-6 if slopes else 2e-2)
        assert (b.measurement.slope is not None) == slopes


@pytest.mark.parametrize("name", KINDS)
def test_around_all_steps_is_what_the_formulas_say_before_them(name: str) -> None:
    (before, weights), (around, same), (_, plain) = (train(name, how) for how in ("before", "around", "not"))
    assert_same(before, around)
    assert all(map(torch.equal, weights, same))
    assert all(map(torch.equal, plain, same))


def logging(made: list[Optimizer], loss_fn: Callable[[], Tensor]) -> None:
    """Evaluates the model between the steps, for its log alone."""
    for one in made:
        one.zero_grad()
    loss_fn().backward()
    for one in made:
        one.step()
        float((loss_fn() * 2).detach())


def backwards(made: list[Optimizer], loss_fn: Callable[[], Tensor]) -> None:
    """Steps in the order that the list has not."""
    logging(made[::-1], loss_fn)


def closures(made: list[Optimizer], loss_fn: Callable[[], Tensor]) -> None:
    def closure() -> Tensor:
        for one in made:
            one.zero_grad()
        loss = loss_fn()
        loss.backward()
        return loss

    first, *others = made
    first.step(closure)
    for one in others:
        one.step()


@pytest.mark.parametrize("loop", [logging, backwards, closures])
def test_any_loop_that_takes_one_gradient_is_measured(loop: Loop) -> None:
    (before, weights), (around, same) = train("SGD, AdamW", "before"), train("SGD, AdamW", "around", loop=loop)
    assert_same(before, around)
    assert all(map(torch.equal, weights, same))


def clipping(made: list[Optimizer], loss_fn: Callable[[], Tensor]) -> None:
    """Clips the gradients of each just before its step, as the Trainer of Lightning does."""
    for one in made:
        one.zero_grad()
    loss_fn().backward()
    for one in made:
        torch.nn.utils.clip_grad_norm_([p for group in one.param_groups for p in group["params"]], 0.05)
        one.step()


def test_gradients_that_are_clipped_between_the_steps_leave_no_slope() -> None:
    (around, same), (_, plain) = (train("SGD, AdamW", how, loop=clipping) for how in ("around", "not"))
    assert all(map(torch.equal, plain, same))
    assert not around.skipped
    assert [record.measurement.slope for record in around.history] == [None] * 4


# Steps that are not of one gradient.


def in_turns(made: list[Optimizer], loss_fn: Callable[[], Tensor]) -> None:
    """Each optimizer has a loss of its own, as of a GAN."""
    for one in made:
        one.zero_grad()
        loss_fn().backward()
        one.step()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step\\(\\)` before:UserWarning")
def test_steps_of_several_gradients_are_skipped_with_the_reason() -> None:
    (around, same), (_, plain) = (train("SGD, AdamW", how, loop=in_turns) for how in ("around", "not"))
    assert not around.history
    # Of the last one nothing tells.
    assert len(around.skipped) == 2 * 4 - 1
    assert around.skipped[0][1] == (
        "all 2 optimizers must step once between one backward pass and the next, got 1 that did; pass those that "
        "step together"
    )
    assert all(map(torch.equal, plain, same))


@pytest.mark.parametrize("left_out", [0, 1])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_that_one_of_them_leaves_out_is_not_taken_for_that_of_the_next(left_out: int, set_to_none: bool) -> None:
    """As a loss scaler does, which knows of each by itself."""
    model = network().double()
    made = KINDS["SGD, AdamW"](model)
    monitor = sharpkern.Monitor(model, made)
    losses: list[Callable[[], Tensor]] = []
    AroundStep(made, lambda: True, lambda direction: monitor(lambda: losses[-1](), direction=direction))
    for step in range(4):
        x, y = batch(step)
        losses.append(lambda x=x, y=y: F.cross_entropy(model(x.double()), y))
        model.zero_grad(set_to_none=set_to_none)
        losses[-1]().backward()
        for number, one in enumerate(made):
            if (step, number) != (1, left_out):
                before = [p.detach().clone() for p in model.parameters()]
                one.step()
    assert [record.step for record in monitor.history] == [0, 2, 3]
    assert [step for step, _ in monitor.skipped] == [1]
    assert not all(map(torch.equal, before, model.parameters()))


def test_a_second_step_of_one_of_them_begins_anew_without_any_forward_pass() -> None:
    """Gradients that are set by hand leave no other trace."""
    model = network()
    made = KINDS["SGD, AdamW"](model)
    lrs: list[float] = []
    AroundStep(made, lambda: True, lambda direction: lrs.append(float(len(direction().parameters))))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    made[0].step()
    with pytest.raises(sharpkern.NoUpdateError, match="got 1 that did"):
        made[0].step()
    made[0].step()
    made[1].step()
    assert lrs == [5.0]


def test_a_step_that_raises_ends_the_steps_together() -> None:
    model = network()
    made = KINDS["SGD, AdamW"](model)
    measured: list[Any] = []
    AroundStep(made, lambda: True, measured.append)

    def broken() -> Tensor:
        raise RuntimeError("broken")

    for step in range(2):
        x, y = batch(step)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        made[0].step()
        if step == 0:
            with pytest.raises(RuntimeError, match="broken"):
                made[1].step(broken)
        else:
            made[1].step()
    assert len(measured) == 1


def test_a_loss_scale_that_a_later_step_takes_out_leaves_no_slope() -> None:
    model = network()
    made = [SGD(model[0].parameters(), lr=0.05), SGD(model[2:].parameters(), lr=0.05, fused=True)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monitor = sharpkern.Monitor(model, made)
    x, y = batch(0)
    loss_fn = lambda: F.cross_entropy(model(x), y)
    scaler.scale(loss_fn()).backward()
    scaler.unscale_(made[0])
    AroundStep(made, lambda: True, lambda direction: monitor(loss_fn, direction=direction))
    for one in made:
        scaler.step(one)
    assert monitor.history[0].measurement.slope is None


def test_the_call_before_the_steps_comes_once() -> None:
    model = network()
    made = KINDS["SGD, AdamW"](model)
    calls: list[list[Tensor]] = []
    around = AroundStep(
        made,
        lambda: True,
        lambda _: pytest.fail("not called"),
        lambda: calls.append([*map(torch.clone, model.parameters())]),
    )
    x, y = batch(0)
    for _ in range(2):
        here = [p.detach().clone() for p in model.parameters()]
        closures(made, lambda: F.cross_entropy(model(x), y))
        assert all(map(torch.equal, calls[-1], here))
    assert len(calls) == 2
    around.remove()
    assert not any(one._optimizer_step_pre_hooks or one._optimizer_step_post_hooks for one in made)


# In Lightning, where the module steps its optimizers by itself.

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches .* is smaller than the logging interval"),
]


class Manual(pl.LightningModule):
    """Two optimizers, measured before their steps or around them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net, self.how = network(), how
        self.monitor: sharpkern.Monitor | None = None

    def configure_optimizers(self) -> Any:
        return KINDS["SGD, AdamW"](self.net)

    def on_train_start(self) -> None:
        self.monitor = sharpkern.Monitor(self.net, self.optimizers())
        if self.how == "around":
            measure = lambda direction: self.monitor(lambda: self.loss(), direction=direction)
            AroundStep(self.optimizers(), lambda: True, measure)

    def training_step(self, batch: Sequence[Tensor]) -> None:
        x, y = batch
        self.loss = lambda: F.cross_entropy(self.net(x), y)
        for one in self.optimizers():
            one.zero_grad()
        loss = self.loss()
        self.manual_backward(loss)
        if self.how == "before":
            self.monitor(self.loss, loss=loss)
        for one in self.optimizers():
            one.step()


def test_lightnings_manual_optimisation_with_two_optimizers() -> None:
    data = TensorDataset(
        *(
            torch.cat(parts).to(kind)
            for parts, kind in zip(zip(*map(batch, range(4)), strict=True), (torch.float64, torch.long), strict=True)
        )
    )
    found = {}
    for how in ("before", "around", "not"):
        module = Manual(how)
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            precision="64-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(data, batch_size=64))
        found[how] = module
    plain = train("SGD, AdamW", "before")
    assert_same(found["before"].monitor, found["around"].monitor)
    assert len(found["before"].monitor.history) == 4
    assert plain[0].history[0].measurement.status == "converged"
    weights = [list(module.parameters()) for module in found.values()]
    assert all(map(torch.equal, weights[0], weights[2]))
    assert all(map(torch.equal, weights[1], weights[2]))


# In torchtitan.


@pytest.fixture(scope="module")
def titan() -> Any:
    return pytest.importorskip(
        "torchtitan.components.optimizer", reason="torchtitan is not installed; .ci/run installs it without its torch"
    )


def titans(titan: Any, how: str) -> tuple[sharpkern.Monitor, list[Tensor]]:
    """A run with the container as it is published, of two parts of a model as of a pipeline, and four optimizers."""
    model = network().double()
    groups = [
        titan.ParamGroupConfig(pattern=r"^0\.weight|^4", optimizer_name="AdamW", optimizer_kwargs={"lr": 3e-3}),
        titan.ParamGroupConfig(pattern=".*", optimizer_name="Adam", optimizer_kwargs={"lr": 1e-3}),
    ]
    config = titan.OptimizersContainer.Config(param_groups=groups, implementation="for-loop")
    optimizer = config.build(model_parts=[model[:2], nn.ModuleDict({"2": model[2], "4": model[4]})])
    assert len(list(optimizer)) == 4
    monitor = sharpkern.Monitor(model, optimizer)
    losses: list[Callable[[], Tensor]] = []
    if how == "around":
        AroundStep(optimizer, lambda: True, lambda direction: monitor(lambda: losses[-1](), direction=direction))
    for step in range(4):
        x, y = batch(step)
        losses.append(lambda x=x, y=y: F.cross_entropy(model(x.double()), y))
        optimizer.zero_grad()
        losses[-1]().backward()
        if how == "before":
            monitor(losses[-1])
        optimizer.step()
    return monitor, [p.detach() for p in model.parameters()]


def test_torchtitans_container_as_it_is_published(titan: Any) -> None:
    (before, weights), (around, same), (_, plain) = (titans(titan, how) for how in ("before", "around", "not"))
    assert_same(before, around)
    assert all(map(torch.equal, weights, plain))
    assert all(map(torch.equal, same, plain))
