"""Kernels compiled before training starts: else the first measurements wait for Triton's compiler."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from sharpkern import ops
from sharpkern._support.progress import progress_bar
from sharpkern.directions.parts import parts_of
from sharpkern.directions.residence import may_keep
from sharpkern.directions.shadow_step import undisturbed
from sharpkern.distributed.sharding import local
from sharpkern.engines.batched.engine import NUM_PARALLEL
from sharpkern.ops.linear_cross_entropy import VOCABULARY_CHUNK
from sharpkern.ops.matmul import product_dtype
from sharpkern.ops.rules import rule_of
from sharpkern.ops.together import prepared_together
from sharpkern.ops.update import LazyUpdate, ParamUpdate, StoredUpdate

# Elements from which on kernels have the configuration of large tensors, and of large models.
_LARGE, _LARGE_MODEL = 1 << 18, 1 << 22
# What small stand-ins have.
_FEW = 1 << 10

_NORMS = (nn.LayerNorm, nn.RMSNorm)

# Models whose kernels need no word any more.
_done: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class _Kind:
    """Parameters of one optimizer's group that have a dtype and a device in common.

    Attributes:
        parameters: of them.
        optimizer: that steps them.
        group: its group, without the parameters.
    """

    parameters: Sequence[Tensor]
    optimizer: Any
    group: Mapping[str, Any]


def precompile(
    model: nn.Module, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], *, progress: bool = True
) -> int:
    """Compile the kernels that measurements of a model will need, before training starts.

    Triton compiles a kernel when it is first launched, for a second or so each, and keeps it on the disk
    (``TRITON_CACHE_DIR``). A `Monitor` would do so in its first measurements. Nothing happens where there is no GPU.
    Where the loss is computed under autocast, call it under the same.

    Args:
        model: the model that is trained.
        optimizer: its optimizer, or a list of those that step together, before or after their first steps.
        progress: whether a terminal shows how far it is.

    Returns:
        int: launches that were made on stand-ins; 0 where there are no kernels.

    Raises:
        TypeError: if an argument is of another kind.

    Memory:
        While it runs, stand-ins of 4 Mi elements with the state of an optimizer: about 100 MiB.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> precompile(model, torch.optim.AdamW(model.parameters()))
        0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; pass the model that is trained")
    parts_of(optimizer)
    kinds = list(_kinds(optimizer))
    _done.add(model)
    num_launches = 0
    with torch.no_grad(), progress_bar(len(kinds) + 1, shown=progress and bool(kinds), words="compiling") as advance:
        for kind in kinds:
            num_launches += undisturbed([kind.parameters[0].device], partial(_count_of_kind, kind, model))
            advance("compiling kernels of the optimizer")
        for device, dtypes in _devices(kinds).items():
            num_launches += _count(_launches_of_layers(model, device, dtypes))
        advance("compiling kernels of layers")
    return num_launches


@contextmanager
def told_of_compiling(model: nn.Module) -> Iterator[None]:
    """Say on a terminal what the first measurement of a model may wait for, unless that was done before."""
    is_first = model not in _done and any(ops.has_kernels(parameter.device) for parameter in model.parameters())
    _done.add(model)
    words = "first measurement: compiling kernels, which sharpkern.precompile does before training"
    with progress_bar(1, shown=is_first, words=words):
        yield


def _count_of_kind(kind: _Kind, model: nn.Module) -> int:
    return _count(_launches_of(kind, model))


def _count(launches: Iterator[None]) -> int:
    return sum(1 for _ in launches)


def _kinds(optimizer: Any) -> Iterator[_Kind]:
    """Yield the groups of parameters that kernels move."""
    for part in parts_of(optimizer):
        alike: dict[Hashable, list[Any]] = defaultdict(list)
        for place in part.places():
            held = local(place.parameter)
            if ops.has_kernels(held.device) and held.is_floating_point() and held.dtype != torch.float64:
                alike[place.group_number, held.dtype, held.device].append(place)
        for places in alike.values():
            group = {key: value for key, value in places[0].group.items() if key != "params"}
            yield _Kind([local(place.parameter) for place in places], part.optimizer, group)


def _devices(kinds: Iterable[_Kind]) -> dict[torch.device, set[torch.dtype]]:
    found: dict[torch.device, set[torch.dtype]] = defaultdict(set)
    for kind in kinds:
        found[kind.parameters[0].device].add(kind.parameters[0].dtype)
    return found


def _launches_of(kind: _Kind, model: nn.Module) -> Iterator[None]:
    """Launch what forms and sums the updates of a kind, with the state that there is now and after a step."""
    there = any(kind.optimizer.state.get(parameter) for parameter in kind.parameters)
    for steps in (1,) if there or rule_of(kind.optimizer) is None else (0, 1):
        make = partial(_stand_in, kind, steps)
        yield from _launches_after(make, kind, model)
        if _may_be_kept(kind):
            yield from _together(make(_size_of(kind)), None, torch.bfloat16)
    if _may_be_kept(kind):
        yield from _launches_after(partial(_kept_stand_in, kind), kind, model)


def _size_of(kind: _Kind) -> int:
    """Elements of what has the configuration of large models, where a kind is of one."""
    return _LARGE_MODEL if sum(p.numel() for p in kind.parameters) >= _LARGE_MODEL else _FEW


def _may_be_kept(kind: _Kind) -> bool:
    """Whether Δθ may be kept in memory unasked."""
    like = kind.parameters[0]
    by_rule = rule_of(kind.optimizer) is not None
    return by_rule and like.dtype == torch.bfloat16 and may_keep(sum(map(torch.numel, kind.parameters)), like.device)


def _launches_after(make: Callable[[int], ParamUpdate], kind: _Kind, model: nn.Module) -> Iterator[None]:
    like = kind.parameters[0]
    vectors = [p.numel() for p in kind.parameters if p.dim() == 1]
    alpha, steps = (torch.zeros(num, dtype=torch.float32, device=like.device) for num in (1, NUM_PARALLEL))
    whole = make(_size_of(kind))
    # Sums, and weights that are written in place.
    if isinstance(whole, LazyUpdate):
        operands = (whole.rule, [whole.base], [whole.grad], whole.state, whole.numbers)
        ops.sum_steps(*operands, decoupled=whole.decoupled, flag=whole.flag)
    else:
        ops.reduce([whole.update()], [whole.update()], [whole.base])
    yield
    yield from _together(whole, alpha, like.dtype)
    if isinstance(whole, StoredUpdate):
        for module in {m.embedding_dim: m for m in model.modules() if isinstance(m, nn.Embedding)}.values():
            W = torch.zeros(4, module.embedding_dim, dtype=like.dtype, device=like.device)
            for each in (alpha, steps):
                ops.embedding(torch.zeros(4, dtype=torch.int64, device=like.device), W, W.to(whole.delta.dtype), each)
                yield
    # Weights one by one, of which there are some rows at a time as well, and vectors of their own.
    for num in (_FEW, _LARGE):
        one = make(num)
        for each, dtype in product((alpha, steps), {like.dtype, product_dtype(like)}):
            one.form(each, dtype=dtype)
            yield
        for each in (alpha, steps):
            if len(vectors) == 1 and num == _FEW and like.dtype.itemsize < 4:
                one.form(each, dtype=torch.float32)
                yield
    if len(vectors) > 1:
        # In float32, where a norm of 16 bits is computed.
        few = make(_LARGE_MODEL if sum(vectors) >= _LARGE_MODEL else _FEW)
        yield from _together(few, alpha, torch.float32)
        if isinstance(few, LazyUpdate) and any(isinstance(module, _NORMS) for module in model.modules()):
            yield from _together(few, None, torch.float32)


def _together(move: ParamUpdate, alpha: Tensor | None, dtype: torch.dtype) -> Iterator[None]:
    launch = prepared_together([move], [torch.empty_like(move.base, dtype=dtype)], alpha)
    if launch is not None:
        launch(alpha=alpha)
        yield


def _kept_stand_in(kind: _Kind, num: int) -> ParamUpdate:
    """An update of a parameter of some size whose Δθ is in memory as its weight is."""
    like = kind.parameters[0]
    weight = torch.ones(num, dtype=like.dtype, device=like.device)
    return StoredUpdate(weight, torch.ones_like(weight))


def _stand_in(kind: _Kind, num_steps: int, num: int) -> ParamUpdate:
    """The update of a parameter of some size as the optimizer would make it after so many steps."""
    like = kind.parameters[0]
    parameter = nn.Parameter(torch.ones(num, dtype=like.dtype, device=like.device))
    rule = rule_of(kind.optimizer)
    if rule is None:
        # Another optimizer steps on a copy, whose displacement is kept in float32.
        wide = torch.promote_types(like.dtype, torch.float32)
        return StoredUpdate(parameter.detach(), torch.ones_like(parameter, dtype=wide))
    parameter.grad = torch.ones_like(parameter)
    optimizer = type(kind.optimizer)([{**kind.group, "params": [parameter]}])
    for _ in range(num_steps):
        optimizer.step()
    # .get: the state is a defaultdict, and indexing it would create an entry.
    state, real = optimizer.state.get(parameter, {}), kind.optimizer.state.get(like, {})
    state = {
        name: value.to(real[name].dtype) if isinstance(value, Tensor) and isinstance(real.get(name), Tensor) else value
        for name, value in state.items()
    }
    reading = rule.read(optimizer, optimizer.param_groups[0], state, float(num_steps))
    numbers = (reading.weight_decay, 1.0, 1.0, *reading.numbers)
    return LazyUpdate(
        rule.name, parameter.detach(), parameter.grad, reading.state, numbers, reading.decoupled, reading.flag
    )


def _launches_of_layers(model: nn.Module, device: torch.device, dtypes: set[torch.dtype]) -> Iterator[None]:
    """Launch what normalises, and what takes the cross-entropy of large logits."""
    modules = list(model.modules())
    vocabularies = {module.num_embeddings for module in modules if isinstance(module, nn.Embedding)}
    kept = may_keep(sum(p.numel() for p in model.parameters() if p.dtype == torch.bfloat16), device)
    directions = [torch.float32, *([torch.bfloat16] if kept else [])]
    norms = {_norm_of(module) for module in modules if isinstance(module, _NORMS) and module.elementwise_affine}
    for steps in (1, NUM_PARALLEL):
        alpha = torch.zeros(steps, dtype=torch.float32, device=device)
        height = VOCABULARY_CHUNK // steps
        for width in {height} | {vocabulary % height or height for vocabulary in vocabularies if vocabulary > height}:
            maximum, total, target = (torch.zeros(4, device=device) for _ in range(3))
            logits = torch.zeros(4, height, device=device)[:, :width]
            labels = torch.zeros(4, dtype=torch.int64, device=device)
            ops.online_cross_entropy_(maximum, total, target, logits, labels, 0)
            yield
        for kind, length, eps, has_bias in norms:
            for dtype, moving in product(dtypes, directions):
                if eps is None or moving not in (dtype, torch.float32):
                    continue
                x = torch.zeros(steps, 4, length, dtype=dtype, device=device)
                w, d = torch.ones(length, dtype=dtype, device=device), torch.ones(length, dtype=moving, device=device)
                if kind is nn.LayerNorm:
                    ops.layer_norm(x, w, d, w if has_bias else None, d if has_bias else None, alpha, eps=eps)
                else:
                    ops.rms_norm(x, w, d, alpha, eps=eps)
                yield


def _norm_of(module: Any) -> tuple[type, int, float | None, bool]:
    """What the kernel of a norm depends on."""
    kind = nn.LayerNorm if isinstance(module, nn.LayerNorm) else nn.RMSNorm
    return kind, module.normalized_shape[-1], module.eps, getattr(module, "bias", None) is not None
