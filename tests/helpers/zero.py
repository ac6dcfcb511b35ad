"""DeepSpeed on a CPU: engines of a small GPT, its rows, and everything of a run that a measurement must not touch."""

import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

import sharpkern
from tests.helpers.models import GPT

ROWS = 8


def started() -> Any:
    """DeepSpeed itself, on the gloo group of this process, without the operators that it would compile."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(distributed.get_rank())}
    # Its own, of which there are many; ours are errors as in every test.
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", sharpkern.SharpkernWarning)
    import deepspeed
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.utils import logger

    class Half(CPU_Accelerator):
        """torch computes in float16 on any CPU; DeepSpeed asks for one that is quick at it."""

        def is_fp16_supported(self) -> bool:
            return True

    set_accelerator(Half())
    logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    return deepspeed


def tokens(step: int, rows: int = ROWS) -> Tensor:
    """The rows that all ranks train a step on."""
    return torch.randint(0, 128, (rows, 17), generator=torch.Generator().manual_seed(step))


def mine(rows: Tensor) -> Tensor:
    """This rank's of them."""
    return rows[distributed.get_rank() :: distributed.get_world_size()]


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(rows[:, :-1]).float().flatten(0, 1), rows[:, 1:].flatten())


def gpt(dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    # Two ranks divide hardly any parameter evenly.
    model = GPT(vocabulary=130, width=20, layers=2, dropout=dropout)
    with torch.no_grad():
        model.tokens.weight.mul_(0.2)
    return model


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights that decay, and others that move at half the rate."""
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0, "lr": 5e-3},
    ]


def adamw(parameters: Any) -> torch.optim.AdamW:
    # Where a gradient is of the size of its rounding, ε keeps its sign from being the step.
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01, eps=1e-4)


def engine_of(
    model: nn.Module,
    stage: int,
    *,
    optimizer: Callable[[Any], torch.optim.Optimizer] | dict[str, Any] = adamw,
    parameters: Any = None,
    zero: dict[str, Any] | None = None,
    accumulate: int = 1,
    **config: Any,
) -> Any:
    """The engine of a model; ``config`` goes beside what every run needs, and an optimizer may be one of its."""
    import deepspeed

    given_optimizer = callable(optimizer)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=None if given_optimizer else parameters or model.parameters(),
        optimizer=optimizer(parameters or model.parameters()) if given_optimizer else None,
        config={
            "train_micro_batch_size_per_gpu": ROWS // distributed.get_world_size() // accumulate,
            "gradient_accumulation_steps": accumulate,
            "zero_optimization": {"stage": stage, **(zero or {})},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **({} if given_optimizer else {"optimizer": optimizer}),
            **config,
        },
    )
    return engine


def tensors_of(engine: Any) -> Iterator[Tensor]:
    """Weights, masters and optimizer state."""
    import deepspeed

    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        yield from (parameter.detach().clone() for parameter in parameters)
    wrapper = engine.optimizer
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat"):
        yield from (master.detach().clone() for master in getattr(wrapper, name, ()))
    for state in getattr(wrapper, "optimizer", wrapper).state.values():
        yield from (value.clone() for value in state.values() if isinstance(value, Tensor))


def closures(model: nn.Module, step: int, accumulate: int) -> list[Callable[[], Tensor]]:
    """The losses of this rank's micro-batches."""
    return [partial(loss_of, model, rows) for rows in mine(tokens(step)).chunk(accumulate)]


def mean_of(parts: list[Callable[[], Tensor]]) -> Tensor:
    return sum(part() for part in parts) / len(parts)


def train(
    engine: Any,
    steps: int,
    measure: Callable[[list[Callable[[], Tensor]]], object] | None,
    accumulate: int = 1,
    start: int = 0,
) -> None:
    """Some steps, each of them measured where the engine is about to take it."""
    for step in range(start, start + steps):
        parts = closures(engine, step, accumulate)
        for part in parts:
            engine.backward(part())
            if measure is not None and engine.is_gradient_accumulation_boundary():
                measure(parts)
            engine.step()


def given(rank: dict[str, Any], name: str) -> Any:
    """What a job gave on a rank."""
    assert not isinstance(rank[name], str), rank[name]
    return rank[name]
