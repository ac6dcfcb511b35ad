"""Marks tell models and data apart by every value, its place, name, shape and dtype, and are the same everywhere."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sharpkern.mixtures import fingerprint as _marks
from sharpkern.mixtures.fingerprint import fingerprint_of, fingerprint_of_function, fingerprint_of_model


class Model(nn.Module):
    """Tensors of several dtypes and layouts, one of them tied."""

    def __init__(self) -> None:
        super().__init__()
        numbers = iter(torch.arange(1, 1000) / 8)
        fill = lambda *shape: torch.stack([next(numbers) for _ in range(torch.Size(shape).numel())]).view(shape)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        for parameter in (*self.first.parameters(), *self.second.parameters()):
            parameter.data = fill(*parameter.shape)
        self.low = nn.Parameter(fill(3, 5).bfloat16())
        self.norm = nn.BatchNorm1d(4)
        self.tied = self.first.weight
        self.register_buffer("mask", torch.tensor([[True, False], [False, True]]))
        self.register_buffer("phases", torch.complex(fill(2), fill(2)), persistent=False)
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("alone", torch.tensor(3))


def swap(model: Model) -> None:
    model.first.bias.data, model.second.bias.data = model.second.bias.data, model.first.bias.data


def untie(model: Model) -> None:
    model.tied = nn.Parameter(model.tied.detach().clone())


def rename(model: Model) -> None:
    model.other = model.low
    del model.low


CHANGES: dict[str, Callable[[Model], object]] = {
    "columns the other way round": lambda m: m.first.weight.data.copy_(m.first.weight.data.flip(1)),
    "rows the other way round": lambda m: m.first.weight.data.copy_(m.first.weight.data.flip(0)),
    "transposed": lambda m: m.second.weight.data.copy_(m.second.weight.data.t().clone()),
    "two values swapped in bfloat16": lambda m: m.low.data[0].copy_(m.low.data[0, [1, 0, 2, 3, 4]]),
    "two tensors swapped": swap,
    "one bit in the last value": lambda m: m.second.bias.data[-1:].view(torch.int32).add_(1),
    "other shape": lambda m: setattr(m.low, "data", m.low.data.view(5, 3)),
    "other dtype": lambda m: setattr(m.low, "data", m.low.data.view(torch.float16)),
    "sign of zero": lambda m: m.norm.bias.data.neg_(),
    "a buffer": lambda m: m.norm.running_mean.add_(1),
    "a mask": lambda m: m.mask.logical_not_(),
    "a buffer that is not saved": lambda m: m.phases.conj_physical_(),
    "name": rename,
    "untied": untie,
    "frozen": lambda m: m.low.requires_grad_(False),
    "mode": lambda m: m.eval(),
    "mode of one layer": lambda m: m.norm.eval(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_differs_has_another_mark(change: str) -> None:
    model = Model()
    before = fingerprint_of_model(model)
    CHANGES[change](model)
    assert fingerprint_of_model(model) != before


def column_major(model: Model) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.t().contiguous().t()


SAME: dict[str, Callable[[Model], nn.Module]] = {
    "a copy": copy.deepcopy,
    "strides": lambda m: column_major(m) or m,
    "a wrapper": nn.DataParallel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "a gradient": lambda m: m.low.sum().backward() or m,
}


@pytest.mark.parametrize("change", SAME)
def test_a_model_that_holds_the_same_has_the_same_mark(change: str) -> None:
    model = Model()
    before = fingerprint_of_model(model)
    assert fingerprint_of_model(SAME[change](model)) == before


def test_blocks_of_any_size_give_the_same_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    whole = fingerprint_of_model(model)
    for size in (1, 7, 16, 64):
        monkeypatch.setattr(_marks, "_BLOCK", size)
        assert fingerprint_of_model(model) == whole


def test_marks_are_the_same_in_every_process() -> None:
    program = """
from tests.mixtures.test_marks import DATA, Model, function
from sharpkern.mixtures.fingerprint import fingerprint_of, fingerprint_of_function, fingerprint_of_model
print(fingerprint_of_model(Model()), fingerprint_of(DATA), fingerprint_of_function(function))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    marks = [fingerprint_of_model(Model()), fingerprint_of(DATA), fingerprint_of_function(function)]
    assert list(map(int, done.stdout.split())) == marks
    # On every machine too.
    assert marks[:2] == [16646481982445610039, 3368803743657371166]


DATA = {
    "rows": torch.arange(6).view(2, 3),
    "more": [np.arange(3.0), (1, 2.5, "text", None, b"bytes", True)],
    "sparse": torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize(
    "other",
    [
        {**DATA, "rows": torch.arange(6).view(2, 3).flip(1)},
        {**DATA, "rows": torch.arange(6).view(3, 2)},
        {**DATA, "rows": torch.arange(6.0).view(2, 3)},
        {**DATA, "more": [np.arange(3.0)[::-1], DATA["more"][1]]},
        {**DATA, "more": [np.arange(3), DATA["more"][1]]},
        {**DATA, "more": [DATA["more"][0], (1, 2.5, "text", None, b"bytes", False)]},
        {**DATA, "more": [[DATA["more"][0]], *DATA["more"][1]]},
        {**DATA, "sparse": torch.eye(3).flip(0).to_sparse()},
        dict(reversed(DATA.items())),
    ],
)
def test_data_that_differs_has_another_mark(other: object) -> None:
    assert fingerprint_of(other) != fingerprint_of(DATA)


def function(x: float, y: float = 2.0) -> float:
    return 3.0 * x + y if x in {"a", "b", "c"} else y


def of(scale: float) -> Callable[[float], float]:
    return lambda x: scale * x


class Called:
    """A function with a setting."""

    def __init__(self, scale: float) -> None:
        self.scale, self.calls = scale, 0

    def __call__(self, x: float) -> float:
        self.calls += 1
        return self.scale * x


def test_a_function_is_known_by_what_it_does_and_holds() -> None:
    called = Called(2.0)
    functions = [function, of(2.0), of(3.0), lambda x: x, lambda x: x + 1, called, Called(3.0)]
    marks = [fingerprint_of_function(one) for one in functions]
    assert len(set(marks)) == len(marks)
    # That it was called makes it no other.
    called(1.0)
    assert fingerprint_of_function(called) == marks[5]
    assert fingerprint_of_function(of(2.0)) == marks[1]
