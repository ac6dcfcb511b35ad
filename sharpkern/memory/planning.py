"""`memory_plan`: run every method on fake tensors, and see what it would take."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from sharpkern._support.progress import progress_bar
from sharpkern.engines.batched.engine import NUM_PARALLEL
from sharpkern.errors import EngineUnsupportedError
from sharpkern.memory.architectures import HEADS, check_positions, language_loss, language_model
from sharpkern.memory.cards import MethodMemory
from sharpkern.memory.gpus import ranks, shard
from sharpkern.memory.methods import Method, methods
from sharpkern.memory.optimizers import OPTIMIZERS, has_formula
from sharpkern.memory.plan import MemoryPlan
from sharpkern.memory.training_state import TrainingState, fake_copy
from sharpkern.tensors.fake import pretend_device

_RANGES = {"tokens": (2, 2**24), "batch_size": (1, 2**20), "num_gpus": (1, 2**16), "num_steps": (1, NUM_PARALLEL)}
_NO_VALUES = (
    "loss_fn must not read values, which a plan has none of, got {}; leave out what depends on them: assertions, masks "
    "made by indexing, .item()"
)


def memory_plan(
    model: str | os.PathLike[str] | nn.Module,
    loss_fn: Callable[[nn.Module], Tensor] | None = None,
    *,
    tokens: int = 4096,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
    optimizer: str = "adamw-fp32",
    num_gpus: int = 1,
    num_steps: int = 8,
    head: str = "stock",
    progress: bool = True,
) -> MemoryPlan:
    """Count what measuring a model would take on a GPU, by every method, without the GPU and without the memory.

    The engines' own code runs on tensors that have shapes and no values, and the bytes of those that are alive at once
    are counted. What is not in it: what kernels take and free by themselves, the allocator's rounding, CUDA's context.

    Args:
        model: name of an architecture ("olmo2-7b", "llama3-70b", "qwen3-8b", …), a configuration file of
            transformers or its folder, or a module, such as one that was built under ``torch.device("meta")``.
        loss_fn: of a module: takes a copy of it that lies on the CPU, makes its inputs itself, and returns the loss;
            autocast in it must be the CPU's. Nothing has values; what reads them is refused. Left out for a causal
            language model by name.
        tokens: in a sequence, of a model by name.
        batch_size: sequences, of a model by name.
        dtype: of the weights of a model by name; by default as its configuration says, or bfloat16.
        optimizer: that trains the model: one of `OPTIMIZERS`; "none" for a checkpoint that is measured by itself.
        num_gpus: over which FSDP2 shards model, optimizer and direction; each has a batch of its own.
        num_steps: step sizes of one pass of the batched engine, 1 to 8.
        head: of a model by name: "stock" logits of the whole vocabulary in training and plain forward passes, or
            "chunked" cross-entropy (`linear_cross_entropy`). The virtual and batched engines go by chunks anyway.
        progress: shows a bar on a terminal: a large model takes up to a minute.

    Returns:
        MemoryPlan: peak bytes of each method that can evaluate the model, by what they are for, and the smallest card
        that holds it; "forward and backward" recomputes nothing and has no optimizer's step in it. Print it, or
        see ``plan["virtual", "state"].peak_bytes``, ``to_json``, ``save`` and ``plot``.

    Raises:
        ImportError: transformers is not installed, and the model is a name.
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range, there is no such model, or ``loss_fn`` reads values.

    Memory: none of the model's.

    Examples:
        >>> import torch, sharpkern
        >>> with torch.device("meta"):
        ...     model = torch.nn.Sequential(torch.nn.Linear(512, 4096), torch.nn.ReLU(), torch.nn.Linear(4096, 10))
        >>> plan = sharpkern.memory_plan(model, lambda model: model(torch.zeros(64, 512)).square().mean())
        >>> plan["virtual", "state"].peak_bytes < plan["in place", "state"].peak_bytes
        True
    """
    _check_choices(optimizer=(optimizer, tuple(OPTIMIZERS)), head=(head, HEADS))
    _check_numbers(tokens=tokens, batch_size=batch_size, num_gpus=num_gpus, num_steps=num_steps)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    conditions: dict[str, Any] = {"optimizer": optimizer, "gpus": num_gpus}
    vocabulary: int | None = None
    if isinstance(model, nn.Module):
        if loss_fn is None:
            raise TypeError(
                "loss_fn must be given with a module, got none; pass a function that takes the module and returns its "
                "loss"
            )
        name, original, loss = type(model).__name__, model, loss_fn
    elif isinstance(model, (str, os.PathLike)):
        if loss_fn is not None:
            raise TypeError("loss_fn must be left out for a model by name, got one; pass the module with it")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating torch.dtype, got {dtype!r}; pass torch.bfloat16")
        name = os.fspath(model)
        with progress_bar(1, shown=progress, words="reading the configuration"):
            original, vocabulary = language_model(name, dtype)
        check_positions(original, tokens)
        dtype = next(original.parameters()).dtype
        loss = language_loss(tokens, batch_size, head)
        number = {"tokens": tokens, "batch_size": batch_size}
        conditions |= {**number, "dtype": str(dtype).removeprefix("torch."), "head": head}
    else:
        raise TypeError(
            f"model must be a name, a path or a torch.nn.Module, got {type(model).__name__}; build the model under "
            'torch.device("meta")'
        )

    def scene() -> TrainingState:
        fake = fake_copy(original, mode)
        if num_gpus > 1:
            shard(fake, num_gpus, mode)
        return TrainingState(fake, loss, optimizer, mode, vocabulary)

    if not any(parameter.requires_grad for parameter in original.parameters()):
        raise ValueError("model must have parameters that are trained, got none; unfreeze what is to move")
    conditions = {"parameters": sum(p.numel() for p in original.parameters()), **conditions}
    by_formula = has_formula(optimizer)
    in_bf16 = by_formula and num_gpus == 1 and any(p.dtype == torch.bfloat16 for p in original.parameters())
    ways = methods(num_steps, from_state=by_formula, in_bf16=in_bf16)
    if num_gpus > 1:
        ways = [method for method in ways if method.sharded]
    rows: list[MethodMemory] = []
    with (
        ranks(num_gpus),
        pretend_device("cuda"),
        _values_refused(),
        progress_bar(len(ways), shown=progress, words="building the model") as advance,
    ):
        place = scene()
        for method in ways:
            # As in a run, where the next engine takes the place of one that is unable.
            with suppress(EngineUnsupportedError):
                rows.append(_row(place, method))
            advance(method.name)
            if num_gpus > 1:
                # What FSDP2 has gathered for one method is not there for the next.
                place = scene()
    return MemoryPlan(name, conditions, tuple(rows))


def _row(scene: TrainingState, method: Method) -> MethodMemory:
    counter = scene.counter()
    held = scene.held(gradients=method.measures)
    method.run(scene, counter)
    parts = {name: size for name, size in (held | counter.parts).items() if size}
    return MethodMemory(method.name, method.direction, method.num_steps, parts, counter.host_bytes)


@contextmanager
def _values_refused() -> Iterator[None]:
    """Say what it means if a loss cannot be had without values."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(_NO_VALUES.format(error.args[0] if error.args else error)) from error
    except RuntimeError as error:
        if "numpy()" not in str(error):
            raise
        raise ValueError(_NO_VALUES.format(".numpy()")) from error


def _check_choices(**options: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, choices) in options.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}; choose the nearest")


def _check_numbers(**numbers: int) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must be an integer, got {number!r}; pass a count")
        least, most = _RANGES[name]
        if not least <= number <= most:
            raise ValueError(f"{name} must be from {least} to {most}, got {number}; pass another")
