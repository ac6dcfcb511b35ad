"""One evaluation of the user's loss: from the same state each time, checked, reduced over ranks, as a Python float."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from sharpkern.engines.guards import Guard
from sharpkern.engines.precision import LossPrecision, is_low

LossFn = Callable[[], Tensor]
Reduce = Callable[[Tensor], Tensor]


class Closure:
    """The user's ``loss_fn``, called unchanged.

    Args:
        loss_fn: takes nothing, returns the scalar loss of the model's current parameters.
        guard: rewound before every call.
        precision: told the dtype of the loss.
        reduce: applied to the loss before it is read, so that all ranks see the same number.

    Attributes:
        calls: evaluations so far.
        random: whether the last call drew numbers from torch's random streams.
        precision: as given.
        guard: as given.
    """

    def __init__(self, loss_fn: LossFn, guard: Guard, precision: LossPrecision, reduce: Reduce | None = None) -> None:
        self._loss_fn = loss_fn
        self.guard = guard
        self._reduce = reduce
        self.precision = precision
        self.calls = 0
        self.random = False

    def __call__(self, around: AbstractContextManager[object]) -> float:
        """Evaluate the loss once.

        Args:
            around: entered around the user's function alone.

        Returns:
            float: the loss, nan and inf included.
        """
        self.guard.rewind()
        self.calls += 1
        with around:
            loss = self._called()
        self.random = self.guard.drew_random_numbers()
        _check_loss(loss)
        return self._read(loss)[0]

    def several(
        self, around: Callable[[Tensor], AbstractContextManager[object]], values: Sequence[float]
    ) -> list[float]:
        """Evaluate the loss once for several values, by torch.func.vmap.

        Args:
            around: entered around the user's function alone; takes what stands for the values, a 0-dim float64 tensor.
            values: any numbers.

        Returns:
            list: one loss for each, as calling it for each would have given.
        """
        self.guard.rewind()

        def one(value: Tensor) -> Tensor:
            with around(value):
                # That it differentiates is no mistake before it is found to be one for a single value.
                loss = self._loss_fn()
            _check_loss(loss)
            return loss

        losses = torch.func.vmap(one, randomness="same")(torch.tensor(values, dtype=torch.float64, device="cpu"))
        self.calls += len(values)
        self.random = self.guard.drew_random_numbers()
        return self._read(losses)

    def _read(self, losses: Tensor) -> list[float]:
        """Wait for losses, and have each reduced by itself."""
        self.precision.loss_dtype = losses.dtype
        losses = (losses.detach().float() if is_low(losses.dtype) else losses.detach()).reshape(-1)
        if self._reduce is not None:
            return [float(self._reduce(loss)) for loss in losses]
        values: list[float] = losses.tolist()
        return values

    def _called(self) -> Tensor:
        try:
            return self._loss_fn()
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise ValueError(
                "loss_fn must only return the loss, got a closure that differentiates while gradients are off; take "
                "backward() out of it, or wrap what needs derivatives in torch.enable_grad()"
            ) from error


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor):
        value = f" {loss}" if isinstance(loss, (int, float)) else ""
        raise TypeError(
            f"loss_fn must return a 0-dim floating-point tensor, got {type(loss).__name__}{value}; "
            "return the loss itself, without .item()"
        )
    if loss.numel() != 1:
        raise ValueError(
            f"loss_fn must return a scalar, got a tensor of shape {list(loss.shape)}; reduce it, for example by .mean()"
        )
    if not loss.is_floating_point():
        raise TypeError(f"loss_fn must return a floating-point loss, got {loss.dtype}; return the loss, not a count")
    if loss.device.type == "meta":
        raise ValueError("loss_fn must return a loss with a value, got a meta tensor; put the model on a real device")


def default_reduce(model: nn.Module) -> Reduce | None:
    """Mean over the process group of a DistributedDataParallel model."""
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return None
    group = model.process_group

    def mean(loss: Tensor) -> Tensor:
        total = loss.clone()
        torch.distributed.all_reduce(total, group=group)
        return total / torch.distributed.get_world_size(group)

    return mean
