"""DeepSpeed's engines: where the weights lie that a rank moves, and the gradient that the engine's step will see.

DeepSpeed puts a wrapper around the optimizer that it steps, and hands that one tensors of its own, the masters: of ZeRO
this rank's part of each group of parameters, flat. From the masters it writes the weights, here called pieces, and
gathers the model's parameters out of the pieces of all ranks. Its gradients are still multiplied by the loss scale, and
not yet clipped. deepspeed is looked up where it is loaded already.
"""

import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharpkern.errors import NoUpdateError


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of the weights that this rank moves.

    Attributes:
        weight: what the model's parameters are made from, in their dtype.
        master: what the optimizer holds, of the same shape; it may be the same memory.
        group: number of the optimizer's group that it belongs to.
    """

    weight: Tensor
    master: Tensor
    group: int

    @property
    def has_master(self) -> bool:
        """Whether the master is a copy of its own."""
        return self.master.data_ptr() != self.weight.data_ptr()


class Wrapped:
    """An optimizer inside of one of DeepSpeed's wrappers.

    Attributes:
        wrapper: DeepSpeed's.
        inner: the optimizer that moves the masters.
        gathers: parameters are gathered in a pass, module by module.
    """

    gathers = False

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self.inner: torch.optim.Optimizer = wrapper.optimizer

    def pieces(self) -> list[Piece]:
        """What this rank moves."""
        raise NotImplementedError

    def gradient(self, number: int) -> Sequence[Tensor]:
        """What lies one after the other in the gradient of a piece; nothing where that is not complete."""
        raise NotImplementedError

    def group(self) -> Any | None:
        """The ranks that the pieces are split over; None where each has all of them."""
        return self.wrapper.dp_process_group or torch.distributed.group.WORLD

    def publish(self) -> None:
        """Make the model's parameters what the pieces of all ranks hold; a collective where they are split."""


class _Partitioned(Wrapped):
    """ZeRO-1 and 2: every rank has all parameters, which lie in flat tensors, and moves its part of these."""

    _parts, _masters, _flat = (
        "parallel_partitioned_bit16_groups",
        "single_partition_of_fp32_groups",
        "bit16_groups_flat",
    )

    def pieces(self) -> list[Piece]:
        groups = self.wrapper.real_dp_process_group
        parts, masters = getattr(self.wrapper, self._parts), getattr(self.wrapper, self._masters)
        return [
            Piece(of_ranks[torch.distributed.get_rank(group)], master, number)
            for number, (of_ranks, master, group) in enumerate(zip(parts, masters, groups, strict=True))
        ]

    def gradient(self, number: int) -> Sequence[Tensor]:
        return self.wrapper.averaged_gradients.get(number) or ()

    def publish(self) -> None:
        sys.modules["deepspeed.runtime.utils"].all_gather_dp_groups(
            groups_flat=getattr(self.wrapper, self._flat),
            partitioned_param_groups=getattr(self.wrapper, self._parts),
            dp_process_group=self.wrapper.real_dp_process_group,
            start_alignment_factor=self.wrapper.nccl_start_alignment_factor,
            allgather_bucket_size=self.wrapper.allgather_bucket_size,
        )


class _Summed(_Partitioned):
    """ZeRO-1 of bf16 weights whose gradients are summed in float32."""

    _parts, _masters, _flat = "bf16_partitioned_groups", "fp32_groups_flat_partition", "bf16_groups_flat"

    def gradient(self, number: int) -> Sequence[Tensor]:
        return (self.wrapper.fp32_groups_gradient_flat_partition[number],)


class _Sharded(Wrapped):
    """ZeRO-3: every rank has its part of each parameter, one after the other in flat tensors."""

    gathers = True

    def pieces(self) -> list[Piece]:
        weights, masters = self.wrapper.fp16_partitioned_groups_flat, self.wrapper.fp32_partitioned_groups_flat
        return [
            Piece(weight, master, self.wrapper.sub_group_to_group_id[number])
            for number, (weight, master) in enumerate(zip(weights, masters, strict=True))
        ]

    def gradient(self, number: int) -> Sequence[Tensor]:
        return self.wrapper.averaged_gradients.get(number) or ()

    def publish(self) -> None:
        # What is gathered is let go of, so that the next pass gathers what was written.
        self.wrapper.parameter_offload.partition_all_parameters()
        if self.wrapper.persistent_parameters:
            self.wrapper.persistent_parameters[0].all_gather(self.wrapper.persistent_parameters)
        self.wrapper.invalidate_secondary_tensor()


class _Fused(Wrapped):
    """Stage 0 in 16 bits: all parameters lie in flat tensors, and all of these are moved."""

    def pieces(self) -> list[Piece]:
        pairs = zip(self.wrapper.fp16_groups_flat, self.wrapper.fp32_groups_flat, strict=True)
        return [Piece(weight, master, number) for number, (weight, master) in enumerate(pairs)]

    def gradient(self, number: int) -> Sequence[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.wrapper.fp16_groups[number]]

    def group(self) -> None:
        return None


class _Unfused(Wrapped):
    """Stage 0 in 16 bits with any optimizer: a master for each parameter."""

    def pieces(self) -> list[Piece]:
        return [
            Piece(parameter, master, number)
            for number, (group, masters) in enumerate(
                zip(self.wrapper.fp16_groups, self.wrapper.fp32_groups, strict=True)
            )
            for parameter, master in zip(group, masters, strict=True)
        ]

    def gradient(self, number: int) -> Sequence[Tensor]:
        parameter = self.pieces()[number].weight
        return (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad,)

    def group(self) -> None:
        return None


# By the name of the very class: what is derived from it steps in another way.
_KNOWN: dict[str, type[Wrapped]] = {
    "DeepSpeedZeroOptimizer": _Partitioned,
    "DeepSpeedZeroOptimizer_Stage3": _Sharded,
    "BF16_Optimizer": _Summed,
    "FP16_Optimizer": _Fused,
    "FP16_UnfusedOptimizer": _Unfused,
}


def is_engine(module: object) -> bool:
    """Whether a module is DeepSpeed's engine."""
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(module).__mro__)


def engine_in(model: nn.Module) -> Any | None:
    """The engine that a model is or holds."""
    return next(filter(is_engine, model.modules()), None) if "deepspeed" in sys.modules else None


def is_wrapper(optimizer: object) -> bool:
    """Whether an optimizer is what DeepSpeed has put around the one that steps."""
    base = sys.modules.get("deepspeed.runtime.base_optimizer")
    return base is not None and isinstance(optimizer, base.DeepSpeedOptimizer)


def wrapped(optimizer: Any) -> Wrapped | None:
    """What is known of one of DeepSpeed's wrappers; None of anything else.

    Raises:
        TypeError: it steps in another way than those that are known.
    """
    if not is_wrapper(optimizer):
        return None
    unknown = _unknown_of(optimizer)
    if unknown:
        raise TypeError(_refusal("optimizer must be that of", unknown))
    return _KNOWN[type(optimizer).__name__](optimizer)


def refuse_unknown(engine: Any) -> None:
    """Refuse an engine whose weights, gradients or step are not where this file looks for them."""
    config = getattr(engine, "_config", None)
    zero = getattr(config, "zero_config", None)
    found = [
        what
        for what, there in {
            "PipelineEngine": any(kind.__name__ == "PipelineEngine" for kind in type(engine).__mro__),
            "model parallelism": getattr(engine, "mp_world_size", 1) > 1 or getattr(engine, "autotp_size", int)() > 1,
            "sequence parallelism": getattr(engine, "sequence_parallel_size", 1) > 1,
            "MoE layers": getattr(engine, "has_moe_layers", False),
            "ZenFlow": getattr(engine, "zenflow", False),
            "DeepCompile": getattr(engine, "_deepcompile_active", False),
            "offloaded optimizer states": _offloads(zero, "offload_optimizer"),
            "offloaded parameters": _offloads(zero, "offload_param"),
            "quantised weights": getattr(zero, "zero_quantized_weights", False)
            or getattr(zero, "zero_quantized_nontrainable_weights", False),
            "quantised gradients": getattr(zero, "zero_quantized_gradients", False),
            "managed_gradient_accumulation=false": not getattr(config, "managed_gradient_accumulation", True),
            "float16 by torch_autocast": getattr(engine, "torch_autocast_z0_gradscaler", None) is not None,
        }.items()
        if there
    ]
    found += _unknown_of(getattr(engine, "optimizer", None))
    if found:
        raise TypeError(_refusal("model must be", list(dict.fromkeys(found))))


def _refusal(what: str, found: Sequence[str]) -> str:
    return (
        f"{what} a DeepSpeed engine at ZeRO stage 0 to 3 with weights and optimizer states on the device, got one with "
        f"{', '.join(found)}; leave that out, or measure the run's checkpoints"
    )


def _offloads(zero: Any, name: str) -> bool:
    device = getattr(getattr(zero, name, None), "device", None)
    return device is not None and getattr(device, "value", device) != "none"


def _unknown_of(optimizer: Any) -> list[str]:
    """Names of what does not step as the optimizers that are known, of a wrapper and what is inside of it."""
    if type(optimizer).__name__ == "DeepSpeedZeRoOffload":
        return ["sharded weights and no optimizer"]
    is_outer = is_wrapper(optimizer)
    inner = type(getattr(optimizer, "optimizer", None) if is_outer else optimizer)
    own = inner.__module__.startswith("deepspeed.")
    return [
        what
        for what, there in {
            type(optimizer).__name__: is_outer and type(optimizer).__name__ not in _KNOWN,
            "offloaded optimizer states": is_outer
            and (getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)),
            "states that offload_states() took away": is_outer and bool(getattr(optimizer, "offloaded_states", None)),
            "float16 by torch_autocast": getattr(optimizer, "torch_autocast_gradscaler", None) is not None,
            # DeepSpeed divides the gradients by a loss scale there that it has not multiplied the loss by.
            "float16 at stage 0": getattr(getattr(optimizer, "loss_scale_config", None), "use_grad_scaling", False),
            "a fused step of its own": getattr(optimizer, "fused_adam_legacy", False)
            or getattr(optimizer, "fused_lamb_legacy", False),
            # Muon orthogonalises gradients ahead of its step, 1-bit optimizers average them inside of it.
            f"DeepSpeed's {inner.__name__}": own and ("muon" in inner.__module__ or "onebit" in inner.__module__),
        }.items()
        if there
    ]


@contextmanager
def step_gradients(known: Wrapped) -> Iterator[float]:
    """Give the masters the gradients that the next step will, without loss scale, clipped; a collective.

    Yields what clipping multiplies the gradient by. The gradients outlive the context where they are held.
    """
    pieces, groups = known.pieces(), known.inner.param_groups
    gradients, clip = _gradients(known, pieces)
    kept = [(piece.master, piece.master.grad) for piece in pieces]
    members = [list(group["params"]) for group in groups]
    try:
        for piece, gradient in zip(pieces, gradients, strict=True):
            piece.master.grad = gradient
            # ZeRO-3 enters each one for its own step alone.
            held = groups[piece.group]["params"]
            if not any(piece.master is one for one in held):
                held.append(piece.master)
        yield clip
    finally:
        for master, gradient_before in kept:
            master.grad = gradient_before
        for group, params in zip(groups, members, strict=True):
            group["params"][:] = params


def _flat(parts: Sequence[Tensor], master: Tensor) -> Tensor:
    """A gradient as its master lies, padded with zeros: a copy."""
    flat = torch.cat([part.detach().reshape(-1).to(master.dtype) for part in parts])
    padding = flat.new_zeros(master.numel() - flat.numel())
    return torch.cat([flat, padding]).view_as(master) if padding.numel() else flat.view_as(master)


def _gradients(known: Wrapped, pieces: Sequence[Piece]) -> tuple[list[Tensor], float]:
    """The gradients that the step will see, and what clipping makes of them; a collective, also where a rank fails."""
    gradients: list[Tensor] = []
    failure = None
    square = torch.full((), math.nan, dtype=torch.float64, device=pieces[0].master.device)
    try:
        each = [known.gradient(number) for number in range(len(pieces))]
        # ZeRO-3 keeps what has been summed so far.
        if not all(each) or not getattr(known.wrapper, "is_gradient_accumulation_boundary", lambda: True)():
            raise ValueError(
                "the engine must be about to step, got one whose gradients are not averaged yet; measure between "
                "engine.backward() and engine.step(), where engine.is_gradient_accumulation_boundary()"
            )
        gradients = [_flat(parts, piece.master) for parts, piece in zip(each, pieces, strict=True)]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        square = torch.stack(norms).square().sum()
    except Exception as raised:
        # The others hear of it by what is no number.
        failure = raised
    if known.group() is not None:
        torch.distributed.all_reduce(square, group=known.group())
    if failure is not None:
        try:
            raise failure
        finally:
            del failure
    scale = _scale(known.wrapper)
    # A loss scale that grows in this step does so before it is divided by.
    factor = 1 / _next_scale(known.wrapper)
    factor *= _coefficient(square, float(known.wrapper.clip_grad), factor)
    for gradient in gradients:
        gradient.mul_(factor)
    return gradients, factor * scale


def _coefficient(square: Tensor, limit: float, factor: float) -> float:
    """What clipping to a norm multiplies gradients by: those of a squared norm, once they are taken times a factor."""
    norm = math.sqrt(square.item()) * factor if square >= 0 else math.nan
    if not math.isfinite(norm):
        raise NoUpdateError(
            "the gradient must be finite, got nan or inf on some rank; skip this measurement: DeepSpeed skips the step"
        )
    return 1 / max(1.0, (norm + 1e-6) / limit) if limit > 0 else 1.0


def clip_of(model: nn.Module) -> float | None:
    """What an engine at stage 0 will multiply the parameters' own gradients by; None where it leaves them alone."""
    engine = engine_in(model)
    limit = 0.0 if engine is None or is_wrapper(engine.optimizer) else float(engine.gradient_clipping())
    if engine is None or limit == 0:
        return None
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in model.parameters() if p.grad is not None]
    return _coefficient(torch.stack(norms).square().sum(), limit, 1.0) if norms else None


def _scale(wrapper: Any) -> float:
    """The loss scale."""
    return float(getattr(wrapper, "loss_scale", None) or 1.0)


def _next_scale(wrapper: Any) -> float:
    """The loss scale that the step will divide by."""
    kept = getattr(wrapper, "loss_scaler", None)
    if kept is None:
        return _scale(wrapper)
    wrapper.loss_scaler = copy.copy(kept)
    try:
        wrapper._update_scale(False)
        return _scale(wrapper)
    finally:
        wrapper.loss_scaler = kept


def keep_state(known: Wrapped) -> Callable[[], None]:
    """Note what a wrapper counts in a pass without a backward pass; returns what puts it back."""
    hooks = getattr(known.wrapper, "_backward_hook_state", None)
    counted = {} if hooks is None else dict(vars(hooks))
    micro_step = getattr(known.wrapper, "micro_step_id", None)

    def put_back() -> None:
        if hooks is not None:
            vars(hooks).update(counted)
        if micro_step is not None:
            known.wrapper.micro_step_id = micro_step

    return put_back
