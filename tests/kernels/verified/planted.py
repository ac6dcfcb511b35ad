"""Faults, each of which the verifier must find in a kernel that it passes without; and some that it cannot see."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.kernels.verified import formulas
from tests.kernels.verified.cases import CASES, Case, question
from tests.kernels.verified.edits import Edit, replaced
from tests.kernels.verified.verifier import Question

# Faults are told by no letter.
_FAULT = "fault"


@dataclass(frozen=True)
class Fault:
    """A fault in one case.

    Attributes:
        case: of CASES, which is proved equal to its formula.
        left: what the verifier may still prove: "unproved" or "safe" where it finds the fault, "equal" where it cannot.
        ptx: changes the kernel.
        formula: the wrong one, or None.
    """

    case: str
    left: str
    ptx: Callable[[str], str] | None = None
    formula: Callable[..., object] | None = None

    def question(self, architecture: str) -> Question:
        """What is asked about the case with the fault."""
        case: Case = CASES[self.case]
        if self.formula is not None:
            case = replace(case, formula=self.formula)
        asked = question(case, architecture, edited=bool(case.all_edits))
        return asked if self.ptx is None else replace(asked, ptx=Edit(_FAULT, self.ptx).apply(asked.ptx))


def _without(pattern: str, count: int = 0) -> Callable[[str], str]:
    return lambda ptx: replaced(pattern, "", ptx, count)


def _late(ptx: str) -> str:
    """Wait until one group more is under way."""
    return replaced(r"(cp\.async\.wait_group \t)6;", r"\g<1>7;", ptx, count=1)


def _one_commit_less(ptx: str) -> str:
    """Of the groups of copies, one is joined to the next just before the first wait counts them."""
    before, wait, after = ptx.partition("cp.async.wait_group")
    head, commit, tail = before.rpartition("\tcp.async.commit_group;\n")
    assert commit, "nothing is committed in the PTX"
    return head + tail + wait + after


@dataclass(frozen=True)
class _WrongSign:
    def __call__(self, W: Tensor, D: Tensor, alpha: Tensor) -> Tensor:
        return formulas.moved(W[None], -D[None], alpha[:, None])


@dataclass(frozen=True)
class _NoNesterov:
    def __call__(self, theta: Tensor, grad: Tensor, buffer: Tensor, alpha: Tensor, numbers: Tensor) -> Tensor:
        decay, factor, rate, momentum, undamped = (numbers[index] for index in range(5))
        g = theta * decay + grad * factor
        return formulas.moved(theta[None], (g * undamped + buffer * momentum)[None] * rate, alpha[:, None])


@dataclass(frozen=True)
class _MeanOfOneMore:
    def __call__(self, x: Tensor, weight: Tensor, weight_direction: Tensor, alpha: Tensor) -> Tensor:
        scale = 1.0 / torch.sqrt((x * x).sum(-1, keepdim=True) / (x.shape[1] + 1) + 2.0**-20)
        y = (x * scale).view(alpha.shape[0], -1, x.shape[1])
        return y * formulas.moved(weight[None, None], weight_direction[None, None], alpha[:, None, None])


@dataclass(frozen=True)
class _OnePartTwice:
    def __call__(self, parts: Tensor) -> Tensor:
        return (parts.sum(0) + parts[0]).view(1, 16, 64)


_FEW = "linear, few tokens"

FAULTS = {
    "rms_norm: the barrier removed": Fault("rms_norm fp32", "unproved", _without(r"\tbar\.sync \t0;\n")),
    "linear: the first barrier removed": Fault(_FEW, "unproved", _without(r"\tbar\.sync \t0;\n", 1)),
    "linear: all barriers removed": Fault(_FEW, "unproved", _without(r"\tbar\.sync \t0;\n")),
    "linear: wait_group late by one": Fault(_FEW, "unproved", _late),
    "linear: a commit removed": Fault(_FEW, "unproved", _one_commit_less),
    "form: stores 16 bytes off": Fault(
        "form fp32, K=8",
        "unproved",
        lambda ptx: replaced(r"(st\.global\.v4\.b32 \[ %rd\d+ \+ )0( \])", r"\g<1>16\2", ptx),
    ),
    "form: the formula's sign": Fault("form fp32, K=1, ragged", "safe", formula=_WrongSign()),
    "form_step: the formula without Nesterov": Fault("form_step SGD fp32, K=1, ragged", "safe", formula=_NoNesterov()),
    "rms_norm: the formula's mean": Fault("rms_norm fp32", "safe", formula=_MeanOfOneMore()),
    "linear: one part twice in the formula": Fault("linear, sum of parts fp32", "safe", formula=_OnePartTwice()),
    # Bounds of reads are not checked.
    "form: reads without their masks (not seen)": Fault(
        "form fp32, K=1, ragged", "equal", lambda ptx: replaced(r"@%p\d+ (ld\.global)", r"\1", ptx)
    ),
}
