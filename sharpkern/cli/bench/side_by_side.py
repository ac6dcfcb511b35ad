"""Engines on one model at the same time, outside of any search, to time and compare their passes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from sharpkern.direction import Direction
from sharpkern.engines.choose import Engine, open_engine
from sharpkern.engines.closure import Closure
from sharpkern.engines.guards import preserved
from sharpkern.engines.precision import LossPrecision
from sharpkern.engines.table import make_pairs


@contextmanager
def engines(
    names: Sequence[str], model: nn.Module, loss_fn: Callable[[], Tensor], direction: Direction
) -> Iterator[list[Engine]]:
    """Open engines.

    Args:
        names: of the engines; "inplace" alone, since it writes what others read.
        model: evaluated by ``loss_fn``.
        loss_fn: the closure.
        direction: to move along.

    Yields:
        list: the engines in the order of their names.
    """
    with preserved(model, direction.parameters) as guard, ExitStack() as stack:
        pairs = make_pairs(direction.moves())
        yield [
            stack.enter_context(open_engine(name, pairs, Closure(loss_fn, guard, LossPrecision()), compiled=False))
            for name in names
        ]
