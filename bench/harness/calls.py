"""How a call of every operation is made, the bytes and flops it takes, and how exact its result has to be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from sharpkern import ops

from .formulas import FORMULAS, adam_update, sgd_update
from .timing import Json, Machine

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
Backend = Literal["auto", "triton", "torch"]
Shape = tuple[int, ...]
Shapes = Sequence[Shape]

DECAY: Json = {"weight_decay": 0.1}
MOMENTUM: Json = {"momentum": 0.9, "weight_decay": 0.1}
_ADAM: Json = {"beta1": 0.9, "beta2": 0.999, "correction1": 1 - 0.9**10, "correction2": 1 - 0.999**10, "eps": 1e-8}
_STEPS = (-0.3, 0.0, 0.7, -1e-3, 0.11, -0.5, 1e-5, 0.25)
_UPDATES: dict[str, Callable[..., Tensor]] = {"adam": adam_update, "sgd": sgd_update}


@dataclass(frozen=True)
class Call:
    """One call of an operation, with what its result has to be."""

    operation: str  # name in `sharpkern.ops` and in `FORMULAS`
    operands: Sequence[Any]
    about: Json  # what sets this call apart, for the record
    nbytes: int  # what it has to move: every operand read once, every result written once
    flops: int = 0  # of a matrix product; 0 where bytes count
    options: Json = field(default_factory=dict)
    written: tuple[int, ...] = ()  # which operands are written; they are the result then
    roundings: float = 0.5  # units in the last place of the exact result that are added to torch's error
    # An absolute error that is added: for sums whose terms are larger than the result.
    floor: Callable[[], float | Tensor] = lambda: 0.0
    repeated: bool = False  # whether the check repeats the call to see that its bits stay the same

    def run(self, backend: Backend) -> Any:
        """Call the operation."""
        return getattr(ops, self.operation)(*self.operands, **self.options, backend=backend)

    def formula(self, function: Callable[..., Any]) -> Any:
        """Call the formula, or what it was compiled to."""
        return function(*self.operands, **self._options())

    def repeat(self, wanted: bool = True) -> "Call":
        """Return the call, to be repeated when it is checked."""
        return replace(self, repeated=wanted)

    def into(self, buffer: Tensor) -> "Call":
        """Return the call with its K results written into a buffer, as engines do."""
        theta, alpha = self.operands[0], self.operands[-1]
        out = buffer[: len(alpha) * theta.numel()].view(len(alpha), *theta.shape)
        return replace(self, options={**self.options, "out": out})

    def result(self, function: Callable[..., Any]) -> list[Tensor]:
        """Return what a function makes of the operands, with copies of those that are written."""
        copies = {i: tree_map(Tensor.clone, self.operands[i]) for i in self.written}
        returned = function(*(copies.get(i, operand) for i, operand in enumerate(self.operands)), **self._options())
        found: list[Tensor] = tree_leaves(list(copies.values()) if copies else returned)
        return found

    def exact(self) -> list[Tensor]:
        """Return the result in float64, of the operands as they are."""
        operands, options = tree_map(_widened, (list(self.operands), self._options("dtype", "seed")))
        return replace(self, operands=operands, options=options).result(FORMULAS[self.operation])

    @property
    def rule(self) -> str:
        """The optimizer's rule, of a call that forms weights from its state."""
        return self.operation.removeprefix("form_")

    def _options(self, *without: str) -> Json:
        return {name: value for name, value in self.options.items() if name not in {"out", *without}}


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _nbytes(*operands: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(operands) if isinstance(leaf, Tensor))


class Make:
    """Makes calls on one machine, one method per operation."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._randn = machine, machine.randn

    def axpy_(self, shapes: Shapes, *dtypes: torch.dtype) -> Call:
        """The write of all tensors from θ₀; dtypes of θ, θ₀ and Δθ."""
        theta = [torch.full(shape, torch.nan, dtype=dtypes[0], device=self._machine.device) for shape in shapes]
        operands = theta, self._list(shapes, dtypes[1], 1000), self._list(shapes, dtypes[2], 2000), self.alpha(1)
        return Call("axpy_", operands, _about(*dtypes), _nbytes(operands), written=(0,))

    def form(self, shape: Shape, num_steps: int, *dtypes: torch.dtype, seed: int | None = None) -> Call:
        """W + α_k D; dtypes of W and D."""
        W, D = (self._randn(*shape, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes))
        about = _about(*dtypes, size=W.numel(), num_steps=num_steps)
        nbytes = _nbytes(W, D) + num_steps * W.nbytes
        options = {} if seed is None else {"seed": seed}
        operands = W, D, self.alpha(num_steps)
        return Call("form", operands, about, nbytes, options=options, roundings=1.0 if options else 0.5)

    def form_adam(self, shape: Shape, num_steps: int, *dtypes: torch.dtype, options: Json = DECAY) -> Call:
        """θ + α_k Δθ out of Adam's state, without step sizes Δθ itself; dtypes of θ and state."""
        largest = {"max_exp_avg_sq": self._second_moment(shape, FP32, 9)} if "max_exp_avg_sq" in options else {}
        moments = self._randn(*shape, dtype=dtypes[1], seed=2), self._second_moment(shape, dtypes[1], 3)
        return self._formed("form_adam", shape, num_steps, moments, dtypes, options, _ADAM | options | largest)

    def form_sgd(self, shape: Shape, num_steps: int, *dtypes: torch.dtype, options: Json = MOMENTUM) -> Call:
        """θ + α_k Δθ out of SGD's momentum, without step sizes Δθ itself; dtypes of θ and momentum."""
        stored = self._randn(*shape, dtype=dtypes[1], seed=2) if "momentum" in options else None
        return self._formed("form_sgd", shape, num_steps, (stored,), dtypes, options, options)

    def sums(self, formed: Call) -> Call:
        """Δθᵀg and |Δθ|² over the step that a call of `form_adam` or `form_sgd` takes."""
        operands, options = formed.operands[:-1], formed._options("dtype")
        floor = partial(_floor_of_sums, formed)
        nbytes = _nbytes(operands, options)
        call = Call(f"{formed.rule}_sums", operands, formed.about, nbytes, options=options, floor=floor)
        return call.repeat(formed.repeated)

    def form_steps_(self, formed: Sequence[Call]) -> Call:
        """What calls of `form_adam` or `form_sgd` with one step size, or none, form one by one."""
        rule, theta, grad, state, numbers, options = _together(formed)
        dtype = formed[0].options.get("dtype", theta[0].dtype)
        written = [torch.full_like(one, torch.nan, dtype=dtype) for one in theta]
        operands = rule, written, theta, grad, state, formed[0].operands[-1], numbers
        nbytes = _nbytes(written, theta, grad, state)
        floor = formed[0].floor
        return Call("form_steps_", operands, _about_all(formed), nbytes, options=options, written=(1,), floor=floor)

    def sum_steps(self, formed: Sequence[Call]) -> Call:
        """The sums over the steps that calls of `form_adam` or `form_sgd` take."""
        rule, theta, grad, state, numbers, options = _together(formed)
        operands, nbytes = (rule, theta, grad, state, numbers), _nbytes(theta, grad, state)

        def floor() -> Tensor:
            return torch.stack([_floor_of_sums(call) for call in formed])

        return Call("sum_steps", operands, _about_all(formed), nbytes, options=options, floor=floor)

    def reduce(self, shapes: Shapes, *dtypes: torch.dtype) -> Call:
        """The sums over all tensors; dtypes of θ, Δθ and g."""
        operands = [self._list(shapes, dtype, 1000 * role) for role, dtype in enumerate(dtypes)]

        def floor() -> Tensor:
            magnitudes: Tensor = FORMULAS["reduce"](*([one.abs().double() for one in role] for role in operands))
            return 1e-13 * magnitudes

        return Call("reduce", operands, _about(*dtypes), _nbytes(operands), floor=floor)

    def embedding(self, table: Shape, indices: Shape, num_steps: int, *dtypes: torch.dtype) -> Call:
        """Random rows of W + α_k D, which alone are read; dtypes of W and D."""
        W, D = (self._randn(*table, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes))
        rows = self._machine.integers(len(W), *indices)
        per_element = W.itemsize + D.itemsize + num_steps * W.itemsize
        about = _about(*dtypes, size=table[1], num_steps=num_steps)
        return Call("embedding", (rows, W, D, self.alpha(num_steps)), about, rows.numel() * table[1] * per_element)

    def norm(self, operation: str, rows: int, width: int, num_steps: int, *dtypes: torch.dtype) -> Call:
        """A norm of K inputs with a moving weight, and for layer_norm a moving bias; dtypes of x and of directions."""
        x = self._randn(num_steps, rows, width, dtype=dtypes[0])
        vectors = [self._randn(width, dtype=dtype, seed=seed) for seed, dtype in enumerate(dtypes * 2, start=1)]
        operands = x, *vectors[: 2 if operation == "rms_norm" else 4], self.alpha(num_steps)
        # Rows add up in another order: a few fp32 roundings at the size of a normalised element, which is about 1.
        exactness: Json = {"roundings": 1.0, "floor": lambda: 4e-6}
        about = _about(*dtypes, size=width, num_steps=num_steps)
        return Call(operation, operands, about, _nbytes(operands) + x.nbytes, options={"eps": 1e-5}, **exactness)

    def online_cross_entropy_(self, tokens: int, width: int, softcap: float | None = None, *, first: int = 0) -> Call:
        """The statistics of every token carried on by one chunk of logits; they are new where it is the first."""
        statistics = self._randn(tokens), self._randn(tokens, seed=1).exp_(), self._randn(tokens, seed=2)
        if first == 0:
            statistics = statistics[0].fill_(-torch.inf), statistics[1].zero_(), statistics[2].zero_()
        logits, labels = self._randn(tokens, width, seed=3, scale=4.0), self._machine.integers(2 * width, tokens)
        about = {"size": width, "softcap": softcap, "chunk": "later chunk" if first else "first chunk"}
        # exp and tanh are good to a few units in the last place, those of tanh multiplied by the cap.
        cap = softcap or 0.0
        exactness: Json = {"written": (0, 1, 2), "roundings": 32 + 8 * cap, "floor": lambda: 1e-6 * cap}
        operands, nbytes = (*statistics, logits, labels, first), _nbytes(statistics, statistics, logits, labels)
        return Call("online_cross_entropy_", operands, about, nbytes, options={"softcap": softcap}, **exactness)

    def linear(self, shape: Shape, inputs: Shape, num_steps: int, *dtypes: torch.dtype) -> Call:
        """A linear layer on inputs [K, M], or [1, M] that all share; dtypes of x and W, of D, and of the result."""
        x = self._randn(*inputs, shape[1], dtype=dtypes[0])
        W, D = (self._randn(*shape, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes[:2], start=1))
        alpha = self.alpha(num_steps)
        assert alpha is not None

        def floor() -> Tensor:
            # Sums add up in another order, and a weight half-way between two of 16 bits may be rounded to the other.
            magnitudes: Tensor = FORMULAS["linear"](*(one.abs().double() for one in (x, W, D, alpha)))
            largest = x.abs().amax(-1, keepdim=True).double() * (W.abs() + D.abs()).amax(-1).double()
            return 1e-6 * magnitudes + torch.finfo(x.dtype).eps * largest

        about = _about(*dtypes, size=shape[1], num_steps=num_steps, inputs=inputs[0], tokens=inputs[1])
        options: Json = {"dtype": dtypes[2]} if len(dtypes) > 2 else {}
        results = num_steps * inputs[1] * shape[0]
        nbytes = _nbytes(x, W, D) + results * dtypes[-1 if options else 0].itemsize
        flops = 2 * results * shape[1]
        return Call("linear", (x, W, D, alpha), about, nbytes, flops, options=options, floor=floor)

    def alpha(self, num_steps: int) -> Tensor | None:
        """Return step sizes of both signs, 0 among them where there are several; None for none."""
        return torch.tensor(_STEPS[:num_steps], device=self._machine.device) if num_steps else None

    def _formed(
        self,
        operation: str,
        shape: Shape,
        num_steps: int,
        state: Any,
        dtypes: tuple[torch.dtype, ...],
        changes: Json,
        options: Json,
    ) -> Call:
        theta, grad = (self._randn(*shape, dtype=dtypes[0], seed=seed) for seed in range(2))
        numbers = {name: value for name, value in changes.items() if isinstance(value, (int, float))}
        about = _about(*dtypes, size=theta.numel(), num_steps=num_steps) | numbers
        operands = theta, grad, *state, self.alpha(num_steps)
        results = max(1, num_steps) * theta.numel() * options.get("dtype", theta.dtype).itemsize
        # Terms of the update, up to about 20, may cancel.
        nbytes = _nbytes(operands[:-1], options) + results
        return Call(operation, operands, about, nbytes, options=options, floor=lambda: 1e-5)

    def _second_moment(self, shape: Shape, dtype: torch.dtype, seed: int) -> Tensor:
        return self._randn(*shape, seed=seed).square_().add_(0.25).to(dtype)

    def _list(self, shapes: Shapes, dtype: torch.dtype, seed: int) -> list[Tensor]:
        return [self._randn(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate(shapes)]


def _about(*dtypes: torch.dtype, **more: int) -> Json:
    return {"dtypes": " ".join(str(dtype).removeprefix("torch.") for dtype in dtypes), **more}


def _about_all(formed: Sequence[Call]) -> Json:
    return {**formed[0].about, "size": sum(call.about["size"] for call in formed), "tensors": len(formed)}


def _floor_of_sums(formed: Call) -> Tensor:
    """Return an error of Δθᵀg and |Δθ|²: every term carries the fp32 roundings of its Δθ, whose terms may cancel."""
    *operands, _ = formed.operands
    options = {name: _widened(value) for name, value in formed._options("dtype").items()}
    delta = _UPDATES[formed.rule](*map(_widened, operands), **options)
    return 1e-6 * torch.stack([(delta * operands[1]).abs().sum(), delta.square().sum()])


def _together(formed: Sequence[Call]) -> tuple[str, list[Tensor], list[Tensor], list[Any], tuple[float, ...], Json]:
    """Return what operations on all parameters at once take: rule, θ, g, state, numbers and options."""
    rule, options = formed[0].rule, formed[0].options
    theta, grad = ([call.operands[role] for call in formed] for role in range(2))
    numbers = options["weight_decay"], options.get("grad_factor", 1.0), options.get("rate", 1.0)
    if rule == "sgd":
        state = [call.operands[2] for call in formed]
        own: tuple[float, ...] = options.get("momentum", 0.0), 1 - options.get("dampening", 0.0)
        return rule, theta, grad, state, numbers + own, {"flag": options.get("nesterov", False)}
    state = [one for call in formed for one in (*call.operands[2:4], call.options.get("max_exp_avg_sq"))]
    beta1, beta2 = options["beta1"], options["beta2"]
    own = 1 - beta1, beta2, 1 - beta2, 1 / options["correction1"], options["correction2"] ** 0.5, options["eps"]
    return rule, theta, grad, state, numbers + own, {"decoupled": options.get("decoupled", True)}
