"""DeepSpeed's engines: where the weights lie that a rank moves, and the gradient that the engine's step will see.

ZeRO hands the optimizer inside of it flat tensors, the masters: this rank's part of each group of parameters. From
those it writes the weights, here called pieces, and gathers the model's parameters out of the pieces of all ranks. Its
gradients are flat too, still scaled and not yet clipped. deepspeed is looked up where it is loaded already.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharpkern.errors import NoUpdateError

_ZERO, _ZERO_3, _FUSED = "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "FP16_Optimizer"
_OVERFLOW = "the gradient must be finite, got nan or inf on some rank; skip this measurement: DeepSpeed skips the step"


@dataclass(frozen=True, eq=False)
class Piece:
    """A flat part of the weights that this rank moves.

    Attributes:
        weight: what the model's parameters are made from, in their dtype.
        master: what the optimizer holds, in full precision; it may lie in the same memory.
        group: number of the optimizer's group that it belongs to.
    """

    weight: Tensor
    master: Tensor
    group: int

    @property
    def has_master(self) -> bool:
        """Whether the master is a copy of its own."""
        return self.master.data_ptr() != self.weight.data_ptr() or self.weight.numel() == 0


def is_engine(module: object) -> bool:
    """Whether a module is DeepSpeed's engine."""
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(module).__mro__)


def is_wrapper(optimizer: object) -> bool:
    """Whether an optimizer is what DeepSpeed has put around the one that steps."""
    base = sys.modules.get("deepspeed.runtime.base_optimizer")
    return base is not None and isinstance(optimizer, base.DeepSpeedOptimizer)


def engine_in(model: nn.Module) -> Any | None:
    """The engine that a model is or holds."""
    return next(filter(is_engine, model.modules()), None)


def refuse_unknown(engine: Any) -> None:
    """Refuse an engine whose weights, gradients or step are not where this file looks for them."""
    zero = getattr(getattr(engine, "_config", None), "zero_config", None)
    found = [
        what
        for what, there in {
            "PipelineEngine": any(kind.__name__ == "PipelineEngine" for kind in type(engine).__mro__),
            "model parallelism": getattr(engine, "mp_world_size", 1) > 1,
            "sequence parallelism": getattr(engine, "sequence_parallel_size", 1) > 1,
            "MoE layers": getattr(engine, "has_moe_layers", False),
            "ZenFlow": bool(getattr(engine, "zenflow", False)),
            "DeepCompile": bool(getattr(engine, "_deepcompile_active", False)),
            "offloaded optimizer states": _offloads(getattr(zero, "offload_optimizer", None)),
            "offloaded parameters": _offloads(getattr(zero, "offload_param", None)),
            "quantised weights": getattr(zero, "zero_quantized_weights", False)
            or getattr(zero, "zero_quantized_nontrainable_weights", False),
            "quantised gradients": getattr(zero, "zero_quantized_gradients", False),
            "managed_gradient_accumulation=false": not getattr(
                getattr(engine, "_config", None), "managed_gradient_accumulation", True
            ),
        }.items()
        if there
    ]
    found += _unknown_optimizers(getattr(engine, "optimizer", None))
    if found:
        raise TypeError(
            f"model must be a DeepSpeed engine at ZeRO stage 0 to 3 that holds its weights on the device, got one with "
            f"{', '.join(found)}; docs/distributed.md tells what is known: leave that out, or measure the run's "
            "checkpoints"
        )


def _offloads(config: Any) -> bool:
    device = getattr(config, "device", None)
    return device is not None and getattr(device, "value", device) != "none"


def _unknown_optimizers(optimizer: Any) -> list[str]:
    """Names of an engine's optimizers that do not step as the ones which are known."""
    if not is_wrapper(optimizer):
        outer, inner = [], optimizer
    else:
        outer, inner = [optimizer], getattr(optimizer, "optimizer", None)
    names = [type(one).__name__ for one in outer if type(one).__name__ not in (_ZERO, _ZERO_3, _FUSED)]
    if optimizer is None or type(optimizer).__name__ == "DeepSpeedZeRoOffload":
        names.append("no optimizer")
    kind = type(inner)
    # DeepSpeed's Muon orthogonalises gradients before its step, and 1-bit optimizers average them inside of it.
    if kind.__module__.startswith("deepspeed.") and ("muon" in kind.__module__ or "onebit" in kind.__module__):
        names.append(f"DeepSpeed's {kind.__name__}")
    if any(getattr(one, "torch_autocast_gradscaler", None) is not None for one in outer):
        names.append("torch_autocast in float16")
    if any(getattr(one, "offloaded_states", None) for one in outer):
        names.append("offload_states()")
    return names


def inner_of(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that moves the masters."""
    inner: torch.optim.Optimizer = optimizer.optimizer
    return inner


def pieces_of(optimizer: Any) -> list[Piece]:
    """What this rank moves, in the order of the optimizer's groups."""
    name = type(optimizer).__name__
    if name == _ZERO_3:
        groups = [optimizer.sub_group_to_group_id[i] for i in range(len(optimizer.fp16_groups))]
        weights, masters = optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat
    elif name == _ZERO:
        ranks = [torch.distributed.get_rank(group) for group in optimizer.real_dp_process_group]
        weights = [parts[rank] for parts, rank in zip(optimizer.parallel_partitioned_bit16_groups, ranks, strict=True)]
        masters, groups = optimizer.single_partition_of_fp32_groups, list(range(len(weights)))
    else:
        weights, masters = optimizer.fp16_groups_flat, optimizer.fp32_groups_flat
        groups = list(range(len(weights)))
    return [Piece(*one) for one in zip(weights, masters, groups, strict=True)]


def process_group(optimizer: Any) -> Any | None:
    """The ranks that the pieces are split over; None where each has all of them."""
    name = type(optimizer).__name__
    return optimizer.dp_process_group if name in (_ZERO, _ZERO_3) else None


@torch.no_grad()
def publish(optimizer: Any) -> None:
    """Make the model's parameters what the pieces of all ranks hold; a collective."""
    name = type(optimizer).__name__
    if name == _ZERO_3:
        # What is gathered is let go of, so that the next pass gathers what was written.
        optimizer.parameter_offload.partition_all_parameters()
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
        optimizer.invalidate_secondary_tensor()
    elif name == _ZERO:
        sys.modules["deepspeed.runtime.utils"].all_gather_dp_groups(
            groups_flat=optimizer.bit16_groups_flat,
            partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )


@contextmanager
def step_gradients(optimizer: Any) -> Iterator[float]:
    """Give the masters the gradients that the next step will: without the loss scale, and clipped; a collective.

    Yields what clipping multiplies them by. Tensors that are made of them outlive the context.
    """
    pieces = pieces_of(optimizer)
    inner = inner_of(optimizer)
    gradients = [_gradient(optimizer, number, piece) for number, piece in enumerate(pieces)]
    scale = float(getattr(optimizer, "loss_scale", None) or optimizer.loss_scale_config.cur_scale)
    clip = _clip(optimizer, gradients, scale)
    if clip / scale != 1:
        for gradient in gradients:
            gradient.mul_(clip / scale)
    kept = [(piece.master, piece.master.grad) for piece in pieces]
    members = [list(group["params"]) for group in inner.param_groups]
    try:
        for piece, gradient in zip(pieces, gradients, strict=True):
            piece.master.grad = gradient
            # ZeRO-3 enters each one only for its own step.
            present = inner.param_groups[piece.group]["params"]
            if not any(piece.master is one for one in present):
                present.append(piece.master)
        yield clip
    finally:
        for master, gradient_before in kept:
            master.grad = gradient_before
        for group, params in zip(inner.param_groups, members, strict=True):
            group["params"][:] = params


def _gradient(optimizer: Any, number: int, piece: Piece) -> Tensor:
    """The flat gradient of a piece in its master's dtype, still scaled: a copy."""
    if type(optimizer).__name__ == _FUSED:
        group = optimizer.fp16_groups[number]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
    else:
        parts = list(optimizer.averaged_gradients.get(number) or ())
        if not parts:
            raise ValueError(
                "the engine must be about to step, got one whose gradients are not averaged yet; measure between "
                "engine.backward() and engine.step(), where engine.is_gradient_accumulation_boundary()"
            )
    flat = torch.cat([part.detach().reshape(-1).to(piece.master.dtype) for part in parts])
    missing = piece.master.numel() - flat.numel()
    return torch.cat([flat, flat.new_zeros(missing)]) if missing else flat


def _clip(optimizer: Any, gradients: list[Tensor], scale: float) -> float:
    """What the step will multiply unscaled gradients by; raises alike on all ranks where one is not finite."""
    square = torch.zeros((), dtype=torch.float64)
    for gradient in gradients:
        square += torch.linalg.vector_norm(gradient, dtype=torch.float64).square().cpu()
    group = process_group(optimizer)
    if group is not None:
        there = square.to(gradients[0].device)
        torch.distributed.all_reduce(there, group=group)
        square = there.cpu()
    norm = math.sqrt(square.item()) / scale if square >= 0 else math.nan
    if not math.isfinite(norm):
        raise NoUpdateError(_OVERFLOW)
    limit = float(optimizer.clip_grad)
    return 1 / max(1.0, (norm + 1e-6) / limit) if limit > 0 else 1.0
