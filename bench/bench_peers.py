"""Other packages' exact Hessian-vector products on a small GPT: do they give what sharpkern gives?

The tests compare with hessian-eigenthings, of the extra ``peers``. curvlinops is compared with here, since what it
depends on (torchvision) does not go with every build of torch. It works without:

    pip install --no-deps curvlinops-for-pytorch==3.0.1 einops einconv linear_operator opt-einsum
    python bench/bench_peers.py

Theirs fail on fused attention and ours do not: the plain backend is chosen for their sake.
"""

from collections.abc import Callable

import torch
from runs import GPT, text, token_loss
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpkern import Direction, directional_sharpness, hessian_sharpness

TOL = 1e-4


class Trained:
    """A language model of a few thousand parameters after some steps of AdamW, with its next gradient, in float64."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = GPT(width=8, num_layers=1, num_heads=2, context=16).double()
        data = text()
        rows = torch.stack([data[start : start + 17] for start in range(0, 800, 100)])
        self.inputs, self.targets = rows[:, :-1], rows[:, 1:]
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        for step in range(21):
            optimizer.zero_grad()
            self.loss().backward()
            if step < 20:
                optimizer.step()
        self.direction = Direction.from_optimizer(optimizer)

    def loss(self) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        return token_loss(self.model(self.inputs), self.targets)

    def ours(self) -> tuple[float, float]:
        """Return λ_max and λ_dir of the next update."""
        along = directional_sharpness(self.model, self.loss, self.direction, method="hvp")
        return hessian_sharpness(self.model, self.loss, tol=TOL).value, along

    def along(self, product: Callable[[Tensor], Tensor]) -> float:
        """Return λ_dir of the next update by a function v ↦ Hv of flat vectors."""
        delta = torch.cat([tensor.flatten() for tensor in self.direction.tensors])
        return float(delta @ product(delta)) / self.direction.slope


def eigenthings(trained: Trained) -> tuple[float, float]:
    """Return λ_max by hessian-eigenthings' Lanczos, and λ_dir by its product."""
    from hessian_eigenthings import HessianOperator, lanczos

    operator = HessianOperator(trained.model, [None], lambda model, batch: trained.loss())
    with sdpa_kernel(SDPBackend.MATH):
        found = lanczos(operator, k=1, max_iter=40, which="LA", tol=TOL, seed=0)
        return found.eigenvalues.item(), trained.along(operator.matvec)


def curvlinops(trained: Trained) -> tuple[float, float]:
    """Return λ_max by scipy on curvlinops' operator, and λ_dir by its product."""
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import eigsh

    parameters = list(trained.model.parameters())
    for parent in list(trained.model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(parent, name, _WrittenOut(child))
    # Its losses take one row for each target.
    flat = nn.Sequential(trained.model, nn.Flatten(0, 1))
    with sdpa_kernel(SDPBackend.MATH):
        operator = HessianLinearOperator(
            flat, nn.CrossEntropyLoss(), parameters, [(trained.inputs, trained.targets.flatten())]
        )
        (top,), _ = eigsh(operator.to_scipy(), k=1, which="LA", tol=TOL)
        return float(top), trained.along(lambda vector: operator @ vector)


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


def main() -> None:
    """Print what each package gives."""
    print(f"{'':22}{'λ_max':>16}{'λ_dir':>16}")
    rows = {"sharpkern": Trained.ours, "hessian-eigenthings": eigenthings, "curvlinops and scipy": curvlinops}
    for name, measured in rows.items():
        top, along = measured(Trained())
        print(f"{name:22}{top:16.9f}{along:16.9f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
