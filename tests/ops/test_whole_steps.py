"""Δθ of a whole model in blocks: the bits of each step by itself, and its sums."""

import pytest
import torch
from torch import Tensor

from sharpkern.directions.from_optimizer import steps_by_rule
from sharpkern.directions.optimizer_state import read_slots
from sharpkern.directions.parts import parts_of
from sharpkern.ops import whole_steps
from sharpkern.ops.rules import rule_of
from sharpkern.ops.update import LazyUpdate
from tests.helpers.rules import RULES

SHAPES = [(3,), (), (40, 50), (7, 11), (130, 90), (1,), (5, 3), (64,)]


def steps_of(name: str, dtype: torch.dtype, num_steps: int) -> list[LazyUpdate]:
    """The next steps of an optimizer of tensors of many sizes, one of them laid out by columns."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    parameters.append(torch.nn.Parameter(torch.randn(30, 20, dtype=dtype).t()))
    make, options = RULES[name]
    optimizer = make(parameters, lr=0.01, **options)
    for step in range(num_steps + 1):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        if step < num_steps:
            optimizer.step()
    (slots,) = read_slots(parts_of(optimizer), None, None)
    rule = rule_of(optimizer)
    assert rule is not None
    return steps_by_rule(rule, optimizer, slots, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("num_steps", [0, 2])
@pytest.mark.parametrize("name", RULES)
def test_each_has_the_bits_that_it_has_alone(
    name: str, num_steps: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = steps_of(name, dtype, num_steps)
    monkeypatch.setattr(whole_steps, "CPU_CHUNK", 1000)
    deltas: list[Tensor] = []
    for step, (delta, sums) in zip(steps, whole_steps.updates_with_sums(steps), strict=True):
        deltas.append(delta)
        assert torch.equal(delta, step.update())
        assert delta.dtype == dtype
        assert (sums is None) == (not step.base.is_contiguous())
        if sums is not None:
            scale = (delta.double() * step.grad.double()).abs().sum()
            off = (sums - step.slope_and_norm()).abs() / torch.stack([scale, sums[1]])
            assert off.max() < (1e-6 if dtype == torch.float32 else 1e-13)
    operands = {operand.data_ptr() for step in steps for operand in step.operands}
    assert not operands & {delta.data_ptr() for delta in deltas}, "Δθ has to outlive the step"


def test_steps_of_other_numbers_are_worked_out_by_themselves() -> None:
    parameters = [torch.nn.Parameter(torch.randn(20)) for _ in range(4)]
    optimizer = torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.1, "eps": 1e-3}])
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    optimizer.state[parameters[1]]["step"] += 5
    (slots,) = read_slots(parts_of(optimizer), None, None)
    steps = steps_by_rule(rule_of(optimizer), optimizer, slots, 1e-3)  # type: ignore[arg-type]
    found = whole_steps.updates_with_sums(steps)
    assert all(torch.equal(delta, step.update()) for step, (delta, _) in zip(steps, found, strict=True))


@pytest.mark.parametrize("scale", [1e-30, 1e25], ids=["tiny", "huge"])
def test_sums_beyond_the_range_of_their_dtype(scale: float) -> None:
    parameters = [torch.nn.Parameter(torch.randn(50)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = scale * torch.randn_like(parameter)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    (slots,) = read_slots(parts_of(optimizer), None, None)
    steps = steps_by_rule(rule_of(optimizer), optimizer, slots, 0.1)  # type: ignore[arg-type]
    for step, (_, sums) in zip(steps, whole_steps.updates_with_sums(steps), strict=True):
        assert sums is not None
        torch.testing.assert_close(sums, step.grad.double().square().sum().expand(2), rtol=1e-6, atol=0)
