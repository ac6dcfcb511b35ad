"""Time and memory of calls, the same way on a GPU and on a CPU, and what the machine reaches at most.

A GPU is timed by events around each call, with the host running ahead of it; a CPU by its clock. Variants take turns in
changing order, so that heat, clocks and other load meet all of them alike.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from sharpkern.tensors.free import free_bytes

if TYPE_CHECKING:
    from .cases import Bench

Json = dict[str, Any]
Result = TypeVar("Result")
# A variant is called with the number of the call and rotates its buffers by it: what another variant has just used must
# not be in the cache.
Variant = Callable[[int], object]

# Before a timed call the GPU sleeps while the host gets ahead, so that launches are not timed with it: at least and at
# most these seconds, otherwise half as long again as the host took for the last call.
_HEAD_START, _LONGEST_HEAD_START = 2e-4, 2e-2
_CYCLES_PER_SECOND = 2e9
# Rounds, and seconds on a GPU, whose clock has come down while the process started.
_WARM_UP, _WARM_UP_SECONDS = 2, 0.2


def each_call(function: Callable[[], object]) -> Variant:
    """Return a function without buffers to rotate as a variant."""
    return lambda _: function()


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile of the rounds; ``host`` is the launch, None on a CPU."""

    median: float
    p20: float
    p80: float
    rounds: int
    host: float | None = None

    @classmethod
    def of(cls, seconds: list[float], host: list[float] | None = None) -> "Timing":
        """Return the summary of some rounds, at least one."""
        quintiles = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds
        median = statistics.median(host) if host else None
        return cls(statistics.median(seconds), quintiles[0], quintiles[-1], len(seconds), median)

    def to_json(self) -> Json:
        """Return the fields, in seconds with 6 digits."""
        fields = asdict(self).items()
        return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in fields}


class Machine:
    """The device under test: a CUDA or HIP device, or the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"

    @property
    def runs_kernels(self) -> bool:
        """Whether Triton kernels run here: on a GPU, and on a CPU under Triton's interpreter."""
        return self.is_gpu or os.environ.get("TRITON_INTERPRET") == "1"

    @property
    def memory(self) -> int:
        """Free bytes of the GPU, with the allocator's unused reserve; 0 on a CPU."""
        return free_bytes(self.device)

    def synchronize(self) -> None:
        """Wait until the device is done; raises what went wrong there."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def generator(self, seed: int) -> torch.Generator:
        """Return a random stream of its own on the device."""
        return torch.Generator(self.device).manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
        """Return normal numbers that depend on the seed alone; never zeros, which some hardware is faster on."""
        drawn = torch.empty(shape, dtype=dtype, device=self.device)
        return drawn.normal_(0.0, scale, generator=self.generator(seed))

    def integers(self, end: int, *shape: int, seed: int = 7) -> Tensor:
        """Return random integers from 0 to ``end`` − 1."""
        return torch.randint(0, end, shape, generator=self.generator(seed), device=self.device)

    def rotations(self, nbytes: int) -> int:
        """Return how many buffers of ``nbytes`` have to take turns so that none is still in the cache."""
        cache = 1 << 22
        if self.is_gpu:
            cache = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 1 << 26)
        return max(1, -(-3 * cache // max(1, nbytes)))

    def copy(self, nbytes: int = 0) -> tuple[Variant, int]:
        """Return a copy of about ``nbytes``, larger than any cache, and how many bytes it reads and writes."""
        # A quarter gigabyte is beyond any cache, and enough for the full bandwidth.
        smallest, largest = (1 << 28, 1 << 31) if self.is_gpu else (1 << 24, 1 << 26)
        source = self.randn(min(max(nbytes // 2, smallest), largest) // 4)
        target = torch.empty_like(source)
        return lambda _: target.copy_(source), 2 * source.nbytes

    def time(self, variants: Mapping[str, Variant], seconds: float = 1.0) -> dict[str, Timing]:
        """Time variants in turns: 3 to 50 rounds, for about so many seconds after the warm-up."""
        host: dict[str, list[float]] = {name: [] for name in variants}
        warm, rounds = time.perf_counter() + (_WARM_UP_SECONDS if self.is_gpu else 0.0), 0
        while rounds < _WARM_UP or time.perf_counter() < warm:
            self._round(variants, rounds, host)
            rounds += 1
        started = time.perf_counter()
        self._round(variants, rounds, host)
        one = time.perf_counter() - started
        taken: dict[str, list[float]] = {name: [] for name in variants}
        for round_ in range(min(50, max(3, round(seconds / max(one, 1e-6))))):
            for name, value in self._round(variants, round_, host).items():
                taken[name].append(value)
        return {name: Timing.of(values, host[name][-len(values) :]) for name, values in taken.items()}

    def _round(self, variants: Mapping[str, Variant], round_: int, host: dict[str, list[float]]) -> dict[str, float]:
        """Call every variant once, beginning with another one each round, and return the seconds of each."""
        names = list(variants)
        first, first_call = round_ % len(names), round_ * len(names)
        order = names[first:] + names[:first]
        self.synchronize()
        if not self.is_gpu:
            return {name: _seconds(variants[name], first_call + i) for i, name in enumerate(order)}
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in order}
        for i, (name, (start, end)) in enumerate(events.items()):
            ahead = max(_HEAD_START, 1.5 * host[name][-1]) if host[name] else _HEAD_START
            torch.cuda._sleep(round(_CYCLES_PER_SECOND * min(ahead, _LONGEST_HEAD_START)))
            start.record()
            host[name].append(_seconds(variants[name], first_call + i))
            end.record()
        self.synchronize()
        return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}

    def milliseconds(self, function: Callable[[], Result]) -> tuple[float, Result]:
        """Return the milliseconds from the call until the device has done all of it, and what it gave."""
        self.synchronize()
        started = time.perf_counter()
        result = function()
        self.synchronize()
        return 1e3 * (time.perf_counter() - started), result

    def peak(self, function: Callable[[], object]) -> dict[str, int]:
        """Call a function and return the bytes that it took at most on top of what was there.

        They are of tensors, and as reserved by the allocator; none on a CPU, where no allocator counts them.
        """
        if not self.is_gpu:
            function()
            return {}
        self.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        allocated, reserved = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        function()
        self.synchronize()
        return {
            "allocated": torch.cuda.max_memory_allocated(self.device) - allocated,
            "reserved": torch.cuda.max_memory_reserved(self.device) - reserved,
        }


def machine_here() -> Machine:
    """Return the GPU, or the CPU with one thread: threads that share cores with other work wait for each other."""
    if torch.cuda.is_available():
        return Machine(torch.device("cuda:0"))
    torch.set_num_threads(1)
    return Machine(torch.device("cpu"))


def _seconds(variant: Variant, call: int) -> float:
    started = time.perf_counter()
    variant(call)
    return time.perf_counter() - started


def cases(bench: "Bench") -> dict[str, Callable[[], Iterator[Json]]]:
    """Return the two ceilings: a large copy, and a square product of random numbers: bf16 on a GPU, fp32 on a CPU."""
    machine, size = bench.machine, bench.pick(gpu=8192, cpu=1024, quick=512)

    def product() -> Variant:
        dtype = torch.bfloat16 if machine.is_gpu else torch.float32
        a, b = (machine.randn(size, size, dtype=dtype, seed=seed) for seed in range(2))
        return lambda _: a @ b

    return {
        "copy": lambda: _twice(machine, "copy", *machine.copy(machine.memory // 4 or 1 << 28), "bytes"),
        "product": lambda: _twice(machine, "product", product(), 2 * size**3, "flop"),
    }


def _twice(machine: Machine, name: str, variant: Variant, amount: int, unit: str) -> Iterator[Json]:
    """Time the same thing as two variants: what they differ by is noise."""
    variants = dict.fromkeys((name, f"{name} again"), variant)
    for one, timing in machine.time(variants, 1.0 if machine.is_gpu else 0.3).items():
        yield {"variant": one, unit: amount, f"{unit}_per_second": amount / timing.median, **timing.to_json()}
