"""A GPU that computes nothing: Triton's compiler, specialisation and launch path over a stub of libcuda.

Launchers run on CPU tensors as on a GPU, up to the driver, which counts the launches; then plain torch fills in the
numbers. So that whatever runs on a GPU but its arithmetic runs here, and what it costs the host can be counted.
Once installed it stays for the length of the process, which is to do nothing else.
"""

import ctypes
import importlib
import inspect
import os
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharpkern import ops
from sharpkern.ops import registry

SOURCE = Path(__file__).with_name("stub_cuda.c")

_SUMS = ("step_sums", "sum_steps")
_FORMS = ("form", "form_step", "form_steps_", "axpy_")

# What makes the host wait for a device.
READS = ("item", "tolist", "__float__", "__bool__", "__int__", "__index__", "numpy", "cpu")


@dataclass
class Counts:
    """What a part of a program asked of the GPU.

    Attributes:
        launches: by kernel.
        loaded: kernels by name that were launched for the first time, each compiled or found in Triton's cache.
        refused: operations whose operands a launcher refused, which plain torch computed.
        reads: how often a tensor was read back.
    """

    launches: Counter[str] = field(default_factory=Counter)
    loaded: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    reads: int = 0

    def to_json(self) -> dict[str, Any]:
        """The counts as they are committed."""
        return {
            "launches": dict(sorted(self.launches.items())),
            "loaded": dict(sorted(self.loaded.items())),
            "refused": dict(sorted(self.refused.items())),
            "reads": self.reads,
        }


def missing() -> str | None:
    """Why there can be no such GPU here, or None."""
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError:
        return "triton is a Linux package"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton interprets its kernels in this process"
    if torch.cuda.is_available():
        return "there is a GPU, whose driver is loaded"
    if compiler() is None:
        return "needs a C compiler"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "needs the header files of Python"
    return None


def compiler() -> str | None:
    """The C compiler that Triton takes."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")


class FakeGPU:
    """The GPU, which counts what is asked of it.

    Attributes:
        fills: by plain torch what a kernel would have computed; off where operands are too large to be touched.
        leaves_out_forms: formed weights are left as they were, whatever they are, and sums over steps are those of the
            last time: filling them in would disturb what is timed.
        filling: seconds of this thread that plain torch took to fill in numbers, to be taken off what is timed.
    """

    def __init__(self) -> None:
        self.fills = True
        self.leaves_out_forms = False
        self.filling = 0.0
        self._stub = _load_stub()
        self._refused: Counter[str] = Counter()
        self._reads = 0
        self._is_filling = False
        _drive()
        self._let_launchers_through()
        self._count_reads()

    @contextmanager
    def counted(self) -> Iterator[Counts]:
        """Count what happens inside."""
        counts, loaded, launched = Counts(), self._loaded(), self._launched("launches")
        refused, reads = Counter(self._refused), self._reads
        yield counts
        counts.launches = self._launched("launches") - launched
        counts.loaded = self._loaded() - loaded
        counts.refused = self._refused - refused
        counts.reads = self._reads - reads

    @contextmanager
    def fills_in(self, result: Any) -> Iterator[Any]:
        """Compute what a kernel would have written into the result of its launch; neither counted nor timed."""
        started, self._is_filling = time.thread_time(), True
        try:
            yield result
        finally:
            self._is_filling = False
            self.filling += time.thread_time() - started

    def programs(self) -> Counter[str]:
        """How many programs of each kernel were launched so far."""
        return self._launched("programs")

    def _launched(self, what: str) -> Counter[str]:
        counts: Counter[str] = Counter()
        for i in range(self._stub.stub_num_functions()):
            counts[self._stub.stub_name(i).decode()] += getattr(self._stub, f"stub_{what}")(i)
        return counts

    def _loaded(self) -> Counter[str]:
        return Counter(self._stub.stub_name(i).decode() for i in range(self._stub.stub_num_functions()))

    def _let_launchers_through(self) -> None:
        from sharpkern.kernels import _launch

        _launch.INTERPRETED = True
        _launch.architecture = lambda device: "sm_90"  # type: ignore[assignment]
        registry._kernels_work = lambda device: True  # type: ignore[assignment]
        for module in (registry, ops):
            module.has_kernels = lambda device: True  # type: ignore[attr-defined]
        real = registry._launcher

        @cache
        def launcher(name: str, kernel: str) -> Any:
            return _Filled(self, name, real(name, kernel))

        registry._launcher = launcher

    def _count_reads(self) -> None:
        def counting(stock: Callable[..., Any]) -> Callable[..., Any]:
            def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                self._reads += not self._is_filling
                return stock(tensor, *args, **kwargs)

            return read

        for name in READS:
            setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))


class _Filled:
    """A launcher after whose launches plain torch computes the result."""

    def __init__(self, gpu: FakeGPU, name: str, launcher: Any) -> None:
        self._gpu, self._name, self._launcher = gpu, name, launcher
        self._last: dict[Any, Tensor] = {}

    def accept(self, *operands: Any, **options: Any) -> Callable[[], Any]:
        try:
            launch = self._launcher.accept(*operands, **options)
        except (TypeError, ValueError):
            self._gpu._refused[self._name] += 1
            raise

        def run(**changed: Any) -> Any:
            if not self._gpu.fills or (self._gpu.leaves_out_forms and self._name in _FORMS):
                return launch(**changed)
            if self._name in _SUMS:
                result = launch()
                # By what tells the operands of one program apart: the first gradient.
                key = (operands[2][0] if isinstance(operands[2], (list, tuple)) else operands[2]).data_ptr()
                if not self._gpu.leaves_out_forms or key not in self._last:
                    with self._gpu.fills_in(result):
                        self._last[key] = _by_torch(self._name, operands, options, changed, result).clone()
                return result.copy_(self._last[key])
            with self._gpu.fills_in(launch(**changed)) as result:
                return _by_torch(self._name, operands, options, changed, result)

        return run


def _by_torch(
    name: str, operands: tuple[Any, ...], options: dict[str, Any], changed: dict[str, Any], result: Any
) -> Any:
    """Write what an operation computes into the result of its launch, which may be one that was made again."""
    operation = getattr(ops, name)
    bound = inspect.signature(operation).bind(*operands, **options)
    bound.arguments |= changed
    bound.arguments["backend"] = "torch"
    out = bound.arguments.get("out")
    if out is None and isinstance(result, Tensor):
        return result.copy_(operation(*bound.args, **bound.kwargs))
    if out is not None and out.dim() < 1 + bound.arguments.get("W", bound.arguments.get("theta")).dim():
        # Of one step size launches take what is written itself.
        bound.arguments["out"] = out.unsqueeze(0)
    operation(*bound.args, **bound.kwargs)
    return result


def _load_stub() -> ctypes.CDLL:
    """Build the stub, and load it as the libcuda of this process."""
    import triton

    # Triton links against it as long as the process lives.
    folder = Path(tempfile.mkdtemp(prefix="libcuda"))
    library = folder / "libcuda.so.1"
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    found = compiler()
    assert found is not None
    subprocess.run(
        [found, "-shared", "-fPIC", "-O1", f"-I{headers}", "-Wl,-soname,libcuda.so.1", "-o", library, SOURCE],
        check=True,
    )
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    stub.stub_name.restype = ctypes.c_char_p
    stub.stub_launches.restype = stub.stub_programs.restype = ctypes.c_longlong
    return stub


def _drive() -> None:
    """Make it the device of Triton."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime.driver import driver

    class Driver(nvidia.CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_device_capability = lambda device=0: (9, 0)
            self.get_current_stream = lambda device: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

    driver.set_active(Driver())
