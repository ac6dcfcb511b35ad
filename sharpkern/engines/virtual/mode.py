"""The torch-function mode in which a model computes with θ + αΔθ, while θ itself is only read.

It sees every call the closure makes on a parameter and answers it with the formed weight: the model, the closure and
the parameters stay untouched. One layer's weight exists at a time, in a scratch buffer.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode

from sharpkern import ops
from sharpkern.engines.batched.batch_norms import statistics_left_alone
from sharpkern.engines.batched.rules import REPLACEMENTS
from sharpkern.engines.evaluation.guard import Guard
from sharpkern.engines.evaluation.precision import LossPrecision, is_low
from sharpkern.engines.tracked import Scratch, Step, TrackedParam
from sharpkern.engines.virtual import torch_calls as calls
from sharpkern.engines.virtual.audit import StorageWatch, moved
from sharpkern.engines.virtual.deferred_logits import tensors_in
from sharpkern.engines.virtual.layers import HeadLoss, Kept, head_loss, linear_on_steps
from sharpkern.engines.virtual.linear import choose as choose_way
from sharpkern.engines.virtual.lm_head import LMHead, cross_entropy_by_name, linear_operands
from sharpkern.engines.virtual.norms import moving_norm
from sharpkern.engines.virtual.small_weights import SmallWeights
from sharpkern.errors import EngineUnsupportedError
from sharpkern.ops.linear_cross_entropy import linear_cross_entropy
from sharpkern.ops.matmul import product_dtype
from sharpkern.ops.update import StoredUpdate
from sharpkern.tensors.storage import Owners, share_memory, storage_pointer

_NESTED = (list, tuple, dict)


class VirtualParameters(TorchFunctionMode):
    """While active, every torch call on a parameter of the table computes with θ + αΔθ in its place."""

    def __init__(
        self,
        pairs: Iterable[TrackedParam],
        precision: LossPrecision,
        guard: Guard | None = None,
        num_steps: int = 1,
        kept: Kept | None = None,
        may_repoint: bool = False,
    ) -> None:
        super().__init__()
        # Hooks of the model's own give parameters other memory, which is no write to them.
        self._may_repoint = may_repoint
        # Quantised layers hand integers to and fro between their weight and its copies, and keep their values.
        watched = guard.parameters if guard is not None else []
        self._watched = {id(parameter): parameter for parameter in watched if parameter.is_floating_point()}
        self._guard = guard
        self._parameters = {id(pair.weight): pair for pair in pairs}
        self._table = dict(self._parameters)
        owners = Owners((pair.weight, pair) for pair in self._parameters.values())
        others = [*guard.aliases, *guard.parameters] if guard is not None else []
        # Other tensors in reach that move, since they lie in the memory of what does.
        self._aliases = {
            id(one): (one, found) for one in others if id(one) not in self._parameters and (found := owners.of(one))
        }
        self._precision = precision
        self._scratch = Scratch()
        self._kept = kept or Kept(0)
        self.tail = LMHead(precision, num_steps)
        self.alpha = Step(0.0)
        self._small = SmallWeights(self._parameters.values())
        # Nothing but parameters is to be told by its identity, and these functions are called as they are.
        self._is_simple = not self._aliases
        self._replaced: Mapping[Callable[..., Any], Callable[..., Any]] = {}
        self.work = 0
        self._outdated: dict[int | None, list[Tensor]] = {}
        self.read: set[int] = set()
        self.rounded: set[int] = set()
        # Calls were changed, other than of parameters that move.
        self._changed_calls = False
        # Once its engine is closed it does nothing, wherever an interrupt has left it.
        self.ended = False

    @property
    def is_needed(self) -> bool:
        """Whether a pass that computes with the parameters as they are may differ without the mode, and touch more."""
        copies = self._guard is not None and self._guard.copies_late
        return self._changed_calls or copies or self._precision.widened_roundoff > 0

    def begin(self, alpha: float | Tensor) -> None:
        """Start a pass: forget the views of the last one."""
        self._table = dict(self._parameters)
        self.tail.begin()
        self._small.begin()
        self.alpha = Step(alpha)
        self._is_simple = not self._aliases
        self._replaced = REPLACEMENTS if self.alpha.is_several else {}
        self.read = set()
        self.work = 0
        self._outdated = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.ended:
            return func(*args, **kwargs)
        if self._is_simple:
            # On the path of thousands of calls a pass, next to none of which concern a parameter.
            kind = calls.kind_of(func)
            if kind == "metadata":
                return func(*args, **kwargs)
            if kind == "linear":
                if (product := self._linear(func, *linear_operands(*args, **kwargs))) is not None:
                    self._precision.note_product("linear", product)
                    self.work += product.numel()
                    return product
            elif kind != "special" and func not in self._replaced:
                if not self._holds(args) and not (kwargs and ("out" in kwargs or self._holds(kwargs.values()))):
                    return func(*args, **kwargs)
                if kind == "scaling" and not kwargs and (scaled := self._scaled(func, *args)) is not None:
                    return scaled
        name = calls.name_of(func)
        if self.alpha.is_several and not torch.is_grad_enabled():
            self._watch_statistics(name, args, kwargs)
            func = self._replaced.get(func, func)
        if calls.writes(name) and args and not (self._may_repoint and name == "set.data"):
            self._refuse_write(name, args[0])
            self._before_write(args[0])
        if "out" in kwargs:
            self._before_write(kwargs["out"])
        if calls.renormalises(name, args, kwargs):
            self._changed_calls = True
            args, kwargs = self._with_copies(name, args, kwargs)
        if self.tail.holds(args, kwargs):
            answer = self.tail.answer(func, name, args, kwargs)
            if answer is not NotImplemented:
                return answer
            args, kwargs = self.tail.materialised((args, kwargs))
        if self._aliases and not calls.is_metadata(name):
            args, kwargs = self._with_moved_aliases(name, args, kwargs)
        if name in calls.LOSSES:
            args, kwargs = self._precision.widen_loss(args, kwargs)
        if isinstance(func, HigherOrderOperator) and self._parameters:
            func = self._without_parameters(func, args, kwargs)
        if self._holds(args) or (kwargs and self._holds(kwargs.values())):
            result = self._answer(func, name, args, kwargs)
        else:
            result = func(*args, **kwargs)
        if name in calls.PRODUCTS:
            self._precision.note_product(name, result)
            self.work += result.numel() if isinstance(result, Tensor) else 0
        elif func is linear_cross_entropy:
            self._note_head(*args[::2])
        return result

    def _answer(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that names at least one parameter, or a view of one."""
        first = self._pair(args[0]) if args else None
        if calls.is_metadata(name):
            return func(*args, **kwargs)
        if name in calls.OPAQUE:
            raise EngineUnsupportedError(
                f"the model or loss_fn reads a parameter's memory by {name}(), where no formed weight can be put"
            )
        if name == "requires_grad_":
            return args[0]
        if self._holds([kwargs.get("out")]):
            self._refuse_write(name, kwargs["out"])
        linear = name in calls.LINEAR_IN_FIRST and not calls.reads_bits(name, args, kwargs)
        if first is not None and linear and not self._holds(args[1:]):
            return self._apply_to_both(func, first, args[1:], kwargs)
        if first is not None and name in calls.CASTS:
            return self._cast(func, first, args[1:], kwargs)
        if name == "embedding":
            weight = self._pair(args[1] if len(args) > 1 else kwargs["weight"])
            if weight is not None:
                return self._gather_rows(func, weight, args, kwargs)
        if name == "linear":
            answer = self._linear(func, *linear_operands(*args, **kwargs))
            if answer is not None:
                return answer
        if func is linear_cross_entropy and not torch.is_grad_enabled() and not self._holds(args[::2]):
            return cross_entropy_by_name(self._head(self._table[id(args[1])]), *args, **kwargs)
        normed = None
        if name in calls.NORMS:
            normed = moving_norm(func, args, kwargs, self._pair, self.alpha, self._small.update)
        if normed is not None:
            result, owners = normed
            self.read |= owners
            return result
        elementwise = name in calls.NORMS or name in calls.ELEMENTWISE
        if elementwise and any(is_low(pair.weight.dtype) for pair in self._pairs_in((args, kwargs))):
            return self._in_full_precision(func, name, args, kwargs)
        return self._with_formed(func, name, args, kwargs)

    # -- answers ------------------------------------------------------------------------------------------------------

    def _apply_to_both(self, func: Any, pair: TrackedParam, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Views and gathers are linear: f(W + αD) = f(W) + αf(D). A view stays a pair; a copy is formed."""
        tensors = {id(tensor): tensor for tensor in (pair.weight, *pair.move.operands)}
        results = {key: func(tensor, *rest, **kwargs) for key, tensor in tensors.items()}
        weights = results[id(pair.weight)]
        if isinstance(weights, Tensor):
            return self._register(pair, pair.view(lambda tensor: results[id(tensor)]))
        parts = (
            self._register(pair, pair.view(lambda tensor, i=i: results[id(tensor)][i]))  # type: ignore[misc]
            for i in range(len(weights))
        )
        return type(weights)(parts) if type(weights) in (tuple, list) else tuple(parts)

    def _register(self, pair: TrackedParam, part: TrackedParam) -> Tensor:
        if part.weight is pair.weight:
            return part.weight
        if storage_pointer(part.weight) != storage_pointer(pair.weight):
            return self._form(part)
        # The pair holds the view, so that its id stays taken until the pass ends.
        self._table[id(part.weight)] = part
        return part.weight

    def _cast(self, func: Any, pair: TrackedParam, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Casts widen before they round: a bf16 weight taken to float32 keeps the whole displacement."""
        empty = pair.weight.detach().new_empty(0)
        result = func(empty, *rest, **kwargs)
        if result is empty:
            return pair.weight
        if not isinstance(result, Tensor):
            return result
        self.read.add(pair.owner)
        exact = result.dtype.is_floating_point and result.dtype.itemsize >= pair.move.wide.itemsize
        if not exact:
            self.rounded.add(pair.owner)
        return func(pair.form(self.alpha, dtype=pair.move.wide if exact else pair.weight.dtype), *rest, **kwargs)

    def _gather_rows(self, func: Any, pair: TrackedParam, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        def rows(source: Tensor) -> Any:
            if len(args) > 1:
                return func(args[0], source, *args[2:], **kwargs)
            return func(*args, **{**kwargs, "weight": source})

        self.read.add(pair.owner)
        move = pair.move
        on_kernels = ops.has_kernels(move.base.device) and not torch.is_grad_enabled()
        if self.alpha and on_kernels and isinstance(move, StoredUpdate) and len(args) > 1:
            self.rounded.add(pair.owner)
            return ops.embedding(args[0], move.base, move.delta, self.alpha.of(move), dtype=pair.weight.dtype)[0]
        weight: Tensor = rows(pair.weight)
        if not self.alpha:
            return weight
        return self._form(pair.view(lambda tensor: weight if tensor is pair.weight else rows(tensor)))

    def _in_full_precision(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Norm weights near 1 swallow small steps when rounded to 16 bits: compute in float32, round the result."""
        operands = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        result_dtype = operands[0].dtype
        if name in calls.ELEMENTWISE and len(args) == 2:
            result_dtype = torch.result_type(args[0], args[1])

        def widen(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            pair = self._pair(value)
            if pair is not None:
                self.read.add(pair.owner)
                small = None if torch.is_grad_enabled() else self._small.formed(pair, self.alpha)
                return pair.form(self.alpha, dtype=pair.move.wide) if small is None else small
            return value.float() if is_low(value.dtype) else value

        return calls.map_tensors(
            func(*calls.map_values(widen, args), **calls.map_values(widen, kwargs)), lambda t: t.to(result_dtype)
        )

    def _with_formed(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Any other call: form the weights it takes. Products consume theirs at once: one scratch serves them all."""
        # A closure that differentiates by its inputs keeps the weights: then each is formed in memory of its own.
        free = [name in calls.PRODUCTS and not torch.is_grad_enabled() and not self.alpha.is_several]
        at_once = (name in calls.NORMS or name in calls.ELEMENTWISE) and not torch.is_grad_enabled()

        def formed(value: Any) -> Any:
            pair = self._pair(value)
            if pair is None:
                return value
            if self.alpha and free[0] and value.dim() > 1:
                free[0] = False
                dtype = _taken_as(pair.weight) if name in calls.AUTOCAST_PRODUCTS else pair.weight.dtype
                return self._form(pair, self._scratch.take(pair.weight, dtype))
            return self._vector(value) if at_once else self._form(pair)

        with warnings.catch_warnings() if name in calls.RECURRENT else nullcontext():
            if name in calls.RECURRENT:
                # Weights formed one by one are not, as cuDNN would like them, in one piece.
                warnings.filterwarnings("ignore", "RNN module weights")
            result = func(*calls.map_values(formed, args), **calls.map_values(formed, kwargs))
        if name in calls.PRODUCTS and isinstance(result, Tensor) and self._scratch.owns(result):
            return result.clone()
        return result

    def _linear(self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """A linear layer that stands for large logits, or takes all step sizes at once; None for any other."""
        pair = self._pair(weight)
        if pair is None or self._pair(x) is not None or weight.dim() != 2:
            return None
        if bias is not None and bias.shape != weight.shape[:1]:
            return None
        if bias is None and self.tail.may_be(weight):
            logits = self.tail.defer(x, weight, self._head(pair), lambda: self._product(func, pair, x, None))
            if logits is not None:
                self._is_simple = False
                return logits
        return self._product(func, pair, x, bias)

    def _product(self, func: Any, pair: TrackedParam, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.alpha.is_several and not torch.is_grad_enabled():
            return self._product_on_steps(pair, x, bias)
        if torch.is_grad_enabled():
            return self._with_formed(func, "linear", (x, pair.weight, bias), {})  # type: ignore[no-any-return]
        self.read.add(pair.owner)
        self.rounded.add(pair.owner)
        weight = pair.weight
        if self.alpha:
            dtype = _taken_as(weight)
            kept = self._kept.weights(pair, self.alpha, dtype)
            out = self._scratch.take(weight, dtype) if kept is None else None
            weight = pair.form(self.alpha, dtype=dtype, out=out) if kept is None else kept[0]
        product: Tensor = func(x, weight) if bias is None else func(x, weight, self._vector(bias))
        return product

    def _scaled(self, func: Any, *factors: Any) -> Tensor | None:
        """A tensor times a vector of 16 bits that moves, as in a norm that is written out, by one call; else None.

        The product of two such numbers is exact in float32, in which torch multiplies: without a step nothing is to be
        done about it.
        """
        if torch.is_grad_enabled() or len(factors) != 2 or self.alpha.is_several:
            return None
        first, second = map(self._pair, factors)
        pair, other = (second, factors[0]) if first is None else (first, factors[1])
        if pair is None or (first is not None and second is not None) or type(other) is not Tensor:
            return None
        weight = pair.weight
        if weight.dim() != 1 or not is_low(weight.dtype) or other.dtype != weight.dtype:
            return None
        if other.dim() == 0 or other.shape[-1] != len(weight):
            return None
        if not self.alpha and pair.move.base is weight:
            self.read.add(pair.owner)
            return func(*factors)  # type: ignore[no-any-return]
        formed = self._small.formed(pair, self.alpha)
        if formed is None:
            return None
        self.read.add(pair.owner)
        return torch.mul(other, formed, out=torch.empty_like(other))

    def _vector(self, value: Tensor | None) -> Tensor | None:
        """A bias as it is, or formed in its own dtype where it moves; to be consumed at once."""
        pair = self._pair(value)
        if pair is None or value is None:
            return value
        small = self._small.formed(pair, self.alpha)
        if small is None:
            return self._form(pair)
        self.read.add(pair.owner)
        self.rounded.add(pair.owner)
        return small.to(value.dtype)

    def _product_on_steps(self, pair: TrackedParam, x: Tensor, bias: Tensor | None) -> Tensor:
        dtype = product_dtype(x)
        way = choose_way(x.device, dtype, x.numel() // max(1, x.shape[-1]))
        self.read.add(pair.owner)
        if way != "products":
            self.rounded.add(pair.owner)
        moved = self._pair(bias)
        if moved is not None:
            self.read.add(moved.owner)
            self.rounded.add(moved.owner)
        y = linear_on_steps(pair, moved, self.alpha, x, dtype, way, self._kept)
        return y if bias is None or moved is not None else y + bias.to(dtype)

    def _head(self, pair: TrackedParam) -> Callable[[torch.dtype], HeadLoss]:
        """What gives, for the dtype of the product, the cross-entropy of a head."""

        def in_dtype(dtype: torch.dtype) -> HeadLoss:
            self.read.add(pair.owner)
            self.rounded.add(pair.owner)
            return head_loss(pair, self.alpha, dtype, self._scratch)

        return in_dtype

    def _note_head(self, hidden: Tensor, labels: Tensor) -> None:
        """Remember the precision of a cross-entropy that holds its product inside."""
        self._precision.widen_loss((None, labels), {})
        self._precision.note_product("linear", torch.empty(0, dtype=product_dtype(hidden), device=hidden.device))

    def _with_moved_aliases(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments of a call, with copies that have moved of tensors that lie in the memory of parameters."""

        def replace(tensor: Tensor) -> Tensor:
            _, pairs = self._aliases.get(id(tensor), (None, ()))
            if not pairs:
                return tensor
            if name in calls.OPAQUE or self.alpha.is_several or (tensor.requires_grad and torch.is_grad_enabled()):
                raise EngineUnsupportedError(f"{name} reads parameters through a tensor that shares their memory")
            owners = {pair.owner for pair in pairs}
            self.read |= owners
            self.rounded |= owners
            return moved(tensor, pairs, self.alpha) if self.alpha else tensor

        return calls.map_tensors(args, replace), calls.map_tensors(kwargs, replace)

    def _with_copies(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments of a call that writes its weight, the parameters among them copied."""
        if self._pairs_in((args, kwargs)):
            raise EngineUnsupportedError(f"{name} with max_norm writes its weight")

        def copied(tensor: Tensor) -> Tensor:
            return tensor.detach().clone() if id(tensor) in self._watched else tensor

        return calls.map_tensors(args, copied), calls.map_tensors(kwargs, copied)

    def _without_parameters(self, func: Any, args: Any, kwargs: Any) -> Callable[..., Any]:
        """A higher-order operator whose functions, of which this mode sees nothing, must not read what moves."""
        given = {pair.memory for pair in self._pairs_in((args, kwargs))}

        def call(*args: Any, **kwargs: Any) -> Any:
            with StorageWatch(pair for pair in self._parameters.values() if pair.memory not in given) as watch:
                try:
                    result = func(*args, **kwargs)
                except NotImplementedError as error:
                    # Before torch 2.7 no mode is asked that the operator has no rule for.
                    raise EngineUnsupportedError(f"{calls.name_of(func)} calls functions unseen ({error})") from error
            if watch.touched:
                raise EngineUnsupportedError(f"{calls.name_of(func)} calls a function that reads a parameter")
            return result

        return call

    def _watch_statistics(self, name: str, args: Any, kwargs: Any) -> None:
        """Refuse reads of running statistics that a norm would have updated, had it been called for one step size."""
        updated = statistics_left_alone(name, args, kwargs)
        if self._outdated and not updated:
            # By their memory, which aliases share.
            for read in tensors_in((args, kwargs)):
                if any(share_memory(read, tensor) for tensor in self._outdated.get(storage_pointer(read), ())):
                    raise EngineUnsupportedError("loss_fn updates running statistics of a norm, and then reads them")
        # They are held, so that no other tensor takes their place in memory.
        for tensor in updated:
            self._outdated.setdefault(storage_pointer(tensor), []).append(tensor)
            self._is_simple = False

    def _before_write(self, written: Any) -> None:
        self.tail.before_write(written)
        if self._guard is not None:
            self._guard.before_write(tensors_in(written))

    def _refuse_write(self, name: str, written: Any) -> None:
        tensors = written if isinstance(written, (list, tuple)) else [written]
        if any(id(tensor) in known for tensor in tensors for known in (self._table, self._watched, self._aliases)):
            raise ValueError(
                f"loss_fn must only evaluate the loss, got a write to a parameter by {name}; take training steps, "
                "weight clipping and momentum encoders out of the closure"
            )

    # -- the table ----------------------------------------------------------------------------------------------------

    def _form(self, pair: TrackedParam, out: Tensor | None = None) -> Tensor:
        self.read.add(pair.owner)
        self.rounded.add(pair.owner)
        if not self.alpha:
            return pair.weight
        return pair.form(self.alpha, dtype=None if out is None else out.dtype, out=out)

    def _pair(self, value: Any) -> TrackedParam | None:
        return self._table.get(id(value)) if isinstance(value, Tensor) else None

    def _pairs_in(self, values: Any) -> list[TrackedParam]:
        found: list[TrackedParam] = []
        calls.map_values(lambda value: found.append(pair) if (pair := self._pair(value)) else None, values)
        return found

    def _holds(self, values: Iterable[Any]) -> bool:
        """Whether a pair's tensor is among the values, or in lists inside them; on the path of every torch call."""
        table = self._table
        if not table:
            return False
        for value in values:
            # The table holds its tensors, so that nothing else has their identity.
            if id(value) in table:
                return True
            if (
                type(value) is not Tensor
                and isinstance(value, _NESTED)
                and self._holds(value.values() if isinstance(value, dict) else value)
            ):
                return True
        return False


def _taken_as(weight: Tensor) -> torch.dtype:
    """The dtype that a product takes a formed weight in: autocast would round a float32 one in another pass."""
    return product_dtype(weight) if weight.dtype == torch.float32 else weight.dtype
