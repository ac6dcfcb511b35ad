"""A small language model in one piece, as stages of a pipeline, and with layers that are split over ranks by hand."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from tests.helpers.models import Block

VOCABULARY, WIDTH, ROWS, LENGTH = 64, 16, 8, 8
SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}


def layers(dropout: float = 0.0) -> nn.Sequential:
    """Four layers that a pipeline's stages can hold one or two of each."""
    torch.manual_seed(0)
    first, last = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
    return nn.Sequential(
        first, Block(WIDTH, 2, dropout), Block(WIDTH, 2, dropout), nn.Sequential(nn.LayerNorm(WIDTH), last)
    )


def batch(step: int) -> Tensor:
    """Counting sequences with some noise, [rows, length + 1]."""
    generator = torch.Generator().manual_seed(1000 + step)
    rows = (torch.randint(0, VOCABULARY, (ROWS, 1), generator=generator) + 3 * torch.arange(LENGTH + 1)) % VOCABULARY
    noise = torch.randint(0, VOCABULARY, rows.shape, generator=generator)
    return torch.where(torch.rand(rows.shape, generator=generator) < 0.2, noise, rows)


def loss_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return loss_of_logits(model(rows[:, :-1]), rows[:, 1:])


class Pipeline:
    """This rank's stages of the layers.

    Attributes:
        model: what this rank holds.
    """

    def __init__(self, schedule: str, group: Any, wrap: Callable[[nn.Module], nn.Module] = lambda part: part) -> None:
        rank, size = distributed.get_rank(group), distributed.get_world_size(group)
        num_stages = 4 if schedule == "interleaved" else size
        parts = [nn.Sequential(*layers()[k::1][: 4 // num_stages]) for k in range(0, 4, 4 // num_stages)]
        mine = range(rank, num_stages, size)
        self.model: nn.Module = nn.ModuleDict({f"stage{k}": wrap(parts[k]) for k in mine})
        stages = [PipelineStage(self.model[f"stage{k}"], k, num_stages, torch.device("cpu"), group=group) for k in mine]
        given: Any = stages if schedule == "interleaved" else stages[0]
        self._schedule = SCHEDULES[schedule](given, 2, loss_fn=loss_of_logits)
        self._first, self._last = rank == 0, rank == size - 1

    def step(self, rows: Tensor) -> Tensor | None:
        """Forward and backward passes of all micro-batches."""
        return self._run(self._schedule.step, rows)

    def evaluate(self, rows: Tensor) -> Tensor | None:
        """Forward passes alone; the loss on the last rank, None on the others."""
        return self._run(self._schedule.eval, rows)

    def _run(self, run: Callable[..., Any], rows: Tensor) -> Tensor | None:
        losses: list[Tensor] = []
        given: Sequence[Tensor] = (rows[:, :-1],) if self._first else ()
        run(*given, **({"target": rows[:, 1:], "losses": losses} if self._last else {}))
        return torch.stack(losses).mean() if losses else None


class _Copied(torch.autograd.Function):
    """The same on all ranks, whose gradients add up."""

    @staticmethod
    def forward(context: Any, x: Tensor, group: Any) -> Tensor:
        context.group = group
        return x

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        distributed.all_reduce(gradient, group=context.group)
        return gradient, None


class _Summed(torch.autograd.Function):
    """The sum over the ranks."""

    @staticmethod
    def forward(context: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone()
        distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class SplitMLP(nn.Module):
    """A block's MLP, of whose hidden units each rank of a group has a share."""

    def __init__(self, mlp: nn.Module, group: Any) -> None:
        super().__init__()
        self.group = group
        rank, size = distributed.get_rank(group), distributed.get_world_size(group)
        up, _, down, _ = mlp
        self.up, self.up_bias, self.down = (
            nn.Parameter(whole.detach().chunk(size, dim)[rank].clone())
            for whole, dim in ((up.weight, 0), (up.bias, 0), (down.weight, 1))
        )
        self.down_bias = down.bias

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(_Copied.apply(x, self.group), self.up, self.up_bias))
        return _Summed.apply(F.linear(hidden, self.down), self.group) + self.down_bias

    def split(self) -> list[nn.Parameter]:
        """What other ranks have other parts of."""
        return [self.up, self.up_bias, self.down]


def split_mlps(model: nn.Module, group: Any) -> set[nn.Parameter]:
    """Split the MLP of every block, and return what other ranks have other parts of."""
    found: set[nn.Parameter] = set()
    for module in list(model.modules()):
        if isinstance(module, Block):
            module.mlp = SplitMLP(module.mlp, group)
            found.update(module.mlp.split())
    return found
