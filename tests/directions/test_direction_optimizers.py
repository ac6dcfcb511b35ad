"""Every optimizer's direction is what its real step then does, and asking for it leaves no trace."""

import copy
import math
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lion_pytorch import Lion
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import sharpkern
from sharpkern.directions.direction import Direction
from sharpkern.errors import NoUpdateError
from sharpkern.memory.counter import bytes_of, peak_bytes

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
STEPS = 50


class Signum(torch.optim.Optimizer):
    """A home-made optimizer: signs of a momentum, noise, decay that does not know of the gradient."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})
        self.num_calls = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.num_calls += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.1)
                noise = torch.randn_like(p) * (0.5 + 0.1 * random.random() + 0.1 * np.random.rand())
                p.add_(momentum.sign() + 0.01 * noise + 0.1 * p, alpha=-group["lr"])


class AdamWithClipping(torch.optim.Adam):
    """A subclass of a known optimizer, whose closed form is no longer known."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.01)
        super().step()


def variant(kind: type[torch.optim.Optimizer], **options: Any) -> MakeOptimizer:
    return lambda params: kind(params, **options)


SGD, ADAM, ADAMW, RMSPROP = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
EXACT = {
    "sgd": variant(SGD, lr=0.1),
    "sgd-decay": variant(SGD, lr=0.1, weight_decay=0.1),
    "sgd-momentum": variant(SGD, lr=0.1, momentum=0.9),
    "sgd-dampening": variant(SGD, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "sgd-nesterov": variant(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd-maximize": variant(SGD, lr=0.01, momentum=0.9, weight_decay=0.01, maximize=True),
    "sgd-foreach": variant(SGD, lr=0.1, momentum=0.9, weight_decay=0.01, foreach=True),
    "sgd-tensor-lr": variant(SGD, lr=torch.tensor(0.1), momentum=0.9),
    "lion": variant(Lion, lr=0.001),
    "rmsprop-momentum": variant(RMSPROP, lr=0.01, momentum=0.5, centered=True, weight_decay=0.01),
    "rmsprop-maximize": variant(RMSPROP, lr=0.001, momentum=0.5, maximize=True),
}
WITHIN_ULPS = {
    "sgd-fused": variant(SGD, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "adam": variant(ADAM, lr=0.01),
    "adam-decay": variant(ADAM, lr=0.01, weight_decay=0.1),
    "adam-amsgrad": variant(ADAM, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adam-maximize": variant(ADAM, lr=0.001, maximize=True),
    "adam-betas": variant(ADAM, lr=0.01, betas=(0.4, 0.7), eps=1e-3),
    "adam-foreach": variant(ADAM, lr=0.01, foreach=True),
    "adam-fused": variant(ADAM, lr=0.01, weight_decay=0.1, fused=True),
    "adam-tensor-lr": variant(ADAM, lr=torch.tensor(0.01)),
    "adamw": variant(ADAMW, lr=0.01, weight_decay=0.1),
    "adamw-amsgrad": variant(ADAMW, lr=0.01, amsgrad=True),
    "adamw-foreach": variant(ADAMW, lr=0.01, foreach=True),
    "adamw-fused": variant(ADAMW, lr=0.01, weight_decay=0.1, fused=True),
    "adamw-maximize": variant(ADAMW, lr=0.001, weight_decay=0.1, maximize=True),
    "lion-decay": variant(Lion, lr=0.001, weight_decay=0.1),
    "lion-decoupled": variant(Lion, lr=0.001, weight_decay=0.0001, decoupled_weight_decay=True),
    "rmsprop": variant(RMSPROP, lr=0.01),
    "rmsprop-centered": variant(RMSPROP, lr=0.01, centered=True, weight_decay=0.1),
    "rmsprop-foreach": variant(RMSPROP, lr=0.01, foreach=True, momentum=0.5, centered=True),
}
BY_SHADOW_STEP = {
    "adafactor": variant(torch.optim.Adafactor, lr=0.01),
    "radam": variant(torch.optim.RAdam, lr=0.01),
    "nadam": variant(torch.optim.NAdam, lr=0.01),
    "adagrad": variant(torch.optim.Adagrad, lr=0.01),
    "adadelta": variant(torch.optim.Adadelta, lr=0.1),
    "adamax": variant(torch.optim.Adamax, lr=0.01),
    "asgd": variant(torch.optim.ASGD, lr=0.01),
    "rprop": variant(torch.optim.Rprop, lr=0.01),
    "home-made": variant(Signum),
    "subclass": variant(AdamWithClipping, lr=0.01),
}
if hasattr(torch.optim, "Muon"):
    BY_SHADOW_STEP["muon"] = variant(torch.optim.Muon, lr=0.01)
ALL = EXACT | WITHIN_ULPS | BY_SHADOW_STEP


def make_model(*, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 4, bias=bias))


def make_run(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    # Muon takes matrices only.
    model = make_model(bias=name != "muon")
    return model, ALL[name](model.parameters())


def backward(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    model.zero_grad()
    x, y = (torch.randn(16, size, generator=generator) for size in (6, 4))
    nn.functional.mse_loss(model(x), y).backward()


def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Direction, list[Tensor], list[Tensor]]]:
    """Train; at each step yield the direction asked for before it, and the weights before and after it."""
    for step in range(STEPS):
        backward(model, step)
        direction = Direction.from_optimizer(optimizer)
        before = [p.detach().clone() for p in direction.parameters]
        optimizer.step()
        yield direction, before, [p.detach().clone() for p in direction.parameters]


def ulps(direction: Direction, before: list[Tensor], after: list[Tensor]) -> float:
    """Largest error of θ − ηΔθ against the real step, in units of the rounding of θ and ηΔθ."""
    worst = 0.0
    for theta, delta, real in zip(before, direction.tensors, after, strict=True):
        theta, delta, real = theta.double(), direction.lr * delta.double(), real.double()
        worst = max(worst, float(((theta - delta - real).abs() / (theta.abs() + delta.abs())).max()))
    return worst / torch.finfo(torch.float32).eps


def trace(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Everything that asking for a direction must leave alone."""
    state = {id(p): {k: (id(v), copy.deepcopy(v)) for k, v in s.items()} for p, s in optimizer.state.items()}
    weights = [(id(p), p.detach().clone(), p._version) for p in model.parameters()]
    grads = [(id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    streams = [torch.get_rng_state(), random.getstate(), np.random.get_state()]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return [state, weights, grads, streams, copy.deepcopy(groups), sorted(vars(optimizer))]


def seed_streams() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", EXACT)
def test_it_is_bit_for_bit_what_the_step_writes(name):
    for direction, before, after in steps(*make_run(name)):
        for theta, delta, real in zip(before, direction.tensors, after, strict=True):
            assert torch.equal(theta.add(delta, alpha=-direction.lr), real)


@pytest.mark.parametrize("name", WITHIN_ULPS)
def test_it_is_within_ulps_of_what_the_step_writes(name):
    worst = max(ulps(*one) for one in steps(*make_run(name)))
    assert worst < 3, worst


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"amsgrad": True, "weight_decay": 0.1}])
@pytest.mark.parametrize("kind", [ADAM, ADAMW])
def test_capturable_adam_is_within_ulps_of_what_the_step_writes(kind, options, monkeypatch):
    """Its bias corrections are of float32, up to 3e-5 off; torch keeps it from CPUs, where nothing captures."""
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_get_capturable_supported_devices", lambda **_: ["cpu"])
    model = make_model()
    optimizer = kind(model.parameters(), lr=0.01, capturable=True, **options)
    worst = max(ulps(*one) for one in steps(model, optimizer))
    assert worst < 3, worst


@pytest.mark.parametrize("name", BY_SHADOW_STEP)
def test_any_other_optimizer_is_what_its_step_writes(name):
    worst = max(ulps(*one) for one in steps(*make_run(name)))
    assert worst < 2, worst


@pytest.mark.parametrize("name", ALL)
def test_asking_leaves_no_trace(name):
    """Trap 8, at the first step, where no state exists yet, and later."""
    model, optimizer = make_run(name)
    for step in range(3):
        backward(model, step)
        before = trace(model, optimizer)
        Direction.from_optimizer(optimizer)
        assert equal(before, trace(model, optimizer))
        optimizer.step()


@pytest.mark.parametrize("name", ["sgd-momentum", "adamw", "home-made"])
def test_a_run_that_asks_ends_where_a_run_ends_that_does_not(name):
    ends = []
    for asks in (True, False):
        model, optimizer = make_run(name)
        seed_streams()
        for step in range(STEPS):
            backward(model, step)
            if asks:
                Direction.from_optimizer(optimizer)
            optimizer.step()
        ends.append([*model.state_dict().values(), *(s for state in optimizer.state.values() for s in state.values())])
    assert equal(*ends)


@pytest.mark.parametrize("name", ["sgd-nesterov", "adam-amsgrad", "adamw", "lion", "rmsprop", "adafactor", "home-made"])
def test_the_state_of_a_checkpoint_is_read_as_well(name):
    model, optimizer = make_run(name)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    resumed = ALL[name](model.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    backward(model, 9)
    seed_streams()
    expected = Direction.from_optimizer(optimizer)
    assert equal(Direction.from_optimizer(resumed).tensors, expected.tensors)


def test_a_step_count_kept_as_a_number_is_read_as_well():
    model, optimizer = make_run("adamw")
    backward(model)
    optimizer.step()
    expected = Direction.from_optimizer(optimizer)
    for state in optimizer.state.values():
        state["step"] = float(state["step"])
    assert equal(Direction.from_optimizer(optimizer).tensors, expected.tensors)


def test_adamw_without_the_group_entry_of_newer_torch_decays_decoupled():
    model, optimizer = make_run("adamw")
    backward(model)
    expected = Direction.from_optimizer(optimizer)
    for group in optimizer.param_groups:
        group.pop("decoupled_weight_decay", None)
    assert equal(Direction.from_optimizer(optimizer).tensors, expected.tensors)


def test_slope_and_norm_are_the_float64_sums_to_the_digits_of_float32():
    model, optimizer = make_run("adamw")
    backward(model)
    direction = Direction.from_optimizer(optimizer)
    pairs = list(zip(direction.parameters, direction.tensors, strict=True))
    products = [d.double() * p.grad.double() for p, d in pairs]
    error = abs(direction.slope - sum(float(one.sum()) for one in products))
    assert error < 1e-6 * sum(float(one.abs().sum()) for one in products)
    assert direction.norm_sq == pytest.approx(sum(float(d.double().square().sum()) for _, d in pairs), rel=1e-6)
    assert direction.nbytes == 4 * sum(p.numel() for p in model.parameters())


def test_a_scheduler_and_hooks_stay_behind():
    """The real step is patched by the scheduler and watched by hooks, of the instance and of all optimizers."""
    model, optimizer = make_run("home-made")
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    calls: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    try:
        backward(model)
        Direction.from_optimizer(optimizer)
        assert calls == []
        assert optimizer.num_calls == 0
        optimizer.step()
        assert calls == ["global pre", "pre", "post", "global post"]
    finally:
        for handle in handles:
            handle.remove()


def test_an_optimizer_that_keeps_its_model_steps_on_the_copy():
    class Keeper(Signum):
        """Reaches its parameters by way of the model, and reads marks on them."""

        def step(self, closure: None = None) -> None:
            for p in self.model.parameters():
                p.data.add_(p.grad, alpha=-p.factor * self.param_groups[0]["lr"])

    model = make_model()
    optimizer = Keeper(model.parameters(), lr=0.1)
    optimizer.model = model
    for p in model.parameters():
        p.factor = 3.0
    backward(model)
    before = [p.detach().clone() for p in model.parameters()]
    direction = Direction.from_optimizer(optimizer)
    assert equal(before, [p.detach() for p in model.parameters()])
    for p, delta in zip(direction.parameters, direction.tensors, strict=True):
        torch.testing.assert_close(delta, 3 * p.grad, rtol=1e-5, atol=1e-5)


def test_what_moves_without_a_gradient_leaves_no_slope():
    class Decay(Signum):
        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            for p in self.param_groups[0]["params"]:
                p.mul_(1 - self.param_groups[0]["lr"])

    model = make_model()
    optimizer = Decay(model.parameters(), lr=0.1)
    backward(model)
    assert Direction.from_optimizer(optimizer).slope is not None
    model[0].weight.grad = None
    direction = Direction.from_optimizer(optimizer)
    assert direction.slope is None
    assert len(direction.parameters) == 4


def test_adam_of_16_bit_weights_does_not_lose_the_step():
    """θ − θ′ of a bfloat16 step is mostly zeros; the shadow step is taken in float32."""
    fine, coarse = make_model(), make_model().bfloat16()
    fine.load_state_dict(coarse.state_dict())
    backward(fine)
    directions = []
    for model in (fine, coarse):
        for p, source in zip(model.parameters(), fine.parameters(), strict=True):
            p.grad = source.grad.bfloat16().to(p.dtype)
        optimizer = torch.optim.NAdam(model.parameters(), lr=1e-5)
        for _ in range(2):
            directions.append(Direction.from_optimizer(optimizer))
            optimizer.step()
    assert all(t.dtype is torch.float32 for t in directions[2].tensors)
    for a, b in zip(directions[0].tensors, directions[2].tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=0.01, atol=0.01)
    # The second step finds bfloat16 state.
    for a, b in zip(directions[1].tensors, directions[3].tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["sgd-nesterov", "adam-decay", "adamw", "rmsprop-momentum", "lion-decay"])
def test_closed_forms_keep_the_dtype_of_parameter_and_state(name):
    model = make_model().bfloat16()
    optimizer = ALL[name](model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert all(t.dtype is torch.bfloat16 for t in Direction.from_optimizer(optimizer).tensors)
    optimizer.step()
    expected = [t.float() for t in Direction.from_optimizer(optimizer).tensors]
    for state in optimizer.state.values():
        state.update({key: value.float() for key, value in state.items() if key != "step"})
    widened = Direction.from_optimizer(optimizer).tensors
    assert all(t.dtype is torch.float32 for t in widened)
    for a, b in zip(widened, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("name", ["sgd-nesterov", "adam-decay", "adamw-amsgrad", "rmsprop-momentum"])
def test_closed_forms_allocate_the_direction_and_four_of_one_parameter(name):
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(20)])
    optimizer = ALL[name](model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept: list[Direction] = []
    peak = peak_bytes(lambda: kept.append(Direction.from_optimizer(optimizer)))
    # Inner products widen one parameter twice to float64; what is left over are 0-dim tensors.
    assert bytes_of(model.parameters()) == kept[0].nbytes <= peak <= kept[0].nbytes + 4 * 64 * 64 * 4 + 1000


def test_the_share_of_zero_gradients_is_zero_but_not_an_error():
    model, optimizer = make_run("sgd-momentum")
    backward(model)
    for p in model[0].parameters():
        p.grad.zero_()
    direction = Direction.from_optimizer(optimizer)
    assert float(direction.tensors[0].abs().sum()) == 0
    assert math.isfinite(direction.slope)


@pytest.mark.parametrize("kind", [SGD, ADAMW, torch.optim.NAdam])
def test_the_slope_of_what_maximizes_is_that_of_what_falls(kind):
    """Climbing −L is descending L: the same update, the same slope, the same sharpness."""
    found = []
    for sign, options in ((1, {}), (-1, {"maximize": True})):
        model = make_model()
        optimizer = kind(model.parameters(), lr=0.01, **options)
        x, y = torch.ones(4, 6), torch.zeros(4, 4)
        loss_fn = lambda model=model, x=x, y=y: nn.functional.mse_loss(model(x), y)
        (sign * loss_fn()).backward()
        direction = Direction.from_optimizer(optimizer)
        found.append((direction, sharpkern.critical_sharpness(model, loss_fn, direction)))
    (descent, plain), (climb, same) = found
    assert climb.slope == pytest.approx(descent.slope, rel=1e-6)
    assert climb.slope > 0
    assert (same.status, same.sharpness) == ("converged", pytest.approx(plain.sharpness, rel=1e-6))


def test_where_some_groups_climb_what_others_descend_no_slope_is_known():
    model = make_model()
    backward(model)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "maximize": True}]
    assert Direction.from_optimizer(SGD(groups, lr=0.1)).slope is None


def test_an_attribute_says_as_well_that_an_optimizer_maximizes():
    class Climber(Signum):
        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            for p in self.param_groups[0]["params"]:
                p.add_(p.grad, alpha=self.param_groups[0]["lr"])

    model = make_model()
    backward(model)
    optimizer = Climber(model.parameters())
    optimizer.maximize = True
    assert Direction.from_optimizer(optimizer).slope > 0


@pytest.mark.parametrize("name", ["sgd-momentum", "adamw", "nadam"])
def test_gradients_that_are_all_zero_are_no_gradients(name):
    """Moments still move the weights, but no slope says whether downhill; one gradient left is enough."""
    model, optimizer = make_run(name)
    backward(model)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    with pytest.raises(NoUpdateError, match=r"got 4 and all gradients are zero: measure between backward\(\) and zero"):
        Direction.from_optimizer(optimizer)
    model[2].bias.grad[0] = 1e-3
    assert Direction.from_optimizer(optimizer).norm_sq > 0


def test_an_optimizer_that_rests_in_its_first_steps_is_not_blamed_on_the_loss():
    class Rests(Signum):
        def step(self, closure: None = None) -> None:
            self.num_calls += 1
            if self.num_calls > 1:
                super().step()

    model = make_model()
    optimizer = Rests(model.parameters())
    backward(model)
    with pytest.raises(NoUpdateError, match="got all zeros; the gradients are not zero, but this step moves nothing"):
        Direction.from_optimizer(optimizer)
    optimizer.step()
    assert Direction.from_optimizer(optimizer).norm_sq > 0


@pytest.mark.parametrize("name", ["adafactor", "muon", "adamw", "sgd-momentum"])
def test_an_enclosing_autocast_does_not_reach_the_step(name):
    if name not in ALL:
        pytest.skip("torch.optim.Muon is of torch 2.9")
    model, optimizer = make_run(name)
    backward(model)
    optimizer.step()
    expected = Direction.from_optimizer(optimizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        direction = Direction.from_optimizer(optimizer)
        assert torch.is_autocast_enabled("cpu")
    assert equal(direction.tensors, expected.tensors)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError(), KeyboardInterrupt(), SystemExit(3)])
def test_what_ends_a_step_on_a_copy_comes_out_as_itself_and_leaves_no_trace(error):
    class Ends(Signum):
        def step(self, closure: None = None) -> None:
            super().step()
            raise error

    model = make_model()
    optimizer = Ends(model.parameters())
    backward(model)
    seed_streams()
    before = trace(model, optimizer)
    with pytest.raises(type(error)) as caught:
        Direction.from_optimizer(optimizer)
    assert caught.value is error
    assert equal(before, trace(model, optimizer))


def test_a_cpu_without_memory_is_not_blamed_on_the_optimizer():
    class Hungry(Signum):
        def step(self, closure: None = None) -> None:
            torch.empty(1 << 58)

    model = make_model()
    backward(model)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        Direction.from_optimizer(Hungry(model.parameters()))


def test_a_hook_of_all_optimizers_may_ask():
    """The registry is being read while its hooks must not run on the copy."""
    model, optimizer = make_run("nadam")
    backward(model)
    asked: list[Direction] = []
    handles = [register_optimizer_step_pre_hook(lambda *_: asked.append(Direction.from_optimizer(optimizer)))]
    handles.append(register_optimizer_step_pre_hook(lambda *_: asked.append(None)))
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert [direction is None for direction in asked] == [False, True]


FLAGS = {
    "tensor betas": lambda params: ADAM(params, lr=torch.tensor(0.01), betas=(torch.tensor(0.9), torch.tensor(0.99))),
    "foreach": lambda params: torch.optim.NAdam(params, lr=0.01, foreach=True),
    "tensor lr": lambda params: torch.optim.NAdam(params, lr=torch.tensor(0.01)),
    "tensor lr, closed form": lambda params: RMSPROP(params, lr=torch.tensor(0.01), momentum=0.5),
    "fused": lambda params: torch.optim.Adagrad(params, lr=0.01, fused=True),
    "differentiable": lambda params: torch.optim.NAdam(params, lr=0.01, differentiable=True),
    "differentiable, closed form": lambda params: ADAM(params, lr=0.01, differentiable=True),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_and_hyperparameters_in_tensors_make_no_difference(name):
    # What steps with gradients takes no leaves.
    weights = [w.detach().clone().requires_grad_().clone() for w in make_model().parameters()]
    differentiable = name.startswith("differentiable")
    params = weights if differentiable else [nn.Parameter(w.detach()) for w in weights]
    optimizer = FLAGS[name](params)
    for step in range(4):
        for p in params:
            p.retain_grad() if differentiable and p.requires_grad and not p.is_leaf else None
            p.grad = torch.full_like(p, 0.1 * (step + 1)).detach()
        direction = Direction.from_optimizer(optimizer)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        assert ulps(direction, before, [p.detach() for p in params]) < 3
