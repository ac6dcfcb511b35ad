"""Every rule of sharpkern.ops.rules by torch: what the optimizer's own step writes, and known for no other step."""

import copy
import pkgutil
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from torch import Tensor

from sharpkern import Direction, ops
from sharpkern.ops.rules import rule_of
from tests.helpers.rules import FULLEST, RULES, reading

LR = 0.01


def made(name: str, dtype: torch.dtype, num_steps: int, **change: Any) -> tuple[torch.nn.Parameter, Any]:
    """A parameter with a gradient that its optimizer has not seen, after some steps."""
    kind, options = RULES[name]
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(40, 30, generator=generator).to(dtype))
    optimizer = kind([parameter], lr=LR, **options | change)
    for step in range(num_steps + 1):
        parameter.grad = torch.randn(40, 30, generator=generator).to(dtype)
        if step < num_steps:
            optimizer.step()
    return parameter, optimizer


def update(parameter: Tensor, optimizer: Any, **change: Any) -> Tensor:
    operands, numbers, options = reading(parameter, optimizer, **change)
    return ops.form_step(*operands, None, numbers, **options, dtype=parameter.dtype)[0]


@pytest.mark.parametrize("num_steps", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", RULES)
def test_it_is_what_the_step_writes(name: str, dtype: torch.dtype, num_steps: int) -> None:
    parameter, optimizer = made(name, dtype, num_steps)
    before, delta = parameter.detach().clone(), update(parameter, optimizer)
    operands, numbers, options = reading(parameter, optimizer)
    formed = ops.form_step(*operands, torch.tensor([-LR], dtype=torch.float64), numbers, **options)
    optimizer.step()
    after = parameter.detach()
    units = torch.finfo(dtype).eps * (before.abs() + LR * delta.abs())
    assert ((before - LR * delta - after).abs() <= 3 * units).all()
    assert ((formed[0] - after).abs() <= 3 * units).all()


@pytest.mark.parametrize("num_steps", [0, 3])
@pytest.mark.parametrize("name", FULLEST)
def test_nothing_is_written_and_rate_and_scale_enter(name: str, num_steps: int) -> None:
    parameter, optimizer = made(name, torch.float32, num_steps)
    before = copy.deepcopy((parameter, optimizer.state_dict(), parameter.grad))
    delta = update(parameter, optimizer)
    assert torch.equal(update(parameter, optimizer, rate=0.3), delta * 0.3)
    now = parameter, optimizer.state_dict(), parameter.grad
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (before, now)), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    parameter.grad *= 1024
    assert torch.equal(update(parameter, optimizer, grad_factor=1 / 1024), delta)


@pytest.mark.parametrize("name", FULLEST)
def test_sums_are_those_of_the_update(name: str) -> None:
    parameter, optimizer = made(name, torch.float64, 3)
    delta, (operands, numbers, options) = update(parameter, optimizer), reading(parameter, optimizer)
    exact = [float((delta * parameter.grad).sum()), float(delta.square().sum())]
    assert ops.step_sums(*operands, numbers, **options).tolist() == pytest.approx(exact, rel=1e-13)


def test_what_is_not_a_rule_or_not_all_of_it_is_refused() -> None:
    W = torch.ones(3)
    with pytest.raises(ValueError, match=r"rule must be one of .*, got 'adagrad'; use a step on a copy for others"):
        ops.form_step("adagrad", W, W, (W,), None, (0.0, 1.0, 1.0))
    with pytest.raises(
        ValueError, match=r"state and numbers must be exp_avg and weight_decay, .*, got 0 and 5 of them"
    ):
        ops.form_step("lion", W, W, (), None, (0.0, 1.0, 1.0, 0.9, 0.1))
    with pytest.raises(ValueError, match="beta1 must be finite, got nan; look at the optimizer's group"):
        ops.form_step("lion", W, W, (None,), None, (0.0, 1.0, 1.0, torch.nan, 0.1))
    with pytest.raises(TypeError, match="grad must be a tensor, got None; pass the one of the parameter"):
        ops.form_step("rmsprop", W, None, (None,) * 3, None, (0.0, 1.0, 1.0, 0.9, 0.1, 1e-8, 0.0))


@pytest.mark.parametrize("rule", ops.rules.RULES.values(), ids=lambda rule: rule.name)
def test_rules_name_classes_that_there_are(rule: Any) -> None:
    for full_name in rule.optimizers:
        kind = pkgutil.resolve_name(full_name)
        assert f"{kind.__module__}.{kind.__qualname__}" == full_name


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, Lion])
def test_a_subclass_has_no_rule(kind: Any) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    assert rule_of(kind([parameter], lr=LR)) is not None
    assert rule_of(type(kind.__name__, (kind,), {})([parameter], lr=LR)) is None


def test_lion_that_steps_by_another_function_is_stepped_on_a_copy() -> None:
    _, optimizer = made("Lion", torch.float32, 2)
    stock = optimizer.update_fn
    optimizer.update_fn = lambda p, *rest: p.add_(1.0)
    assert rule_of(optimizer) is None
    assert torch.allclose(Direction.from_optimizer(optimizer).tensors[0], torch.full((40, 30), -1 / LR), rtol=1e-4)
    optimizer.update_fn = stock
    optimizer.param_groups[0]["maximize"] = True
    assert rule_of(optimizer) is None
