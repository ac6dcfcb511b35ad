"""Other packages' exact Hessian-vector products on a small GPT: do they give what sharpkern gives?

The tests compare with hessian-eigenthings, of the extra ``peers``. curvlinops and PyHessian are compared with here,
since what the first depends on (torchvision) does not go with every build of torch, and the second has no release
since 2021. Both work without:

    pip install --no-deps curvlinops-for-pytorch==3.0.1 einops einconv linear_operator opt-einsum pyhessian==0.1
    python bench/peers.py

Theirs fail on fused attention and ours do not: the plain backend is chosen for their sake. What else they need is done
to a copy of the model.
"""

import copy
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# The checkout, also where the package is not installed.
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from runs import GPT, Batch, text, token_loss
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpkern import Direction, directional_sharpness, hessian_sharpness

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
    """hessian-eigenthings 1.0.0a5: its operator makes the graph anew for each product.

    Args:
        model: a language model, not touched.
        batch: its inputs and targets.
    """

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
    """curvlinops 3.0.1 with scipy's eigsh; its check for determinism is left out.

    Args:
        model: a language model, not touched.
        batch: its inputs and targets.
    """

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
    """PyHessian 0.1: power iteration on one graph that it keeps.

    Args:
        model: a language model, not touched.
        batch: its inputs and targets.
    """

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


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
