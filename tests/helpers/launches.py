"""One launch or more of every kernel, as its launcher makes them, with what the machine code must show."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from sharpkern.kernels.axpy import axpy_
from sharpkern.kernels.cross_entropy import MAX_WIDTH, online_cross_entropy_
from sharpkern.kernels.embedding import embedding
from sharpkern.kernels.form import form
from sharpkern.kernels.linear import linear
from sharpkern.kernels.norm import MAX_LENGTH, layer_norm, rms_norm
from sharpkern.kernels.optimizer_steps import form_step
from sharpkern.kernels.reduce import reduce
from sharpkern.kernels.whole_steps import form_steps_, step_sums, sum_steps
from torch import Tensor

from tests.helpers.compiled import Facts, compile_launch, facts_of, fingerprint_of, launches_of

# Committed facts by Triton version, case and architecture.
TABLE = Path(__file__).parents[2] / "bench" / "results" / "static.json"

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Enough elements for the configuration of large tensors, and no multiple of anything: full tiles must still be wide.
_NUM = (1 << 22) + 3


@dataclass(frozen=True)
class Products:
    """What a kernel that multiplies matrices must show.

    Attributes:
        kernel: its name.
        registers: of a thread at most.
        matrix: by architecture the opcode, and how many make up one round of the loop; none of any other.
    """

    kernel: str
    registers: int
    matrix: dict[str, tuple[str, int]]


@dataclass(frozen=True)
class Case:
    """A call of a launcher, and what its kernels must show.

    Attributes:
        call: what to record.
        wide: the least number of 16-byte (loads, stores) by kernel; a kernel that is not named needs none.
        products: of the kernel that multiplies matrices, if there is one.
    """

    call: Callable[[], object]
    wide: dict[str, tuple[int, int]]
    products: Products | None = None


def _vector(dtype: torch.dtype, num: int = _NUM) -> Tensor:
    # Never touched, and so never mapped.
    return torch.empty(num, dtype=dtype)


def _form(dtype: torch.dtype, num_steps: int, seed: int | None = None) -> Callable[[], object]:
    return lambda: form(_vector(dtype), _vector(dtype), torch.zeros(num_steps), seed=seed)


# Weight decay, factor of the gradient, rate, and the rule's own: β₁ = 0.9, β₂ = 0.999.
ADAM = (0.0, 1.0, 1.0, 0.1, 0.999, 0.001, 10.0, 0.0316, 1e-8)
SGD = (0.1, 1.0, 1.0, 0.9, 1.0)
LION = (0.1, 1.0, 1.0, 0.9, 0.1)
RMSPROP = (0.1, 1.0, 1.0, 0.99, 0.01, 1e-8, 0.9)

# bf16 weights and gradients and fp32 state: numbers, state, and what else the launcher is given.
RULES = {
    "adam": (ADAM, (FP32, FP32, None), {"decoupled": True}),
    "sgd": (SGD, (FP32,), {"flag": True}),
    "lion": (LION, (FP32,), {"decoupled": True}),
    "rmsprop": (RMSPROP, (FP32, FP32, FP32), {"flag": True}),
}


def _operands(rule: str, weight_decay: float | None) -> tuple[Any, ...]:
    numbers, state, options = RULES[rule]
    tensors = tuple(None if dtype is None else _vector(dtype) for dtype in state)
    numbers = numbers if weight_decay is None else (weight_decay, *numbers[1:])
    return rule, _vector(BF16), _vector(BF16), tensors, numbers, options


def form_state(rule: str, num_steps: int, weight_decay: float | None = None, **more: Any) -> Callable[[], object]:
    """A call that forms weights from the state of an optimizer; 0 steps: the update itself."""

    def call() -> object:
        rule_, theta, grad, state, numbers, options = _operands(rule, weight_decay)
        return form_step(rule_, theta, grad, state, _alpha(num_steps), numbers, **options | more)

    return call


def sum_state(rule: str, weight_decay: float | None = None) -> Callable[[], object]:
    """A call that sums over a step of an optimizer."""

    def call() -> object:
        *operands, options = _operands(rule, weight_decay)
        return step_sums(*operands, **options)

    return call


def form_whole(rule: str, written: torch.dtype, **more: Any) -> Callable[[], object]:
    """A call that forms the weights of a model of one tensor."""

    def call() -> object:
        rule_, theta, grad, state, numbers, options = _operands(rule, 0.1)
        return form_steps_(rule_, [_vector(written)], [theta], [grad], state, torch.zeros(1), numbers, **options | more)

    return call


def _amsgrad() -> object:
    state = tuple(_vector(FP32) for _ in range(3))
    return form_step("adam", _vector(BF16), _vector(BF16), state, _alpha(8), (0.1, *ADAM[1:]))


def _alpha(num_steps: int) -> Tensor | None:
    return torch.zeros(num_steps) if num_steps else None


def _axpy(theta: torch.dtype, base: torch.dtype, delta: torch.dtype) -> Callable[[], object]:
    return lambda: axpy_([_vector(theta)], [_vector(base)], [_vector(delta)], torch.zeros(1))


def _reduce(*dtypes: torch.dtype) -> Callable[[], object]:
    return lambda: reduce(*([_vector(dtype)] for dtype in dtypes))


# Matrix instructions of one warp in one round of the loop: 8 sums of [16, 64], depth 32, and one of [128, 128 or 256],
# depth 64. Tiles of rows at any address are [64, 128], depth 32; float32 has matrix instructions on CDNA alone.
_FEW = dict.fromkeys(("sm_80", "sm_90", "sm_100", "sm_103", "sm_120"), ("HMMA", 16)) | {"gfx942": ("v_mfma", 16)}
_FEW_FP32 = {"gfx942": ("v_mfma", 32)}
_MANY = {"sm_80": ("HMMA", 64), "sm_90": ("HGMMA", 4), "sm_120": ("HMMA", 16), "gfx942": ("v_mfma", 8)}
_MANY |= dict.fromkeys(("sm_100", "sm_103"), ("UTCHMMA", 4))
_MANY_UNALIGNED = {"sm_80": ("HMMA", 16), "sm_90": ("HGMMA", 2), "sm_120": ("HMMA", 16), "gfx942": ("v_mfma", 8)}
_MANY_UNALIGNED |= dict.fromkeys(("sm_100", "sm_103"), ("UTCHMMA", 2))
_MANY_FP32 = {"gfx942": ("v_mfma", 16)}

_Matrix = dict[str, tuple[str, int]]


def _linear(num_tokens: int, dtypes: tuple[torch.dtype, ...], num_columns: int = 4096) -> Callable[[], object]:
    x, W, D = dtypes
    return lambda: linear(
        torch.empty(8, num_tokens, num_columns, dtype=x),
        torch.empty(4096, num_columns, dtype=W),
        torch.empty(4096, num_columns, dtype=D),
        torch.zeros(8),
    )


def _few(matrix: _Matrix, *dtypes: torch.dtype, num_tokens: int = 16, num_columns: int = 4096) -> Case:
    # Two programs of 256 threads fit the registers of a multiprocessor, if loads are asynchronous and products on
    # matrix instructions.
    registers = 128 if matrix is _FEW and num_columns == 4096 else 255
    products = Products("_few_tokens_kernel", registers, matrix)
    wide = {"_sum_parts_kernel": (1 if dtypes[0] == FP32 else 2, 1)}
    return Case(_linear(num_tokens, dtypes, num_columns), wide, products)


def _many(matrix: _Matrix, *dtypes: torch.dtype, num_tokens: int = 256, num_columns: int = 4096) -> Case:
    return Case(_linear(num_tokens, dtypes, num_columns), {}, Products("_many_tokens_kernel", 255, matrix))


def _rows(dtype: torch.dtype, length: int = 4096) -> Tensor:
    return torch.zeros(1, 4, length, dtype=dtype)


def _layer_norm(length: int) -> Callable[[], object]:
    vectors = [torch.ones(length, dtype=BF16) for _ in range(4)]
    return lambda: layer_norm(_rows(BF16, length), *vectors, torch.zeros(1), eps=1e-6)


def _online_cross_entropy(width: int) -> Callable[[], object]:
    statistics = [torch.zeros(4) for _ in range(3)]
    labels = torch.zeros(4, dtype=torch.int64)
    return lambda: online_cross_entropy_(*statistics, torch.zeros(4, width), labels, 0, softcap=30.0)


CASES = {
    "axpy bf16": Case(_axpy(BF16, BF16, BF16), {"_axpy_kernel": (2, 1)}),
    "axpy bf16 from fp32 masters": Case(_axpy(BF16, FP32, FP32), {"_axpy_kernel": (4, 1)}),
    "axpy fp32, bf16 direction": Case(_axpy(FP32, FP32, BF16), {"_axpy_kernel": (1, 1)}),
    "form bf16 K=1": Case(_form(BF16, 1), {"_form_kernel": (2, 1)}),
    "form bf16 K=8": Case(_form(BF16, 8), {"_form_kernel": (2, 8)}),
    "form fp32 K=8": Case(_form(FP32, 8), {"_form_kernel": (2, 8)}),
    "form bf16 K=8 stochastic": Case(_form(BF16, 8, seed=3), {"_form_kernel": (2, 8)}),
    "form from AdamW state K=1": Case(form_state("adam", 1, 0.1), {"_form_step_kernel": (6, 1)}),
    "form from AdamW state K=8": Case(form_state("adam", 8, 0.1), {"_form_step_kernel": (6, 8)}),
    "form fp32 from AdamW state K=8": Case(form_state("adam", 8, dtype=FP32), {"_form_step_kernel": (2, 8)}),
    "form from Adam state K=8, amsgrad": Case(_amsgrad, {"_form_step_kernel": (8, 8)}),
    "update from Adam state": Case(form_state("adam", 0), {"_form_step_kernel": (5, 1)}),
    "form from SGD state K=8": Case(form_state("sgd", 8), {"_form_step_kernel": (4, 8)}),
    "form from Lion state K=8": Case(form_state("lion", 8), {"_form_step_kernel": (4, 8)}),
    "form from RMSprop state K=8": Case(form_state("rmsprop", 8), {"_form_step_kernel": (8, 8)}),
    "forms of a model from AdamW state": Case(form_whole("adam", BF16), {"_form_steps_kernel": (6, 1)}),
    "forms in fp32 of a model from AdamW state": Case(form_whole("adam", FP32), {"_form_steps_kernel": (2, 1)}),
    "forms of a model from SGD state": Case(form_whole("sgd", BF16), {"_form_steps_kernel": (4, 1)}),
    "reduce bf16": Case(_reduce(BF16, BF16, BF16), {"_chunk_sums_kernel": (3, 0)}),
    "reduce bf16, fp32 direction": Case(_reduce(BF16, FP32, BF16), {"_chunk_sums_kernel": (4, 0)}),
    "reduce fp32": Case(_reduce(FP32, FP32, FP32), {"_chunk_sums_kernel": (3, 0)}),
    "sums of an AdamW step": Case(sum_state("adam", 0.1), {"_step_sums_kernel": (6, 0)}),
    "sums of an SGD step": Case(sum_state("sgd"), {"_step_sums_kernel": (4, 0)}),
    "sums of a Lion step": Case(sum_state("lion"), {"_step_sums_kernel": (4, 0)}),
    "sums of an RMSprop step": Case(sum_state("rmsprop"), {"_step_sums_kernel": (8, 0)}),
    "linear bf16 K=8 M=16": _few(_FEW, BF16, BF16, BF16),
    "linear bf16 K=8 M=64": _few(_FEW, BF16, BF16, BF16, num_tokens=64),
    "linear bf16 K=8 M=16, fp32 direction": _few(_FEW, BF16, BF16, FP32),
    "linear fp16 K=8 M=16, fp32 weight": _few(_FEW, FP16, FP32, FP32),
    "linear bf16 K=8 M=16, rows anywhere": _few(_FEW, BF16, BF16, BF16, num_columns=4097),
    "linear fp32 K=8 M=16": _few(_FEW_FP32, FP32, FP32, FP32),
    "linear bf16 K=8 M=128": _many(_MANY, BF16, BF16, BF16, num_tokens=128),
    "linear bf16 K=8 M=256": _many(_MANY, BF16, BF16, BF16),
    "linear bf16 K=8 M=256, fp32 direction": _many(_MANY, BF16, BF16, FP32),
    "linear fp16 K=8 M=256, fp32 weight": _many(_MANY, FP16, FP32, FP32),
    "linear bf16 K=8 M=256, rows anywhere": _many(_MANY_UNALIGNED, BF16, BF16, BF16, num_columns=4097),
    "linear fp32 K=8 M=256": _many(_MANY_FP32, FP32, FP32, FP32),
    "embedding bf16 K=8": Case(
        lambda: embedding(torch.zeros(4, dtype=torch.int64), *_rows(BF16), *_rows(BF16), torch.zeros(8)),
        {"_embedding_kernel": (2, 8)},
    ),
    "rms_norm bf16": Case(
        lambda: rms_norm(_rows(BF16), *[torch.ones(4096, dtype=BF16) for _ in range(2)], torch.zeros(1), eps=1e-6),
        {"_norm_kernel": (2, 1)},
    ),
    "layer_norm bf16": Case(_layer_norm(4096), {"_norm_kernel": (2, 1)}),
    "layer_norm bf16, longest row": Case(_layer_norm(MAX_LENGTH), {"_norm_kernel": (2, 1)}),
    "online_cross_entropy": Case(_online_cross_entropy(MAX_WIDTH), {"_online_cross_entropy_kernel": (4, 0)}),
    "online_cross_entropy, narrow": Case(_online_cross_entropy(1000), {"_online_cross_entropy_kernel": (0, 0)}),
}

_ONE = torch.zeros(1)
_INDEX = torch.zeros(1, dtype=torch.int64)

SMALLEST: dict[str, Callable[[], object]] = {
    "axpy": lambda: axpy_([_ONE.clone()], [_ONE], [_ONE], _ONE),
    "form": lambda: form(_ONE, _ONE, _ONE, out=torch.zeros(1, 1)),
    "form_step, adam": lambda: form_step("adam", _ONE, _ONE, (None, None, None), _ONE, ADAM, out=torch.zeros(1, 1)),
    "form_step, adam, update": lambda: form_step(
        "adam", _ONE, None, (_ONE, _ONE, None), None, (0.1, *ADAM[1:]), decoupled=True
    ),
    "form_step, adam, update before the first step": lambda: form_step(
        "adam", _ONE, _ONE, (None, None, None), None, ADAM
    ),
    "form_step, sgd": lambda: form_step("sgd", _ONE, _ONE, (None,), _ONE, (0.0, *SGD[1:]), out=torch.zeros(1, 1)),
    "form_step, sgd, update": lambda: form_step("sgd", _ONE, _ONE, (_ONE,), None, SGD),
    "form_step, sgd, update without decay": lambda: form_step("sgd", _ONE, _ONE, (None,), None, (0.0, *SGD[1:])),
    "form_step, lion": lambda: form_step("lion", _ONE, _ONE, (None,), _ONE, LION, decoupled=True),
    "form_step, rmsprop": lambda: form_step("rmsprop", _ONE, _ONE, (None,) * 3, _ONE, RMSPROP, flag=True),
    "form_steps_, adam": lambda: form_steps_(
        "adam", [_ONE.clone()], [_ONE], [_ONE], (_ONE, _ONE, None), _ONE, ADAM, decoupled=True
    ),
    "form_steps_, sgd, update": lambda: form_steps_("sgd", [_ONE.clone()], [_ONE], [_ONE], (None,), None, SGD),
    "reduce": lambda: reduce([_ONE], [_ONE], [_ONE]),
    "sum_steps, sgd": lambda: sum_steps("sgd", [_ONE], [_ONE], (_ONE,), SGD),
    "step_sums, adam": lambda: step_sums("adam", _ONE, _ONE, (_ONE, _ONE, None), (0.1, *ADAM[1:]), decoupled=True),
    "step_sums, adam, before the first step": lambda: step_sums("adam", _ONE, _ONE, (None, None, None), ADAM),
    "step_sums, sgd": lambda: step_sums("sgd", _ONE, _ONE, (_ONE,), SGD),
    "step_sums, sgd, without decay": lambda: step_sums("sgd", _ONE, _ONE, (None,), (0.0, *SGD[1:])),
    "step_sums, lion": lambda: step_sums("lion", _ONE, _ONE, (_ONE,), LION, decoupled=True),
    "step_sums, rmsprop": lambda: step_sums("rmsprop", _ONE, _ONE, (_ONE,) * 3, RMSPROP, flag=True),
    "linear": lambda: linear(_ONE[None, None], _ONE[None], _ONE[None], _ONE),
    "linear, many tokens": lambda: linear(torch.zeros(1, 65, 1), _ONE[None], _ONE[None], _ONE),
    "embedding": lambda: embedding(_INDEX, _ONE[None], _ONE[None], _ONE),
    "rms_norm": lambda: rms_norm(_ONE[None], _ONE, None, _ONE, eps=1e-6),
    "layer_norm": lambda: layer_norm(_ONE[None], _ONE, _ONE, _ONE, None, _ONE, eps=1e-6),
    "online_cross_entropy_": lambda: online_cross_entropy_(
        _ONE.clone(), _ONE.clone(), _ONE.clone(), _ONE[None], _INDEX, 1
    ),
}


# Compiled whatever has been committed: its machine code is looked at more closely than that of the others.
ALWAYS = "sm_90"


def case_facts(name: str, architecture: str, known: Iterable[Facts] = ()) -> list[Facts]:
    """What the compiler makes of every kernel that a case launches, each kernel once.

    Args:
        name: of the case.
        architecture: to compile for.
        known: facts that may be of the same sources, which are then compiled again for one architecture alone, as they
            would be from Triton's cache; and see `facts_of`.

    Returns:
        list: facts by kernel.
    """
    launches = {launch.kernel: launch for launch in launches_of(CASES[name].call, architecture)}
    found = []
    for launch in launches.values():
        mark = fingerprint_of(launch, architecture)
        same = next((facts for facts in known if facts.source == mark), None) if architecture != ALWAYS else None
        facts = same or facts_of(compile_launch(launch, architecture), architecture, known)
        found.append(replace(facts, source=mark))
    return found


def committed_facts(name: str, architecture: str) -> list[Facts] | None:
    """The same as it was written to the table with this version of Triton, None where there is no such version."""
    table = json.loads(TABLE.read_text()).get(triton.__version__)
    return None if table is None else [Facts(**row) for row in table[name][architecture]]
