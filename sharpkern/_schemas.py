"""Every operation as it is registered with torch: its schema, its kernel, the shape of its result, its rule for vmap.

What the operations do is in `sharpkern.ops`, which calls them.
"""

import torch
from torch import Tensor

from sharpkern._library import define
from sharpkern.reference import empty_steps

operations = torch.ops.sharpkern
"""What is defined below, by name."""

# What the operations on an optimizer's state share with each other, and with their variant that writes a given output.
_ADAM_OPTIONS = (
    "float beta1, float beta2, float correction1, float correction2, float eps, float weight_decay=0.0, "
    "bool decoupled=True, float grad_factor=1.0, float rate=1.0"
)
# torch.func.vmap takes no tensors by keyword alone.
_ADAM = (
    "Tensor theta, Tensor? grad, Tensor? exp_avg, Tensor? exp_avg_sq, Tensor? alpha, Tensor? max_exp_avg_sq=None, *, "
    + _ADAM_OPTIONS
)
_SGD_OPTIONS = (
    "float weight_decay=0.0, float momentum=0.0, float dampening=0.0, bool nesterov=False, float grad_factor=1.0, "
    "float rate=1.0"
)
_SGD = f"Tensor theta, Tensor grad, Tensor? momentum_buffer, Tensor? alpha, *, {_SGD_OPTIONS}"


def _formed(like: Tensor, alpha: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    return empty_steps(like, 1 if alpha is None else alpha.numel(), dtype or like.dtype)


def _summed(theta: Tensor, *_: object, **__: object) -> Tensor:
    return theta.new_empty(2, dtype=torch.float64)


def _normed(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


# Schema, kernel file, fake result; where there is a rule for torch.func.vmap, the arguments with K in front.
define("axpy_(Tensor(a!)[] theta, Tensor[] base, Tensor[] delta, Tensor alpha) -> ()", "axpy")
define(
    "form(Tensor W, Tensor D, Tensor alpha, *, ScalarType? dtype=None, int? seed=None) -> Tensor",
    "form",
    lambda W, D, alpha, dtype=None, **_: _formed(W, alpha, dtype),
    stepped=(2,),
)
define("form.out(Tensor W, Tensor D, Tensor alpha, *, int? seed=None, Tensor(a!) out) -> ()", "form")
define(
    f"form_adam({_ADAM}, ScalarType? dtype=None) -> Tensor",
    "form_adam",
    lambda theta, grad, exp_avg, exp_avg_sq, alpha, max_exp_avg_sq=None, dtype=None, **_: _formed(theta, alpha, dtype),
    stepped=(4,),
)
define(f"form_adam.out({_ADAM}, Tensor(a!) out) -> ()", "form_adam")
define(
    f"form_sgd({_SGD}, ScalarType? dtype=None) -> Tensor",
    "form_sgd",
    lambda theta, grad, momentum_buffer, alpha, dtype=None, **_: _formed(theta, alpha, dtype),
    stepped=(3,),
)
define(f"form_sgd.out({_SGD}, Tensor(a!) out) -> ()", "form_sgd")
define(
    "adam_sums(Tensor theta, Tensor grad, Tensor? exp_avg, Tensor? exp_avg_sq, *, Tensor? max_exp_avg_sq=None, "
    f"{_ADAM_OPTIONS}) -> Tensor",
    "step_sums",
    _summed,
)
define(
    f"sgd_sums(Tensor theta, Tensor grad, Tensor? momentum_buffer, *, {_SGD_OPTIONS}) -> Tensor", "step_sums", _summed
)
define(
    "reduce(Tensor[] theta, Tensor[] delta, Tensor[] grad) -> Tensor",
    "reduce",
    lambda theta, *_, **__: torch.empty(len(theta), 4, dtype=torch.float64, device=theta[0].device if theta else None),
)
define(
    "linear(Tensor x, Tensor W, Tensor D, Tensor alpha, *, ScalarType? dtype=None) -> Tensor",
    "linear",
    lambda x, W, D, alpha, dtype=None, **_: x.new_empty(
        (alpha.numel(), x.shape[1], W.shape[0]), dtype=dtype or x.dtype
    ),
)
define(
    "embedding(Tensor indices, Tensor W, Tensor D, Tensor alpha, *, ScalarType? dtype=None) -> Tensor",
    "embedding",
    lambda indices, W, D, alpha, dtype=None, **_: W.new_empty(
        (alpha.numel(), *indices.shape, W.shape[1]), dtype=dtype or W.dtype
    ),
    stepped=(3,),
)
define(
    "rms_norm(Tensor x, Tensor weight, Tensor? weight_direction, Tensor alpha, *, float eps, ScalarType? dtype=None) "
    "-> Tensor",
    "norm",
    lambda x, *_, dtype=None, **__: _normed(x, dtype),
    stepped=(0, 3),
)
define(
    "layer_norm(Tensor x, Tensor weight, Tensor? weight_direction, Tensor? bias, Tensor? bias_direction, Tensor alpha, "
    "*, float eps, ScalarType? dtype=None) -> Tensor",
    "norm",
    lambda x, *_, dtype=None, **__: _normed(x, dtype),
    stepped=(0, 5),
)
define(
    "online_cross_entropy_(Tensor(a!) maximum, Tensor(b!) total, Tensor(c!) target, Tensor logits, Tensor labels, "
    "int first, *, float? softcap=None) -> ()",
    "cross_entropy",
)
