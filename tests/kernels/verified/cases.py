"""Every kernel, at sizes that are small enough to be verified, as its launcher launches it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from sharpkern.kernels.axpy import axpy_
from sharpkern.kernels.cross_entropy import online_cross_entropy_
from sharpkern.kernels.embedding import embedding
from sharpkern.kernels.form import form
from sharpkern.kernels.linear import linear
from sharpkern.kernels.norm import layer_norm, rms_norm
from sharpkern.kernels.optimizer_steps import form_step
from sharpkern.kernels.reduce import reduce
from sharpkern.kernels.whole_steps import form_steps_, sum_steps
from torch import Tensor

from tests.helpers.compiled import Launch, compile_launch, launches_of
from tests.kernels.verified import formulas
from tests.kernels.verified.edits import (
    HALVES_BY_ONE_MOVE,
    ONE_LANE_STORES,
    ONE_LANE_STORES_ALPHA,
    ROOT_OF_CORRECTION_IS_FIXED,
    ROOTS_OF_ABSOLUTE_VALUES,
    Edit,
    addresses_from_parameters,
    alpha_is,
    label_is_here,
    select_in_fp32,
)
from tests.kernels.verified.verifier import Question

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

BF16, FP16, FP32, INT64 = torch.bfloat16, torch.float16, torch.float32, torch.int64

# Why equality is not asked.
_NO_PROOF = "equality: no proof found in a minute"
_LAYOUT = "equality: the verifier does not know the layout of the products"

# A power of two is the same number in every format.
EPS = 2.0**-20


@dataclass(frozen=True)
class Case:
    """One launch of a kernel.

    Attributes:
        call: of a launcher.
        formula: of what the kernel writes, None where safety alone is asked.
        inputs: arguments of the kernel that the formula takes, in its order.
        outputs: arguments that are written, in the formula's order.
        index: which of the call's launches it is.
        addresses: operands whose addresses the kernel reads from a table, with their roles there.
        edits: of the PTX, without which less is proved.
        unasked: why there is no formula.
    """

    call: Callable[[], object]
    formula: Callable[..., object] | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("out",)
    index: int = 0
    addresses: Mapping[str, tuple[int, Tensor]] = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()
    unasked: str = ""

    @property
    def all_edits(self) -> tuple[Edit, ...]:
        """With the one that does without the table of addresses."""
        roles = [role for role, _ in self.addresses.values()]
        return (*([addresses_from_parameters(roles)] if roles else []), *self.edits)

    @property
    def letters(self) -> str:
        """Of all edits."""
        return "".join(sorted({edit.letter for edit in self.all_edits}))

    def launch(self, architecture: str) -> Launch:
        """The launch, as it would be made on an architecture."""
        return launches_of(self.call, architecture)[self.index]


def code_of(ptx: str) -> str:
    """PTX without comments and what debuggers read, in which lines of our files are counted."""
    ptx = re.sub(r"\n\t\.section[^{]*\{[^}]*\}", "", ptx)
    ptx = re.sub(r"^\s*(?:\.loc|\.file)\s.*\n|^\$L__tmp\d+:\n", "", ptx, flags=re.MULTILINE)
    return re.sub(r"\s*//.*", "", ptx)


def question(case: Case, architecture: str, *, edited: bool) -> Question:
    """What is asked about a case; about the PTX of one with edits as it is, safety alone."""
    launch = case.launch(architecture)
    compiled = compile_launch(launch, architecture)
    ptx = code_of(compiled.asm["ptx"])
    contents = {name: launch.arguments[name] for name in ("rows", "chunks") if name in launch.arguments}
    if case.addresses and edited:
        # Addresses are no numbers here.
        contents["rows"] = contents["rows"].clone()
        contents["rows"][:, :-2] = 0
    tensors = {name: tensor for name, (_, tensor) in case.addresses.items()} if edited else {}
    for edit in case.all_edits if edited else ():
        ptx = edit.apply(ptx)
    asked = case.formula if edited or not case.all_edits else None
    threads = 32 * compiled.metadata.num_warps
    return Question(ptx, launch, threads, compiled.metadata.shared, asked, case.inputs, case.outputs, tensors, contents)


def zeros(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """Zeros on a CPU, which only stand for memory."""
    return torch.zeros(shape, dtype=dtype)


_SELECTED = {FP32: (), BF16: (select_in_fp32("bf16"),), FP16: (select_in_fp32("f16"),)}


def _form(dtype: torch.dtype, written: torch.dtype, num: int, num_steps: int) -> Case:
    def call() -> object:
        return form(zeros(num, dtype=dtype), zeros(num, dtype=dtype), zeros(num_steps), dtype=written)

    return Case(call, formulas.Form(written), ("W", "D", "alpha"), edits=_SELECTED[written])


# Weight decay, factor of the gradient, rate, and the rule's own.
_NUMBERS = {
    "adam": (0.1, 1.0, 1.0, 0.1, 0.999, 0.001, 10.0, 0.0316, 1e-8),
    "sgd": (0.1, 1.0, 1.0, 0.9, 0.7),
    "lion": (0.1, 1.0, 1.0, 0.9, 0.1),
    "rmsprop": (0.1, 1.0, 1.0, 0.99, 0.01, 1e-8, 0.9),
}
_STATES = {"adam": 2, "sgd": 1, "lion": 1, "rmsprop": 3}
_OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {"decoupled": True},
    "sgd": {"flag": True},
    "lion": {"decoupled": True},
    "rmsprop": {"flag": True},
}
_ROOTS = {"adam": (ROOTS_OF_ABSOLUTE_VALUES, ROOT_OF_CORRECTION_IS_FIXED), "rmsprop": (ROOTS_OF_ABSOLUTE_VALUES,)}


def _padded(rule: str, state: list[Tensor]) -> list[Tensor | None]:
    return [*state, None] if rule == "adam" else list(state)


def _step(rule: str, dtype: torch.dtype, written: torch.dtype, num: int, num_steps: int) -> Case:
    """θ + α_k Δθ, or Δθ for no step sizes."""
    alpha = zeros(num_steps) if num_steps else None

    def call() -> object:
        theta, grad = zeros(num, dtype=dtype), zeros(num, dtype=dtype)
        state = _padded(rule, [zeros(num) for _ in range(_STATES[rule])])
        return form_step(rule, theta, grad, state, alpha, _NUMBERS[rule], dtype=written, **_OPTIONS[rule])

    states = tuple(f"state_{index}" for index in range(_STATES[rule]))
    inputs = ("theta", "grad", *states, *(("alpha",) if num_steps else ()), "numbers")
    formula = formulas.Step(rule, written) if num_steps else formulas.Update(rule)
    edits = (*(_SELECTED[written] if num_steps else ()), *_ROOTS.get(rule, ()))
    return Case(call, formula, inputs, edits=edits)


def _whole_step(rule: str, num: int) -> Case:
    names = ("out", "theta", "grad", "first", "second", "third")[: 3 + _STATES[rule]]
    tensors = [zeros(num) for _ in names]
    out, theta, grad, *state = tensors

    def call() -> object:
        states = _padded(rule, state)
        return form_steps_(rule, [out], [theta], [grad], states, zeros(1), _NUMBERS[rule], **_OPTIONS[rule])

    addresses = {name: (role, tensor) for role, (name, tensor) in enumerate(zip(names, tensors, strict=True))}
    inputs = (*names[1:], "alpha", "numbers")
    return Case(call, formulas.WholeStep(rule), inputs, addresses=addresses, edits=_ROOTS.get(rule, ()))


def _decided(case: Case, zero: bool) -> Case:
    """The case with α = 0 or another α."""
    formula = replace(case.formula, zero=zero)  # type: ignore[type-var]
    return replace(case, formula=formula, edits=(*case.edits, alpha_is(zero)))


def _step_sums(rule: str, num: int, dtype: torch.dtype = FP32) -> Case:
    names = ("theta", "grad", "first", "second", "third")[: 2 + _STATES[rule]]
    tensors = [zeros(num, dtype=dtype if index < 2 else FP32) for index in range(len(names))]
    theta, grad, *state = tensors

    def call() -> object:
        return sum_steps(rule, [theta], [grad], _padded(rule, state), _NUMBERS[rule], **_OPTIONS[rule])

    return Case(
        call,
        formulas.StepSums(rule),
        (*names, "numbers"),
        ("partial",),
        addresses={name: (role, tensor) for role, (name, tensor) in enumerate(zip(names, tensors, strict=True), 1)},
        edits=(*_SUMS, *_ROOTS.get(rule, ())),
    )


_SUMS = (ONE_LANE_STORES, HALVES_BY_ONE_MOVE)


def _plain_step_sums() -> Case:
    theta, grad = zeros(256), zeros(256)
    call = lambda: sum_steps("sgd", [theta], [grad], [None], (0.0, *_NUMBERS["sgd"][1:]))
    addresses = {"grad": (2, grad)}
    formula = formulas.PlainStepSums()
    return Case(call, formula, ("grad", "numbers"), ("partial",), addresses=addresses, edits=_SUMS)


def _axpy(num: int) -> Case:
    names = ("theta", "base", "delta")
    tensors = [zeros(num) for _ in names]
    theta, base, delta = tensors
    addresses = {name: (role, tensor) for role, (name, tensor) in enumerate(zip(names, tensors, strict=True))}
    call = lambda: axpy_([theta], [base], [delta], zeros(1))
    return Case(call, formulas.Axpy(False), ("base", "delta", "alpha"), ("theta",), addresses=addresses)


def _reduce(num: int, dtype: torch.dtype) -> Case:
    names = ("theta", "delta", "grad")
    tensors = [zeros(num, dtype=dtype) for _ in names]
    addresses = {name: (role, tensor) for role, (name, tensor) in enumerate(zip(names, tensors, strict=True))}
    call = lambda: reduce(*([tensor] for tensor in tensors))
    return Case(call, formulas.Sums(), names, ("partial",), addresses=addresses, edits=_SUMS)


def _sums_of_chunks() -> Case:
    # Three chunks each.
    tensors = [zeros(3 * 16384) for _ in range(2)]
    call = lambda: reduce(tensors, tensors, tensors)
    return Case(call, formulas.SumsOfChunks(2), ("partial",), ("sums",), index=1, edits=_SUMS)


def _embedding(dtype: torch.dtype) -> Case:
    def call() -> object:
        return embedding(zeros(3, dtype=INT64), zeros(7, 100, dtype=dtype), zeros(7, 100, dtype=dtype), zeros(2))

    return Case(call, formulas.Embedding(dtype), ("indices", "W", "D", "alpha"))


def _norm(dtype: torch.dtype, length: int, rows: int = 2, *, biased: bool = False) -> Case:
    def call() -> object:
        x, vectors = zeros(rows, rows, length, dtype=dtype), [zeros(length, dtype=dtype) for _ in range(4)]
        if biased:
            return layer_norm(x, *vectors, zeros(rows), eps=EPS)
        return rms_norm(x, *vectors[:2], zeros(rows), eps=EPS)

    biases = ("bias", "bias_direction") if biased else ()
    inputs = ("x", "weight", "weight_direction", *biases, "alpha")
    return Case(call, formulas.Norm(EPS, dtype), inputs, edits=(ONE_LANE_STORES,))


def _cross_entropy(width: int, here: bool) -> Case:
    def call() -> object:
        return online_cross_entropy_(zeros(2), zeros(2), zeros(2), zeros(2, width), zeros(2, dtype=INT64), 0)

    inputs, outputs = ("maximum", "total", "logits"), ("maximum", "total")
    formula: Callable[..., object] = formulas.OnlineCrossEntropy()
    if here:
        inputs, outputs = (*inputs, "labels"), (*outputs, "target")
        formula = formulas.OnlineCrossEntropyAtLabel()
    return Case(call, formula, inputs, outputs, edits=(ONE_LANE_STORES, label_is_here(here)))


def _linear(
    tokens: int,
    rows: int,
    columns: int,
    num_steps: int = 1,
    dtype: torch.dtype = BF16,
    written: torch.dtype = FP32,
    direction: torch.dtype | None = None,
) -> Case:
    def call() -> object:
        x = zeros(num_steps, tokens, columns, dtype=dtype)
        W, D = zeros(rows, columns, dtype=dtype), zeros(rows, columns, dtype=direction or dtype)
        return linear(x, W, D, zeros(num_steps), dtype=written)

    return Case(call, formulas.Linear(written), ("x", "W", "D", "alpha"))


def _many_tokens(zero: bool) -> Case:
    case = _decided(_linear(128, 128, 128), zero)
    return _safety(replace(case, edits=(*case.edits, ONE_LANE_STORES_ALPHA)), _LAYOUT)


def _sum_of_parts(written: torch.dtype) -> Case:
    case = _linear(16, 64, 512, written=written)
    return replace(case, formula=formulas.SumOfParts((1, 16, 64), written), inputs=("parts",), index=1)


def _stochastic() -> object:
    return form(zeros(1000, dtype=BF16), zeros(1000, dtype=BF16), zeros(8), seed=3)


def _safety(case: Case, why: str) -> Case:
    """The case without its formula."""
    return replace(case, formula=None, unasked=why)


_ADAMW = _step("adam", FP32, FP32, 1000, 1)
_RMSPROP = _step("rmsprop", FP32, FP32, 1000, 1)

CASES = {
    "form fp32, K=1, ragged": _form(FP32, FP32, 1000, 1),
    "form fp32, K=8": _form(FP32, FP32, 1008, 8),
    "form bf16 to fp32, K=8": _form(BF16, FP32, 1008, 8),
    "form bf16, K=1, ragged": _form(BF16, BF16, 1000, 1),
    "form bf16, K=8": _form(BF16, BF16, 1008, 8),
    "form fp16, K=8": _form(FP16, FP16, 1008, 8),
    "form bf16, K=8, stochastic": Case(_stochastic, unasked="random rounding is no real arithmetic"),
    "form_step SGD fp32, K=1, ragged": _step("sgd", FP32, FP32, 1000, 1),
    "form_step SGD bf16 to fp32, K=8": _step("sgd", BF16, FP32, 1008, 8),
    "form_step SGD bf16, K=8": _step("sgd", BF16, BF16, 1008, 8),
    "form_step Lion fp32, K=1, ragged": _step("lion", FP32, FP32, 1000, 1),
    "form_step Lion bf16, K=2": _step("lion", BF16, BF16, 1008, 2),
    "form_step AdamW fp32, K=1, ragged, α ≠ 0": _decided(_ADAMW, False),
    "form_step AdamW fp32, K=1, ragged, α = 0": _decided(_ADAMW, True),
    "form_step AdamW, Δθ": _step("adam", BF16, FP32, 1008, 0),
    "form_step RMSprop fp32, K=1, ragged, α ≠ 0": _decided(_RMSPROP, False),
    "form_step RMSprop fp32, K=1, ragged, α = 0": _decided(_RMSPROP, True),
    "form_step RMSprop, Δθ": _step("rmsprop", BF16, FP32, 1008, 0),
    "form_steps_ SGD": _whole_step("sgd", 1000),
    "form_steps_ Lion": _whole_step("lion", 1000),
    "form_steps_ AdamW, α ≠ 0": _decided(_whole_step("adam", 1000), False),
    "form_steps_ AdamW, α = 0": _decided(_whole_step("adam", 1000), True),
    "form_steps_ RMSprop, α ≠ 0": _decided(_whole_step("rmsprop", 1000), False),
    "form_steps_ RMSprop, α = 0": _decided(_whole_step("rmsprop", 1000), True),
    "axpy_, one tile, α ≠ 0": _decided(_axpy(200), False),
    "axpy_, one tile, α = 0": _decided(_axpy(200), True),
    "axpy_, tiles, α ≠ 0": _decided(_axpy(1000), False),
    "axpy_, tiles, α = 0": _decided(_axpy(1000), True),
    "reduce fp32, one tile": _reduce(200, FP32),
    "reduce fp32, tiles": _reduce(1000, FP32),
    "reduce bf16, tiles": _reduce(1000, BF16),
    "reduce, sums of chunks": _sums_of_chunks(),
    "sum_steps SGD, plain": _plain_step_sums(),
    "sum_steps SGD": _step_sums("sgd", 200),
    "sum_steps SGD bf16, tiles": _step_sums("sgd", 600, BF16),
    "sum_steps Lion": _step_sums("lion", 200),
    "sum_steps AdamW": _step_sums("adam", 200),
    "sum_steps RMSprop": _step_sums("rmsprop", 200),
    "embedding fp32": _embedding(FP32),
    "embedding bf16": _embedding(BF16),
    "rms_norm fp32": _norm(FP32, 128),
    "rms_norm fp32, ragged": _norm(FP32, 100),
    "rms_norm bf16, long row": _norm(BF16, 4096, rows=1),
    "layer_norm fp32": _safety(_norm(FP32, 128, biased=True), _NO_PROOF),
    "layer_norm bf16, ragged": _safety(_norm(BF16, 100, biased=True), _NO_PROOF),
    "online_cross_entropy_, ragged, label elsewhere": _cross_entropy(1000, False),
    "online_cross_entropy_, ragged, label here": _cross_entropy(1000, True),
    "online_cross_entropy_, label elsewhere": _cross_entropy(1024, False),
    "online_cross_entropy_, label here": _cross_entropy(1024, True),
    "linear, few tokens": _linear(16, 64, 64),
    "linear, few tokens, K=2": _linear(16, 64, 64, 2),
    "linear, few tokens, ragged": _linear(13, 50, 72, direction=FP32),
    "linear, few tokens, fp32": _safety(_linear(16, 64, 64, dtype=FP32), _LAYOUT),
    "linear, few tokens, K=8, bf16": _safety(_linear(16, 64, 64, 8, written=BF16), _LAYOUT),
    "linear, sum of parts fp32": _sum_of_parts(FP32),
    "linear, sum of parts bf16": _sum_of_parts(BF16),
    "linear, many tokens, α ≠ 0": _many_tokens(False),
    "linear, many tokens, α = 0": _many_tokens(True),
    "linear, many tokens, fp32, α ≠ 0": _decided(_linear(65, 16, 32, dtype=FP32), False),
    "linear, many tokens, fp32, α = 0": _decided(_linear(65, 16, 32, dtype=FP32), True),
}
