"""Critical sharpness of one block at a time: which layer limits the step."""

import time
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from statistics import mean
from typing import Any

from torch import nn
from typing_extensions import Unpack

from sharpkern.directions.blocks import default_blocks, items_of, selected
from sharpkern.directions.direction import Direction
from sharpkern.distributed.declared import Ranks
from sharpkern.distributed.sharding import reshard
from sharpkern.engines.session import Engine, Session, in_session
from sharpkern.errors import NoUpdateError
from sharpkern.measures.critical import check_arguments, common, step_of
from sharpkern.measures.micro_batches import Clip, Several, Step
from sharpkern.measures.result import Measurement, MeasureOptions, Options
from sharpkern.measures.run import ConstantLossError, Run, finish
from sharpkern.measures.sampled import by_sample
from sharpkern.search.line_search import SearchMemory, SearchResult

Which = str | nn.Parameter | nn.Module | Iterable[str | nn.Parameter | nn.Module]
Blocks = Mapping[str, Which]
# Relative noise up to which losses of other formed weights are the same; in 16 bits each block has its own base loss.
_EXACT = 1e-6


def blockwise_critical_sharpness(
    model: nn.Module,
    loss_fn: Several,
    direction: Direction,
    blocks: Blocks | None = None,
    *,
    weights: Sequence[float] | None = None,
    clip: Clip = None,
    **options: Unpack[MeasureOptions],
) -> dict[str, Measurement]:
    """Measure λ_c = 2/η_c of every block, η_c being how far it can move alone before the loss rises.

    Each block moves by its own part of Δθ, while all other parameters stay at θ. The blocks' λ_c do not add up to λ_c
    of the whole update, and may all be smaller or larger than it: the curvature between blocks is in none of them.

    Args:
        model: evaluated by ``loss_fn``.
        loss_fn: as for `critical_sharpness`, one closure or the micro-batches of one step.
        direction: Δθ of the whole model.
        blocks: {name: what moves}: patterns of parameters' names ("h.0.*"), modules or parameters, or several of them.
            By default the repeated layers, which stand in a ModuleList or Sequential, and each module beside them, such
            as embedding, last norm and head; a tied weight belongs to the first block that has it.
        weights: of the micro-batches, as for `critical_sharpness`.
        clip: as for `critical_sharpness`, where there is a sample.
        **options: of `critical_sharpness`, ``base_loss`` excepted. With ``sample`` the same micro-batches are drawn for
            all blocks, and each takes as many more as it needs. Where ``ranks`` split the model, a block is what all
            ranks hold under its name, and a rank may hold nothing of it.

    Returns:
        dict: name of the block → its measurement, in the order of ``blocks``; sharpness in 1/learning-rate, ``slope``
        the block's own share of Δθᵀg. Blocks that the direction does not move are left out. The base loss is evaluated
        once and counts among the first block's ``forwards``; in 16-bit arithmetic, and of a sample that no
        `MicroBatch` knows the losses of, once for each block.

    Raises:
        NoUpdateError: the direction moves no block.
        TypeError: ``blocks`` is no mapping, or as `critical_sharpness`.
        ValueError: a pattern matches no parameter, or as `critical_sharpness`.

    Memory: as `critical_sharpness` of the largest block alone.

    Determinism: as deterministic as ``loss_fn``.

    Source: Kalra et al. 2026, arXiv 2601.16979, for λ_c.

    Examples:
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
        >>> _ = [nn.init.ones_(parameter) for parameter in model.parameters()]
        >>> loss_fn = lambda: 3 * model[0].weight.square().sum() + model[1].weight.square().sum()
        >>> loss_fn().backward()
        >>> found = blockwise_critical_sharpness(model, loss_fn, Direction.from_gradients(model))
        >>> {name: round(m.sharpness, 3) for name, m in found.items()}
        {'0': 6.0, '1': 2.0}
    """
    chosen = Options.of(blockwise_critical_sharpness, options)
    check_arguments(model, direction)
    step = step_of(model, loss_fn, direction, chosen, weights=weights, clip=clip)
    found = measure_blocks(model, step, direction, blocks_of(model, blocks, chosen.ranks), chosen, {})
    if not found:
        raise NoUpdateError("direction must move some parameter of the blocks, got none; name other blocks")
    return found


def blocks_of(model: nn.Module, blocks: Any, ranks: Ranks | str | None) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of every block."""
    reshard(model)
    if blocks is None:
        return default_blocks(model)
    if not isinstance(blocks, Mapping):
        raise TypeError(f"blocks must map names to what moves, got {type(blocks).__name__}; pass {{'head': 'head.*'}}")
    if not blocks:
        raise ValueError("blocks must hold at least one block, got none; leave it out for the model's layers")
    may_lack = isinstance(ranks, Ranks)
    return {str(name): selected(items_of(which), model, may_lack=may_lack) for name, which in blocks.items()}


def measure_blocks(
    model: nn.Module,
    step: Step,
    direction: Direction,
    blocks: Mapping[str, list[nn.Parameter]],
    options: Options,
    memories: MutableMapping[str, SearchMemory],
    draw: int | None = None,
) -> dict[str, Measurement]:
    """Measure one block after the other in one session, each from what its last search left in ``memories``."""

    def measured(session: Session) -> dict[str, Measurement]:
        step.settle(session)
        target = session.target(step.closure)
        closure, checks, bases = target.closure, target.checks, dict[str, float]()
        session.begin(checks)
        agrees = set(checks.agrees)
        # The same on all ranks.
        (number,) = session.ranks.means([checks.num_measurements if draw is None else draw])
        found, excesses = dict[str, Measurement](), list[float]()
        for name in session.ranks.union(list(blocks)):
            try:
                part = session.part(partial(session.direction.only, blocks.get(name, [])))
            except NoUpdateError:
                continue
            started = time.perf_counter()
            # What one block's weights are read by says nothing about those of the next.
            checks.agrees = set(agrees)
            left = common(memories.get(name), session.ranks)

            def search(
                engine: Engine, part: Session = part, left: SearchMemory | None = left
            ) -> tuple[Run, SearchResult]:
                run = Run(part, target, engine, options, base=bases.get(engine.name))
                return run, finish(run, run.search(left))

            try:
                run, result = by_sample(part, target, options, step, left, number, excesses) or part.run(
                    target, search, engine=options.engine
                )
            except ConstantLossError as constant:
                # Nothing depends on it, such as an expert without tokens that decays.
                run, result = constant.run, constant.result
            m = run.measurement(result, time.perf_counter() - started)
            is_exact = run.engine.name in ("swapped", "inplace") or closure.precision.noise() <= _EXACT
            if is_exact and m.sample_size is None:
                bases[run.engine.name] = m.base_loss
            found[name], memories[name] = m, result.memory
            closure.calls = 0
        if excesses:
            # Of the same micro-batches, so that they say one thing.
            checks.excesses.append(mean(excesses))
        return found

    plan = (tuple(blocks) if options.ranks is None else (), options.plan)
    return in_session(measured, model, direction, step.loss_fns, reduce=options.reduce, ranks=options.ranks, plan=plan)
