"""The result of a measurement, and the options of one."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from inspect import signature
from typing import Any, TypedDict

from torch import Tensor

from sharpkern._support.figures import draw_alone
from sharpkern._support.html import table_html
from sharpkern.distributed.declared import Ranks, check_ranks
from sharpkern.engines.session import ENGINES
from sharpkern.search.line_search import Status

METHODS = ("auto", "bisection")


@dataclass(frozen=True)
class Measurement:
    """One measured critical sharpness.

    Attributes:
        critical_lr: η_c, the smallest step size at which the loss rises; a learning rate. 0 for "ascent", the largest
            step tried for "unbounded", nan for "nonfinite" and "unresolved".
        sharpness: λ_c = 2/η_c, in 1/learning-rate; inf for "ascent", nan where η_c is.
        bracket: (lo, hi), the largest step known to lie before the rise and the smallest known rise; 0 and inf if
            unknown.
        base_loss: L(θ).
        slope: Δθᵀg, how fast the loss falls along −Δθ; None where no gradient belongs to the direction.
        directional_sharpness: ΔθᵀHΔθ/(Δθᵀg) estimated from the same probes, in 1/learning-rate, or None where they do
            not resolve it.
        error: relative uncertainty of critical_lr.
        exponent: how steeply the loss crosses its base value; 1 on a quadratic, small for an ill-conditioned crossing,
            None if unknown.
        probes: (η, loss) in the order evaluated by the search, the base loss not among them.
        forwards: losses evaluated, all of them: base loss, probes and checks. The batched engine has up to 8 of them
            from one call of the closure.
        status: "converged"; "ascent"; "unbounded"; "nonfinite", the base loss is nan or inf; "unresolved".
        engine: which evaluated the losses: "virtual" or "batched", which only read θ, or "inplace".
        retained: share of the displacement at η_c that survives rounding to the weights' dtype; 1.0 = all. Estimated
            from about 4096 elements of each tensor; nan where there is no η_c.
        seconds: wall time.
        sample_size: micro-batches that decided, where a sample was asked for: all of them where it had to grow to
            that; None where the whole batch was measured at once. Then forwards counts one for every whole batch, and
            probes and bracket are estimates for it.
        num_micro_batches: of the step, on all ranks; None likewise.
        beta: how much of the sample's deviation in slope was taken from its losses, 1 where all of it; None likewise.
        lr: learning rate that the direction came with, or None.

    ``print`` says it in a line, and a notebook shows a table.

    Source: Kalra et al. 2026, arXiv 2601.16979.
    """

    critical_lr: float
    sharpness: float
    bracket: tuple[float, float]
    base_loss: float
    slope: float | None
    directional_sharpness: float | None
    error: float
    exponent: float | None
    probes: tuple[tuple[float, float], ...]
    forwards: float
    status: Status
    engine: str
    retained: float
    seconds: float
    lr: float | None = None
    sample_size: int | None = None
    num_micro_batches: int | None = None
    beta: float | None = None

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        ax: Any = None,
        *,
        curve: tuple[Iterable[Any], Iterable[Any]] | None = None,
    ) -> Any:
        """Draw the probes, the bracket, η_c and the learning rate; needs the extra ``plot``.

        Args:
            path: of an image file, its format by the ending.
            ax: matplotlib axes to draw into, in place of a figure of its own.
            curve: (step sizes, losses) of a finer curve, as from `losses_along`.

        Returns:
            matplotlib.figure.Figure: for a notebook to show, where neither ``path`` nor ``ax`` is given.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: ``curve`` has not as many losses as step sizes.
        """
        from sharpkern.measures.plot import draw_measurement

        return draw_alone(lambda axes: draw_measurement(axes, self, curve), path, ax)

    def __str__(self) -> str:
        value = f"λ_c {self.sharpness:.4g}, η_c {self.critical_lr:.4g}"
        if self.status == "converged":
            value += f" ± {self.error:.1%}" + (f" = {self.critical_lr / self.lr:.3g} × lr" if self.lr else "")
        work = f"{self.forwards:.4g} forward passes, {self.seconds:.2g} s, {self.engine} engine"
        return f"{value} ({self.status}); loss {self.base_loss:.4g}; {work}"

    def __repr__(self) -> str:
        return f"Measurement(λ_c = {self.sharpness:.4g}, η_c = {self.critical_lr:.4g}, {self.status})"

    def _repr_html_(self) -> str:
        low, high = self.bracket
        rows = {
            "λ_c": f"{self.sharpness:.5g}",
            "η_c": f"{self.critical_lr:.5g} ({self.status}, ± {self.error:.1%})",
            "bracket": f"{low:.5g} – {high:.5g}",
            "learning rate": "" if self.lr is None else f"{self.lr:.5g}",
            "loss": f"{self.base_loss:.5g}",
            "forward passes": f"{self.forwards:.4g} in {self.seconds:.2g} s, {self.engine} engine",
        }
        return table_html(rows)


def check_values(status: Status, critical_lr: float, sharpness: float, base_loss: float) -> None:
    """Refuse numbers that no measurement of this status has."""
    rules = {"ascent": critical_lr == 0, "nonfinite": math.isnan(critical_lr), "unresolved": math.isnan(critical_lr)}
    if not rules.get(status, 0 < critical_lr < math.inf):
        raise ValueError(f"critical_lr is {critical_lr} where the status is {status!r}")
    expected = 2 / critical_lr if critical_lr else math.inf
    if not (sharpness == expected or (math.isnan(sharpness) and math.isnan(expected))):
        raise ValueError(f"sharpness is {sharpness} where critical_lr is {critical_lr}")
    if math.isfinite(base_loss) == (status == "nonfinite"):
        raise ValueError(f"the loss is {base_loss} where the status is {status!r}")


class MeasureOptions(TypedDict, total=False):
    """The keyword arguments that `sharpkern.critical_sharpness` shares with whatever measures for its caller."""

    initial_lr: float | None
    rtol: float | None
    method: str
    engine: str
    certify: bool
    noise: float | None
    max_forwards: int
    reduce: Callable[[Tensor], Tensor] | None
    ranks: Ranks | str | None
    sample: float | str | None


@dataclass(frozen=True)
class Options:
    """What can be chosen about a measurement; the meaning of each is told by `sharpkern.critical_sharpness`."""

    initial_lr: float | None = None
    rtol: float | None = None
    method: str = "auto"
    engine: str = "auto"
    certify: bool = False
    noise: float | None = None
    max_forwards: int = 40
    reduce: Callable[[Tensor], Tensor] | None = None
    ranks: Ranks | str | None = None
    sample: float | str | None = None

    @property
    def plan(self) -> "Options":
        """What has to be the same on all ranks."""
        return replace(self, reduce=None, ranks=None)

    @property
    def tolerance(self) -> float:
        """Of η_c, relative: as given, or the default."""
        return self.rtol or (0.01 if self.sample is None else 0.05)

    @classmethod
    def of(cls, caller: Callable[..., Any], options: Mapping[str, Any]) -> "Options":
        """Options given by name."""
        names = [field.name for field in fields(cls)]
        for name in options:
            if name not in names:
                own = [one.name for one in signature(caller).parameters.values() if one.default is not one.empty]
                close = get_close_matches(name, known := [*own, *names], 1) or known
                raise TypeError(
                    f"{caller.__name__} has no option {name!r}; did you mean {' or '.join(map(repr, close))}?"
                )
        return cls(**options)

    def __post_init__(self) -> None:
        if self.rtol is not None:
            _check_number("rtol", self.rtol, "a number in (0, 1)", lambda x: 0 < x < 1, "leave it out for 0.01")
        if self.initial_lr is not None:
            _check_number(
                "initial_lr", self.initial_lr, "positive and finite", _positive, "leave it out for the optimizer's"
            )
        if self.noise is not None:
            _check_number("noise", self.noise, "in [0, 1)", lambda x: 0 <= x < 1, "leave it out to have it estimated")
        if isinstance(self.max_forwards, bool) or not isinstance(self.max_forwards, int):
            raise TypeError(f"max_forwards must be an int, got {self.max_forwards!r}; leave it out for 40")
        if self.max_forwards < 2:
            raise ValueError(
                f"max_forwards must be at least 2 (the base loss and one probe), got {self.max_forwards}; "
                "leave it out for 40"
            )
        _check_choice("method", self.method, METHODS)
        _check_choice("engine", self.engine, ENGINES)
        if not isinstance(self.certify, bool):
            raise TypeError(f"certify must be True or False, got {self.certify!r}; leave it out for False")
        if self.reduce is not None and not callable(self.reduce):
            raise TypeError(
                f"reduce must be callable on the loss tensor, got {type(self.reduce).__name__}; pass a function that "
                "all-reduces the loss, or leave it out"
            )
        check_ranks(self.ranks)
        if self.reduce is not None and self.ranks is not None:
            raise ValueError("reduce cannot be combined with ranks=, by which losses are averaged; leave reduce out")
        if self.sample is not None:
            self._check_sample()

    def _check_sample(self) -> None:
        sample = self.sample
        is_number = isinstance(sample, (int, float)) and not isinstance(sample, bool)
        if not is_number and sample != "auto":
            raise TypeError(f"sample must be 'auto', a share or a number of micro-batches, got {sample!r}")
        if isinstance(sample, int) and sample < 4:
            raise ValueError(
                f"sample must be at least 4 micro-batches, got {sample}; pass 'auto' for as many as needed"
            )
        if isinstance(sample, float) and not 0 < sample <= 1:
            raise ValueError(f"sample must be a share in (0, 1], got {sample}; pass 'auto' for as many as needed")
        taken = {"reduce": self.reduce is not None, "certify": self.certify, "method": self.method != "auto"}
        if any(taken.values()):
            names = " and ".join(f"{name}=" for name, given in taken.items() if given)
            raise ValueError(
                f"sample cannot be combined with {names}, which speaks of the whole batch's own losses; leave one out"
            )


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _check_number(name: str, value: Any, rule: str, valid: Callable[[float], bool], remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, {rule}, got {value!r}; {remedy}")
    if not valid(value):
        raise ValueError(f"{name} must be {rule}, got {value}; {remedy}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}; leave it out for 'auto'"
        )
