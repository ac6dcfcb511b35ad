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
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The checkout, also where the package is not installed.
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import GPT, Batch, Counted, Training, text, token_loss

import sharpkern
from sharpkern import Direction, directional_sharpness, hessian_sharpness

_MOST_PROBES = 40


@dataclass(frozen=True)
class Published:
    """One result.

    Attributes:
        critical_lr: the middle of the last bracket, a learning rate; None where there was no rise, or no fall.
        forwards: losses evaluated, the base loss among them.
    """

    critical_lr: float | None
    forwards: int


@torch.no_grad()
def published_critical_lr(
    model: nn.Module, optimizer: torch.optim.AdamW, loss_fn: Callable[[], Tensor], guess: float, width: float = 1 / 16
) -> Published:
    """Measure η_c as published; the model is left as it was."""
    update = adamw_update(model, optimizer)
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
        if lo > 0 and hi - lo <= width * lo:
            break
        eta = 2 * lo if hi == float("inf") else (lo + hi) / 2
    _copy_into(model, weights)
    return Published((lo + hi) / 2 if lo > 0 and hi < float("inf") else None, forwards)


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


TOL = 1e-4


@dataclass(frozen=True)
class Top:
    """A largest eigenvalue, as a package found it.

    Attributes:
        value: in 1/learning-rate.
        products: Hessian-vector products that it took.
        converged: whether the package says that the tolerance was reached.
    """

    value: float
    products: int
    converged: bool = True


class EigenThings:
    """hessian-eigenthings 1.0.0a5: its operator makes the graph anew for each product."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        from hessian_eigenthings import HessianOperator

        self._model = copy.deepcopy(model)
        self._operator = HessianOperator(
            self._model, [batch], lambda model, batch: token_loss(model(batch[0]), batch[1])
        )

    def product(self, vector: Tensor) -> Tensor:
        """Return H·v, flat."""
        with sdpa_kernel(SDPBackend.MATH):
            product: Tensor = self._operator.matvec(vector)
            return product

    def lanczos(self, tol: float, steps: int = 40) -> Top:
        """Find the largest eigenvalue by a number of Lanczos steps, which are all made; tol is for the verdict."""
        from hessian_eigenthings import lanczos

        with sdpa_kernel(SDPBackend.MATH):
            found = lanczos(self._operator, k=1, max_iter=steps, which="LA", tol=tol, seed=0)
            return Top(found.eigenvalues.item(), found.iterations, found.converged.item())

    def power(self, tol: float) -> Top:
        """Find the eigenvalue of largest magnitude by power iteration, to a relative residual; 100 products at most."""
        from hessian_eigenthings import deflated_power_iteration

        with sdpa_kernel(SDPBackend.MATH):
            found = deflated_power_iteration(self._operator, k=1, max_iter=100, tol=tol, seed=0)
            return Top(found.eigenvalues.item(), found.iterations, found.converged.item())


class CurvLinOps:
    """curvlinops 3.0.1 with scipy's eigsh; its check for determinism is left out."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        from curvlinops import HessianLinearOperator

        model = copy.deepcopy(model)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.LayerNorm):
                    setattr(parent, name, _WrittenOut(child))
        # Its losses take one row for each target.
        flat = nn.Sequential(model, nn.Flatten(0, 1))
        with sdpa_kernel(SDPBackend.MATH):
            self._operator = HessianLinearOperator(
                flat,
                nn.CrossEntropyLoss(),
                list(model.parameters()),
                [(batch[0], batch[1].flatten())],
                check_deterministic=False,
            )

    def product(self, vector: Tensor) -> Tensor:
        """Return H·v, flat."""
        with sdpa_kernel(SDPBackend.MATH):
            product: Tensor = self._operator @ vector
            return product

    def eigsh(self, tol: float) -> Top:
        """Find the largest eigenvalue by scipy, to a relative residual."""
        from scipy.sparse.linalg import LinearOperator, eigsh

        linear, products = self._operator.to_scipy(), 0

        def matvec(vector: object) -> object:
            nonlocal products
            products += 1
            return linear @ vector

        with sdpa_kernel(SDPBackend.MATH):
            (top,), _ = eigsh(LinearOperator(linear.shape, matvec, dtype=linear.dtype), k=1, which="LA", tol=tol)
        return Top(float(top), products)


class PyHessian:
    """PyHessian 0.1: power iteration on one graph that it keeps."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        import pyhessian

        self._hessian = pyhessian.hessian
        self._model, self._batch = _Cleared(copy.deepcopy(model)), batch

    def power(self, tol: float) -> Top:
        """Find the eigenvalue of largest magnitude, until it changes by less than a share; 100 products at most."""
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # It keeps the graph by backward(create_graph=True), whose cycle of references is cut below.
            warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
            (top,), _ = self._hessian(self._model, token_loss, data=self._batch, cuda=False).eigenvalues(tol=tol)
        products, self._model.times = self._model.times, 0
        self._model.zero_grad()
        return Top(top, products, products < 100)


class _Cleared(nn.Module):
    """A model that counts how often its gradients are cleared, which PyHessian does before each product."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.times = model, 0

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the model's outputs."""
        return self.model(tokens)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.times += 1
        super().zero_grad(set_to_none)


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


class Trained:
    """A language model of a few thousand parameters after some steps of AdamW, with its next gradient, in float64."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = GPT(width=8, num_layers=1, num_heads=2, context=16).double()
        data = text()
        rows = torch.stack([data[start : start + 17] for start in range(0, 800, 100)])
        self.batch = rows[:, :-1], rows[:, 1:]
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        for step in range(21):
            optimizer.zero_grad()
            self.loss().backward()
            if step < 20:
                optimizer.step()
        self.direction = Direction.from_optimizer(optimizer)

    def loss(self) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        return token_loss(self.model(self.batch[0]), self.batch[1])

    def ours(self) -> tuple[float, float]:
        """Return λ_max and λ_dir of the next update."""
        along = directional_sharpness(self.model, self.loss, self.direction, method="hvp")
        return hessian_sharpness(self.model, self.loss, tol=TOL).value, along

    def eigenthings(self) -> tuple[float, float]:
        """Return λ_max by hessian-eigenthings' Lanczos, and λ_dir by its product."""
        theirs = EigenThings(self.model, self.batch)
        return theirs.lanczos(TOL).value, self.along(theirs.product)

    def curvlinops(self) -> tuple[float, float]:
        """Return λ_max by scipy on curvlinops' operator, and λ_dir by its product."""
        theirs = CurvLinOps(self.model, self.batch)
        return theirs.eigsh(TOL).value, self.along(theirs.product)

    def along(self, product: Callable[[Tensor], Tensor]) -> float:
        """Return λ_dir of the next update by a function v ↦ Hv of flat vectors."""
        delta = torch.cat([tensor.flatten() for tensor in self.direction.tensors])
        return float(delta @ product(delta)) / self.direction.slope


def main() -> None:
    """Print what each package gives."""
    trained = Trained()
    print(f"{'':22}{'λ_max':>16}{'λ_dir':>16}")
    rows = {"sharpkern": trained.ours, "hessian-eigenthings": trained.eigenthings, "curvlinops": trained.curvlinops}
    for name, measured in rows.items():
        top, along = measured()
        print(f"{name:22}{top:16.9f}{along:16.9f}")
    print(f"{'PyHessian':22}{PyHessian(trained.model, trained.batch).power(TOL).value:16.9f}")


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
    """Return the methods that take up to some ten forward passes."""
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
    """Return what finds the largest eigenvalue, by name; a call prepares it, and fails if it is not installed."""
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
    """Critical sharpness by a Monitor of its own."""

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
    """Critical sharpness by the published method."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._guess = training.lr

    def __call__(self, loss_fn: Counted) -> Found:
        """Measure a step."""
        found = published_critical_lr(self._training.model, self._training.optimizer, loss_fn, self._guess)
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
