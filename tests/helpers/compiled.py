"""Compile for GPUs that are not there: what a launcher would launch, and what the compiler made of it."""

import hashlib
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from sharpkern.kernels import _launch, linear
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_103": GPUTarget("cuda", 103, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# Its disassembler does not know sm_103, and on sm_120 it spills 4 registers of form with stochastic rounding.
if triton.__version__.startswith("3.6."):
    del TARGETS["sm_103"], TARGETS["sm_120"]

# Bytes of shared memory that one program may have.
SHARED_LIMIT = {
    "sm_80": 166912,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_103": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}

_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Launch:
    """One launch as a launcher asked for it."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]


@dataclass(frozen=True)
class Facts:
    """What the compiler made of one launch; bytes per program for shared memory, per thread for the stack.

    Attributes:
        source: mark of what was compiled: kernel and what it calls, types, constants, options, target and compiler.
        code: mark of the machine code that instructions were counted in, "" where counting takes no time.
    """

    kernel: str
    registers: int
    shared: int
    stack: int
    spills: int
    instructions: int
    wide_loads: int
    wide_stores: int
    matrix: dict[str, int]
    source: str = field(default="", compare=False)
    code: str = field(default="", compare=False)

    def to_json(self) -> dict[str, Any]:
        """A dictionary for the table."""
        return asdict(self)


@contextmanager
def recorded(architecture: str) -> Iterator[list[Launch]]:
    """Let launchers run on CPU tensors as if on this architecture; their launches are collected and not made."""
    launches: list[Launch] = []

    def run(kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        arguments |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        launches.append(Launch(kernel, arguments, options, grid))

    with (
        mock.patch.object(_launch, "INTERPRETED", True),
        mock.patch.object(_launch, "architecture", return_value=architecture),
        mock.patch.object(linear, "architecture", return_value=architecture),
        mock.patch.object(JITFunction, "run", run),
    ):
        yield launches


def launches_of(call: Callable[[], object], architecture: str) -> list[Launch]:
    """The launches that a call of a launcher on CPU tensors asks for."""
    with recorded(architecture) as launches:
        call()
    return launches


def compile_launch(launch: Launch, architecture: str) -> Any:
    """Compile a launch with the specialisation that Triton would give it: alignment, and constants of 1."""
    return triton.compile(_source(launch), target=TARGETS[architecture], options=launch.options)


def fingerprint_of(launch: Launch, architecture: str) -> str:
    """A mark of all that the compiler's result depends on, as Triton's own cache has it."""
    parts = _source(launch).hash(), sorted(launch.options.items()), TARGETS[architecture], triton.__version__
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _source(launch: Launch) -> ASTSource:
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def kind(value: Any, place: tuple[int, ...], parameter: Any) -> Any:
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and isinstance(value, int) and value == 1):
            constants[place] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(kind(one, (*place, i), parameter) for i, one in enumerate(value))
        if isinstance(value, torch.Tensor):
            name = _POINTERS[value.dtype]
            divisible = value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment
        else:
            name = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = specialised and value % 16 == 0
        if divisible:
            attributes[place] = [["tt.divisibility", 16]]
        return name

    signature = {
        parameter.name: kind(launch.arguments[parameter.name], (index,), parameter)
        for index, parameter in enumerate(launch.kernel.params)
    }
    return ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)


def facts_of(compiled: Any, architecture: str, known: Iterable[Facts] = ()) -> Facts:
    """Read registers, memory and instructions from compiled code.

    Args:
        compiled: the kernel.
        architecture: that it is for.
        known: facts that may be of this very code, whose instructions are then not counted again: NVIDIA's disassembler
            takes half a second for a kernel of any size.

    Returns:
        Facts: of the kernel.
    """
    if architecture.startswith("gfx"):
        return _amd_facts(compiled)
    code = hashlib.sha256(b"".join(_sections(compiled.asm["cubin"], ".text."))).hexdigest()
    counted = next((facts for facts in known if facts.code == code), None) or _counted(compiled, code)
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _cuobjdump(compiled, "-res-usage")))
    return replace(
        counted,
        registers=int(usage["REG"]),
        shared=compiled.metadata.shared,
        stack=int(usage["STACK"]) + int(usage["LOCAL"]),
    )


def sass_of(compiled: Any) -> str:
    """The machine code of a kernel for an NVIDIA GPU."""
    return _cuobjdump(compiled, "-sass")


def _cuobjdump(compiled: Any, *flags: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(_BINARIES / "cuobjdump"), *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _counted(compiled: Any, code: str) -> Facts:
    """The instructions of a kernel for an NVIDIA GPU."""
    text = sass_of(compiled)
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)", text, re.MULTILINE))
    return Facts(
        kernel=compiled.metadata.name,
        registers=0,
        shared=0,
        stack=0,
        spills=sum(count for name, count in opcodes.items() if name.split(".")[0] in {"LDL", "STL"}),
        instructions=opcodes.total(),
        wide_loads=sum(count for name, count in opcodes.items() if name.startswith("LDG") and ".128" in name),
        wide_stores=sum(count for name, count in opcodes.items() if name.startswith("STG") and ".128" in name),
        matrix=_matrix(opcodes, r"(HMMA|HGMMA|UTC\w*MMA)\b"),
        code=code,
    )


def _sections(elf: bytes, prefix: str) -> Iterator[bytes]:
    """Contents of the sections of a 64-bit ELF file whose names begin so."""
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    size, num, of_names = struct.unpack_from("<3H", elf, 0x3A)
    headers = [struct.unpack_from("<2I4Q", elf, start + size * i) for i in range(num)]
    names = headers[of_names][4]
    for name, _, _, _, offset, length in headers:
        end = elf.index(b"\0", names + name)
        if elf[names + name : end].decode().startswith(prefix):
            yield elf[offset : offset + length]


def _amd_facts(compiled: Any) -> Facts:
    text = compiled.asm["amdgcn"]
    entry = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    opcodes = Counter(re.findall(r"^\t([a-z]+_\w+)", text, re.MULTILINE))
    return Facts(
        kernel=compiled.metadata.name,
        registers=entry["vgpr_count"],
        shared=compiled.metadata.shared,
        stack=entry["private_segment_fixed_size"],
        # Scalar registers are spilled to lanes of vector registers; what goes to memory is on the stack.
        spills=entry["vgpr_spill_count"],
        instructions=opcodes.total(),
        wide_loads=sum(count for name, count in opcodes.items() if re.match(r"(global|buffer)_load_dwordx4", name)),
        wide_stores=sum(count for name, count in opcodes.items() if re.match(r"(global|buffer)_store_dwordx4", name)),
        matrix=_matrix(opcodes, r"(v_mfma)_"),
    )


def _matrix(opcodes: Counter[str], pattern: str) -> dict[str, int]:
    """Count of matrix instructions by opcode."""
    found: Counter[str] = Counter()
    for name, count in opcodes.items():
        if match := re.match(pattern, name):
            found[match[1]] += count
    return dict(found)
