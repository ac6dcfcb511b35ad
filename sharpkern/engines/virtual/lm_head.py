"""The tail of a causal language model, hidden states → head → cross-entropy, recognised while it goes by.

Logits are by far the largest activation of such a model, and most closures only ever hand them to a cross-entropy. So
large logits are *deferred*: the call on the head is answered by a placeholder of their shape, which takes no memory and
holds NaN, so that a read nobody saw cannot pass for a number. Reshapes, slices of tokens, casts and a soft-cap give
further placeholders, and `torch.nn.functional.cross_entropy` of one is computed chunk by chunk (see
`sharpkern.ops.linear_cross_entropy`). Any
other call makes the logits after all, by the calls that were put off, and nothing has changed but memory.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sharpkern.engines.evaluation.precision import LossPrecision
from sharpkern.engines.virtual import torch_calls as calls
from sharpkern.engines.virtual.deferred_logits import Deferred, Head, tensors_in, version_of
from sharpkern.engines.virtual.layers import HeadLoss
from sharpkern.ops.linear_cross_entropy import check_operands
from sharpkern.ops.matmul import product_dtype
from sharpkern.ops.registry import Backend
from sharpkern.tensors.fake import is_plain
from sharpkern.tensors.storage import storage_pointer

# Logits are deferred where they in float32, and the formed weight of the head, take more bytes than this.
HEAD_THRESHOLD = 256 * 2**20

# A head has this many rows, or that many for each column. What is smaller is some other layer, whose results the very
# next call would need.
HEAD_ROWS, HEAD_RATIO = 30_000, 8

# Answered by the placeholder; strides are those of the logits it stands for.
_METADATA = frozenset(
    "shape size dim ndim ndimension numel nelement element_size itemsize nbytes dtype device layout get_device "
    "requires_grad grad grad_fn is_leaf is_cuda is_cpu is_sparse is_nested is_quantized is_floating_point is_complex "
    "is_inference __len__ __hash__".split()
)
_STRIDES = frozenset("stride storage_offset is_contiguous".split())


class LMHead:
    """The deferred logits of one pass, recognised by identity.

    Attributes:
        used: whether logits were deferred in this pass.
        enabled: whether logits may be deferred.
    """

    def __init__(self, precision: LossPrecision, num_steps: int = 1) -> None:
        self._precision = precision
        # Of the engine and not of the pass: losses of passes of few and of many step sizes are compared.
        self._num_steps = num_steps
        self._deferred: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.used = False
        self.enabled = True

    def begin(self) -> None:
        """Start a pass: forget the logits of the last one."""
        self._deferred = WeakTensorKeyDictionary()
        self.used = False

    def defer(
        self, hidden: Tensor, weight: Tensor, loss: Callable[[torch.dtype], HeadLoss], call: Callable[[], Tensor]
    ) -> Tensor | None:
        """A placeholder for the logits of a head, if they are large."""
        if not self.enabled or not self._may_be_large_head(hidden, weight) or not self._can_wait(hidden, weight):
            return None
        (vocabulary, width), dtype = weight.shape, product_dtype(hidden)
        layout = torch.empty(*hidden.shape[:-1], vocabulary, dtype=dtype, device="meta")
        if self._num_steps * (4 * layout.numel() + dtype.itemsize * weight.numel()) <= HEAD_THRESHOLD:
            return None
        autocast = _autocast_now(hidden.device.type)
        head = Head(hidden, vocabulary, dtype, loss(dtype), call, autocast, version_of(hidden))
        states = hidden.detach().reshape(-1, width).contiguous()
        self.used = True
        return self._placeholder(Deferred(head, layout, states, head.logits))

    def may_be(self, weight: Tensor) -> bool:
        """Whether a matrix may be that of a head: nearly none is, which is told without a closer look."""
        rows, width = weight.shape
        return rows >= HEAD_ROWS or rows >= HEAD_RATIO * width

    def _may_be_large_head(self, hidden: Tensor, weight: Tensor) -> bool:
        """Whether a product may be that of a large head."""
        if hidden.dim() == 0 or weight.dim() != 2 or not self.may_be(weight):
            return False
        num_tokens = hidden.numel() // max(1, hidden.shape[-1])
        return self._num_steps * (4 * num_tokens * len(weight) + weight.nbytes) > HEAD_THRESHOLD

    def _can_wait(self, hidden: Tensor, weight: Tensor) -> bool:
        """Whether a product of plain tensors that autograd does not look at is asked for."""
        return (
            not torch.is_grad_enabled()
            and is_plain(hidden)
            and is_plain(weight)
            # Wrappers of torch.func have no memory, and tensors of inference mode no version.
            and storage_pointer(weight) is not None
            and (self._num_steps > 1 or storage_pointer(hidden) is not None)
            and not hidden.is_inference()
            and hidden.shape[-1:] == weight.shape[1:]
            and product_dtype(hidden) == product_dtype(weight)
        )

    def holds(self, *values: Any) -> bool:
        """Whether deferred logits are among the values; on the path of every torch call."""
        return self.used and bool(self._found(values))

    def answer(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call on deferred logits."""
        if name == "cross_entropy":
            return self._cross_entropy(*args, **kwargs)
        logits = self._get(args[0]) if args else None
        if logits is None or logits.real is not None or self._found((args[1:], kwargs)):
            return NotImplemented
        if name in _METADATA:
            return func(*args, **kwargs)
        if name in _STRIDES:
            return func(logits.layout, *args[1:], **kwargs)
        part = logits.after(func, name, args[1:], kwargs)
        if part is None:
            return NotImplemented
        return args[0] if part is logits else self._placeholder(part)

    def materialised(self, values: Any) -> Any:
        """The values with logits in place of the placeholders among them."""
        self._make({id(logits.head) for logits in self._found(values)})
        return calls.map_tensors(values, lambda tensor: logits.made() if (logits := self._get(tensor)) else tensor)

    def before_write(self, written: Any) -> None:
        """Make the logits whose hidden states are about to be written."""
        if not self.used:
            return
        pointers = {storage_pointer(tensor) for tensor in tensors_in(written)}
        heads = (logits.head for logits in self._deferred.values())
        self._make({id(head) for head in heads if storage_pointer(head.hidden) in pointers})

    def _make(self, heads: set[int]) -> None:
        """Make all that was derived from some heads' logits, as it would have been made when it was called for.

        A later write to one of them then reaches views, and does not reach copies.
        """
        for logits in list(self._deferred.values()):
            if id(logits.head) in heads:
                with torch.no_grad():
                    logits.made()

    def _cross_entropy(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Any:
        logits = self._get(input)
        plain = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
        if logits is None or logits.real is not None or not plain or reduction not in ("mean", "sum"):
            return NotImplemented
        if logits.cap is not None and logits.cap.stage != "done":
            return NotImplemented
        if not _are_labels(target, logits.layout, logits.states.device):
            return NotImplemented
        logits.head.check()
        self._precision.widen_loss((None, target), {})
        return logits.head.loss(
            logits.hidden.to(logits.head.dtype),
            target,
            ignore_index=ignore_index,
            reduction=reduction,
            softcap=None if logits.cap is None else logits.cap.bound,
        )

    def _placeholder(self, logits: Deferred) -> Tensor:
        nan = torch.full((), torch.nan, dtype=logits.layout.dtype, device=logits.states.device)
        placeholder = nan.expand(logits.layout.shape)
        self._deferred[placeholder] = logits
        return placeholder

    def _get(self, value: Any) -> Deferred | None:
        return self._deferred.get(value) if isinstance(value, Tensor) else None

    def _found(self, values: Any) -> list[Deferred]:
        return [logits for tensor in tensors_in(values) if (logits := self._get(tensor)) is not None]


def linear_operands(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments of `torch.nn.functional.linear`, by position or by name."""
    return input, weight, bias


def cross_entropy_by_name(
    loss: Callable[[torch.dtype], HeadLoss],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    reduction: str,
    softcap: float | None,
    backend: Backend,
) -> Tensor:
    """`sharpkern.linear_cross_entropy` of a weight that is formed some rows at a time."""
    check_operands(hidden, weight, labels, reduction, softcap)
    dtype = product_dtype(hidden)
    return loss(dtype)(
        hidden.reshape(-1, hidden.shape[-1]).to(dtype),
        labels.reshape(-1),
        ignore_index=ignore_index,
        reduction=reduction,
        softcap=softcap,
        backend=backend,
    )


def _autocast_now(device: str) -> Callable[[], AbstractContextManager[object]]:
    """What makes the context of autocast as it is at this moment."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    return partial(
        torch.autocast, device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
    )


def _are_labels(target: Any, logits: Tensor, device: torch.device) -> bool:
    """Whether a target has one label for each row of logits [N, V]."""
    return (
        is_plain(target)
        and target.dtype == torch.int64
        and logits.dim() == 2
        and target.shape == logits.shape[:1]
        and target.device == device
    )
