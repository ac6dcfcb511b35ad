"""Parameters that share memory: each step moves that memory, and so all of them, by the sum of their updates."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from sharpkern.distributed.sharding import is_sharded, local
from sharpkern.ops.reductions import inner_product
from sharpkern.ops.update import LazyUpdate
from sharpkern.tensors.storage import elements_spanned, overlapping, overlaps_itself

Source = Tensor | LazyUpdate
Given = TypeVar("Given", bound=Source)

_REMEDY = (
    "give one of them memory of its own by .data = .data.clone(), or use one Parameter in both places, as by "
    "F.linear(x, self.encoder.weight.T)"
)


def summed(
    parameters: Sequence[Tensor],
    sources: Sequence[Given],
    labels: Sequence[str],
    masters: Sequence[Tensor | None] = (),
) -> list[Given | Tensor]:
    """Return updates in which those of parameters that share memory are what they move that memory by together."""
    result: list[Given | Tensor] = list(sources)
    for group in overlapping([local(parameter) for parameter in parameters]):
        _check_group([parameters[i] for i in group], [labels[i] for i in group], [masters[i] for i in group if masters])
        _, views = _spread([parameters[i] for i in group], [_worked_out(sources[i]) for i in group], add=True)
        for i, view in zip(group, views, strict=True):
            result[i] = view
    return result


def norm_once(
    parameters: Sequence[Tensor], sources: Sequence[Source], norms_sq: Sequence[float], labels: Sequence[str]
) -> float:
    """Return |Δθ|² with memory that parameters share counted once."""
    for label, parameter, norm_sq in zip(labels, parameters, norms_sq, strict=True):
        if norm_sq and overlaps_itself(local(parameter)):
            raise ValueError(
                f"{label} must have memory for each of its elements, got strides {list(local(parameter).stride())} for "
                f"shape {list(parameter.shape)}; make the smaller tensor the Parameter, and expand it in forward()"
            )
    alone = dict(enumerate(norms_sq))
    together = 0.0
    for group in overlapping([local(parameter) for parameter in parameters]):
        members = [parameters[i] for i in group]
        _check_group(members, [labels[i] for i in group])
        deltas = [_worked_out(sources[i]) for i in group]
        memory, views = _spread(members, deltas, add=False)
        for i, view, delta in zip(group, views, deltas, strict=True):
            if not torch.equal(view, delta.to(view.dtype)):
                raise ValueError(
                    f"{' and '.join(labels[i] for i in group)} share memory and must move alike, got different "
                    f"displacements for {labels[i]}; pass the sum of their updates for each, or for one of them alone"
                )
            del alone[i]
        together += float(inner_product(memory, memory))
    return sum(alone.values()) + together


def also_moved(
    parameters: Sequence[nn.Parameter],
    sources: Sequence[Source],
    masters: Sequence[Tensor | None],
    labels: Sequence[str],
) -> dict[nn.Parameter, Tensor]:
    """Return what moves besides: parameters that share memory with one that does, and how far each moves."""
    found: dict[nn.Parameter, Tensor] = {}
    for group in overlapping([local(parameter) for parameter in parameters]):
        mine = [i for i in group if i < len(sources)]
        if not mine or len(mine) == len(group):
            continue
        members = [parameters[i] for i in group]
        _check_group(members, [labels[i] for i in group], [masters[i] for i in mine])
        deltas = [_worked_out(sources[i]) if i < len(sources) else None for i in group]
        _, views = _spread(members, deltas, add=False)
        for parameter, view, delta in zip(members, views, deltas, strict=True):
            if delta is None and view.any():
                found[parameter] = view
    return found


def _spread(parameters: Sequence[Tensor], deltas: Sequence[Tensor | None], *, add: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the displacement of the memory that parameters share, and what each of them sees of it."""
    dtype = torch.float32
    for delta in deltas:
        dtype = dtype if delta is None else torch.promote_types(dtype, delta.dtype)
    start = min(parameter.storage_offset() for parameter in parameters)
    stop = max(parameter.storage_offset() + elements_spanned(parameter) for parameter in parameters)
    memory = torch.zeros(stop - start, dtype=dtype, device=parameters[0].device)
    views = [memory.as_strided(p.size(), p.stride(), p.storage_offset() - start) for p in parameters]
    for view, delta in zip(views, deltas, strict=True):
        if delta is not None:
            view.add_(delta) if add else view.copy_(delta)
    return memory, views


def _worked_out(source: Source) -> Tensor:
    """Return Δθ of a source."""
    return source if isinstance(source, Tensor) else source.update()


def _check_group(parameters: Sequence[Tensor], labels: Sequence[str], masters: Sequence[Tensor | None] = ()) -> None:
    """Refuse parameters that share memory in a way in which no displacement of it is defined."""
    dtypes = list(dict.fromkeys(str(parameter.dtype) for parameter in parameters))
    wrong = [label for label, parameter in zip(labels, parameters, strict=True) if overlaps_itself(local(parameter))]
    if len(dtypes) > 1:
        rule, got = "be of one dtype", " and ".join(dtypes)
    elif any(map(is_sharded, parameters)):
        rule, got = "be plain tensors", "DTensors"
    elif any(master is not None for master in masters):
        rule, got = "have no masters, each of which is stepped by itself", "masters"
    elif wrong:
        rule, got = "have memory for each of their elements", f"an expanded {wrong[0]}"
    else:
        return
    raise ValueError(f"parameters that share memory must {rule}, got {got} for {' and '.join(labels)}; {_REMEDY}")
