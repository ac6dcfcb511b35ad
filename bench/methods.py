"""The methods that are compared: each measures the same training step its own way.

Every one starts from model and optimizer alone, so that making Δθ counts for all that need it. Searches start from
their own last result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import published
import torch
from gpts import Training
from peers import CurvLinOps, EigenThings, PyHessian
from timing import Counted
from torch.nn.attention import SDPBackend, sdpa_kernel

import sharpkern

_LANCZOS_STEPS = 10
# What larger models are measured by, too.
MAIN = (
    "forward + backward",
    "sharpkern, auto, virtual",
    "sharpkern, auto, in place",
    "published method",
    "sharpkern, loss differences",
    "double backward",
)


@dataclass(frozen=True)
class Found:
    """What a method says of a step.

    Attributes:
        value: the sharpness, in 1/learning-rate; None where there is none, or nothing was asked.
        forwards: losses evaluated.
        products: Hessian-vector products, if any.
        converged: whether the value is as exact as was asked for.
    """

    value: float | None
    forwards: int
    products: int = 0
    converged: bool = True


@dataclass(frozen=True)
class Method:
    """One way to measure.

    Attributes:
        name: for tables.
        quantity: "λ_c", "λ_dir", "λ_max", or "training".
        measure: a step, of which it is given the batch's loss.
    """

    name: str
    quantity: str
    measure: Callable[[Counted], Found]


def cheap(training: Training) -> list[Method]:
    """Return the methods that take up to some ten forward passes.

    Args:
        training: whose steps they measure.
    """
    searches = [
        ("auto, virtual", {"engine": "virtual"}),
        ("auto, in place", {"engine": "inplace"}),
        ("auto, batched", {"engine": "batched"}),
        ("bisection, virtual", {"engine": "virtual", "method": "bisection"}),
        ("bisection, in place", {"engine": "inplace", "method": "bisection"}),
    ]
    return [
        Method("forward + backward", "training", lambda loss_fn: _backward(training, loss_fn)),
        *(Method(f"sharpkern, {name}", "λ_c", Search(training, **options)) for name, options in searches),
        Method("published method", "λ_c", PublishedSearch(training)),
        Method("sharpkern, loss differences", "λ_dir", lambda loss_fn: _along(training, loss_fn, "forward")),
        Method("sharpkern, exact product", "λ_dir", lambda loss_fn: _along(training, loss_fn, "hvp")),
        Method("double backward", "λ_dir", lambda loss_fn: _double_backward(training, loss_fn)),
    ]


def tops(training: Training, loss_fn: Counted, tol: float) -> list[tuple[str, Callable[[], Callable[[], Found]]]]:
    """Return what finds the largest eigenvalue, by name; a call prepares it, and fails if it is not installed.

    Args:
        training: at the step.
        loss_fn: of its batch.
        tol: relative residual, or relative change from one product to the next with PyHessian.
    """
    given = training.model, loss_fn.batch

    def ours() -> Found:
        found = sharpkern.hessian_sharpness(training.model, loss_fn, tol=tol)
        return Found(found.value, 1, found.iterations, found.converged)

    def by(make: Any, method: str, **options: int) -> Callable[[], Callable[[], Found]]:
        def prepare() -> Callable[[], Found]:
            run = getattr(make(*given), method)

            def measure() -> Found:
                top = run(tol, **options)
                forwards = 1 if make is PyHessian else top.products
                return Found(top.value, forwards, top.products, top.converged)

            return measure

        return prepare

    return [
        ("sharpkern", lambda: ours),
        ("curvlinops and scipy", by(CurvLinOps, "eigsh")),
        # Its number of steps is chosen beforehand; these are enough here, as its own verdict says.
        ("hessian-eigenthings, Lanczos", by(EigenThings, "lanczos", steps=_LANCZOS_STEPS)),
        ("hessian-eigenthings, power iteration", by(EigenThings, "power")),
        ("PyHessian, power iteration", by(PyHessian, "power")),
    ]


class Search:
    """Critical sharpness by a Monitor of its own.

    Args:
        training: whose steps it measures.
        **options: of the Monitor.
    """

    def __init__(self, training: Training, **options: Any) -> None:
        self._monitor = sharpkern.Monitor(training.model, training.optimizer, **options)
        # What is checked once is checked once for each closure's code: a class of its own makes it this search's own.
        self._own = type("Own", (Counted,), {})

    def __call__(self, loss_fn: Counted) -> Found:
        """Measure a step."""
        found = self._monitor(self._own(loss_fn.model, loss_fn.loss_of, loss_fn.batch))
        assert found is not None
        converged = found.status == "converged"
        return Found(found.sharpness if converged else None, found.forwards, converged=converged)


class PublishedSearch:
    """Critical sharpness by the published method.

    Args:
        training: whose steps it measures.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._guess = training.lr

    def __call__(self, loss_fn: Counted) -> Found:
        """Measure a step."""
        found = published.critical_lr(self._training.model, self._training.optimizer, loss_fn, self._guess)
        if found.critical_lr is None:
            return Found(None, found.forwards, converged=False)
        self._guess = found.critical_lr
        return Found(2 / found.critical_lr, found.forwards)


def _backward(training: Training, loss_fn: Counted) -> Found:
    """A forward and a backward pass, which leave the gradient that is there."""
    torch.autograd.grad(loss_fn(), list(training.model.parameters()))
    return Found(None, 1)


def _along(training: Training, loss_fn: Counted, method: str) -> Found:
    direction = sharpkern.Direction.from_optimizer(training.optimizer)
    found = sharpkern.directional_sharpness(training.model, loss_fn, direction, method=method)
    return Found(float(found), found.forwards, 2 if method == "hvp" else 0)


def _double_backward(training: Training, loss_fn: Counted) -> Found:
    """λ_dir by plain torch and nothing else: no check of what the product is worth."""
    direction = sharpkern.Direction.from_optimizer(training.optimizer)
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        loss = loss_fn()
    gradient = torch.autograd.grad(loss, direction.parameters, create_graph=True)
    slope = sum((g * delta).sum() for g, delta in zip(gradient, direction.tensors, strict=True))
    product = torch.autograd.grad(slope, direction.parameters)
    curvature = sum(float((hv * delta).sum()) for hv, delta in zip(product, direction.tensors, strict=True))
    return Found(curvature / float(slope.detach()), 1, 1)
