"""Thresholds against what the optimizers themselves do on a one-dimensional quadratic."""

import math

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from sharpkern.measures.hessian import hessian_sharpness
from sharpkern.measures.thresholds import stability_threshold

LR = 0.1
SGD_SETTINGS = {
    "plain": {},
    "weight decay": {"weight_decay": 3.0},
    "momentum": {"momentum": 0.9},
    "momentum and decay": {"momentum": 0.5, "weight_decay": 2.0},
    "dampening": {"momentum": 0.8, "dampening": 0.6},
    "dampening without momentum": {"dampening": 0.6},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "nesterov and decay": {"momentum": 0.5, "nesterov": True, "weight_decay": 2.0},
    "maximize": {"momentum": 0.9, "maximize": True},
}
NUM_STEPS = 1000


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(1, dtype=torch.float64))


def run_sgd(curvature: float, settings: dict) -> float:
    """|θ| after steps of torch's own SGD on ½·curvature·θ² (its negative where it maximizes)."""
    weight = parameter()
    optimizer = SGD([weight], lr=LR, **settings)
    sign = -1.0 if settings.get("maximize") else 1.0
    for _ in range(NUM_STEPS):
        weight.grad = sign * curvature * weight.detach()
        optimizer.step()
    return weight.abs().item()


@pytest.mark.parametrize("settings", SGD_SETTINGS.values(), ids=SGD_SETTINGS.keys())
def test_sgd_contracts_below_the_threshold_and_grows_above(settings):
    threshold = stability_threshold(SGD([parameter()], lr=LR, **settings))
    assert run_sgd(0.98 * threshold, settings) < 1e-2
    assert run_sgd(1.02 * threshold, settings) > 1e2


ADAM_SETTINGS = {
    "Adam": (Adam, {}),
    "Adam, beta1 0": (Adam, {"betas": (0.0, 0.99)}),
    "Adam, beta1 0.5": (Adam, {"betas": (0.5, 0.99)}),
    "Adam, large eps": (Adam, {"eps": 0.5}),
    "amsgrad": (Adam, {"amsgrad": True}),
    "Adam maximizes": (Adam, {"maximize": True}),
    "AdamW without decay": (AdamW, {"weight_decay": 0.0}),
    "AdamW": (AdamW, {"weight_decay": 0.1}),
    "AdamW, beta1 0.5": (AdamW, {"weight_decay": 0.1, "betas": (0.5, 0.99)}),
    "AdamW, amsgrad": (AdamW, {"weight_decay": 0.1, "amsgrad": True}),
}


def run_adam(share: float, kind: type, settings: dict, penalty: float = 0.0) -> float:
    """|θ| after steps of torch's own Adam where ``hessian_sharpness`` is this share of the threshold, less a penalty.

    √v̂ is 0.3 from a long warm phase and stays that: β₂ is so near to 1 that θ's own gradients weigh nothing.
    """
    weight = parameter()
    beta1 = settings.get("betas", (0.9, 0.999))[0]
    optimizer = kind([weight], lr=LR, **{**settings, "betas": (beta1, 1 - 1e-14)})
    warm = torch.full((1,), 0.09, dtype=torch.float64)
    optimizer.state[weight] |= {"step": torch.tensor(1e17), "exp_avg": torch.zeros_like(warm), "exp_avg_sq": warm}
    if settings.get("amsgrad"):
        optimizer.state[weight]["max_exp_avg_sq"] = warm.clone()
    model, curvature = torch.nn.ParameterList([weight]), 1.0
    loss_fn = lambda: curvature * model[0].square().sum() / 2
    unit = hessian_sharpness(model, loss_fn, preconditioner=optimizer).value
    curvature = (share * stability_threshold(optimizer) - penalty / 0.3) / unit
    sign = -1.0 if settings.get("maximize") else 1.0
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        (sign * loss_fn()).backward()
        optimizer.step()
        if weight.abs() > 1e2:
            break
    assert warm.sqrt().item() == pytest.approx(0.3, rel=1e-3)
    return weight.abs().item()


@pytest.mark.parametrize(("kind", "settings"), ADAM_SETTINGS.values(), ids=ADAM_SETTINGS.keys())
def test_adam_contracts_below_the_threshold_of_the_preconditioned_sharpness_and_grows_above(kind, settings):
    assert run_adam(0.98, kind, settings) < 1e-2
    assert run_adam(1.02, kind, settings) > 1e2


def test_adam_with_l2_decay_is_exact_for_the_loss_with_its_penalty():
    settings = {"weight_decay": 40.0, "eps": 0.0}
    assert run_adam(0.98, Adam, settings, penalty=40.0) < 1e-2
    assert run_adam(1.02, Adam, settings, penalty=40.0) > 1e2


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
def test_at_adams_threshold_itself_theta_alternates(beta1):
    """|g| is then constant, so that v̂ = g² needs no freezing; m comes to rest at −(1−β₁)/(1+β₁)·g of the last step."""
    amplitude = LR * (1 - beta1) / (1 + beta1) / 2
    weight = torch.nn.Parameter(torch.tensor([amplitude], dtype=torch.float64))
    optimizer = Adam([weight], lr=LR, betas=(beta1, 0.9), eps=0.0)
    start = weight.detach().clone()
    rest = -start * (1 - beta1) / (1 + beta1)
    optimizer.state[weight] |= {"step": torch.tensor(1e6), "exp_avg": rest, "exp_avg_sq": start.square()}
    model = torch.nn.ParameterList([weight])
    loss_fn = lambda: model[0].square().sum() / 2
    for step in range(20):
        assert weight.item() == pytest.approx((-1) ** step * amplitude, rel=1e-9)
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
    sharpness = hessian_sharpness(model, loss_fn, preconditioner=optimizer).value
    assert sharpness == pytest.approx(stability_threshold(optimizer), rel=1e-6)


def test_the_exact_threshold_of_decoupled_decay_differs_by_the_documented_share():
    lr, decay, beta1 = 1e-3, 0.1, 0.9
    published = stability_threshold(AdamW([parameter()], lr=lr, weight_decay=decay))
    exact = (2 / lr - decay) * (1 + beta1) / (1 - beta1)
    # The root of the recursion with decoupled decay that sits on −1, by its characteristic polynomial.
    linear = -(1 + beta1) + lr * decay + lr * (1 - beta1) * exact
    assert 1 - linear + beta1 * (1 - lr * decay) == pytest.approx(0, abs=1e-12)
    assert (published - exact) / published == pytest.approx(lr * decay * beta1 / (1 + beta1), rel=1e-3)


@pytest.mark.parametrize(
    ("optimizer", "threshold"),
    [
        (lambda p: SGD(p, lr=0.5), 4.0),
        (lambda p: SGD(p, lr=torch.tensor(0.5)), 4.0),
        (lambda p: SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1), 7.5),
        (lambda p: SGD(p, lr=0.5, momentum=0.5, nesterov=True), 3.0),
        (lambda p: Adam(p, lr=0.5), 76.0),
        (lambda p: Adam(p, lr=0.5, amsgrad=True), 76.0),
        (lambda p: AdamW(p, lr=0.5, weight_decay=0.1), 75.9),
        (lambda p: SGD(p, lr=0.0), math.inf),
        (lambda p: AdamW(p, lr=0.0), math.inf),
        (lambda p: SGD(p, lr=0.5, momentum=0.9, dampening=1.0), math.inf),
    ],
)
def test_closed_forms(optimizer, threshold):
    assert stability_threshold(optimizer([parameter()])) == pytest.approx(threshold)


@pytest.mark.skipif("decoupled_weight_decay" not in Adam([parameter()]).param_groups[0], reason="needs torch >= 2.7")
def test_adam_told_to_decouple_its_decay_is_adamw():
    told = Adam([parameter()], lr=0.5, weight_decay=0.1, decoupled_weight_decay=True)
    assert stability_threshold(told) == pytest.approx(75.9)


def test_groups_that_differ_give_a_dict_and_equal_ones_a_float():
    differ = SGD([{"params": [parameter()], "lr": 0.5}, {"params": [parameter()], "lr": 0.0}], lr=1.0)
    assert stability_threshold(differ) == {0: 4.0, 1: math.inf}
    equal = SGD([{"params": [parameter()]}, {"params": [parameter()]}], lr=0.5)
    assert stability_threshold(equal) == 4.0


class Logged(SGD):
    """A subclass may step differently."""


@pytest.mark.parametrize(
    ("optimizer", "name"), [(torch.optim.RMSprop([parameter()]), "RMSprop"), (Logged([parameter()]), "Logged")]
)
def test_other_optimizers_are_refused_by_name(optimizer, name):
    with pytest.raises(TypeError, match=rf"must be a torch\.optim\.SGD, Adam or AdamW .*, got {name}; unwrap it"):
        stability_threshold(optimizer)


@pytest.mark.parametrize("settings", [{"momentum": 1.0}, {"momentum": 0.9, "dampening": 1.5}])
def test_settings_that_are_never_stable_are_refused(settings):
    with pytest.raises(
        ValueError, match=r"only with momentum below 1 and dampening of at most 1, got momentum .* lower"
    ):
        stability_threshold(SGD([parameter()], lr=0.1, **settings))
