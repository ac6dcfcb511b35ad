"""Which mix of data lets every task's loss fall the furthest: λ_c^{task→mix} against the shares of the mix.

For each mix an update direction is made from mixed batches, and the critical sharpness of every task's loss along it is
measured. Where a task's λ_c is small, the mix's update may be followed far before that task gets worse; where it is
infinite, it gets worse at once. The sweet spot is the mix with the longest step that no task's loss rises along.
"""

import math
import operator
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain, compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from typing_extensions import Unpack

from sharpkern._support.progress import progress_bar
from sharpkern.directions.direction import Direction
from sharpkern.distributed.ranks import Peers, Together, as_one
from sharpkern.engines.evaluation.closure import check_loss
from sharpkern.engines.evaluation.guard import Guard
from sharpkern.engines.session import Session, in_session
from sharpkern.errors import NoUpdateError
from sharpkern.measures.batch_directions import gradient_direction
from sharpkern.measures.relative import relative_critical_sharpness
from sharpkern.measures.result import MeasureOptions, Options, check_values
from sharpkern.mixtures.fingerprint import fingerprint_of, fingerprint_of_function, fingerprint_of_model
from sharpkern.mixtures.results import MixturePoint, MixtureSweep
from sharpkern.mixtures.resume import ResumableLog, Row, restored
from sharpkern.mixtures.sampling import MixSampler, Ratio, Shares, positive_int
from sharpkern.tensors.random_state import seed_streams

LossFn = Callable[[], Tensor]
BatchLoss = Callable[[Any], Tensor]
MakeDirection = Callable[[nn.Module, Sequence[LossFn]], Direction]


def mixture_sweep(
    model: nn.Module,
    tasks: Mapping[str, Any],
    mix: Mapping[str, Any],
    ratios: Sequence[Ratio],
    make_direction: MakeDirection = gradient_direction,
    *,
    batch_loss: BatchLoss | None = None,
    batch_size: int = 64,
    num_batches: int = 1,
    repeats: int = 5,
    seed: int = 0,
    collate: Callable[[list[Any]], Any] = default_collate,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Unpack[MeasureOptions],
) -> MixtureSweep:
    """Measure λ_c of every task's loss along the update of every mix of some data sources; the model stays as it is.

    Repeats draw other samples. Within a repeat all mixes draw from the same samples and with the same random numbers,
    so that they differ by their shares alone.

    Args:
        model: the model, such as a pre-trained one; in training mode it is measured so, dropout and all.
        tasks: name of the task → closure that returns its scalar loss, or a batch, or a list of batches, whose mean
            loss is the task's; a list is always one of batches. Take data that is not in the mix.
        mix: name of the data source → its samples: a tensor whose rows are samples, a list, a map-style Dataset. Two
            or more. Or, of all sources, closures that return their losses, of which a mix's is then the weighted sum;
            repeats differ where these draw their batch from a random stream.
        ratios: of each mix the share of the first of two sources, or the shares of all, by name or in order.
        make_direction: makes Δθ from the model and a list of closures, each the loss of one mixed batch:
            `gradient_direction`, `adamw_direction`, ``functools.partial(adamw_direction, weight_decay=0.0)``, or a
            function of your own.
        batch_loss: takes a batch and returns its scalar loss; also moves it to the model's device. Needed unless tasks
            and sources are closures.
        batch_size: samples in a mixed batch.
        num_batches: mixed batches that a direction is made of; with `adamw_direction` take ten or more.
        repeats: directions per mix.
        seed: of all samples and random numbers.
        collate: makes a batch of a list of samples, where they are not tensors.
        path: of a file to keep results in as they come. Called again with the same arguments, the sweep goes on where
            it was stopped, and gives the same numbers as one that was not; repeats and ratios may be added. A file of
            another model, data or setting is refused. Of closures, data sets and ``batch_loss`` the losses at θ count,
            of each task and of a first batch of each source, to a thousandth. On several ranks each has a file of its
            own, but for the first with its number in the name.
        progress: show a progress bar on the error stream, where that is a terminal.
        **options: of `critical_sharpness`, ``base_loss`` excepted. Without ``initial_lr`` a search starts from the
            smallest η_c of the measurement before; give a small one where losses are rough, and a later crossing might
            be taken for the first. Hand ``ranks`` to ``make_direction`` too, by ``functools.partial``.

    Returns:
        MixtureSweep: every measurement, with ``table``, ``sweet_spot``, ``to_csv``, ``to_pandas`` and ``plot``.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a ratio is outside [0, 1], the shares of one do not add up to 1, a task or a source is without
            data or has a loss that is not finite, another argument is out of range, or the file is of another sweep.

    Memory: what ``make_direction`` takes (a backward pass), and one `relative_critical_sharpness`.

    Determinism: as deterministic as the model's forward and backward passes.

    Source: Kalra et al. 2026, arXiv 2601.16979.

    Examples:
        >>> import torch, sharpkern
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> data = {"old": torch.full((8, 1), 1.0).double(), "new": torch.full((8, 1), -1.0).double()}
        >>> loss = lambda target: (model.weight - target).square().mean()
        >>> sweep = sharpkern.mixture_sweep(model, data, data, [0.2, 0.8], batch_loss=loss, batch_size=5, repeats=1)
        >>> [(point.shares[0], point.task, point.status) for point in sweep.points]
        [(0.2, 'old', 'ascent'), (0.2, 'new', 'converged'), (0.8, 'old', 'converged'), (0.8, 'new', 'ascent')]
    """
    _check_arguments(model, make_direction, batch_loss)
    num_batches, repeats = positive_int("num_batches", num_batches), positive_int("repeats", repeats)
    Options.of(mixture_sweep, options)
    seed = operator.index(seed)
    mixer = MixSampler(mix, batch_loss, batch_size, seed, collate)
    mixes = _mixes(mixer, ratios)
    # All mixes of a repeat before the next repeat: what is there when the sweep is stopped covers all of them.
    cells = [(shares, repeat) for repeat in range(repeats) for shares in mixes]

    def described(losses: Mapping[str, LossFn]) -> Row:
        return {
            "tasks": [
                [name, fingerprint_of(loss.args if isinstance(loss, partial) else loss)]
                for name, loss in losses.items()
            ],
            # In order, since shares are.
            "sources": [[name, fingerprint_of(source)] for name, source in mixer.sources.items()],
            "model": fingerprint_of_model(model),
            "direction": _described(make_direction),
            "batch_size": mixer.batch_size,
            "num_batches": num_batches,
            "seed": seed,
            "options": {name: _described(value) for name, value in options.items() if name != "ranks"},
        }

    def swept(session: Session) -> tuple[ResumableLog, list[str]]:
        guard = session.guard
        # A shuffled loader gives the same batches whenever the sweep goes on.
        seed_streams(str(seed), guard.devices)
        losses = _task_losses(tasks, batch_loss)
        of_tasks = _evaluated({f"task {name!r}": loss_fn for name, loss_fn in losses.items()}, guard, seed)
        # A source that draws another batch each time shows nothing by the loss of one.
        once, again = ({} if path is None else _evaluated(_source_losses(mixer), guard, seed) for _ in range(2))
        of_sources = {name: loss for name, loss in once.items() if repr(loss) == repr(again[name])}
        with as_one(session.ranks):
            _refuse_without_value(of_tasks)
            settings = {} if path is None else described(losses)
            check = partial(_points, mixer.sources, losses)
            journal = ResumableLog(_file_of(path, session.ranks), settings, losses=of_tasks | of_sources, check=check)
        done = {_cell(row) for row in journal.rows}
        # One rank may have been stopped before it wrote what the others did.
        lacking = session.ranks.any_of([cell not in done for cell in cells])
        left = list(compress(cells, lacking))
        journal.rows = [row for row in journal.rows if _cell(row) not in left]
        with progress_bar(len(cells), done=len(cells) - len(left), shown=progress) as advance:
            for shares, repeat in left:
                started = time.perf_counter()
                # The same buffers and random numbers for all mixes, whatever was done before.
                guard.rewind()
                guard.hide_gradients()
                seed_streams(f"{seed}/{repeat}", guard.devices)
                batches = [partial(mixer.loss, shares, repeat, number) for number in range(num_batches)]
                direction = _direction(make_direction, model, batches, f"shares {shares}, repeat {repeat}")
                # Not above what was found before: from too large a step an earlier rise may be passed over.
                first = options.get("initial_lr") or _smallest_found(journal.rows)
                chosen: MeasureOptions = {**options, "initial_lr": first}
                found = relative_critical_sharpness(model, losses, direction, **chosen)
                points = [MixturePoint.of(shares, repeat, task, measurement) for task, measurement in found.items()]
                row = {"shares": shares, "repeat": repeat, "seconds": time.perf_counter() - started}
                journal.add({**row, "points": [asdict(point) for point in points]})
                advance(", ".join(f"{point.task} λ_c {point.sharpness:.3g}" for point in points))
        return journal, list(losses)

    groups = [group.values() for group in (tasks, mix) if isinstance(group, Mapping)]
    closures = [one for one in (batch_loss, *chain.from_iterable(groups)) if callable(one)]
    journal, names = in_session(swept, model, None, closures, ranks=options.get("ranks"), grad=True)
    # The last row of a cell counts, should two processes have written the file.
    rows = {_cell(row): row for row in journal.rows}
    measured = tuple(point for cell in cells for point in _points(mixer.sources, names, rows[cell]))
    return MixtureSweep(tuple(mixer.sources), tuple(names), tuple(mixes), measured)


def _mixes(mixer: MixSampler, ratios: Sequence[Ratio]) -> list[Shares]:
    """Return the shares of every mix."""
    if isinstance(ratios, (str, Mapping)) or not hasattr(ratios, "__iter__"):
        raise TypeError(f"ratios must be several, got {ratios!r}; pass such as [0, 0.5, 1]")
    mixes = [mixer.shares(ratio) for ratio in ratios]
    if not mixes or len(set(mixes)) < len(mixes):
        raise ValueError(f"ratios must hold a mix, and each of them once, got {list(ratios)}; pass such as [0, 0.5, 1]")
    return mixes


def _direction(make_direction: MakeDirection, model: nn.Module, batches: Sequence[LossFn], cell: str) -> Direction:
    """Make a direction, and refuse one that was made by moving the model."""
    before = _versions(model)
    try:
        direction = make_direction(model, batches)
    except NoUpdateError as error:
        raise NoUpdateError(f"at {cell}: {error}") from error
    if _versions(model) != before:
        raise ValueError(
            "make_direction must leave the parameters as they are, got some written; step a copy of the model, or "
            "use sharpkern.adamw_direction, which moves nothing"
        )
    if not isinstance(direction, Direction):
        raise TypeError(
            f"make_direction must return a sharpkern.Direction, got {type(direction).__name__}; return what "
            "sharpkern.gradient_direction or a Direction method does"
        )
    return direction


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    """Return what changes when a parameter is written or replaced."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]


def _evaluated(losses: Mapping[str, LossFn], guard: Guard, seed: int) -> dict[str, float]:
    """Evaluate every loss once at θ, from the same buffers and random numbers whenever it is done."""
    values = {}
    for name, loss_fn in losses.items():
        guard.rewind()
        seed_streams(str(seed), guard.devices)
        with torch.no_grad():
            loss = loss_fn()
        check_loss(loss)
        values[name] = float(loss)
    return values


def _source_losses(mixer: MixSampler) -> dict[str, LossFn]:
    """Return the loss of a first batch of every source alone."""
    names = list(mixer.sources)
    alone = {name: tuple(float(other == name) for other in names) for name in names}
    return {f"source {name!r}": partial(mixer.loss, shares, 0, 0) for name, shares in alone.items()}


def _refuse_without_value(values: Mapping[str, float]) -> None:
    """Tell what is wrong with a task before any work."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(
                f"the loss of {name} must be finite, got {value}; check its data, and that the model is not diverged"
            )


def _check_arguments(model: object, make_direction: object, batch_loss: object) -> None:
    """Refuse arguments of the wrong kind."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; pass the model to mix data for")
    if not callable(make_direction):
        raise TypeError(
            f"make_direction must be a function of the model and the losses of mixed batches, got {make_direction!r}; "
            "pass sharpkern.gradient_direction or sharpkern.adamw_direction"
        )
    if batch_loss is not None and not callable(batch_loss):
        raise TypeError(f"batch_loss must be callable on a batch, got {type(batch_loss).__name__}; pass a function")


def _task_losses(tasks: Mapping[str, Any], batch_loss: BatchLoss | None) -> dict[str, LossFn]:
    """Return a closure for every task."""
    if not isinstance(tasks, Mapping):
        raise TypeError(f"tasks must map names to closures or data, got {type(tasks).__name__}; pass {{'name': batch}}")
    if not tasks:
        raise ValueError("tasks must hold at least one task, got none; pass {'name': batch}")
    odd = next((name for name in tasks if not isinstance(name, str)), None)
    if odd is not None:
        raise TypeError(f"the names of tasks must be texts, got {odd!r}; pass {{'name': batch}}")
    return {name: _task_loss(name, task, batch_loss) for name, task in tasks.items()}


def _task_loss(name: str, task: Any, batch_loss: BatchLoss | None) -> LossFn:
    """Return the mean loss of a task's batches, or the closure that the task is."""
    if callable(task):
        loss_fn: LossFn = task
        return loss_fn
    batches = list(task) if isinstance(task, (list, Iterator, DataLoader)) else [task]
    if not batches or any(isinstance(batch, Tensor) and not batch.numel() for batch in batches):
        raise ValueError(f"task {name!r} must hold data, got none; pass a batch, a list of batches, or a closure")
    if batch_loss is None:
        raise TypeError(f"batch_loss must be a function of a batch where data is given, got None for task {name!r}")
    return partial(_mean_loss, batch_loss, batches)


def _mean_loss(batch_loss: BatchLoss, batches: Sequence[Any]) -> Tensor:
    return torch.stack([batch_loss(batch) for batch in batches]).mean()


def _smallest_found(rows: Sequence[Row]) -> float | None:
    """Return the smallest of the tasks' η_c in the last row that has any."""
    for row in reversed(rows):
        found: list[float] = [p["critical_lr"] for p in row["points"] if p["status"] == "converged"]
        if found:
            return min(found)
    return None


def _described(value: Any) -> Any:
    """Return what tells a setting from another one, as JSON can hold it."""
    if isinstance(value, partial):
        keywords = {name: _described(argument) for name, argument in sorted(value.keywords.items())}
        return f"{_described(value.func)}{[_described(argument) for argument in value.args]}{keywords}"
    if callable(value):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        own = str(getattr(value, "__module__", "")).startswith("sharpkern.")
        return name if own else f"{name} {fingerprint_of_function(value)}"
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _file_of(path: str | os.PathLike[str] | None, ranks: Peers) -> Path | None:
    """Return the file of this rank: the one that was named, or beside it where others measure along."""
    if path is None:
        return None
    rank = torch.distributed.get_rank() if isinstance(ranks, Together) else 0
    named = Path(path)
    return named.with_name(f"{named.stem}.rank{rank}{named.suffix}") if rank else named


def _cell(row: Row) -> tuple[Shares, int]:
    return tuple(row["shares"]), row["repeat"]


def _points(sources: Collection[str], tasks: Collection[str], row: Row) -> list[MixturePoint]:
    """Return what a row of the file holds; ValueError, TypeError or KeyError where it is no row of this sweep."""
    points = [restored(MixturePoint, entry) for entry in row["points"]]
    shares, repeat = tuple(row["shares"]), row["repeat"]
    if len(shares) != len(sources) or not math.isclose(math.fsum(shares), 1, abs_tol=1e-5) or min(shares) < 0:
        raise ValueError(f"shares are {shares}")
    if [(p.shares, p.repeat, p.task) for p in points] != [(shares, repeat, task) for task in tasks]:
        raise ValueError("it is not of the tasks in their order")
    if type(repeat) is not int or repeat < 0:
        raise ValueError(f"repeat is {repeat!r}")
    for p in points:
        check_values(p.status, p.critical_lr, p.sharpness, p.loss)
    return points
