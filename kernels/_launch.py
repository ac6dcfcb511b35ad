"""How every launcher launches: fixed configurations, repeated launches, and the small tiles of all kernels.

Kernels run on CUDA and HIP devices. Under Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported) they
run on CPU tensors instead, which is how their numerics are tested without a GPU.
"""

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

# The oldest that the kernels are tested with.
_OLDEST_TRITON = (3, 6)
if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST_TRITON:
    raise ImportError(
        f"sharpkern.kernels needs Triton {'.'.join(map(str, _OLDEST_TRITON))} or newer, got {triton.__version__}; "
        "install a newer one, which may need a newer torch, or let plain torch do it by SHARPKERN_BACKEND=torch"
    )

_NOWHERE_ELSE = nullcontext()

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The most programs on axis 0 of a CUDA grid.
MAX_PROGRAMS = 2**31 - 1

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Launcher(Generic[_P, _R]):
    """A launcher in two halves, so that who has another implementation can choose before anything is written.

    Attributes:
        accept: raises the TypeError or ValueError that says what does not fit, or returns the launch, which refuses
            nothing any more. Some launches can be made again, with other step sizes ``alpha`` and outputs ``out`` of
            the same shape, dtype and device, which are then not looked at.
    """

    def __init__(self, accept: Callable[_P, Callable[..., _R]]) -> None:
        self.accept = accept
        functools.update_wrapper(self, accept)

    def __call__(self, *operands: _P.args, **options: _P.kwargs) -> _R:
        """Launch, or raise what does not fit."""
        return self.accept(*operands, **options)()

    def refusal(self, *operands: _P.args, **options: _P.kwargs) -> TypeError | ValueError | None:
        """Return the error that a call would raise before its launch; None where it would launch."""
        try:
            self.accept(*operands, **options)
        except (TypeError, ValueError) as error:
            return error
        return None


class Again:
    """Launches of one kernel on one grid, of which all but the first do without Triton's binder.

    That takes most of a launch's time. What it would look at must not change: the dtypes of all arguments, every number
    among them, and the alignment of every pointer but for what ``aligned`` says of those that do change.
    """

    def __init__(self, kernel: Any, programs: tuple[int], options: dict[str, int | bool]) -> None:
        self._kernel, self._programs, self._options = kernel, programs, options
        self._runs: dict[bool, Callable[..., object]] = {}

    def __call__(self, *arguments: Any, aligned: bool) -> None:
        """Launch with all arguments of the kernel in their order, its constants too."""
        run = self._runs.get(aligned)
        if run is not None:
            run(*arguments)
            return
        compiled = self._kernel[self._programs](*arguments, **self._options)
        # The interpreter compiles nothing.
        if compiled is not None:
            self._runs[aligned] = compiled[(*self._programs, 1, 1)]


def are_aligned(*tensors: Tensor | None) -> bool:
    """Return whether tensors begin at multiples of 16 bytes; None is skipped."""
    return not any(tensor.data_ptr() % 16 for tensor in tensors if tensor is not None)


def runs_on(device: torch.device) -> bool:
    """Return whether kernels run on a device."""
    return device.type == ("cpu" if INTERPRETED else "cuda")


class Threads(Protocol):
    """What every launch configuration has: the number of threads per program."""

    @property
    def threads(self) -> int:
        """Threads per program."""


class Config(NamedTuple):
    """One launch configuration: elements per program and threads per program."""

    block: int
    threads: int


_Config = TypeVar("_Config", bound=Threads)


@dataclass(frozen=True)
class Case(Generic[_Config]):
    """A row of a configuration table: what it applies to (None: anything) and the configuration."""

    architecture: str | None
    itemsize: int | None
    below: int | None
    config: _Config


# Of kernels that read elements and write elements: a thread writes 16 bytes at a time. Were it more, loads of narrower
# operands and stores would give a thread different elements, to be exchanged through shared memory.
STREAMING = (
    # Small tensors: more programs, so that all multiprocessors have one.
    Case(None, 4, 1 << 18, Config(block=256, threads=64)),
    Case(None, None, 1 << 18, Config(block=512, threads=64)),
    Case(None, 4, None, Config(block=1024, threads=256)),
    Case(None, None, None, Config(block=2048, threads=256)),
)


def choose(table: tuple[Case[_Config], ...], device: torch.device, itemsize: int, size: int) -> _Config:
    """Return the configuration of the first row that fits; the last row of a table fits everything.

    Nothing is timed or tried: it is fixed by the device, the element size of the operand that decides, and the number
    that the rows bound from above, usually that of elements.
    """
    arch = architecture(device)
    for case in table:
        if (
            (case.below is None or size < case.below)
            and (case.itemsize is None or case.itemsize == itemsize)
            and (case.architecture is None or case.architecture == arch)
        ):
            return case.config
    raise AssertionError("a table must end with a row that fits everything")


@functools.cache
def architecture(device: torch.device) -> str:
    """Return the name of a device's architecture as compilers spell it, like "sm_90" or "gfx942"."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def is_hopper(tensor: Tensor) -> bool:
    """Return whether a tensor is on a GPU of the Hopper architecture, whose matrix products run asynchronously."""
    return architecture(tensor.device) == "sm_90"


def lane(*dtypes: tl.dtype) -> int:
    """Return how many elements of the narrowest dtype are 16 bytes, the most that a thread reads or writes at once."""
    return max(128 // int(dtype.primitive_bitwidth) for dtype in dtypes)


def options(config: Threads, tensor: Tensor) -> dict[str, int | bool]:
    """Return the compiler options of a launch.

    Multiply and add are fused where a kernel says so and nowhere else: the default differs between Triton versions.
    """
    # CDNA (gfx9) runs 64 threads in a warp, everything else 32.
    warp = 64 if architecture(tensor.device).startswith("gfx9") else 32
    return {"num_warps": max(1, config.threads // warp), "enable_fp_fusion": False}


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which launches go to the device of ``tensor``, which need not be the current one."""
    if INTERPRETED or torch.cuda.current_device() == tensor.device.index:
        return _NOWHERE_ELSE
    return torch.cuda.device(tensor.device)


def grid(num_programs: int, config: Threads) -> tuple[int]:
    """Return the grid of a launch, all of it on axis 0: the other axes end at 65535."""
    # CUDA counts the programs of an axis in 31 bits, HIP its threads in 32.
    limit = (2**32 - 1) // config.threads if torch.version.hip else MAX_PROGRAMS
    if num_programs > limit:
        raise ValueError(f"a launch must have at most {limit} programs, got {num_programs}; call once per part")
    return (num_programs,)


def device_numbers(*numbers: float, like: Tensor) -> Tensor:
    """Return numbers as a float32 vector in device memory, where kernels read what is no size and no flag.

    As an argument a Python float would be fp64 in one call and a constant of the compiled kernel in the next. Every
    probe of a measurement has the same numbers: the 64 most recent vectors are kept, and copied once.
    """
    return _device_numbers(numbers, like.device, stream_of(like.device))


@functools.lru_cache(maxsize=64)
def _device_numbers(numbers: tuple[float, ...], device: torch.device, stream: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def stream_of(device: torch.device) -> int:
    """Return the current stream of a device, which is in the key of every cache of device memory.

    What a cache drops is given out again at once, and only the stream that it was allocated on keeps the new use behind
    the old one: so no other may use it. A CUDA graph holds addresses and no tensors: it must not be replayed after
    other calls have pushed its tables and numbers out.
    """
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@triton.jit
def load_tile(pointers, inside, MASKED: tl.constexpr):
    """Load elements as fp32; outside the tensor they are 0. Full tiles carry no mask, which keeps loads 16 bytes."""
    if MASKED:
        return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    else:  # noqa: RET505 - Triton compiles one of the two branches, and needs the else to see that
        return tl.load(pointers).to(tl.float32)


@triton.jit
def store_tile(pointers, values, inside, MASKED: tl.constexpr):
    """Round fp32 elements to the output's dtype, to nearest even, and store them."""
    if MASKED:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside)
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty))


@triton.jit
def perturbed(w, d, alpha):
    """Return w + αd with one rounding, and w itself, its sign of zero included, where α = 0."""
    return tl.where(alpha == 0.0, w, tl.fma(d, alpha, w))


@triton.jit
def store_steps(out, out_stride, w, update, alpha, inside, K: tl.constexpr, MASKED: tl.constexpr):
    """Store w + α_k·update for K step sizes, or the update itself where there are no step sizes."""
    if alpha is None:
        store_tile(out, update, inside, MASKED)
    else:
        for k in tl.static_range(K):
            store_tile(out, perturbed(w, update, tl.load(alpha + k)), inside, MASKED)
            out += out_stride
