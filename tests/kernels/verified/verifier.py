"""One launch under a static verifier of PTX: free of races and deadlocks in every schedule, equal to a formula.

The verifier is sentryward. It takes the PTX, the sizes of the launch, and the formula in torch. Sizes and scalars
are fixed; what lies in memory is symbolic.
"""

import inspect
import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.compiled import Launch

# A kernel takes seconds; one that takes this long is not proved.
TIMEOUT_SECONDS = 300
MEMORY_MIB = 6144


@dataclass(frozen=True)
class Verdict:
    """What is known about one launch.

    Attributes:
        proved: "equal" (to the formula, and safe), "safe" (free of races, deadlocks and misused barriers), "unproved".
        reason: why it is not equal where a formula was given, or not safe.
        seconds: that the verifier took.
    """

    proved: str
    reason: str
    seconds: float


@dataclass(frozen=True)
class Question:
    """What the verifier is asked about one launch.

    Attributes:
        ptx: the kernel.
        launch: what it was compiled for.
        threads: of a program.
        shared: bytes of shared memory of a program.
        formula: that the output equals, None where only safety is asked.
        inputs: arguments of the kernel that the formula takes, in its order.
        outputs: arguments that the kernel writes, in the order of what the formula returns.
        tensors: arguments that are not the launch's own: PTX parameters behind those of the kernel, in this order.
        contents: integers that lie in memory, by argument.
    """

    ptx: str
    launch: Launch
    threads: int
    shared: int
    formula: Callable[..., object] | None = None
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ("out",)
    tensors: Mapping[str, Tensor] | None = None
    contents: Mapping[str, Tensor] | None = None


def verdict(question: Question) -> Verdict:
    """Ask the verifier.

    Its own command would start a Python for every formula, and import torch there: this takes the same two steps here,
    which are private, and for which the version is pinned.
    """
    from sentryward._reference import extract
    from sentryward._reference_binding import derive_reference_input
    from sentryward.frontend.ptx_native import _run_ptx

    inputs = _inputs(question)
    asked: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        ptx, config, binding = (Path(place) / name for name in ("kernel.ptx", "input.json", "binding.json"))
        ptx.write_text(question.ptx)
        config.write_text(json.dumps(inputs))
        if question.formula is not None:
            told = _binding(question)
            binding.write_text(json.dumps(told))
            expression, _ = extract(_named(question.formula, question.inputs), derive_reference_input(inputs, told))
            asked = {"reference": json.dumps(expression).encode(), "reference_binding": binding}
        started = time.monotonic()
        found = _run_ptx(
            ptx,
            config,
            deadline=started + TIMEOUT_SECONDS,
            pipeline_timeout_seconds=TIMEOUT_SECONDS,
            wellsync_timeout_seconds=TIMEOUT_SECONDS,
            rss_limit_mib=MEMORY_MIB,
            **asked,
        )
        return _read(found, time.monotonic() - started)


def _named(formula: Callable[..., object], names: Sequence[str]) -> Callable[..., object]:
    """The formula with names for its arguments, by which the verifier finds them."""

    def reference(*tensors: Tensor) -> object:
        return formula(*tensors)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    reference.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    return reference


def _read(found: dict[str, Any], seconds: float) -> Verdict:
    checks = found["checks"]
    seconds = round(seconds, 1)
    if found["result"] == "verified":
        return Verdict("equal", "", seconds)
    safe = checks["synchronization"] == checks["memory"] == "passed"
    if found["result"] == "race_free" and safe:
        return Verdict("safe", "", seconds)
    first = (found.get("diagnostics") or [{"code": found["result"]}])[0]
    # What follows are numbers of one run.
    message = first.get("message", "").split(";")[0]
    return Verdict("safe" if safe else "unproved", ": ".join(filter(None, (first["code"], message))), seconds)


def _flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with those of a tuple one by one, as state_0 and so on."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, tuple):
            flat |= {f"{name}_{index}": one for index, one in enumerate(value)}
        else:
            flat[name] = value
    return flat


def _parameters(launch: Launch) -> dict[str, Any]:
    """The arguments that the compiled kernel still takes, in order."""
    flat = {}
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            continue
        for name, one in _flat({parameter.name: value}).items():
            constant = one is None or (not parameter.do_not_specialize and isinstance(one, int) and one == 1)
            if not constant:
                flat[name] = one
    return flat


def _inputs(question: Question) -> dict[str, Any]:
    """The launch, as the verifier wants it told."""
    (entry,) = re.findall(r"\.entry (\w+)\(", question.ptx)
    kinds = re.findall(rf"\.param \.(\w+)(?: \.ptr[^,\n]*)? {entry}_param_\d+[,\n]", question.ptx)
    parameters = _parameters(question.launch)
    tensors = question.tensors or {}
    # Triton's own, for scratch memory that these kernels do not use, come behind the kernel's.
    scratch = [f"scratch{index}" for index in range(len(kinds) - len(parameters) - len(tensors))]
    declarations, arguments = [], []
    named = [*parameters.items(), *((name, None) for name in scratch), *tensors.items()]
    for index, (kind, (name, value)) in enumerate(zip(kinds, named, strict=True)):
        if value is None or isinstance(value, Tensor):
            declarations.append({"parameter": index, "type": "pointer", "space": "global", "object": name})
        else:
            arguments.append({"parameter": index, "type": kind, "value": int(value)})
    places = {one["object"]: one["parameter"] for one in declarations}
    widths = {torch.int64: "s64", torch.int32: "s32"}
    contents = [
        {"parameter": places[name], "element_type": widths[value.dtype], "shapes": value.tolist()}
        for name, value in (question.contents or {}).items()
    ]
    return {
        "schema": "spverify.kernel-input/v1",
        "entry": entry,
        "launch": {
            "grid_dim": [*question.launch.grid, 1, 1, 1][:3],
            "block_dim": [question.threads, 1, 1],
            "dynamic_shared_bytes": question.shared,
        },
        "declarations": declarations,
        "arguments": arguments,
        **({"shape_arrays": contents} if contents else {}),
    }


def _binding(question: Question) -> dict[str, Any]:
    """Which memory of the kernel is which argument of the formula."""
    memory = {name: value for name, value in _parameters(question.launch).items() if isinstance(value, Tensor)}
    memory |= question.tensors or {}
    theirs, ours = {}, {}
    for name in dict.fromkeys([*question.inputs, *(question.contents or {})]):
        tensor = memory[name]
        common = {
            "source_offset": 0,
            "target_offset": 0,
            "element_bytes": tensor.element_size(),
            "shape": list(tensor.shape),
            "target_strides_bytes": _dense(tensor),
        }
        theirs[_object(name)] = common | {"source_strides_bytes": _dense(tensor)}
        ours[_object(name)] = common | {"source_strides_bytes": _strides(tensor)}
    outputs = [
        {
            "left_allocation": f"formula_{name}",
            "right_allocation": _object(name),
            "left_offset": 0,
            "right_offset": 0,
            "element_bytes": memory[name].element_size(),
            "shape": list(memory[name].shape),
            "left_strides_bytes": _dense(memory[name]),
            "right_strides_bytes": _strides(memory[name]),
        }
        for name in question.outputs
    ]
    several = {"kind": "dense_tensors", "tensors": outputs}
    return {
        "schema": "spverify.equivalence-mapping.v1",
        "left_inputs": {"allocations": {name: name for name in theirs}, "parameters": {}, "layouts": theirs},
        "right_inputs": {"allocations": {name: name for name in ours}, "parameters": {}, "layouts": ours},
        "outputs": several if len(outputs) > 1 else {"kind": "dense_tensor", **outputs[0]},
        "output_value_semantics": "ideal_real",
        "reference": {
            "arguments": [
                {
                    "name": name,
                    "allocation": _object(name),
                    "dtype": str(memory[name].dtype).removeprefix("torch."),
                    "shape": list(memory[name].shape),
                }
                for name in question.inputs
            ]
        },
    }


def _object(name: str) -> str:
    return f"6:global{len(name)}:{name}"


def _strides(tensor: Tensor) -> list[int]:
    return [stride * tensor.element_size() for stride in tensor.stride()]


def _dense(tensor: Tensor) -> list[int]:
    return _strides(torch.empty(tensor.shape, dtype=tensor.dtype))
