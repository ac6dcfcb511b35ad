"""Thresholds against what the optimizers themselves do on a one-dimensional quadratic."""

import math

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from sharpkern.thresholds import stability_threshold

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


def run_frozen_adam(curvature: float, preconditioner: float, beta1: float, decoupled: float, coupled: float) -> float:
    """|θ| after Adam's recursion with its preconditioner held fixed, ``curvature`` being the preconditioned one."""
    theta, moment = 1.0, 0.0
    for _ in range(NUM_STEPS):
        gradient = preconditioner * curvature * theta + coupled * theta
        moment = beta1 * moment + (1 - beta1) * gradient
        theta = theta - LR * moment / preconditioner - LR * decoupled * theta
    return abs(theta)


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_with_a_frozen_preconditioner(beta1, decay):
    threshold = stability_threshold(AdamW([parameter()], lr=LR, betas=(beta1, 0.99), weight_decay=decay))
    assert run_frozen_adam(0.98 * threshold, 0.3, beta1, decay, 0.0) < 1e-2
    assert run_frozen_adam(1.02 * threshold, 0.3, beta1, decay, 0.0) > 1e2


def test_adam_with_l2_decay_is_exact_for_the_loss_with_its_penalty():
    preconditioner, decay = 0.5, 40.0
    threshold = stability_threshold(Adam([parameter()], lr=LR, weight_decay=decay))
    penalty = decay / preconditioner
    assert run_frozen_adam(0.98 * threshold - penalty, preconditioner, 0.9, 0.0, decay) < 1e-2
    assert run_frozen_adam(1.02 * threshold - penalty, preconditioner, 0.9, 0.0, decay) > 1e2


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
