"""Calls of the streaming operations to time: on one large tensor, and on the parameters of a model of 1.5 billion.

Bytes are counted by formula: every operand read once, every result written once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sharpkern import ops
from sharpkern.cli.bench.machine import Machine

BF16, FP32 = torch.bfloat16, torch.float32
Shapes = list[tuple[int, ...]]

_ADAM = {
    "beta1": 0.9,
    "beta2": 0.999,
    "correction1": 1 - 0.9**100,
    "correction2": 1 - 0.999**100,
    "eps": 1e-8,
    "weight_decay": 0.1,
}
_SGD = {"momentum": 0.9, "weight_decay": 0.1}


@dataclass(frozen=True)
class Load:
    """A call to time.

    Attributes:
        run: takes ``backend=``.
        nbytes: what it has to move.
    """

    run: Callable[..., object]
    nbytes: int


def olmo2_1b(scale: int = 1) -> Shapes:
    """Return the shapes of the parameters of a model of Olmo2's form: 1.5 billion elements in 179 tensors.

    Args:
        scale: divides the widths, for a CPU.
    """
    width, hidden, vocabulary = 2048 // scale, 8192 // scale, 100352 // scale
    layer: Shapes = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)] + [(width,)] * 4
    return [(vocabulary, width), *layer * 16, (width,), (vocabulary, width)]


class Loads:
    """Makes loads on one machine.

    Args:
        machine: where the tensors lie.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def axpy(self, shapes: Shapes) -> Load:
        """Return the write of all tensors from a backup, 6 bytes per element."""
        theta, base, delta = (self._tensors(shapes, seed) for seed in range(3))
        return Load(partial(ops.axpy_, theta, base, delta, self._alpha(1)), 6 * _numel(shapes))

    def reduce(self, shapes: Shapes) -> Load:
        """Return the sums over all tensors, 6 bytes per element."""
        return Load(partial(ops.reduce, *(self._tensors(shapes, seed) for seed in range(3))), 6 * _numel(shapes))

    def form(self, shapes: Shapes, num_steps: int, seed: int | None = None) -> Load:
        """Return the formation of every tensor from a stored direction, 4 + 2K bytes per element."""
        W, D = self._tensors(shapes, 0), self._tensors(shapes, 1)
        return self._formed(shapes, num_steps, 4, partial(_over, ops.form, W, D), seed=seed)

    def form_adam(self, shapes: Shapes, num_steps: int, state: torch.dtype) -> Load:
        """Return the formation from AdamW's state: weight and gradient in bf16, two moments, K results."""
        theta, grad = self._tensors(shapes, 0), self._tensors(shapes, 1)
        exp_avg = self._tensors(shapes, 2, state)
        exp_avg_sq = [tensor.square_() for tensor in self._tensors(shapes, 3, state)]
        call = partial(_over, ops.form_adam, theta, grad, exp_avg, exp_avg_sq)
        return self._formed(shapes, num_steps, 4 + 2 * state.itemsize, call, **_ADAM)

    def form_sgd(self, shapes: Shapes, num_steps: int) -> Load:
        """Return the formation from SGD's momentum: weight, gradient and buffer in bf16, K results."""
        call = partial(_over, ops.form_sgd, *(self._tensors(shapes, seed) for seed in range(3)))
        return self._formed(shapes, num_steps, 6, call, **_SGD)

    def adam_sums(self, shapes: Shapes, state: torch.dtype) -> Load:
        """Return the sums over AdamW's next step: weight and gradient in bf16, two moments."""
        lists = [self._tensors(shapes, seed) for seed in range(2)] + [self._tensors(shapes, 2, state)]
        lists.append([tensor.square_() for tensor in self._tensors(shapes, 3, state)])
        return Load(partial(_each, ops.adam_sums, *lists, **_ADAM), (4 + 2 * state.itemsize) * _numel(shapes))

    def sgd_sums(self, shapes: Shapes) -> Load:
        """Return the sums over SGD's next step: weight, gradient and buffer in bf16."""
        lists = [self._tensors(shapes, seed) for seed in range(3)]
        return Load(partial(_each, ops.sgd_sums, *lists, **_SGD), 6 * _numel(shapes))

    def embedding(self, vocabulary: int, width: int, num_tokens: int, num_steps: int) -> Load:
        """Return the look-up of random rows, 4 + 2K bytes per element of the output."""
        W, D = (self._machine.randn(vocabulary, width, dtype=BF16, seed=seed) for seed in range(2))
        drawn = torch.randint(
            0, vocabulary, (num_tokens,), generator=self._machine.generator(2), device=self._machine.device
        )
        run = partial(ops.embedding, drawn, W, D, self._alpha(num_steps))
        return Load(run, (4 + 2 * num_steps) * num_tokens * width)

    def norm(self, operation: Callable[..., Tensor], num_vectors: int, rows: int, width: int, num_steps: int) -> Load:
        """Return a norm of K inputs, 4 bytes per element."""
        x = self._machine.randn(num_steps, rows, width, dtype=BF16)
        vectors = [self._machine.randn(width, dtype=BF16, seed=seed) for seed in range(1, num_vectors + 1)]
        run = partial(operation, x, *vectors, self._alpha(num_steps), eps=1e-6)
        return Load(run, 4 * num_steps * rows * width)

    def online_cross_entropy(self, num_tokens: int, width: int) -> Load:
        """Return the update by one chunk of fp32 logits, 4 bytes per logit."""
        maximum, total, target = (self._machine.randn(num_tokens, seed=seed) for seed in range(3))
        logits = self._machine.randn(num_tokens, width, seed=3)
        labels = torch.randint(
            0, width, (num_tokens,), generator=self._machine.generator(4), device=self._machine.device
        )
        run = partial(ops.online_cross_entropy_, maximum, total.exp_(), target, logits, labels, 0)
        return Load(run, 4 * num_tokens * width)

    def linear(self, rows: int, width: int, num_tokens: int, num_steps: int) -> Load:
        """Return a linear layer, 4 bytes per weight and 2 per element of inputs and outputs."""
        x = self._machine.randn(num_steps, num_tokens, width, dtype=BF16)
        W, D = (self._machine.randn(rows, width, dtype=BF16, seed=seed) for seed in (1, 2))
        run = partial(ops.linear, x, W, D, self._alpha(num_steps))
        return Load(run, 4 * rows * width + 2 * num_steps * num_tokens * (rows + width))

    def _formed(self, shapes: Shapes, num_steps: int, read: int, call: Callable[..., None], **options: Any) -> Load:
        """Return a formation of every tensor into one buffer, as the engines use it: ``read`` bytes per element."""
        largest = max(map(_product, shapes))
        buffer = torch.empty(num_steps * largest, dtype=BF16, device=self._machine.device)
        outs = [buffer[: num_steps * _product(shape)].view(num_steps, *shape) for shape in shapes]
        run = partial(call, alpha=self._alpha(num_steps), outs=outs, **options)
        return Load(run, (read + 2 * num_steps) * _numel(shapes))

    def _tensors(self, shapes: Shapes, seed: int, dtype: torch.dtype = BF16) -> list[Tensor]:
        return [self._machine.randn(*shape, dtype=dtype, seed=seed + 10 * i) for i, shape in enumerate(shapes)]

    def _alpha(self, num_steps: int) -> Tensor:
        return torch.linspace(-1e-2, -1e-3, num_steps, device=self._machine.device)


def _over(
    function: Callable[..., Tensor], *lists: list[Tensor], alpha: Tensor, outs: list[Tensor], **options: Any
) -> None:
    """Call a function once per tensor."""
    for *operands, out in zip(*lists, outs, strict=True):
        function(*operands, alpha, out=out, **options)


def _each(function: Callable[..., Tensor], *lists: list[Tensor], **options: Any) -> None:
    """Call a function once per tensor."""
    for operands in zip(*lists, strict=True):
        function(*operands, **options)


def _product(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _numel(shapes: Shapes) -> int:
    return sum(map(_product, shapes))
