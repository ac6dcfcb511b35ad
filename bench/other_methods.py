"""What sharpkern is compared with: the published method, other packages' Hessian-vector products, and its own ways.

Each measures the same training step from model and optimizer alone, so that making Δθ counts for all that need it.
Searches start from their own last result.

The published method (Kalra et al. 2026, arXiv 2601.16979) is written anew from its description, clone-and-dictionary:
the update is a dictionary of tensors, and so are the weights, cloned once; at every probe the weights θ − ηΔθ are built
anew and copied into the model. The step size is doubled from a first guess until the loss exceeds that at θ, or halved
while the guess itself exceeds it, and the bracket is bisected to 1/16; the next measurement starts at the last result.
What the description leaves open is taken the quick way: one fused operation for θ − ηΔθ, and no dictionary that
outlives the copying.

The tests compare with hessian-eigenthings, of the extra ``peers``. curvlinops and PyHessian are compared with here,
since what the first depends on (torchvision) does not go with every build of torch, and the second has no release
since 2021. Both work without:

    pip install --no-deps curvlinops-for-pytorch==3.0.1 einops einconv linear_operator opt-einsum pyhessian==0.1
    python bench/other_methods.py

Theirs fail on fused attention and ours do not: the plain backend is chosen for their sake. What else they need is done
to a copy of the model.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import Batch, Counted, Training, token_loss

import sharpkern
from sharpkern import Direction, directional_sharpness, hessian_sharpness

# What larger models are measured by, too.
MAIN = (
    "forward + backward",
    "sharpkern, auto, virtual",
    "sharpkern, auto, in place",
    "published method",
    "sharpkern, loss differences",
    "double backward",
)
_MOST_PROBES = 40


class Found(NamedTuple):
    """What a method says of a step; the value is None where there is none, or nothing was asked."""

    value: float | None  # in 1/learning-rate
    forwards: int  # losses evaluated
    products: int = 0  # Hessian-vector products, if any
    converged: bool = True  # whether the value is as exact as was asked for


Measure = Callable[[Counted], Found]


@dataclass(frozen=True)
class Method:
    """One way to measure a step, of which it is given the batch's loss."""

    name: str
    quantity: str  # "λ_c", "λ_dir", "λ_max", or "training"
    measure: Measure


def cheap(training: Training) -> list[Method]:
    """Return the methods that take up to some ten forward passes."""
    searches = [
        ("auto, virtual", {"engine": "virtual"}),
        ("auto, in place", {"engine": "inplace"}),
        ("auto, batched", {"engine": "batched"}),
        ("bisection, virtual", {"engine": "virtual", "method": "bisection"}),
        ("bisection, in place", {"engine": "inplace", "method": "bisection"}),
    ]
    return [
        Method("forward + backward", "training", partial(_backward, training)),
        *(Method(f"sharpkern, {name}", "λ_c", search(training, **options)) for name, options in searches),
        Method("published method", "λ_c", published(training)),
        Method("sharpkern, loss differences", "λ_dir", partial(_along, training, "forward")),
        Method("sharpkern, gradient differences", "λ_dir", partial(_along, training, "gradient")),
        Method("sharpkern, exact product", "λ_dir", partial(_along, training, "hvp")),
        Method("double backward", "λ_dir", partial(_double_backward, training)),
    ]


def tops(training: Training, loss_fn: Counted, tol: float) -> list[tuple[str, Callable[[], Measure]]]:
    """Return what finds the largest eigenvalue, by name; a call prepares it, and fails if it is not installed."""

    def ours(loss_fn: Counted) -> Found:
        found = hessian_sharpness(training.model, loss_fn, tol=tol)
        return Found(found.value, 1, found.iterations, found.converged)

    def by(peer: Any, *options: Any) -> Measure:
        found = peer(training.model, loss_fn.loss.batch)
        return lambda _: found.top(tol, *options)

    return [
        ("sharpkern", lambda: ours),
        ("curvlinops and scipy", lambda: by(CurvLinOps)),
        # Steps of Lanczos that the benchmark's models take, as its own verdict says.
        ("hessian-eigenthings, Lanczos", lambda: by(EigenThings, "lanczos", 10)),
        ("hessian-eigenthings, power iteration", lambda: by(EigenThings, "deflated_power_iteration")),
        ("PyHessian, power iteration", lambda: by(PyHessian)),
    ]


# -- critical sharpness -----------------------------------------------------------------------------------------------


def search(training: Training, **options: Any) -> Measure:
    """Return critical sharpness by a Monitor of its own."""
    monitor = sharpkern.Monitor(training.model, training.optimizer, **options)
    # What is checked once is checked once for each closure's code: a class of its own makes it this search's own.
    own = type("Own", (Counted,), {})

    def measure(loss_fn: Counted) -> Found:
        found = monitor(own(loss_fn.model, loss_fn.loss))
        converged = found.status == "converged"
        return Found(found.sharpness if converged else None, found.forwards, converged=converged)

    return measure


def published(training: Training) -> Measure:
    """Return critical sharpness by the published method, each search starting at the last result."""
    guess = training.lr

    def measure(loss_fn: Counted) -> Found:
        nonlocal guess
        found = published_sharpness(training, loss_fn, guess)
        guess = 2 / found.value if found.value else guess
        return found

    return measure


@torch.no_grad()
def published_sharpness(training: Training, loss_fn: Callable[[], Tensor], guess: float) -> Found:
    """Measure λ_c as published, from a first guess of η_c; the model is left as it was."""
    model = training.model
    update = adamw_update(model, training.optimizer)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    base = float(loss_fn())
    lo, hi, eta, forwards = 0.0, float("inf"), guess, 1
    while forwards < _MOST_PROBES:
        _copy_into(model, {name: torch.sub(weights[name], update[name], alpha=eta) for name in weights})
        forwards += 1
        # A loss that is not finite exceeds it too.
        if float(loss_fn()) <= base:
            lo = eta
        else:
            hi = eta
        if lo > 0 and hi - lo <= lo / 16:
            break
        eta = 2 * lo if hi == float("inf") else (lo + hi) / 2
    _copy_into(model, weights)
    found = lo > 0 and hi < float("inf")
    return Found(4 / (lo + hi) if found else None, forwards, converged=found)


@torch.no_grad()
def adamw_update(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return what the next step of AdamW subtracts from the weights, per unit learning rate, by name."""
    (group,) = optimizer.param_groups
    beta1, beta2 = group["betas"]
    update = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        step = float(state["step"]) + 1
        mean = torch.lerp(state["exp_avg"], parameter.grad, 1 - beta1)
        square = (state["exp_avg_sq"] * beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        denominator = square.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        moved = mean.div_(1 - beta1**step).div_(denominator)
        update[name] = moved.add_(parameter, alpha=group["weight_decay"])
    return update


def _copy_into(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


# -- along the update -------------------------------------------------------------------------------------------------


def _backward(training: Training, loss_fn: Counted) -> Found:
    """A forward and a backward pass, which leave the gradient that is there."""
    torch.autograd.grad(loss_fn(), list(training.model.parameters()))
    return Found(None, 1)


def _along(training: Training, method: str, loss_fn: Counted) -> Found:
    direction = Direction.from_optimizer(training.optimizer)
    found = directional_sharpness(training.model, loss_fn, direction, method=method)
    return Found(float(found), found.forwards, 2 if method == "hvp" else 0)


def _double_backward(training: Training, loss_fn: Counted) -> Found:
    """λ_dir by plain torch and nothing else: no check of what the product is worth."""
    direction = Direction.from_optimizer(training.optimizer)
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        loss = loss_fn()
    gradient = torch.autograd.grad(loss, direction.parameters, create_graph=True)
    slope = sum((g * delta).sum() for g, delta in zip(gradient, direction.tensors, strict=True))
    product = torch.autograd.grad(slope, direction.parameters)
    curvature = sum(float((hv * delta).sum()) for hv, delta in zip(product, direction.tensors, strict=True))
    return Found(curvature / float(slope.detach()), 1, 1)


# -- the largest eigenvalue -------------------------------------------------------------------------------------------


class EigenThings:
    """hessian-eigenthings 1.0.0a5: its operator makes the graph anew for each product."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        from hessian_eigenthings import HessianOperator

        self._model = copy.deepcopy(model)
        self._operator = HessianOperator(
            self._model, [batch], lambda model, batch: token_loss(model(batch[0]), batch[1])
        )

    @sdpa_kernel(SDPBackend.MATH)
    def product(self, vector: Tensor) -> Tensor:
        """Return H·v, flat."""
        return self._operator.matvec(vector)

    @sdpa_kernel(SDPBackend.MATH)
    def top(self, tol: float, find: str, steps: int = 100) -> Found:
        """Find the largest eigenvalue by Lanczos, whose steps are all made, or "deflated_power_iteration"."""
        import hessian_eigenthings

        options = {"which": "LA"} if find == "lanczos" else {}
        run = getattr(hessian_eigenthings, find)
        found = run(self._operator, k=1, max_iter=steps, tol=tol, seed=0, **options)
        return Found(found.eigenvalues.item(), found.iterations, found.iterations, found.converged.item())


class CurvLinOps:
    """curvlinops 3.0.1 with scipy's eigsh; its check for determinism is left out."""

    @sdpa_kernel(SDPBackend.MATH)
    def __init__(self, model: nn.Module, batch: Batch) -> None:
        from curvlinops import HessianLinearOperator

        model = copy.deepcopy(model)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.LayerNorm):
                    setattr(parent, name, _WrittenOut(child))
        # Its losses take one row for each target.
        self._operator = HessianLinearOperator(
            nn.Sequential(model, nn.Flatten(0, 1)),
            nn.CrossEntropyLoss(),
            list(model.parameters()),
            [(batch[0], batch[1].flatten())],
            check_deterministic=False,
        )

    @sdpa_kernel(SDPBackend.MATH)
    def product(self, vector: Tensor) -> Tensor:
        """Return H·v, flat."""
        return self._operator @ vector

    @sdpa_kernel(SDPBackend.MATH)
    def top(self, tol: float) -> Found:
        """Find the largest eigenvalue by scipy, to a relative residual."""
        from scipy.sparse.linalg import LinearOperator, eigsh

        linear, products = self._operator.to_scipy(), 0

        def matvec(vector: object) -> object:
            nonlocal products
            products += 1
            return linear @ vector

        (top,), _ = eigsh(LinearOperator(linear.shape, matvec, dtype=linear.dtype), k=1, which="LA", tol=tol)
        return Found(float(top), products, products)


class PyHessian:
    """PyHessian 0.1: power iteration on one graph that it keeps."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        import pyhessian

        self._hessian = pyhessian.hessian
        self._model, self._batch = copy.deepcopy(model), batch

    @sdpa_kernel(SDPBackend.MATH)
    def top(self, tol: float) -> Found:
        """Find the eigenvalue of largest magnitude, until it changes by less than a share; 100 products at most."""
        # It clears the gradients before each product.
        cleared = mock.patch.object(self._model, "zero_grad", wraps=self._model.zero_grad)
        with cleared as products, warnings.catch_warnings():
            # It keeps the graph by backward(create_graph=True), whose cycle of references is cut below.
            warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
            (top,), _ = self._hessian(self._model, token_loss, data=self._batch, cuda=False).eigenvalues(tol=tol)
        self._model.zero_grad()
        return Found(top, 1, products.call_count, products.call_count < 100)


class _WrittenOut(nn.Module):
    """A LayerNorm in elementary operations: `torch.func.jvp` over `jacrev` is wrong for the fused one's weight.

    Found with torch 2.13 and curvlinops 3.0.1, which differentiates by it: its product was off by 4 %.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


# -- one against the other --------------------------------------------------------------------------------------------

TOL = 1e-4


def trained() -> tuple[Training, Counted]:
    """Return a model of a few thousand parameters after some steps of AdamW, with its next gradient, in float64."""
    training = Training.of_text("least")
    training.model.double()
    training.run(20, 128)
    return training, training.begin(128)


def along(training: Training, product: Callable[[Tensor], Tensor]) -> float:
    """Return λ_dir of the next update by a function v ↦ Hv of flat vectors."""
    direction = Direction.from_optimizer(training.optimizer)
    delta = torch.cat([tensor.flatten() for tensor in direction.tensors])
    return float(delta @ product(delta)) / direction.slope


def main() -> None:
    """Print λ_max and λ_dir as each package gives them."""
    training, loss_fn = trained()
    top, direction = hessian_sharpness(training.model, loss_fn, tol=TOL).value, _along(training, "hvp", loss_fn).value
    print(f"sharpkern: λ_max {top:.9f}, λ_dir {direction:.9f}")
    for peer, options in ((EigenThings, ("lanczos", 40)), (CurvLinOps, ()), (PyHessian, ())):
        theirs = peer(training.model, loss_fn.loss.batch)
        print(f"{peer.__name__}: λ_max {theirs.top(TOL, *options).value:.9f}", end="")
        # PyHessian hands no products out.
        print(f", λ_dir {along(training, theirs.product):.9f}" if hasattr(theirs, "product") else "")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
