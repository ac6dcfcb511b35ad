"""Critical sharpness in Lightning's Trainer: a callback, and nothing else to change."""

import copy
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from sharpkern._support.optional import missing
from sharpkern.directions.direction import Direction
from sharpkern.errors import NoUpdateError
from sharpkern.integrations.around_step import AroundStep
from sharpkern.measures.blockwise import Blocks
from sharpkern.measures.micro_batches import Clip
from sharpkern.measures.result import MeasureOptions, Options
from sharpkern.monitoring.lr_cap import CapOptions, LRCap, cap_of, load_cap, with_cap
from sharpkern.monitoring.monitor import CallbackOptions, Monitor


def _lightning() -> Any:
    """The package that is loaded already, or else is installed: one code goes by two names, with classes of each."""
    names = ["lightning.pytorch", "pytorch_lightning"]
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise missing("lightning", "lightning", "SharpnessCallback")


if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
else:
    _package = _lightning().__name__
    Callback = importlib.import_module(_package).Callback
    DummyLogger = importlib.import_module(f"{_package}.loggers.logger").DummyLogger
    is_param_in_hook_signature = importlib.import_module(
        f"{_package}.utilities.signature_utils"
    ).is_param_in_hook_signature

# Their weights are pieces of flat ones, or their steps are not torch's.
_REFUSED = {"DeepSpeedStrategy", "FSDPStrategy"}


class SharpnessCallback(Callback):
    """Measures critical sharpness while a Lightning Trainer trains.

        trainer = Trainer(callbacks=[SharpnessCallback(every=50)])

    Around the optimizer steps that are due it takes Δθ = (θ − θ′)/lr of the step itself, whatever the optimizer, with
    accumulation and clipping in it, and measures at θ: the loss is that of ``training_step``, evaluated again for all
    batches of the step under the strategy and the precision that train, without its logging. The run is bit for bit
    what it would have been without, unless ``cap`` is given. See `AroundStep` for what rounding makes of the
    difference; with ``precision="bf16-true"`` most of a small step is lost, and with it the meaning of λ_c.

    ``sharpness/lambda_c``, ``sharpness/critical_lr``, ``sharpness/headroom``, ``sharpness/forwards`` and the others of
    `sharpkern.Monitor` go to every logger with the number of the measured step, whatever ``log_every_n_steps`` is, and
    to ``trainer.callback_metrics``, where the last ones stay. A checkpoint holds what warm-starts the next search.

    With gradient accumulation Lightning divides the loss of each batch by ``accumulate_grad_batches``, also where an
    epoch ends before that many: λ_c is of that loss, and the base loss of such a step is smaller by its missing part.

    Args:
        every: measure on optimizer steps whose number, ``trainer.global_step``, this divides; or a function of the
            number that says whether.
        warn_below: ratio η_c/η below which a `HeadroomWarning` is raised, see `sharpkern.Monitor`.
        cap: arguments of a `sharpkern.LRCap`, such as ``{"peak": 1e-3}``, that holds the learning rate below a share of
            η_c: **this changes the run**. Δθ is then measured before the step, by `Direction.from_optimizer`. Measure
            as `LRCap.every` says. None changes nothing.
        blocks: True, or blocks as for `sharpkern.blockwise_critical_sharpness`, to measure λ_c of each block too.
        **options: of `sharpkern.critical_sharpness`, such as ``rtol`` or ``engine``; ``sample`` takes some of
            the batches that are accumulated.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range; or, when training begins, the run is one that cannot be measured.

    Memory: on steps that are due, their batches, a copy of the parameters from just before the update on, and then Δθ
    and what the engine takes; nothing between.
    """

    def __init__(
        self,
        every: int | Callable[[int], bool] = 1,
        *,
        warn_below: float | None = None,
        cap: CapOptions | None = None,
        blocks: bool | Blocks = False,
        **options: Unpack[MeasureOptions],
    ) -> None:
        self._options: CallbackOptions = {"every": every, "warn_below": warn_below, "blocks": blocks, **options}
        # What is wrong with them is told here, and not when training begins. No random number is drawn for that.
        Options.of(SharpnessCallback, options)
        stand_in = nn.ParameterList([nn.Parameter(torch.zeros(1))])
        sgd = torch.optim.SGD(stand_in.parameters())
        # Blocks are looked for when the model is there.
        others: CallbackOptions = {**self._options, "blocks": False}
        cap_of(Monitor(stand_in, sgd, **others), sgd, cap)
        self._cap_options = cap
        self._cap: LRCap | None = None
        self._monitor: Monitor | None = None
        self._around: AroundStep | None = None
        self._state: dict[str, Any] = {}
        self._is_due = False
        # What is given to training_step: of the batch that is trained on, and of those that have added to the gradient.
        self._batch: tuple[Any, ...] | None = None
        self._batches: list[tuple[Any, ...]] = []
        # What they were trained on.
        self._losses: list[Tensor] = []
        # Norm of the gradient before clipping, and the largest one.
        self._clip: Clip = None
        self._measured: tuple[dict[str, float], int] | None = None

    @property
    def monitor(self) -> Monitor:
        """The `sharpkern.Monitor` of the training that goes on, or of the last one.

        Raises:
            AttributeError: nothing was trained with this callback.
        """
        if self._monitor is None:
            raise AttributeError(
                "monitor is there once Trainer.fit() has begun to train, got a callback that has not been trained with"
            )
        return self._monitor

    @property
    def cap(self) -> LRCap | None:
        """The `sharpkern.LRCap` of the training that goes on, or of the last one; None where there is none."""
        return self._cap

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it: plain numbers."""
        return self._state if self._monitor is None else with_cap(self._monitor.state_dict(), self._cap)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        # A search for the learning rate loads its checkpoint in the midst of training.
        if self._around is not None:
            self.monitor.load_state_dict(state_dict)
            load_cap(self._cap, state_dict)
        self._state = state_dict

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Refuse runs that cannot be measured.

        Raises:
            ValueError: this is one.
        """
        if stage != "fit":
            return
        names = {kind.__name__ for kind in type(trainer.strategy).__mro__}
        if names & _REFUSED:
            raise ValueError(
                "Trainer must train in one process, by DistributedDataParallel or by FSDP2, got "
                f"{type(trainer.strategy).__name__}; use strategy='ddp' or ModelParallelStrategy, or measure the run's "
                "checkpoints"
            )
        if not pl_module.automatic_optimization:
            raise ValueError(
                "LightningModule must leave its optimizer to the Trainer, got automatic_optimization=False; call "
                "sharpkern.Monitor in training_step, between manual_backward and the optimizer's step"
            )
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise ValueError(
                "training_step must take a batch, which can be evaluated again, got one that takes dataloader_iter; "
                "let the Trainer fetch the batches"
            )

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Make the Monitor, and take up what a checkpoint tells.

        Raises:
            ValueError: the optimizer is one whose steps cannot be measured.
        """
        (optimizer,) = trainer.optimizers
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "optimizer must evaluate the loss once in a step, got LBFGS, which searches by itself along its "
                "directions; leave SharpnessCallback out"
            )
        by_value = trainer.gradient_clip_val and getattr(trainer.gradient_clip_algorithm, "value", "norm") != "norm"
        if by_value and self._options.get("sample") is not None:
            raise ValueError(
                "sample needs gradients that keep their direction, got gradient_clip_algorithm='value'; clip by norm, "
                "or leave sample out"
            )
        model = trainer.strategy.model
        assert model is not None
        self._monitor = Monitor(model, optimizer, log=self._keep, **self._options)
        self._leave()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        foreseen = partial(Direction.from_optimizer, optimizer, scaler=scaler)

        def before() -> None:
            assert self._cap is not None
            if self._is_due:
                self._measure(trainer, pl_module, foreseen)
            self._cap.step()

        self._around = AroundStep(
            optimizer,
            lambda: self._is_due,
            partial(self._measure, trainer, pl_module),
            before=None if self._cap_options is None else before,
        )
        # Its hook comes after that, which may be what makes its rate known.
        self._cap = cap_of(self._monitor, optimizer, self._cap_options)
        if self._state:
            self._monitor.load_state_dict(self._state)
            load_cap(self._cap, self._state)
            self._state = {}

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Note the batch, if its step is due."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            # Where Lightning forgets the gradients, also those of a step that it has broken off.
            self._forget()
        self.monitor.step = trainer.global_step
        self._is_due = self.monitor.is_due
        if self._is_due:
            takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
            self._batch = (_shallow(batch), batch_idx) if takes_index else (_shallow(batch),)

    def on_before_backward(self, trainer: "Trainer", pl_module: "LightningModule", loss: Tensor) -> None:
        """Count the batch in, whose ``training_step`` did not skip it, and note its loss."""
        if self._batch is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._losses.append(loss.detach() / (1.0 if scaler is None else scaler.get_scale()))
            self._batches.append(self._batch)
            self._batch = None

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was measured."""
        monitor = self.monitor
        if self._is_due and trainer.global_step > monitor.step:
            reason = "its loss scaler found gradients that are not finite, or optimizer_step left it out"
            monitor.skipped.append((monitor.step, f"the optimizer did not step: {reason}"))
            self._forget()
        if self._measured is None:
            return
        (values, step), self._measured = self._measured, None
        # Not to the loggers: those would be told only now and then, of another step, and again and again.
        pl_module.log_dict(values, logger=False, on_step=True, on_epoch=False)
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=step)

    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        """Take the hooks off the optimizer."""
        self._leave()

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Take the hooks off the optimizer."""
        self._leave()

    def _measure(self, trainer: "Trainer", pl_module: "LightningModule", step: Callable[[], Direction]) -> None:
        batches, losses = self._batches, self._losses
        self._forget()

        def direction() -> Direction:
            if not batches:
                raise NoUpdateError("the step must have a loss, got none: training_step skipped all of its batches")
            return step()

        clip, self._clip = self._clip, None
        with _logging_off(trainer, pl_module):
            if self._options.get("sample") is None or not batches:
                loss = torch.stack(losses).sum() if losses else None
                self.monitor(partial(_loss, trainer, batches), loss=loss, direction=direction)
                return
            num = len(batches)
            parts = [partial(_loss, trainer, [batch], num) for batch in batches]
            self.monitor(parts, loss=[num * one for one in losses], direction=direction, clip=clip)

    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: torch.optim.Optimizer
    ) -> None:
        """Note the gradient's norm, which the Trainer clips next."""
        if self._is_due and self._options.get("sample") is not None and trainer.gradient_clip_val:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self._clip = torch.nn.utils.get_total_norm(gradients), float(trainer.gradient_clip_val)

    def _keep(self, values: dict[str, float], step: int) -> None:
        # What the cap tells comes after what was measured.
        self._measured = {**(self._measured[0] if self._measured else {}), **values}, step

    def _forget(self) -> None:
        """Drop the batches of a step."""
        self._is_due, self._batch, self._batches, self._losses = False, None, [], []

    def _leave(self) -> None:
        for one in (self._around, self._cap):
            if one is not None:
                one.remove()
        self._around = None
        self._forget()


def _loss(trainer: "Trainer", batches: Sequence[tuple[Any, ...]], times: int = 1) -> Tensor:
    """The loss whose gradient the step had, some times: that of each batch divided as Lightning does."""
    losses = []
    for batch, *index in batches:
        output: Any = trainer.strategy.training_step(_shallow(batch), *index)
        losses.append(output["loss"] if isinstance(output, Mapping) else output)
    first, *others = (loss * (times / trainer.accumulate_grad_batches) for loss in losses)
    total: Tensor = sum(others, first)
    return total


def _shallow(batch: Any) -> Any:
    """The batch, but for the container that holds it: some take labels out of theirs."""
    return copy.copy(batch) if isinstance(batch, (MutableMapping, MutableSequence)) else batch


@contextmanager
def _logging_off(trainer: "Trainer", pl_module: "LightningModule") -> Iterator[None]:
    """Keep what is logged on the way from the Trainer's results and from its loggers."""
    names = ("log", "log_dict")
    attributes, loggers = vars(pl_module), trainer.loggers
    before = {name: attributes.get(name) for name in names}
    try:
        attributes.update(dict.fromkeys(names, _nothing))
        trainer.loggers = [DummyLogger() for _ in loggers]
        yield
    finally:
        trainer.loggers = loggers
        for name, value in before.items():
            if value is None:
                del attributes[name]
            else:
                attributes[name] = value


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass
