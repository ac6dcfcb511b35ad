"""Critical sharpness in Hugging Face's Trainer: a callback, and nothing else to change."""

import copy
import json
import sys
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from sharpkern._support.optional import missing
from sharpkern.engines.session import is_compiled
from sharpkern.integrations.deepspeed import BeforeStep, before_steps_of
from sharpkern.measures.blockwise import Blocks
from sharpkern.measures.micro_batches import Clip
from sharpkern.measures.result import MeasureOptions, Options
from sharpkern.monitoring.lr_cap import CapOptions, LRCap, cap_of, load_cap, with_cap
from sharpkern.monitoring.monitor import CallbackOptions, Monitor
from sharpkern.tensors.random_state import note_streams

try:
    from transformers import Trainer, TrainerCallback, TrainerState
    from transformers.trainer_callback import ExportableState
    from transformers.utils.import_utils import is_sagemaker_mp_enabled
except ImportError as absent:
    raise missing("transformers with accelerate", "transformers", "SharpnessCallback") from absent

_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)
_ABSENT = object()


class SharpnessCallback(TrainerCallback, ExportableState):
    """Measures critical sharpness while a `transformers.Trainer` trains.

    It measures between clipping and the optimizer's step, on the very micro-batches of that step: the Trainer's own
    ``training_step`` is evaluated again without its backward pass, so that the loss is the one that is trained,
    whatever makes it: gradient accumulation, label smoothing, autocast, a ``compute_loss`` of one's own, dropout with
    the masks that the gradient saw. Under DeepSpeed, which steps inside of the backward pass, it measures on entry to
    that step. The run is bit for bit what it would have been without, unless ``cap`` is given.

    ``sharpness/lambda_c``, ``sharpness/critical_lr``, ``sharpness/headroom`` and the others of `sharpkern.Monitor` go
    wherever the Trainer logs to, with the number of steps that the measured weights have taken.

    A checkpoint holds what warm-starts the next search, and ``train(resume_from_checkpoint=...)`` takes it up.

    What a ``compute_loss`` does to anything but its model and its Trainer, such as a file that it writes, it does at
    every evaluation. A model compiled with dropout draws other masks without a backward pass, the same ones each time.

    Args:
        every: measure on steps whose number, ``state.global_step``, this divides; or a function of the number that
            says whether.
        warn_below: ratio η_c/η below which a `HeadroomWarning` is raised, see `sharpkern.Monitor`.
        cap: arguments of a `sharpkern.LRCap`, such as ``{"peak": args.learning_rate}``, that holds the learning rate
            below a share of η_c: **this changes the run**. Measure as `LRCap.every` says. None changes nothing.
        blocks: True, or blocks as for `sharpkern.blockwise_critical_sharpness`, to measure λ_c of each block too.
        **options: of `sharpkern.critical_sharpness`, such as ``rtol`` or ``engine``; ``sample`` takes some of
            the batches that are accumulated.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range.

    Memory: as the Monitor; in steps that are due, the micro-batches until the last of them.

    Examples:
        >>> import tempfile, torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
        >>> from sharpkern.integrations.transformers import SharpnessCallback
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2))
        >>> rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (32, 16))]
        >>> folder = tempfile.mkdtemp()
        >>> args = TrainingArguments(folder, max_steps=4, save_strategy="no", report_to="none", use_cpu=True)
        >>> callback = SharpnessCallback(every=2)
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[callback])
        >>> _ = trainer.train()
        {'sharpness/lambda_c': ...
        >>> [record.step for record in callback.monitor.history]
        [0, 2]
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
        for name, value in {"every": every, "blocks": blocks, **options}.items():
            if isinstance(value, str) and value.startswith("function "):
                raise TypeError(
                    f"{name} must be given anew, got what a checkpoint tells of it, {value!r}; leave "
                    "restore_callback_states_from_checkpoint=False: the callback that you pass is taken up without it"
                )
        self._options: CallbackOptions = {"every": every, "warn_below": warn_below, "blocks": blocks, **options}
        self._cap_options = cap
        # What is wrong with them is told here, and not when the data have been prepared and training begins. No random
        # number is drawn for that.
        Options.of(SharpnessCallback, options)
        stand_in = nn.ParameterList([nn.Parameter(torch.zeros(1))])
        sgd = torch.optim.SGD(stand_in.parameters())
        # Blocks are looked for when the model is there.
        others: CallbackOptions = {**self._options, "blocks": False}
        cap_of(Monitor(stand_in, sgd, **others), sgd, cap)
        self._monitor: Monitor | None = None
        self._cap: LRCap | None = None
        self._trainer: weakref.ref[Any] | None = None
        self._step: _Step | None = None
        self._hook: BeforeStep | None = None

    @property
    def monitor(self) -> Monitor:
        """The `sharpkern.Monitor` of the training that goes on, or of the last one.

        Raises:
            AttributeError: nothing was trained with this callback.
        """
        if self._monitor is None:
            raise AttributeError(
                "monitor is there once Trainer.train() has begun, got a callback that has not been trained with; "
                "after restore_callback_states_from_checkpoint=True the one that has is in "
                "trainer.callback_handler.callbacks"
            )
        return self._monitor

    @property
    def cap(self) -> LRCap | None:
        """The `sharpkern.LRCap` of the training that goes on, or of the last one; None where there is none."""
        return self._cap

    def state(self) -> dict[str, Any]:
        """What a checkpoint's ``trainer_state.json`` holds of it: plain numbers."""
        given = {**self._options, "cap": self._cap_options or None}
        options = {name: _as_json(value) for name, value in given.items() if value or name not in ("cap", "blocks")}
        # A callback that the Trainer makes of it has the second as an attribute; `on_train_begin` reads it in any case.
        saved = with_cap(self._monitor.state_dict(), self._cap) if self._monitor else None
        return {"args": options, "attributes": {"_saved": saved}}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Make the Monitor, and take up what a checkpoint tells.

        Raises:
            RuntimeError: no Trainer calls.
            ValueError: the run is one that cannot be measured, or another `SharpnessCallback` measures it already.
        """
        trainer = _calling_trainer()
        _refuse_others(trainer)
        _refuse_strategy(trainer)
        self._remove_hook()
        # DeepSpeed steps inside of the backward pass, before the Trainer tells of it.
        self._hook = before_steps_of(trainer.model_wrapped, self._before_step)
        self._trainer = weakref.ref(trainer)
        self._monitor = Monitor(trainer.model_wrapped, trainer.optimizer, log=self._log, **self._options)
        self._remove_cap()
        self._cap = cap_of(self._monitor, trainer.optimizer, self._cap_options)
        # A checkpoint of a run without this callback has no entry, which the Trainer expects when it saves.
        callbacks: Any = state.stateful_callbacks
        stored = callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step > 0 and stored["attributes"]["_saved"] is not None:
            self._monitor.load_state_dict(stored["attributes"]["_saved"])
            load_cap(self._cap, stored["attributes"]["_saved"])

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Begin to note micro-batches, if the step is due.

        Raises:
            RuntimeError: the callback was added while the Trainer trains.
        """
        self._forget()
        if self._trainer is None:
            raise RuntimeError(
                "SharpnessCallback must be there when training begins, got one that was added later; add it before "
                "trainer.train()"
            )
        self.monitor.step = state.global_step
        if self.monitor.is_due:
            self._step = _Step(self._trainer())

    def on_substep_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note the next micro-batch too."""
        if self._step is not None:
            self._step.watch()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Measure, if the step is due."""
        if self._hook is None:
            self._before_step()

    def _before_step(self) -> None:
        step, self._step = self._step, None
        if step is not None:
            step.end()
            if self._options.get("sample") is None:
                self.monitor(step.loss, loss=step.trained)
            else:
                self.monitor(step.parts, loss=step.losses, clip=step.clip)
        if self._cap is not None:
            self._cap.step()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Let go of the Trainer."""
        self._forget()
        self._remove_cap()
        self._remove_hook()
        self._trainer = None

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def _remove_cap(self) -> None:
        if self._cap is not None:
            self._cap.remove()

    def _forget(self) -> None:
        """Drop a step that was broken off."""
        if self._step is not None:
            self._step.end()
        self._step = None

    def _log(self, values: dict[str, float], step: int) -> None:
        assert self._trainer is not None
        trainer: Any = self._trainer()
        should_log = trainer.control.should_log
        # Not its override, which may add the run's own metrics to the entry and begin to collect them anew.
        Trainer.log(trainer, values)
        # Logging is taken for the Trainer's own, which may be due yet.
        trainer.control.should_log = should_log


class _MicroBatch(NamedTuple):
    """What ``training_step`` was called with, and the random streams then."""

    model: nn.Module
    inputs: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rewind: list[Callable[[], None]]


class _Step:
    """The micro-batches of one optimizer step, noted as they are trained on.

    Attributes:
        clip: norm of the gradient before clipping, and the largest one; None where the Trainer did not ask for it.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._batches: list[_MicroBatch] = []
        self._losses: list[Tensor] = []
        self.clip: Clip = None
        self._clip_before = vars(trainer.accelerator).get("clip_grad_norm_", _ABSENT)
        self._clip = trainer.accelerator.clip_grad_norm_
        trainer.accelerator.clip_grad_norm_ = self._noted_clip
        self.watch()

    def end(self) -> None:
        """Put both methods back, if that has not been done."""
        self.unwatch()
        attributes = vars(self._trainer.accelerator)
        if attributes.get("clip_grad_norm_") != self._noted_clip:
            return
        if self._clip_before is _ABSENT:
            del attributes["clip_grad_norm_"]
        else:
            attributes["clip_grad_norm_"] = self._clip_before

    def _noted_clip(self, parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
        norm = self._clip(parameters, max_norm, *args, **kwargs)
        if self.clip is None and norm is not None:
            self.clip = norm, max_norm
        return norm

    def watch(self) -> None:
        """Note the next micro-batch, by an attribute that is in place of the method until it is called."""
        self._before = vars(self._trainer).get("training_step", _ABSENT)
        self._trainer.training_step = self._noted

    def unwatch(self) -> None:
        """Put the method back, if that has not been done."""
        if vars(self._trainer).get("training_step") != self._noted:
            return
        if self._before is _ABSENT:
            del self._trainer.training_step
        else:
            self._trainer.training_step = self._before

    @property
    def trained(self) -> Tensor | None:
        """The loss that was trained on, None where it is not known: of a step inside of the last backward pass."""
        return sum(self._losses[1:], self._losses[0]) if self.losses else None

    @property
    def losses(self) -> list[Tensor] | None:
        """What micro-batches were trained on, each as large as the sum; None where one is not known."""
        known = len(self._losses) == len(self._batches)
        return [len(self._losses) * loss for loss in self._losses] or None if known else None

    @property
    def parts(self) -> list[Callable[[], Tensor]]:
        """Closures of micro-batches whose mean is the loss."""
        return [partial(self._part, batch) for batch in self._batches]

    def _part(self, batch: _MicroBatch) -> Tensor:
        return len(self._batches) * self._sum([batch])

    def loss(self) -> Tensor:
        """The same at the parameters as they are: the sum that the Trainer reports."""
        return self._sum(self._batches)

    def _sum(self, batches: Sequence[_MicroBatch]) -> Tensor:
        trainer = self._trainer
        streams = note_streams({p.device for batch in batches for p in batch.model.parameters()})
        total: Tensor | None = None
        with _unchanged(trainer, trainer.state, trainer.control, trainer.accelerator):
            trainer.accelerator.backward = _nothing
            # A compute_loss that logs would log at every evaluation.
            trainer.log = _nothing
            for batch in batches:
                for stream in batch.rewind:
                    stream()
                # Label smoothing takes the labels out of them.
                loss = trainer.training_step(batch.model, copy.copy(batch.inputs), *batch.args, **batch.kwargs)
                total = loss if total is None else total + loss
            if batches and not is_compiled(batches[0].model, self.loss):
                # The random numbers were those of the gradient, and none of the streams that they were put into.
                for stream in streams:
                    stream()
        if total is None:
            raise RuntimeError(
                f"{type(trainer).__name__} must call self.training_step for every micro-batch, got a step without; "
                "call sharpkern.Monitor in a training loop of its own"
            )
        return total

    def _noted(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        # First of all: whatever happens now, nothing is left of it.
        self.unwatch()
        streams = note_streams({parameter.device for parameter in model.parameters()})
        self._batches.append(_MicroBatch(model, copy.copy(inputs), args, kwargs, streams))
        loss: Tensor = self._trainer.training_step(model, inputs, *args, **kwargs)
        self._losses.append(loss.detach())
        return loss


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _as_json(value: object) -> object:
    """Return an option as JSON can hold it: by its name, where it is code or holds modules."""
    try:
        json.dumps(value)
    except TypeError:
        return f"function {getattr(value, '__qualname__', value)}"
    return value


def _calling_trainer() -> Any:
    """The Trainer that an event comes from: events are told everything but that."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    raise RuntimeError(
        "SharpnessCallback must be called by a transformers.Trainer, got an event from elsewhere; pass it as "
        "Trainer(..., callbacks=[SharpnessCallback()]), or call sharpkern.Monitor in a loop of your own"
    )


def _refuse_others(trainer: Any) -> None:
    count = sum(isinstance(callback, SharpnessCallback) for callback in trainer.callback_handler.callbacks)
    if count > 1:
        raise ValueError(
            f"Trainer must have one SharpnessCallback, got {count}, which would log under the same names; for steps "
            "that no single number divides pass every=a function of the step"
        )


def _refuse_strategy(trainer: Any) -> None:
    """Refuse runs whose loss or weights are spread over processes in a way that no measurement knows."""
    accelerator = trainer.accelerator
    kind = accelerator.distributed_type.value
    parallelism = getattr(accelerator, "parallelism_config", None)
    if kind == "FSDP" and getattr(accelerator, "is_fsdp2", False):
        kind = "FSDP2"
    if is_sagemaker_mp_enabled():
        kind = "SageMaker's model parallelism"
    elif trainer.args.n_gpu > 1:
        kind = f"nn.DataParallel on {trainer.args.n_gpu} GPUs"
    elif getattr(parallelism, "non_data_parallel_size", 1) > 1:
        kind = "a model or sequences split over ranks"
    if kind not in {"NO", "FSDP2", "DEEPSPEED"} and not kind.startswith("MULTI_"):
        raise ValueError(
            f"Trainer must train in one process, by DistributedDataParallel, FSDP2 or DeepSpeed, got {kind}; start it "
            "by torchrun and without that, or measure the run's checkpoints"
        )


@contextmanager
def _unchanged(*things: object) -> Iterator[None]:
    """Put attributes back, and what is in those that are dictionaries, lists and tensors."""
    containers: dict[int, tuple[Any, Any]] = {}
    tensors: list[tuple[Tensor, int, Tensor]] = []
    for thing in things:
        _note(vars(thing), containers, tensors)
    try:
        yield
    finally:
        for container, before in containers.values():
            if not _same_members(container, before):
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(before)
        for tensor, version, content in tensors:
            if tensor._version != version:
                tensor.copy_(content)


def _note(container: Any, containers: dict[int, tuple[Any, Any]], tensors: list[tuple[Tensor, int, Tensor]]) -> None:
    if id(container) in containers:
        return
    containers[id(container)] = container, container.copy()
    # A list may be a data set, whose members are left alone.
    for value in container.values() if isinstance(container, dict) else ():
        if type(value) in _CONTAINERS:
            _note(value, containers, tensors)
        elif isinstance(value, Tensor) and not value.is_inference():
            tensors.append((value, value._version, value.detach().clone()))


def _same_members(container: Any, before: Any) -> bool:
    """Whether both hold the same objects in the same order, without calling any object's ``==``."""
    if isinstance(container, dict):
        container, before = container.items(), before.items()
        return len(container) == len(before) and all(
            a is c and b is d for (a, b), (c, d) in zip(container, before, strict=True)
        )
    return len(container) == len(before) and all(a is b for a, b in zip(container, before, strict=True))
