"""A model on fake tensors, with its loss and all that a training loop holds while a measurement runs."""

import copy
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from sharpkern.distributed.sharding import local
from sharpkern.engines import inplace
from sharpkern.engines.tracked import Scratch
from sharpkern.engines.virtual import linear
from sharpkern.memory.counter import ON_HOST, PeakBytes
from sharpkern.memory.optimizers import optimizer_of
from sharpkern.ops import linear_cross_entropy
from sharpkern.ops.update import LazyUpdate, StoredUpdate

ACTIVATIONS, BACKWARD = "activations", "backward"

Loss = Callable[[nn.Module], Tensor]

# By whom weights are formed: what is made there is for them. A frame or two of torch may stand between.
_FORMING = {
    function.__code__
    for function in (Scratch.take, linear.scratch, StoredUpdate.form, LazyUpdate.form, LazyUpdate.update)
}
_ON_HOST = inplace._on_host.__code__
_HEAD = linear_cross_entropy.__file__
_FSDP = os.path.join("torch", "distributed", "fsdp")
_FRAMES = 12


class TrainingState:
    """A model, its loss, and all that a training loop holds.

    Attributes:
        model: as given.
        mode: as given.
        optimizer: that has taken a step; None without one.
        gradients: of every parameter; none without an optimizer.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, optimizer: str, mode: FakeTensorMode, vocabulary: int | None
    ) -> None:
        self.model = model
        self.mode = mode
        self._loss, self._vocabulary = loss, vocabulary
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._shapes = {parameter.shape for parameter in self.parameters if parameter.dim() > 1}
        self.optimizer = optimizer_of(optimizer, self.parameters)
        self.gradients = [] if self.optimizer is None else [torch.zeros_like(p).detach() for p in self.parameters]

    def loss(self, counter: PeakBytes, model: nn.Module | None = None) -> Tensor:
        """Evaluate the loss where everything that it makes is fake."""
        with self.mode, counter:
            return self._loss(self.model if model is None else model)

    def held(self, *, gradients: bool) -> dict[str, int]:
        """Bytes of what is there before anything is evaluated."""
        states = [] if self.optimizer is None else self.optimizer.state.values()
        tensors = {
            "weights": [*self.model.parameters(), *self.model.buffers()],
            "optimizer": [value for state in states for value in state.values() if isinstance(value, Tensor)],
            "gradients": self.gradients if gradients else [],
        }
        return {name: _storage_bytes(of_name) for name, of_name in tensors.items()}

    def counter(self) -> PeakBytes:
        """Return a counter that tells apart what tensors are for."""

        def label(tensor: Tensor, within: str) -> str:
            # Nothing smaller can be seen in the whole.
            if tensor.nbytes < 2**16:
                return ACTIVATIONS if within == BACKWARD else within
            makers = list(_makers())
            if _ON_HOST in makers:
                return ON_HOST
            if within not in (ACTIVATIONS, BACKWARD):
                return within
            if not _FORMING.isdisjoint(makers):
                return "formed"
            if any(_FSDP in maker.co_filename for maker in makers):
                return "gathered"
            by_head = any(maker.co_filename == _HEAD for maker in makers)
            # A head that goes by chunks has its gradient on the way forth.
            if tensor.shape in self._shapes and (within == BACKWARD or by_head):
                return "gradients"
            if by_head or (tensor.dim() and tensor.shape[-1] == self._vocabulary):
                return "logits"
            return ACTIVATIONS

        return PeakBytes(label)


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Return a copy of a model on fake tensors, which lie on the CPU."""
    with FakeCopyMode(mode):
        fake = copy.deepcopy(model)
    places: dict[int, Tensor] = {}
    for module in fake.modules():
        attributes = [(name, value) for name, value in vars(module).items() if isinstance(value, Tensor)]
        named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in [*named, *attributes]:
            if id(tensor) not in places:
                with mode:
                    moved: Tensor = torch.empty_like(tensor, device="cpu", requires_grad=False)
                if isinstance(tensor, nn.Parameter):
                    moved = nn.Parameter(moved, requires_grad=tensor.requires_grad)
                places[id(tensor)] = moved
            setattr(module, name, places[id(tensor)])
    return fake


def _makers() -> Iterator[CodeType]:
    """What a tensor is being made by, from the innermost call outwards."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_FRAMES):
        if frame is None:
            return
        yield frame.f_code
        frame = frame.f_back


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {local(tensor).untyped_storage()._cdata: local(tensor).untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
