"""What the virtual engine knows of torch's calls: which read, view, cast, write or consume a parameter."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator

# Answered by θ itself: they tell nothing of its values.
_METADATA = frozenset(
    "shape size dim ndim ndimension stride storage_offset numel nelement element_size itemsize nbytes dtype device "
    "layout requires_grad grad grad_fn get_device names has_names retains_grad retain_grad output_nr register_hook "
    "register_post_accumulate_grad_hook broadcast_shapes result_type promote_types can_cast set.grad set.requires_grad "
    "_version _base _is_view _is_zerotensor __len__ __hash__".split()
)

# f(W + αD) = f(W) + αf(D): views and gathers along their first argument.
LINEAR_IN_FIRST = frozenset(
    "t T mT H mH adjoint transpose permute view reshape reshape_as view_as flatten ravel unflatten squeeze unsqueeze "
    "__getitem__ chunk unsafe_chunk split unsafe_split split_with_sizes tensor_split hsplit vsplit dsplit unbind "
    "select narrow expand expand_as broadcast_to detach data alias swapaxes swapdims movedim moveaxis diagonal unfold "
    "index_select".split()
)

CASTS = frozenset("to float double half bfloat16 type cpu cuda xpu".split())

# They consume their operands at once and return something new.
PRODUCTS = frozenset(
    "linear matmul __matmul__ __rmatmul__ mm bmm addmm addbmm baddbmm mv addmv einsum tensordot bilinear conv1d conv2d "
    "conv3d conv_transpose1d conv_transpose2d conv_transpose3d grouped_mm _grouped_mm".split()
)

# Of these autocast rounds all factors, on every device.
AUTOCAST_PRODUCTS = frozenset(
    "linear matmul __matmul__ __rmatmul__ mm bmm addmm addbmm baddbmm conv1d conv2d conv3d conv_transpose1d "
    "conv_transpose2d conv_transpose3d".split()
)

RECURRENT = frozenset("lstm gru rnn_tanh rnn_relu".split())

NORMS = frozenset("layer_norm rms_norm group_norm batch_norm instance_norm".split())

ELEMENTWISE = frozenset(
    "mul multiply __mul__ __rmul__ add __add__ __radd__ sub subtract __sub__ __rsub__ addcmul".split()
)

MULTIPLICATIONS = frozenset("mul multiply __mul__ __rmul__".split())

# Answered in ways of their own.
_READERS = frozenset("embedding embedding_bag linear_cross_entropy".split())

LOSSES = frozenset(
    "cross_entropy nll_loss binary_cross_entropy binary_cross_entropy_with_logits mse_loss l1_loss smooth_l1_loss "
    "huber_loss kl_div gaussian_nll_loss poisson_nll_loss soft_margin_loss hinge_embedding_loss multi_margin_loss "
    "multilabel_margin_loss multilabel_soft_margin_loss margin_ranking_loss cosine_embedding_loss triplet_margin_loss "
    "ctc_loss".split()
)

# They hand the parameter's memory to code that torch does not see.
OPAQUE = frozenset(
    "data_ptr numpy __array__ tolist __dlpack__ untyped_storage storage _typed_storage __cuda_array_interface__ "
    "share_memory_ __reduce_ex__".split()
)


# On the path of every torch call of every pass, of which there are thousands: each is looked at once.
_looked_up = functools.lru_cache(maxsize=4096)


@_looked_up
def name_of(func: Any) -> str:
    """The call's name; a property's own name for reads, ``set.<name>`` for writes."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return str(func.__self__.__name__)
    if name == "__set__":
        return f"set.{func.__self__.__name__}"
    return str(name)


@_looked_up
def kind_of(func: Any) -> str:
    """What is to be done about a function: nothing ("metadata"), nothing if it takes no parameter ("plain"), or more.

    Most parameters are taken by "linear", and most of the others by a multiplication, which is plain too: "scaling".
    """
    name = name_of(func)
    if func is torch.nn.functional.linear:
        return "linear"
    if is_metadata(name):
        return "metadata"
    if isinstance(func, HigherOrderOperator) or writes(name) or name in LOSSES or name in PRODUCTS or name in _READERS:
        return "special"
    return "scaling" if name in MULTIPLICATIONS else "plain"


@_looked_up
def is_metadata(name: str) -> bool:
    """Whether the call tells shape, dtype or the like, or makes an unrelated tensor of that shape."""
    return name in _METADATA or name.startswith(("is_", "new_", "sym_")) or name.endswith("_like")


@_looked_up
def writes(name: str) -> bool:
    """Whether the call writes its first argument."""
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name[3:-2] in _INPLACE_OPERATORS)
    return name == "set.data" or (name.endswith("_") and name not in _HARMLESS)


# They do not change the values.
_HARMLESS = frozenset(["requires_grad_", "share_memory_"])

_INPLACE_OPERATORS = frozenset("add sub mul matmul truediv floordiv mod pow and or xor lshift rshift".split())


def reads_bits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call is a view of a tensor's bits as another dtype, as ``view(torch.complex64)`` is."""
    return name == "view" and isinstance(args[1] if len(args) > 1 else kwargs.get("dtype"), torch.dtype)


def renormalises(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an embedding call has ``max_norm`` and so writes its weight."""
    if name not in ("embedding", "embedding_bag"):
        return False
    return (args[3] if len(args) > 3 else kwargs.get("max_norm")) is not None


def map_values(change: Callable[[Any], Any], values: Any) -> Any:
    """Apply ``change`` to every leaf of nested tuples, lists and dictionaries."""
    if isinstance(values, dict):
        return {key: map_values(change, value) for key, value in values.items()}
    if type(values) in (tuple, list):
        return type(values)(map_values(change, value) for value in values)
    return change(values)


def map_tensors(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``change`` to the tensors among nested values."""
    return map_values(lambda value: change(value) if isinstance(value, Tensor) else value, values)
