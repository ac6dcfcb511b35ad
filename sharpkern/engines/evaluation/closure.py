"""One evaluation of the user's loss: from the same state each time, checked, reduced over ranks, as a Python float."""

import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from sharpkern.distributed.lockstep import Lockstep
from sharpkern.distributed.ranks import Alone, Peers
from sharpkern.distributed.sharding import whole
from sharpkern.engines.evaluation.guard import Guard, evaluating
from sharpkern.engines.evaluation.precision import LossPrecision, is_low
from sharpkern.errors import RankError

LossFn = Callable[[], Tensor | None]
Evaluated = TypeVar("Evaluated")

# How often a call is made again that another thread has disturbed.
_REPEATS = 10


class Closure:
    """The user's ``loss_fn``, called unchanged.

    Attributes:
        loss_fn: what is called; of a step's micro-batches, one after the other.
        own: the last loss as this rank alone has it.
        calls: evaluations so far.
        random: whether the last call drew random numbers, on any rank.
        redone: whether a call was made again, as another thread drew from them meanwhile; so it may have before.
        other_masks: seed of other random numbers than those at entry, 0 for these; to be set, and set back.
        asked: whether ``ask`` of the last call was true on any rank.
        is_compiled: what it calls was compiled, so that no mode may look on.
        precision: as given.
        guard: as given.
        ranks: as given.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        guard: Guard,
        precision: LossPrecision,
        ranks: Peers | None = None,
        lockstep: Lockstep | None = None,
    ) -> None:
        self.loss_fn = loss_fn
        self.guard = guard
        self.ranks: Peers = ranks or Alone()
        self._lockstep = lockstep
        self.precision = precision
        self.own = 0.0
        self.calls = 0
        self.random = False
        self.redone = False
        self.other_masks = 0
        self.asked = False
        self.is_compiled = False
        self._ends: list[object] = []

    def __call__(
        self,
        around: AbstractContextManager[object],
        *,
        prepare: Callable[[], object] | None = None,
        ask: Callable[[], bool] | None = None,
    ) -> float:
        """Evaluate the loss once."""
        loss, failure, asks = None, None, False
        evaluating.append(self)
        try:
            loss = self._undisturbed(lambda: self._pass(around, prepare))
            asks = ask is not None and ask()
            loss = None if loss is None else self._wide(loss)[0]
        except BaseException as raised:
            loss, failure = None, self.guard.trace.interrupt_in(raised) or raised
        evaluating.clear()
        failure = self._end_pass(failure)
        try:
            value, self.asked = self._agreed(loss, failure, asks=asks)
            return value
        finally:
            # What was raised holds this frame, which must not hold it; see ranks.py.
            del failure

    def _pass(self, around: AbstractContextManager[object], prepare: Callable[[], object] | None) -> Tensor | None:
        self.calls += 1
        with around, self._noting():
            if prepare is not None:
                prepare()
            loss = self._called()
        # Ranks that run other modules than others may have none.
        if loss is not None or self.ranks.alike:
            check_loss(loss)
        return loss

    def _noting(self) -> AbstractContextManager[object]:
        return nullcontext() if self._lockstep is None or self.is_compiled else self._lockstep.noting()

    def noise(self, *, low_and_unseen: bool = False) -> float:
        """The relative rounding of a loss, where ranks see other parts of it the largest."""
        return self.largest(self.precision.noise(low_and_unseen=low_and_unseen))

    def largest(self, number: float) -> float:
        """The largest of what the ranks have found, each in its own modules; itself where these are alike."""
        return number if self.ranks.alike else max(one for (one,) in self.ranks.gather([number]))

    def _undisturbed(self, evaluate: Callable[[], Evaluated]) -> Evaluated:
        """Evaluate from the state at entry, and again where another thread drew random numbers meanwhile."""
        for _ in range(1 + _REPEATS):
            self.guard.rewind()
            if self.other_masks:
                self.guard.reseed(self.other_masks)
            losses = evaluate()
            self.random = self.guard.drew_random_numbers()
            if not self._ends_elsewhere():
                break
            self.redone = True
        return losses

    def _ends_elsewhere(self) -> bool:
        """Whether the random streams end elsewhere than after the last call, as where another thread drew from them."""
        if not self.random or self.other_masks or threading.active_count() == 1 or not isinstance(self.ranks, Alone):
            return False
        before, self._ends = self._ends, self.guard.stream_states()
        return bool(before) and before != self._ends

    def several(
        self,
        around: Callable[[Tensor], AbstractContextManager[object]],
        values: Sequence[float],
        *,
        ask: Callable[[], bool],
        translate: Callable[[BaseException], BaseException],
    ) -> list[float]:
        """Evaluate the loss once for several values, by torch.func.vmap."""

        def one(value: Tensor) -> Tensor:
            with around(value):
                # That it differentiates is no mistake before it is found to be one for a single value.
                loss = self.loss_fn()
            check_loss(loss)
            assert loss is not None
            return loss

        def at_once() -> Tensor:
            alpha = torch.tensor(values, dtype=torch.float64, device="cpu")
            losses = torch.func.vmap(one, randomness="same")(alpha)
            self.calls += len(values)
            return losses

        losses: Sequence[Tensor | None] = [None] * len(values)
        failure, asks = None, False
        evaluating.append(self)
        try:
            several = self._undisturbed(at_once)
            asks = ask is not None and ask()
            losses = self._wide(several).unbind()
        except BaseException as raised:
            failure = self.guard.trace.interrupt_in(raised) or translate(raised)
        evaluating.clear()
        failure = self._end_pass(failure)
        try:
            agreed = [self._agreed(loss, failure, asks=asks) for loss in losses]
            self.asked = any(asked for _, asked in agreed)
            return [value for value, _ in agreed]
        finally:
            del failure

    def _agreed(self, loss: Tensor | None, failure: BaseException | None, *, asks: bool) -> tuple[float, bool]:
        try:
            value, asked, self.random, num = self.ranks.agree(loss, failure, asks=asks, random=self.random)
        finally:
            del failure
        if self._lockstep is not None:
            self._lockstep.settle()
        if num == 0:
            raise ValueError(
                "loss_fn must return the loss on one rank at least, got None on all of them; return it on the last "
                "stage of a pipeline"
            )
        self.own = value if loss is None or isinstance(self.ranks, Alone) else float(loss)
        return value, asked

    def _wide(self, losses: Tensor) -> Tensor:
        """One loss or several, in a precision in which they can be compared."""
        losses = whole(losses.detach())
        self.precision.loss_dtype = losses.dtype
        return (losses.float() if is_low(losses.dtype) else losses).reshape(-1)

    def _end_pass(self, failure: BaseException | None) -> BaseException | None:
        """Leave the model as the next pass needs it, also where this rank failed and the others did not."""
        if self._lockstep is None:
            return failure
        try:
            if failure is None:
                self._lockstep.finish()
            else:
                if isinstance(failure, torch.OutOfMemoryError):
                    # The failed pass makes room for what the others have yet to communicate.
                    traceback.clear_frames(failure.__traceback__)
                follows = self._lockstep.keep_up()
                if follows and isinstance(failure, Exception):
                    # What it was sent by a rank that had failed made it fail, perhaps.
                    return RankError(f"the measurement failed on another rank before it did here, with {failure!r}")
        except BaseException as late:
            return failure or late
        return failure

    def _called(self) -> Tensor | None:
        try:
            return self.loss_fn()
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise ValueError(
                "loss_fn must only return the loss, got a closure that differentiates while gradients are off; take "
                "backward() out of it, or wrap what needs derivatives in torch.enable_grad()"
            ) from error


def check_loss(loss: object) -> None:
    """Refuse what is no scalar loss, with the remedy that fits what it is."""
    if not isinstance(loss, Tensor):
        got, remedy = _mistaken(loss)
        raise TypeError(f"loss_fn must return a 0-dim floating-point tensor, got {got}; {remedy}")
    if loss.numel() != 1:
        raise ValueError(
            f"loss_fn must return a scalar, got a tensor of shape {list(loss.shape)}; reduce it, for example by .mean()"
        )
    if not loss.is_floating_point():
        raise TypeError(f"loss_fn must return a floating-point loss, got {loss.dtype}; return the loss, not a count")
    if loss.device.type == "meta":
        raise ValueError("loss_fn must return a loss with a value, got a meta tensor; put the model on a real device")


def _mistaken(returned: object) -> tuple[str, str]:
    """Say what was returned in place of a tensor, and what to return."""
    kind = type(returned).__name__
    if returned is None:
        return kind, "end loss_fn with `return loss`"
    if isinstance(returned, (int, float, np.generic, np.ndarray)):
        value = f" {returned}" if np.ndim(returned) == 0 else ""
        return f"{kind}{value}", "return the loss itself, without .item(), float() or .numpy()"
    if callable(returned):
        return kind, "call it, and return what it returns"
    if hasattr(returned, "loss"):
        if returned.loss is None:
            return f"{kind} whose loss is None", "pass labels to the model, and return outputs.loss"
        return kind, "return outputs.loss"
    if isinstance(returned, Mapping):
        if "loss" in returned:
            return kind, "return outputs['loss']"
        return f"{kind} of {', '.join(map(repr, returned))}", "return one loss that is computed from them"
    if isinstance(returned, (tuple, list)):
        scalars = [i for i, one in enumerate(returned) if isinstance(one, Tensor) and one.numel() == 1]
        if len(scalars) == 1:
            return f"{kind} of {len(returned)}", f"return the loss alone, outputs[{scalars[0]}]"
        return f"{kind} of {len(returned)}", "return one loss that is computed from them, such as their mean"
    return kind, "return the loss itself"
