"""Optimizers that wrap, hold or accompany others: the direction is what their whole step then does."""

import copy
import re
import weakref
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

import sharpkern
from sharpkern import Direction

SGD, ADAMW, RMSPROP = torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop


class SlowByParameter(Optimizer):
    """Lookahead whose groups and state are the inner ones, slow weights in a dictionary of its own."""

    def __init__(self, optimizer: Optimizer, k: int = 3, alpha: float = 0.5) -> None:
        self.optimizer, self.k, self.alpha, self.count = optimizer, k, alpha, 0
        self.param_groups, self.defaults, self.state = optimizer.param_groups, optimizer.defaults, optimizer.state
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.optimizer.step()
        self.count += 1
        if self.count % self.k == 0:
            for p, slow in self.slow.items():
                slow.lerp_(p, self.alpha)
                p.copy_(slow)


class SlowInState(Optimizer):
    """Lookahead that counts in the groups, and keeps slow weights in the state of its ``base_optimizer``."""

    def __init__(self, base_optimizer: Optimizer, k: int = 3, alpha: float = 0.5) -> None:
        self.base_optimizer = base_optimizer
        self.param_groups, self.defaults = base_optimizer.param_groups, base_optimizer.defaults
        self.state = {}
        for group in self.param_groups:
            group.update(k=k, alpha=alpha, count=0)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.base_optimizer.step()
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                slow = self.base_optimizer.state[p].setdefault("slow", p.detach().clone())
                if group["count"] % group["k"] == 0:
                    slow.add_(p - slow, alpha=group["alpha"])
                    p.copy_(slow)


class SlowInLists(Optimizer):
    """Lookahead with lists in the order of the parameters, and groups that are a property."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.count = optimizer, 0
        self.fast = [p for group in optimizer.param_groups for p in group["params"]]
        self.slow = [p.detach().clone() for p in self.fast]

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.optimizer.step()
        self.count += 1
        for fast, slow in zip(self.fast, self.slow, strict=True):
            if self.count % 2 == 0:
                slow += 0.5 * (fast - slow)
                fast.copy_(slow)


class Orthogonal(Optimizer):
    """Takes the part of the gradient that is parallel to the weights away, and lets the inner optimizer step."""

    def __init__(self, params: Any, base: Callable[..., Optimizer], **options: Any) -> None:
        super().__init__(params, {})
        self.base = base(self.param_groups, **options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.sub_(p * (p * p.grad).sum() / p.square().sum())
        self.base.step()


class ScheduleFree(Optimizer):
    """Weights are an average of what the inner optimizer moves, and of themselves."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, base.defaults)
        self.base, self.count = base, 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                z = state.setdefault("z", p.detach().clone())
                state["x"] = p.detach().clone()
                p.copy_(z)
        self.base.step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["z"].copy_(p)
                p.copy_(self.state[p]["x"].lerp(p, 1 / (self.count + 1)))


class Centralised(SGD):
    """A subclass that writes its gradients."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() > 1:
                    p.grad.sub_(p.grad.mean(1, keepdim=True))
        super().step()


class GroupsOfItsOwn(Optimizer):
    """Groups are copies that no scheduler knows of, and have another learning rate than those in use."""

    def __init__(self, optimizer: Optimizer) -> None:
        groups = [{"params": group["params"]} for group in optimizer.param_groups]
        super().__init__(groups, {"lr": 1.0})
        self.inner = optimizer

    def step(self, closure: None = None) -> None:
        self.inner.step()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.99)


class Remembering(SGD):
    """Knows its parameters by their ids, weakly, and in an object of its own; in sets too."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        everything = [p for group in self.param_groups for p in group["params"]]
        self.by_id: dict[int, dict[str, Tensor]] = {}
        self.weakly = WeakTensorKeyDictionary({p: torch.zeros_like(p) for p in everything})
        self.holder = SimpleNamespace(sums={id(p): torch.zeros_like(p) for p in everything})
        self.large = {id(p) for p in everything if p.numel() > 10}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                average = self.by_id.setdefault(id(p), {"average": torch.zeros_like(p)})["average"]
                for memory in (average, self.weakly[p], self.holder.sums[id(p)]):
                    memory.lerp_(p.grad, 0.3)
                    p.sub_(memory, alpha=group["lr"] * (2 if id(p) in self.large else 1))


def tuned(base: type[Optimizer]) -> type[Optimizer]:
    """A class made of another, that scales the way from where the run began."""

    class Tuned(base):  # type: ignore[misc, valid-type]
        def step(self, closure: None = None) -> None:
            params = [p for group in self.param_groups for p in group["params"]]
            origin = self.__dict__.setdefault("origin", [p.detach().clone() for p in params])
            super().step()
            with torch.no_grad():
                for p, start in zip(params, origin, strict=True):
                    p.copy_(start.lerp(p, 0.7))

    return Tuned


WRAPPERS: dict[str, Callable[[Any], Optimizer]] = {
    "Lookahead, shared": lambda params: SlowByParameter(SGD(params, lr=0.3, momentum=0.9)),
    "Lookahead, state": lambda params: SlowInState(ADAMW(params, lr=1e-2)),
    "Lookahead, lists": lambda params: SlowInLists(RMSPROP(params, lr=1e-2)),
    "Lookahead of Adadelta": lambda params: SlowByParameter(torch.optim.Adadelta(params, lr=1.0)),
    "OrthoGrad": lambda params: Orthogonal(params, SGD, lr=0.1, momentum=0.9),
    "schedule-free": lambda params: ScheduleFree(ADAMW(params, lr=1e-2)),
    "gradient centralisation": lambda params: Centralised(params, lr=0.1, momentum=0.9),
    "groups of its own": lambda params: GroupsOfItsOwn(SGD(params, lr=0.1)),
    "a class made of another": lambda params: tuned(ADAMW)(params, lr=1e-2),
    "parameters by id": lambda params: Remembering(params, lr=0.1),
    "wrapper of a wrapper": lambda params: SlowByParameter(Orthogonal(params, ADAMW, lr=1e-2)),
}


class Container(Optimizer):
    """Holds optimizers of parts of a model; its own group keeps the learning rate it was made with."""

    def __init__(self, optimizers: Iterable[Optimizer], **options: Any) -> None:
        self.optimizers = list(optimizers)
        params = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        super().__init__(params, options)

    def __iter__(self) -> Any:
        return iter(self.optimizers)

    def step(self, closure: None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class HandsOn(Container):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for _, optimizer in enumerate(list(self.optimizers)):
            optimizer.step()
        return loss


class Clipping(Container):
    """A container whose step does more than those of its parts."""

    def step(self, closure: None = None) -> None:
        for optimizer in self.optimizers:
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.01)
        super().step()


class Chained:
    """No optimizer for torch."""

    def __init__(self, **optimizers: Optimizer) -> None:
        self.chained_optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.chained_optimizers.values():
            optimizer.step()


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)).double()


def backward(model: nn.Module, seed: int = 0) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, 5, generator=generator).double(), torch.randint(3, (16,), generator=generator)
    loss_fn = lambda: nn.functional.cross_entropy(model(x), y)
    model.zero_grad()
    loss_fn().backward()
    return loss_fn


def parts(model: nn.Sequential) -> list[Optimizer]:
    """Three optimizers: one with a closed form, one by steps on a copy, one that draws random numbers."""
    return [
        torch.optim.RAdam(model[0].parameters(), lr=3e-3),
        ADAMW([{"params": model[2].parameters(), "lr": 2e-3}], lr=1.0, weight_decay=0.1),
        Noisy(model[4].parameters(), lr=0.05),
    ]


class Noisy(SGD):
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.add_(torch.randn_like(p) + p.grad, alpha=-self.param_groups[0]["lr"])


SEVERAL: dict[str, Callable[[list[Optimizer]], Any]] = {
    "list": list,
    "tuple": tuple,
    "nested lists": lambda made: [made[:1], [made[1], (made[2],)]],
    "container": lambda made: Container(made, lr=0.7),
    "container without learning rate": lambda made: Container(made),
    "containers in a list": lambda made: [Container(made[:2], lr=0.7), made[2]],
    "hands closures on": lambda made: HandsOn(made, lr=0.7),
    "no optimizer for torch": lambda made: Chained(a=made[0], b=made[1], c=made[2]),
}


def largest_miss(model: nn.Module, optimizer: Any, step: Callable[[], object], num_steps: int = 7) -> float:
    """Of lr·Δθ against the step really taken, relative, over a run in which learning rates grow."""
    worst = 0.0
    for i in range(num_steps):
        backward(model, i)
        direction = Direction.from_optimizer(optimizer)
        moved = dict(zip(map(id, direction.parameters), direction.tensors, strict=True))
        before = [p.detach().clone() for p in model.parameters()]
        step()
        for p, old in zip(model.parameters(), before, strict=True):
            miss = old - p.detach() - direction.lr * moved.get(id(p), 0)
            worst = max(worst, float(miss.norm() / (old - p.detach()).norm()))
    return worst


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_step_of_a_wrapper_is_its_own(name: str) -> None:
    model = make_model()
    optimizer = WRAPPERS[name](model.parameters())
    assert largest_miss(model, optimizer, optimizer.step) < 1e-10


@pytest.mark.parametrize("name", WRAPPERS)
def test_asking_a_wrapper_leaves_no_trace(name: str) -> None:
    ends = []
    for asks in (True, False):
        model = make_model()
        optimizer = WRAPPERS[name](model.parameters())
        for i in range(7):
            backward(model, i)
            if asks:
                Direction.from_optimizer(optimizer)
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


def test_the_learning_rate_of_a_wrapper_is_the_one_in_use() -> None:
    model = make_model()
    inner = SGD(model.parameters(), lr=0.1)
    backward(model)
    optimizer = GroupsOfItsOwn(inner)
    inner.param_groups[0]["lr"] = 0.05
    assert Direction.from_optimizer(optimizer).lr == 0.05


def test_slow_weights_of_16_bit_parameters_are_widened_with_them() -> None:
    model = make_model().bfloat16()
    optimizer = SlowByParameter(SGD(model.parameters(), lr=1e-4), k=1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    direction = Direction.from_optimizer(optimizer)
    assert all(t.dtype is torch.float32 for t in direction.tensors)
    torch.testing.assert_close(direction.tensors[0], torch.full((8, 5), 0.5), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", SEVERAL)
def test_several_optimizers_make_one_direction(name: str) -> None:
    model = make_model()
    made = parts(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: (step + 1) / 10) for one in made]
    backward(model)

    def step() -> None:
        for one, schedule in zip(made, schedules, strict=True):
            one.step()
            schedule.step()

    optimizer = SEVERAL[name](made)
    assert Direction.from_optimizer(optimizer).lr == pytest.approx(3e-4)
    assert largest_miss(model, optimizer, step) < 1e-10


def test_a_container_that_only_hands_its_step_on_needs_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharpkern.directions.from_optimizer.shadow_step", lambda *_: pytest.fail("stepped on a copy"))
    model = make_model()
    backward(model)
    made = [SGD(model[0].parameters(), lr=0.1), ADAMW(model[2:].parameters(), lr=1e-2)]
    for container in (Container(made), HandsOn(made), Chained(a=made[0], b=made[1])):
        assert len(Direction.from_optimizer(container).parameters) == 5


def test_a_container_that_does_more_is_stepped_as_a_whole() -> None:
    model = make_model()
    optimizer = Clipping(parts(model), lr=0.7)
    backward(model)
    assert Direction.from_optimizer(optimizer).lr == 3e-3
    assert largest_miss(model, optimizer, optimizer.step) < 1e-10


def test_wrappers_that_add_nothing_are_looked_through_by_their_own_type() -> None:
    accelerate = pytest.importorskip("accelerate", reason="an extra")
    model = make_model()
    wrapped = accelerate.Accelerator(cpu=True).prepare(*parts(model))
    backward(model)
    assert_same(Direction.from_optimizer(wrapped), Direction.from_optimizer([one.optimizer for one in wrapped]))

    class AddsDecay(type(wrapped[0])):  # type: ignore[misc]
        def step(self, closure: None = None) -> None:
            super().step()
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.mul_(0.5)

    optimizer = AddsDecay(SGD(model.parameters(), lr=0.1))
    assert largest_miss(model, optimizer, optimizer.step) < 1e-10


def test_lightnings_wrappers_are_looked_through() -> None:
    pytest.importorskip("lightning", reason="an extra")
    from lightning.fabric import Fabric
    from lightning.pytorch.core.optimizer import LightningOptimizer

    model = make_model()
    optimizer = ADAMW(model.parameters(), lr=1e-2)
    backward(model)
    expected = Direction.from_optimizer(optimizer)
    assert_same(Direction.from_optimizer(LightningOptimizer(optimizer)), expected)
    _, prepared = Fabric(accelerator="cpu", devices=1).setup(model, optimizer)
    assert_same(Direction.from_optimizer(prepared), expected)


def assert_same(a: Direction, b: Direction) -> None:
    assert list(map(id, a.parameters)) == list(map(id, b.parameters))
    assert all(map(torch.equal, a.tensors, b.tensors))
    assert (a.lr, a.slope) == (b.lr, b.slope)


@pytest.mark.parametrize("known_as", ["part", "container"])
def test_each_of_several_has_a_loss_scale_of_its_own(known_as: str) -> None:
    model = make_model().float()
    made = [SGD(model[0].parameters(), lr=0.1), ADAMW(model[2:].parameters(), lr=1e-2)]
    container = Container(made, lr=1.0)
    generator = torch.randn(16, 5)
    loss = model(generator).square().mean()
    grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad.clone()
    expected = Direction.from_optimizer(made)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(made[1] if known_as == "part" else container)
    direction = Direction.from_optimizer(container, scaler=scaler)
    for a, b in zip(direction.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_masters_belong_to_the_parameters_of_any_of_several() -> None:
    model = make_model().float()
    masters = {p: p.detach() + 1e-4 for p in model[2].parameters()}
    backward_of_ones(model)
    made = [SGD(model[0].parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)]
    direction = Direction.from_optimizer(made, masters=masters)
    assert [master is not None for master in direction.masters] == [False, False, True]


def test_parameters_of_several_that_share_memory_move_by_the_sum() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight.data = model[0].weight.data.t()
    backward_of_ones(model)
    made = [SGD(model[0].parameters(), lr=0.1), SGD(model[1].parameters(), lr=0.2)]
    direction = Direction.from_optimizer(made)
    assert all(torch.equal(delta, torch.full((4, 4), 3.0)) for delta in direction.tensors)
    assert direction.norm_sq == 9 * 16


def backward_of_ones(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)


def test_thresholds_and_preconditioners_take_several_of_one_kind() -> None:
    model = make_model()
    made = [ADAMW(model[0].parameters(), lr=1e-2), ADAMW(model[2:].parameters(), lr=5e-3)]
    joint = ADAMW([{"params": model[0].parameters()}, {"params": model[2:].parameters(), "lr": 5e-3}], lr=1e-2)
    assert sharpkern.stability_threshold(made) == sharpkern.stability_threshold(joint)
    backward(model)
    made[0].step(), made[1].step()
    joint.load_state_dict(copy.deepcopy(joint.state_dict()))
    joint.state.update({p: state for one in made for p, state in one.state.items()})
    assert_same(Direction.from_gradients(model, made), Direction.from_gradients(model, joint))
    with pytest.raises(TypeError, match="all be SGD, or all Adam or AdamW, got both kinds, whose thresholds"):
        sharpkern.stability_threshold([made[0], SGD(model[2:].parameters(), lr=0.1)])
    with pytest.raises(TypeError, match=r"SGD, Adam or AdamW .*, got SlowByParameter; unwrap it"):
        sharpkern.stability_threshold(SlowByParameter(made[0]))
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Adam or AdamW, got SlowByParameter"):
        Direction.from_gradients(model, SlowByParameter(made[0]))


# What is refused.


class PlainWrapper:
    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()


class OptimizersInBackwardContainer(Container):
    def step(self, closure: None = None) -> None:
        pass


class CallsTheLoss(SGD):
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.forward_backward()
        super().step()


def calls_the_loss(model: nn.Module) -> Optimizer:
    optimizer = CallsTheLoss(model.parameters(), lr=0.1)
    optimizer.forward_backward = lambda: model(torch.ones(1, 5).double()).sum().backward()
    return optimizer


def points_back(model: nn.Module) -> Optimizer:
    optimizer = Centralised(model.parameters(), lr=0.1)
    optimizer.model = weakref.ref(model)
    return optimizer


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1)


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "empty list": (lambda model: [], ValueError, "must hold at least one optimizer, got an empty list; pass those"),
    "no optimizer": (
        lambda model: [sgd(model), "adamw"],
        TypeError,
        "must be a torch.optim.Optimizer or a list of them, got str; pass the one inside of it if that does the whole",
    ),
    "plain wrapper": (
        lambda model: PlainWrapper(sgd(model)),
        TypeError,
        "got PlainWrapper; pass the one inside of it if that does the whole step, otherwise take the direction around "
        "it: before = {p: p.detach().clone() for p in model.parameters()}; optimizer.step(); direction = Direction.",
    ),
    "twice": (
        lambda model: [sgd(model[2]), sgd(model)],
        ValueError,
        "parameter 2 of group 0 of optimizer 1 (shape [8, 8]) must stand in one optimizer, got it in optimizer 0 too",
    ),
    "in backward": (
        lambda model: OptimizersInBackwardContainer([sgd(model)], lr=0.1),
        TypeError,
        "must step after the backward pass, got OptimizersInBackwardContainer, which steps inside of it; take the",
    ),
    "calls the loss": (
        calls_the_loss,
        TypeError,
        "got CallsTheLoss, which fails with ValueError: 'forward_backward' holds a function of the run's own tensors",
    ),
    "points back": (points_back, TypeError, "which fails with ValueError: 'model' holds a reference of the run's own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_step_to_foresee_is_refused(name: str) -> None:
    make, error, words = REFUSED[name]
    model = make_model()
    optimizer = make(model)
    backward(model)
    grads = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(error, match=re.escape(words)):
        sharpkern.Monitor(model, optimizer)(lambda: model(torch.ones(1, 5)).sum())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))


def climbing(*names: str, kind: type = SGD, **attributes: Any) -> type:
    """A sharpness-aware class, with methods of these names."""
    body = {name: lambda self, *args: None for name in names}
    return type("Climbing", (kind,), {**body, **attributes})


class Rho(Optimizer):
    """Wraps a base optimizer, and takes a closure."""

    def __init__(self, params: Any, base: Callable[..., Optimizer], *, shares: bool, **options: Any) -> None:
        super().__init__(params, {"rho": 0.05, **options})
        self.base_optimizer = base(self.param_groups if shares else self.param_groups[0]["params"], **options)
        if shares:
            self.param_groups = self.base_optimizer.param_groups

    def step(self, closure: Any = None) -> None:
        raise AssertionError("needs a closure")


class RhoInGroups(Rho):
    def __init__(self, params: Any, base: Callable[..., Optimizer], **options: Any) -> None:
        Optimizer.__init__(self, [{"params": list(params), "rho": 0.05, **options}], {})
        self.base_optimizer = base(self.param_groups, **options)


class SAM(SGD):
    """One class, without a base."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None


class Minimizer:
    """No optimizer for torch."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.rho = optimizer, 0.5

    def ascent_step(self) -> None: ...

    def descent_step(self) -> None: ...


SHARPNESS_AWARE: dict[str, Callable[[nn.Module], Any]] = {
    "first and second": lambda model: climbing("first_step", "second_step")(model.parameters(), lr=0.1),
    "ascent and descent": lambda model: climbing("ascent_step", "descent_step")(model.parameters(), lr=0.1),
    "perturb and back": lambda model: climbing("perturb_weights", "un_perturb")(model.parameters(), lr=0.1),
    "shared groups": lambda model: Rho(model.parameters(), SGD, shares=True, lr=0.1),
    "groups of its own": lambda model: Rho(model.parameters(), SGD, shares=False, lr=0.1),
    "radius in groups": lambda model: RhoInGroups(model.parameters(), SGD, lr=0.1),
    "climb and descend": lambda model: climbing("climb", "descend")(model.parameters(), lr=0.1),
    "by name": lambda model: SAM(model.parameters(), lr=0.1),
    "no optimizer": lambda model: Minimizer(sgd(model)),
    "inside of a wrapper": lambda model: SlowByParameter(SAM(model.parameters(), lr=0.1)),
    "in a list": lambda model: [sgd(model[0]), SAM(model[2:].parameters(), lr=0.1)],
}


@pytest.mark.parametrize("name", SHARPNESS_AWARE)
def test_sharpness_aware_optimizers_are_refused_with_the_way_to_measure_them(name: str) -> None:
    model = make_model()
    optimizer = SHARPNESS_AWARE[name](model)
    backward(model)
    with pytest.raises(TypeError, match=r"sharpness-aware: its step starts at θ.*direction = Direction\.between\("):
        Direction.from_optimizer(optimizer)


class Perturbing(SGD):
    """Takes its gradient at θ + e, and its step from θ."""

    @torch.no_grad()
    def first_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["at"] = p.detach().clone()
            p.add_(p.grad.sign(), alpha=0.05)

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["at"])
        self.step()


def test_the_lines_that_the_error_gives_measure_a_sharpness_aware_step() -> None:
    model = make_model()
    optimizer = Perturbing(model.parameters(), lr=0.1)
    monitor = sharpkern.Monitor(model, optimizer)
    before = {p: p.detach().clone() for p in model.parameters()}
    loss_fn = backward(model)
    optimizer.first_step()
    backward(model)
    optimizer.second_step()
    direction = Direction.between(before, model, 0.1)
    with torch.no_grad():
        for p, value in before.items():
            p.copy_(value)
    assert monitor(loss_fn, direction=direction).status == "converged"
    assert direction.tensors[0].norm() == pytest.approx(float(model[0].weight.grad.norm()), rel=1e-6)


class Sophia(SGD):
    """Its rho is no radius."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            group["rho"] = 0.04
        self.defaults["rho"] = 0.04


@pytest.mark.parametrize("kind", [Sophia, torch.optim.Adadelta])
def test_a_rho_of_another_meaning_is_not_taken_for_a_radius(kind: type[Optimizer]) -> None:
    model = make_model()
    backward(model)
    for optimizer in (kind(model.parameters(), lr=0.1), SlowInState(kind(model.parameters(), lr=0.1))):
        assert Direction.from_optimizer(optimizer).norm_sq > 0
