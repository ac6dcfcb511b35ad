"""Random models, optimizers, losses, engines and contexts: every measurement against copies that really moved.

``python tests/fuzz.py --cases 2000`` prints each difference with the seed of its case; ``--case SEED`` runs one again.
The run of a seed is built several times: measured, to see that nothing changes; not measured, for the steps that should
follow; and in float64, for its losses at θ − ηΔθ, Δθ = (θ − θ′)/lr being what its optimizer's real step did.
"""

import argparse
import copy
import itertools
import math
import random
import sys
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, optim

sys.path.insert(0, str(Path(__file__).parents[1]))

import sharpkern
from sharpkern.errors import EngineUnsupportedError, NoUpdateError, RetainedWarning, SharpkernWarning
from sharpkern.tensors.storage import share_memory
from tests.helpers.random_runs import LossFn, RandomRun, context_of

Measured = sharpkern.Measurement | str
# Relative roundings of one loss.
# Optimizers whose update is a formula of their state; others are stepped in float32.
BY_FORMULA = (optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop)
ROUNDING = {torch.float64: 1e-9, torch.float32: 5e-6, torch.bfloat16: 4e-3}
# What may be, rarely: the error is a statistical one, a rise that no probe came near is not seen, and of rounding to 16
# bits neither the check of an engine nor that of a slope knows the size.
UNLIKELY = (
    "converged further off than its error",
    "converged at a later crossing",
    "warned of an engine in 16 bits, or refused it",
    "warned of a slope in 16 bits",
    "ascent in 16 bits, by rounding or past a fall",
    "unbounded past a rise",
)
# Between a step size and the next of a scan for rises before the critical one.
SCAN = 300 ** (1 / 16)


class Differs(Exception):
    """Something is not as it has to be; the first word says what."""


# -- what must not change ---------------------------------------------------------------------------------------------

GLOBAL_HOOKS = [value for name, value in vars(nn.modules.module).items() if name.startswith("_global_")]


def surroundings() -> dict[str, Any]:
    """What belongs to the process, by name."""
    return {
        "random": repr(random.getstate()),
        "numpy.random": repr(np.random.get_state()),
        "torch's random stream": torch.get_rng_state().numpy().tobytes(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "stance": repr(torch._dynamo.eval_frame._stance) if "torch._dynamo" in sys.modules else "",
        "global hooks": repr(GLOBAL_HOOKS),
        "warnings": repr(warnings.filters),
        "threads": torch.get_num_threads(),
    }


def contents(root: Any, *, identities: bool) -> dict[str, Any]:
    """All that can be reached from an object, by path: tensors to the last bit and, if wanted, which they are."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    todo = deque([("", root)])
    while todo:
        path, value = todo.popleft()
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
            found[path] = repr(value)
        elif id(value) in seen:
            found[path] = id(value) if identities else "seen"
        else:
            seen.add(id(value))
            members = list(_members(value))
            found[path] = type(value).__name__, len(members), id(value) if identities else 0, _own(value, identities)
            todo.extend((f"{path}.{name}", member) for name, member in members)
    return found


def _members(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Tensor):
        if value.is_leaf and not value.is_inference():
            yield "grad", value.grad
    elif isinstance(value, dict):
        # Keys may be tensors, or handles that are numbered through the process.
        yield from ((key if isinstance(key, str) else i, member) for i, (key, member) in enumerate(value.items()))
    elif isinstance(value, (list, tuple, deque, set)):
        yield from enumerate(value)
    elif isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        yield from ((name, cell.cell_contents) for name, cell in cells)
    elif isinstance(value, MethodType):
        yield "self", value.__self__
    elif isinstance(value, partial):
        yield from enumerate(value.args)
    elif isinstance(value, (nn.Module, optim.Optimizer, RandomRun)):
        # A mark that torch.compile makes once.
        yield from ((name, member) for name, member in vars(value).items() if name != "_is_torch_compile")


def _own(value: Any, identities: bool) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if not isinstance(value, Tensor):
        return None
    try:
        bits = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        where = value.data_ptr() if identities else 0
    except RuntimeError as unreadable:
        bits, where = repr(unreadable), 0
    return value.dtype, value.shape, value.stride(), value.requires_grad, bits, where


def assert_same(what: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    changed = [path for path in before | after if before.get(path) != after.get(path)]
    if changed:
        raise Differs(f"{what}: {', '.join(changed[:4])}{f' and {len(changed) - 4} more' * (len(changed) > 4)}")


# -- the run of a seed, three times -----------------------------------------------------------------------------------


def arrive(seed: int, *, measured: bool = False) -> tuple[RandomRun, Callable[[], Measured]]:
    """The run of a seed with the gradients of a step, and what measures it there, and did on the way if it is to be."""
    run = RandomRun(seed, compiled=measured)
    measure = measurer(run, run.closure())
    for _ in range(run.warm_up):
        run.backward()
        if measured and run.monitored:
            with context(run), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                measure()
        run.step()
    run.backward()
    return run, measure


def measurer(run: RandomRun, loss_fn: LossFn) -> Callable[[], Measured]:
    """What measures a run; it returns the reason where nothing is measured."""
    monitor: list[sharpkern.Monitor] = []

    def measure() -> Measured:
        try:
            if not run.monitored:
                direction = sharpkern.Direction.from_optimizer(run.optimizer, resident=run.resident)
                return sharpkern.critical_sharpness(run.model, loss_fn, direction, **run.options)
            if not monitor:
                monitor.append(sharpkern.Monitor(run.model, run.optimizer, **run.options))
            return monitor[0](loss_fn) or f"NoUpdateError: {monitor[0].skipped[-1][1]}"
        except (NoUpdateError, EngineUnsupportedError) as refusal:
            return f"{type(refusal).__name__}: {refusal}"

    return measure


def measure_otherwise(run: RandomRun) -> None:
    """Measure something else, which not every model allows."""
    direction, loss_fn = sharpkern.Direction.from_optimizer(run.optimizer, resident=run.resident), run.closure()
    if run.also == "relative":
        sharpkern.relative_critical_sharpness(run.model, {"one": loss_fn, "other": loss_fn}, direction)
    else:
        with suppress(NotImplementedError, RuntimeError, ValueError):
            sharpkern.directional_sharpness(run.model, loss_fn, direction, method=run.also)


class BreakError(Exception):
    """Raised by a closure in the middle of a measurement."""


def breaking(loss_fn: LossFn, call: int) -> LossFn:
    """The closure, which at one of its calls raises after it has done everything else."""
    calls = itertools.count(1)

    def breaks() -> Tensor:
        loss = loss_fn()
        if next(calls) == call:
            raise BreakError
        return loss

    return breaks


def context(run: RandomRun) -> AbstractContextManager[object]:
    """What a measurement is surrounded by."""
    modes = {"no_grad": torch.no_grad, "enable_grad": torch.enable_grad, "inference_mode": torch.inference_mode}
    return modes[run.context]() if run.context in modes else run.autocast()


def measured(seed: int) -> tuple[RandomRun, Measured, str]:
    """Measure the run of a seed, which may change nothing, neither now nor in the steps that follow.

    Returns:
        tuple: the run, what was found, and what was warned of.
    """

    def after_two_steps(run: RandomRun) -> dict[str, Any]:
        for _ in range(2):
            run.step()
            run.backward()
        return contents((run.model, run.optimizers, run.outside), identities=False) | surroundings()

    expected = after_two_steps(arrive(seed)[0])
    run, measure = arrive(seed, measured=True)
    state = contents(run, identities=True)
    with context(run), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        process = surroundings()
        result = measure()
        assert_same("process", process, surroundings())
        assert_same("state", state, contents(run, identities=True))
        if run.breaks_at:
            with suppress(BreakError):
                measurer(run, breaking(run.closure(), run.breaks_at))()
            assert_same("process after an error", process, surroundings())
            assert_same("state after an error", state, contents(run, identities=True))
        if run.also and not isinstance(result, str):
            measure_otherwise(run)
            assert_same(f"process after {run.also}", process, surroundings())
            assert_same(f"state after {run.also}", state, contents(run, identities=True))
    assert_same("later steps", expected, after_two_steps(run))
    told = [warning for warning in caught if issubclass(warning.category, SharpkernWarning)]
    return run, result, "; ".join(str(one.message) for one in told if one.category is not RetainedWarning)


class Moved:
    """Losses of copies of a run whose parameters were really moved.

    Args:
        seed: of the run.
        dtype: of copies and step: the run's, or a wider one.

    Attributes:
        delta: Δθ of each parameter.
        by_formula: whether its optimizer is one whose Δθ sharpkern has a formula for.
    """

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.run, _ = arrive(seed)
        self.streams = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.exact = dtype == torch.float64
        if dtype != self.run.dtype:
            self.run.cast(dtype)
        parameters = list(self.run.model.parameters())
        groups = [group for optimizer in self.run.optimizers for group in optimizer.param_groups]
        known = [one for one in self.run.optimizers if type(one) in BY_FORMULA]
        # A parameter moves with the one whose memory it shares, which is more than to lie in one buffer with it.
        held = [p for optimizer in known for group in optimizer.param_groups for p in group["params"]]
        self.by_formula = [any(share_memory(parameter, one) for one in held) for parameter in parameters]
        moving = [group["lr"] for group in groups if any(parameter.grad is not None for parameter in group["params"])]
        self.lr = next((float(lr) for lr in moving if lr > 0), 0.0)
        self.theta = [parameter.detach().double().clone() for parameter in parameters]
        self.gradients = [None if p.grad is None else self.run.sign * p.grad.double() for p in parameters]
        self.start = copy.deepcopy((self.run.model, self.run.outside))
        self.keeps_state = self.untried = True
        self.run.step()
        self.delta = [(theta - p.detach()) / (self.lr or 1.0) for theta, p in zip(self.theta, parameters, strict=True)]

    def loss(self, eta: float, digits: int = 0) -> float:
        """Return the loss at a step size; with other last digits of parameters, where a seed is given for them."""
        # What is kept is seen to change only away from θ, where the run has just been.
        first = self.untried and eta != 0
        if self.keeps_state:
            self.copied = copy.deepcopy(self.start)
        model, outside = self.copied
        with torch.no_grad(), nullcontext() if self.exact else self.run.autocast():
            parameters = zip(model.parameters(), self.theta, self.delta, self.by_formula, strict=True)
            for parameter, theta, delta, known in parameters:
                moved = theta - eta * delta if eta else theta
                if digits:
                    generator = torch.Generator().manual_seed(digits)
                    shift = torch.finfo(parameter.dtype).eps * torch.randn(theta.shape, generator=generator).double()
                    # Of a step that was taken the last digits are those of θ′.
                    moved = moved * (1 + shift) + (0 if known else eta * shift * theta / (self.lr or 1.0))
                parameter.copy_(moved)
            random.setstate(self.streams[0]), np.random.set_state(self.streams[1]), torch.set_rng_state(self.streams[2])
            before = contents(self.copied, identities=False) if first else {}
            loss = self.run.loss_of(model, outside).item()
        if first:
            # Copies take longer than losses.
            self.untried, self.keeps_state = False, before != contents(self.copied, identities=False)
        return loss


def check(seed: int) -> str:
    """Run a case.

    Returns:
        How its measurement ended.

    Raises:
        Differs: something is not as it has to be.
    """
    run, result, warned = measured(seed)
    exact, same = Moved(seed, torch.float64), Moved(seed, run.dtype)
    if run.dtype != torch.float64 and not all(exact.by_formula):
        # Other steps are taken in float32, and carry the roundings of θ − θ′.
        stepped = (same if run.dtype == torch.float32 else Moved(seed, torch.float32)).delta
        exact.delta = [deltas[not known] for *deltas, known in zip(exact.delta, stepped, exact.by_formula, strict=True)]
    same.delta = exact.delta
    if isinstance(result, str):
        if run.low and "an independent evaluation gives" in result:
            return UNLIKELY[2]
        moves = exact.lr > 0 and all(
            any(tensor is not None and tensor.any() for tensor in tensors) for tensors in (exact.delta, exact.gradients)
        )
        several = run.options["engine"] == "batched" and "cannot be had from one call of loss_fn" in result
        if moves if result.startswith("NoUpdate") else not (several or run.is_compiled):
            raise Differs(f"refusal: {result}")
        return result.partition(":")[0]
    check_slope(run, result, exact)
    # In 16 bits a gradient may not be that of the loss.
    tiny = 1e-4 * exact.lr
    falls = (exact.loss(0.0) - exact.loss(tiny)) / tiny
    # Nor is it where the pass that it was taken in has changed a state that later ones compute with.
    share = 0.3 if run.low else 0.05
    if warned and not (result.slope is not None and abs(falls - result.slope) > share * result.slope):
        if not run.low or not ("an independent evaluation gives" in warned or "its gradient says" in warned):
            raise Differs(f"warning: {warned}")
        check_crossing(run, result, exact, check_losses(run, result, exact, same), same)
        return UNLIKELY[3 if "its gradient says" in warned else 2]
    return check_crossing(run, result, exact, check_losses(run, result, exact, same), same)


def check_slope(run: RandomRun, result: sharpkern.Measurement, exact: Moved) -> None:
    """Compare Δθᵀg, where every parameter that moves has a gradient."""
    if result.slope is None:
        return
    there = [(delta, grad) for delta, grad in zip(exact.delta, exact.gradients, strict=True) if grad is not None]
    slope = sum((delta * grad).sum().item() for delta, grad in there)
    norms = [math.sqrt(sum(part.square().sum().item() for part in parts)) for parts in zip(*there, strict=True)]
    share = 2e-2 if run.low else 1e-4
    if not math.isclose(slope, result.slope, rel_tol=1e-3, abs_tol=share * math.prod(norms)):
        raise Differs(f"slope: {result.slope:.6g}, by the real step {slope:.6g}")


def check_losses(run: RandomRun, result: sharpkern.Measurement, exact: Moved, same: Moved) -> float:
    """Compare every loss with that of a copy; return how exactly losses are known up to the critical step size."""
    base, reach = exact.loss(0.0), 2 * result.critical_lr if result.critical_lr > 0 else math.inf
    rounding = known = ROUNDING[torch.bfloat16 if run.low else run.dtype]
    for eta, loss in sorted([(0.0, result.base_loss), *result.probes]):
        # In float64 the copies are those that are compared with: a few units in the last place show as much.
        nudge = 1 + 2**-50 if run.dtype == torch.float64 and not run.low else 1
        true, copied = exact.loss(eta), same.loss(eta * nudge)
        size = max(abs(true), abs(base))
        if not math.isfinite(true) or not math.isfinite(copied) or size > 1e30:
            continue
        # Far out a loss amplifies roundings, as much as copies in the same dtype show; one alone may be lucky.
        budget = max(known, rounding + 4 * abs(copied - true) / size)
        # Weights of 16 bits change in steps.
        step = 4e-3 if run.low else 1e-5
        others = [(eta * (1 + i * step), 0) for i in (-3, -2, -1, 1, 2, 3)]
        others += [] if run.low else [(eta, digits) for digits in (1, 2, 3)]
        while abs(loss - true) > budget * size and others:
            at, digits = others.pop(0)
            budget = max(budget, rounding + 4 * abs(same.loss(at * nudge, digits) - exact.loss(at)) / size)
        if not abs(loss - true) <= budget * size:
            raise Differs(f"loss: {loss:.9g} at η = {eta:.6g}, of copies {true:.9g} and in this dtype {copied:.9g}")
        known = budget if eta <= reach else known
    return known * abs(base)


def check_crossing(run: RandomRun, result: sharpkern.Measurement, exact: Moved, tolerance: float, same: Moved) -> str:
    """Compare status, bracket and η_c with a scan along copies; return how the measurement ended."""
    base, same_base = exact.loss(0.0), same.loss(0.0)

    def sign(eta: float) -> int:
        """Whether the loss has risen, 1, or fallen, −1, beyond the tolerance; what is not a number has risen."""
        rise, rounded = exact.loss(eta) - base, same.loss(eta) - same_base
        if not math.isfinite(rise) or not math.isfinite(rounded):
            return 1
        # Far out rounding may make another function of the loss.
        return 0 if abs(rise) <= tolerance or rise * rounded <= 0 else int(math.copysign(1, rise))

    def signs(low: float, high: float) -> list[tuple[int, float]]:
        num = 2 + round(math.log(high / low) / math.log(SCAN))
        return [(sign(eta), eta) for eta in np.geomspace(low, high, max(num, 6)).tolist()]

    status, eta, (lo, hi) = result.status, result.critical_lr, result.bracket
    told = f"{status} at {eta:.6g} ± {result.error:.2g} in ({lo:.6g}, {hi:.6g})"
    falls, rises = ([at for at, loss in result.probes if s * (loss - base) > 300 * tolerance] for s in (-1, 1))
    if status not in ("nonfinite", "ascent"):
        if lo > 0 and sign(lo) > 0:
            raise Differs(f"bracket: {told}, but the loss has risen at its lower end")
        if hi < math.inf and sign(hi) < 0:
            raise Differs(f"bracket: {told}, but the loss has fallen at its upper end")
    if status == "converged":
        width = 1 + 3 * result.error + 0.02
        before, near = signs(eta / 300, eta / width), signs(eta / width, eta * width)
        risen = [at for s, at in before if s > 0]
        # The tolerance may be more than all of the fall, where in this dtype losses are those of float64.
        if all(s == 0 for s, _ in before) and not any(exact.loss(at) < base - 1e-9 * abs(base) for _, at in before):
            raise Differs(f"crossing: {told}, but the loss has not fallen before")
        if all(s < 0 for s, _ in near) or (risen and all(s > 0 for s, _ in near)):
            if lo == 0 or hi == math.inf:
                raise Differs(f"crossing: {told}, but the loss has {'risen' if risen else 'fallen'} all around it")
            return UNLIKELY[0]
        return UNLIKELY[1] if risen else status
    if status == "ascent":
        first = min((at for at, loss in result.probes if not loss <= base + tolerance), default=None)
        if first is None and run.low and max(loss for _, loss in result.probes) > result.base_loss:
            return UNLIKELY[4]
        if first is None:
            raise Differs("ascent: no probe has seen a rise")
        if fallen := [at for s, at in signs(first / 1e4, first) if s < 0]:
            if run.low:
                # Two rises far out speak against the slope; looking below them makes searches on noise endless.
                return UNLIKELY[4]
            raise Differs(f"ascent: {told}, but the loss has fallen at {fallen[0]:.6g}")
    if status == "unbounded" and (risen := [at for s, at in signs(eta / 1e4, eta) if s > 0]):
        # In 16 bits the loss far out is another one for each way of rounding.
        if run.low or not any(risen[0] / SCAN < at < risen[-1] * SCAN for at, _ in result.probes):
            return UNLIKELY[5]
        raise Differs(f"unbounded: {told}, but the loss has risen at {risen[0]:.6g}")
    if status == "unresolved" and falls and rises and result.forwards < run.options.get("max_forwards", 40) - 2:
        raise Differs(f"unresolved: after {result.forwards} forwards, which saw a fall and a rise")
    if status == "nonfinite" and math.isfinite(base):
        raise Differs(f"nonfinite: the base loss is {base}")
    return status


@contextmanager
def environment(seed: int) -> Iterator[None]:
    """What a case sets for the whole process, and puts back."""
    before = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    streams = random.getstate(), np.random.get_state()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.set_default_dtype(torch.float64 if context_of(seed) == "float64" else torch.float32)
            torch.use_deterministic_algorithms(context_of(seed) == "deterministic")
            yield
    finally:
        torch.set_default_dtype(before[0]), torch.use_deterministic_algorithms(before[1])
        random.setstate(streams[0]), np.random.set_state(streams[1])


def outcome(seed: int, *, trace: bool = False) -> tuple[str, str]:
    """Run a case.

    Args:
        seed: of the case.
        trace: whether to print where an error was raised.

    Returns:
        tuple: how it ended, and what is wrong about that, empty where nothing is.
    """
    with environment(seed):
        try:
            about = str(RandomRun(seed))
            arrive(seed)
        except Exception as error:
            return f"cannot be trained: {type(error).__name__}: {error}"[:100], ""
        try:
            return check(seed), ""
        except Exception as error:
            if trace:
                traceback.print_exc()
            said = str(error) if isinstance(error, Differs) else f"error: {type(error).__name__}: {error}"
            return f"DIFFERS, {said.partition(':')[0]}", f"{said} | {about}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200, help="how many")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()) % 10**6 * 10**4, help="of the first; else the clock's"
    )
    parser.add_argument("--case", type=int, help="run this one alone, and show where an error was raised")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.case is not None:
        how, wrong = outcome(arguments.case, trace=True)
        sys.exit(f"{how}: {wrong}" if wrong else print(how))
    print(f"{arguments.cases} cases, --seed {arguments.seed}", flush=True)
    ended: Counter[str] = Counter()
    started = time.perf_counter()
    for i in range(arguments.cases):
        how, wrong = outcome(arguments.seed + i)
        ended[how] += 1
        if wrong:
            print(f"--case {arguments.seed + i}: {wrong}", flush=True)
        if (i + 1) % 100 == 0:
            print(f"{i + 1} cases, {time.perf_counter() - started:.0f} s", flush=True)
    print(*(f"{count:6d} {how}" for how, count in sorted(ended.items())), sep="\n")
    different = sum(count for how, count in ended.items() if how.startswith("DIFFERS"))
    converged = sum(count for how, count in ended.items() if how.startswith("converged"))
    often = [how for how in UNLIKELY if ended[how] > 0.03 * converged + 3]
    print(f"{different} differences in {arguments.cases} cases, --seed {arguments.seed}", *often, sep="; too often: ")
    sys.exit(different > 0 or bool(often))


if __name__ == "__main__":
    main()
