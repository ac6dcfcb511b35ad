"""Critical sharpness in loops that run on Hugging Face's Accelerate, gradient accumulation included."""

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, update_wrapper, wraps
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from sharpkern._support.optional import missing
from sharpkern.directions.direction import Direction
from sharpkern.distributed.deepspeed import clip_of
from sharpkern.engines.evaluation.closure import LossFn
from sharpkern.integrations.deepspeed import before_steps_of
from sharpkern.measures.micro_batches import Clip, Losses, coefficient
from sharpkern.measures.result import Measurement
from sharpkern.monitoring.lr_cap import CapOptions, cap_of, load_cap, with_cap
from sharpkern.monitoring.monitor import Monitor, MonitorOptions

# They keep gradients of their own.
_REFUSED = ("MEGATRON_LM", "XLA")


class SharpnessMonitor(Monitor):
    """A `sharpkern.Monitor` that knows gradient accumulation: it measures the loss of all micro-batches of a step.

    Call it in every micro-batch, inside ``accelerator.accumulate(model)``, between ``accelerator.backward`` (and
    clipping) and ``optimizer.step()``. The loss is scaled as Accelerate scales it, also where the data ends before a
    step is full. Steps are counted as the optimizer takes them, and a skipped step counts.

    Under DeepSpeed call it ahead of ``accelerator.backward``, which takes the step too: it measures on entry to that,
    and returns None. What it found is in ``history``.

    Without accumulation the plain Monitor does all of this; it takes the prepared optimizer, the ``GradScaler`` inside
    and a prepared `DistributedDataParallel` model as they are::

        monitor = sharpkern.Monitor(model, optimizer, every=50, log=accelerator.log)
        accelerator.register_for_checkpointing(monitor)

    Args:
        accelerator: that the run was prepared by.
        model: as ``accelerator.prepare`` returned it.
        optimizer: likewise; a list of them where several step together.
        cap: arguments of a `sharpkern.LRCap`, such as ``{"peak": 1e-3}``, that holds the learning rate below a share of
            η_c: **this changes the run**. It is called by itself; measure as `LRCap.every` says. None changes nothing.
        **options: of `sharpkern.Monitor`, such as ``every``, and of `sharpkern.critical_sharpness`. ``log`` is
            ``accelerator.log`` by default, which writes where trackers were initialised; None writes nothing.

    Attributes:
        cap: the `sharpkern.LRCap`, None where there is none; its state goes with the monitor's.

    Raises:
        ImportError: if accelerate, the extra ``accelerate``, is missing.
        TypeError: if an argument is of the wrong kind, or DeepSpeed's engine of one that cannot be measured.
        ValueError: if an option is out of range, or the run is Megatron-LM's or XLA's.
        RuntimeError: under DeepSpeed, where it is called after ``accelerator.backward``, or not for every micro-batch.

    Memory: as the Monitor; in steps that are due, the micro-batches until the last of them.

    Examples:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from sharpkern.integrations.accelerate import SharpnessMonitor
        >>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
        >>> loader = torch.utils.data.DataLoader(data, batch_size=8)
        >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        >>> monitor = SharpnessMonitor(accelerator, model, optimizer, every=3)
        >>> accelerator.register_for_checkpointing(monitor)
        >>> def compute_loss(batch):
        ...     x, y = batch
        ...     return torch.nn.functional.mse_loss(model(x), y)
        >>> for batch in loader:
        ...     with accelerator.accumulate(model):
        ...         accelerator.backward(compute_loss(batch))
        ...         _ = monitor(compute_loss, batch)
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> [record.step for record in monitor.history]
        [0, 3]
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        cap: CapOptions | None = None,
        **options: Unpack[MonitorOptions],
    ) -> None:
        try:
            from accelerate import Accelerator
        except ImportError:
            raise missing("accelerate", "accelerate", "SharpnessMonitor") from None
        if not isinstance(accelerator, Accelerator):
            raise TypeError(
                f"accelerator must be an accelerate.Accelerator, got {type(accelerator).__name__}; pass the one that "
                "prepared the model"
            )
        kind = accelerator.distributed_type.value
        if kind in _REFUSED:
            raise ValueError(
                "accelerator must leave the gradients in the parameters' .grad, as one process and "
                f"DistributedDataParallel do, got {kind}; measure the run's checkpoints instead"
            )
        options.setdefault("log", accelerator.log)
        super().__init__(model, optimizer, **options)
        self.cap = cap_of(self, optimizer, cap)
        self._accelerator = accelerator
        self._batches: list[tuple[Any, ...]] = []
        # What each of them was trained on, None where that is not known.
        self._trained: list[float | Tensor | None] = []
        # What backward() was called on since the last micro-batch; two are as good as more.
        self._losses: deque[Tensor] = deque(maxlen=2)
        # Norm before clipping and the largest one, of the step in progress.
        self._clipped: Clip = None
        # Where the backward pass takes the step: what measures it, and how many passes were made for it.
        self._waiting: Callable[[], Measurement | None] | None = None
        self._num_passes = 0
        watching = weakref.ref(self)
        self._hook = before_steps_of(model, lambda: _before_step(watching))
        _watch_backward(accelerator, self)

    def __call__(  # type: ignore[override]
        self,
        loss_fn: Callable[..., Tensor],
        *batch: Any,
        heldout: LossFn | None = None,
        loss: Any = None,
        direction: Direction | Callable[[], Direction] | None = None,
        weights: Sequence[float] | None = None,
        clip: Clip = None,
    ) -> Measurement | None:
        """Take a micro-batch, and measure after the last one of a step that is due."""
        if not batch:
            raise TypeError(
                "SharpnessMonitor must be called with the micro-batch, got a loss_fn alone; pass it as "
                "monitor(compute_loss, batch), so that each one is evaluated on its own"
            )
        accelerator = self._accelerator
        num_steps = accelerator.gradient_accumulation_steps
        if accelerator.step % num_steps == 1 % num_steps:
            # The first of a step: what a step that the loop broke off has left is of no gradient.
            self._batches, self._trained = [], []
        measure = partial(self._measure, loss_fn, heldout, direction, weights, clip)
        if self._hook is None:
            self._note(batch, self._last_loss() if loss is None else loss)
            return measure() if accelerator.sync_gradients else None
        self._complete()
        self._note(batch, loss)
        self._waiting = measure
        return None

    def _note(self, batch: tuple[Any, ...], loss: Any) -> None:
        """Keep a micro-batch of a step that is due."""
        if self.is_due:
            self._batches.append(batch)
            self._trained.append(loss)

    def _last_loss(self) -> Tensor | None:
        """What ``backward`` was called on since this was asked, where that was one loss."""
        loss = self._losses[0] if len(self._losses) == 1 else None
        self._losses.clear()
        return loss

    def _complete(self) -> None:
        """Note what the last micro-batch was trained on, where that is known by now."""
        loss = self._last_loss()
        if self._trained and self._trained[-1] is None:
            self._trained[-1] = loss

    def _measure(
        self,
        loss_fn: Callable[..., Tensor],
        heldout: LossFn | None,
        direction: Direction | Callable[[], Direction] | None,
        weights: Sequence[float] | None,
        clip: Clip,
    ) -> Measurement | None:
        """Measure the step whose micro-batches have been noted, if it is due."""
        num_steps = self._accelerator.gradient_accumulation_steps
        batches, self._batches = self._batches, []
        trained, self._trained = self._trained, []
        known = [one for one in trained if one is not None]
        clipped, self._clipped = clip if clip is not None else self._clipped, None
        call = partial(super().__call__, heldout=heldout, direction=direction)
        if self._options.sample is None:
            total = sum(known) / num_steps if len(known) == len(batches) else None
            measurement = call(_StepLoss(loss_fn, batches, num_steps), loss=total)
        else:
            share = len(batches) / num_steps
            if 0 < share < 1 and (self._hook is None or clipped is not None):
                # Where the data ends the gradient is a share of the mean's.
                clipped = (coefficient(clipped) or 1.0) * share
            elif 0 < share < 1 and direction is None:
                call = partial(call, direction=partial(self._share_of_step, share))
            losses: Losses = known if len(known) == len(batches) else None
            parts = [partial(loss_fn, *one) for one in batches]
            measurement = call(parts, loss=losses, weights=weights, clip=clipped)
        if self.cap is not None:
            self.cap.step()
        return measurement

    def _share_of_step(self, share: float) -> Direction:
        """The direction of DeepSpeed's step, whose gradient is a share of the mean's."""
        direction = Direction._from_optimizer(self._optimizer, clip=clip_of(self._model))
        return replace(direction, _clip=(direction._clip or 1.0) * share)

    def state_dict(self) -> dict[str, Any]:
        """The Monitor's, and that of the cap."""
        return with_cap(super().state_dict(), self.cap)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        super().load_state_dict(state)
        load_cap(self.cap, state)


def _watch_backward(accelerator: Any, monitor: SharpnessMonitor) -> None:
    """Have the monitor note what ``backward`` is called on, and how gradients are clipped, as long as there is one."""
    backward, clip, watching = accelerator.backward, accelerator.clip_grad_norm_, weakref.ref(monitor)

    @wraps(clip)
    def clipped(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
        norm, monitor = clip(parameters, max_norm, *args, **kwargs), watching()
        # DeepSpeed clips inside of its step, which has been taken by then; directions know of that.
        if monitor is not None and monitor._hook is None and norm is not None and accelerator.sync_gradients:
            monitor._clipped = norm, max_norm
        return norm

    @wraps(backward)
    def noted(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        monitor = watching()
        if monitor is not None:
            monitor._losses.append(loss.detach())
            monitor._num_passes += 1
        return backward(loss, *args, **kwargs)

    accelerator.backward, accelerator.clip_grad_norm_ = noted, clipped


def _before_step(watching: "weakref.ref[SharpnessMonitor]") -> None:
    """Measure inside of the last backward pass of a step, where DeepSpeed takes it."""
    monitor = watching()
    if monitor is None:
        return
    waiting, monitor._waiting = monitor._waiting, None
    num_passes, monitor._num_passes = monitor._num_passes, 0
    if monitor.is_due and len(monitor._batches) != num_passes:
        raise RuntimeError(
            f"SharpnessMonitor must be called ahead of accelerator.backward in every micro-batch under DeepSpeed, got "
            f"{num_passes} backward passes and {len(monitor._batches)} calls before them; call monitor(compute_loss, "
            "batch) first, as the backward pass takes the step"
        )
    monitor._complete()
    if waiting is None:
        monitor.step += 1
    else:
        waiting()


class _StepLoss:
    """Σ loss_fn(*batch) / n over the micro-batches of one step, as ``accelerator.backward`` adds them up."""

    def __init__(self, func: Callable[..., Tensor], batches: list[tuple[Any, ...]], num_steps: int) -> None:
        # Whether it is compiled is told by an attribute.
        update_wrapper(self, func)
        self.func = func
        self._batches = batches
        self._num_steps = num_steps

    def __call__(self) -> Tensor:
        first, *others = (self.func(*batch) / self._num_steps for batch in self._batches)
        return sum(others, first)
