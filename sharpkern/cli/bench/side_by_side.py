"""Engines on one model at the same time, outside of any search, to time and compare their passes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from sharpkern.direction import Direction
from sharpkern.engines.session import Engine, open_session


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
    with open_session(model, direction, [loss_fn]) as session, ExitStack() as stack:
        yield [stack.enter_context(session.open(session.target(loss_fn), name)) for name in names]
