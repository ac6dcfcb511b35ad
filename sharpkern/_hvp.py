"""Exact Hessian-vector products: one loss evaluation, its gradient with a graph, one more backward per vector."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


class GradientGraph:
    """The gradient of a loss at θ, kept differentiable, so that H·v costs one backward pass through it.

    The closure is called once: every product sees the same batch and the same dropout masks.

    Args:
        loss_fn: The closure; returns the scalar loss with its graph.
        parameters: The parameters θ, each with ``requires_grad``.

    Attributes:
        gradient: ∂L/∂θ, one tensor per parameter, zeros where the loss does not depend on it.

    Memory: the activations of a forward and a backward pass, held as long as the object lives.
    """

    gradient: tuple[Tensor, ...]

    def __init__(self, loss_fn: Callable[[], Tensor], parameters: Sequence[Tensor]) -> None:
        self._parameters = tuple(parameters)
        # The fused attention kernels have no second derivative; plain matrix products do.
        with sdpa_kernel(SDPBackend.MATH):
            loss = loss_fn()
        _check_loss(loss)
        with _named_errors():
            self.gradient = torch.autograd.grad(
                loss,
                self._parameters,
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )

    def product(self, vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return H·v.

        Args:
            vectors: v, one tensor per parameter, of its shape.

        Returns:
            One tensor per parameter, of its shape, dtype and device.
        """
        curved = [(g, v.to(g)) for g, v in zip(self.gradient, vectors, strict=True) if g.requires_grad]
        if not curved:
            return tuple(torch.zeros_like(parameter) for parameter in self._parameters)
        outputs, weights = zip(*curved, strict=True)
        with _named_errors():
            return torch.autograd.grad(
                outputs,
                self._parameters,
                grad_outputs=weights,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )


def check_symmetry(forth: float, back: float, scale: float) -> None:
    """Refuse a Hessian that is not symmetric by more than low precision explains.

    An operator whose backward autograd does not see (a fused kernel, ``@once_differentiable``) counts as constant in
    the second derivative. Nothing raises; the rows of the parameters below it are simply missing.

    Args:
        forth: uᵀHv.
        back: vᵀHu.
        scale: A typical magnitude of either.

    Raises:
        RuntimeError: If they differ by more than a tenth of the scale.
    """
    if abs(forth - back) > 0.1 * scale:
        raise RuntimeError(
            f"Hessian-vector products must be symmetric, got uᵀHv = {forth:.3g} and vᵀHu = {back:.3g}; "
            "an operator of the model computes its gradient out of autograd's sight: run without fused kernels, "
            "or use critical_sharpness, which needs forward passes only"
        )


def _check_loss(loss: object) -> None:
    """Refuse what cannot be differentiated, by name."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a scalar tensor, got {type(loss).__name__}; return the loss itself")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn must return a scalar tensor, got shape {list(loss.shape)}; take its mean or sum")
    if not loss.requires_grad:
        raise ValueError(
            "loss_fn must return a loss with its graph, got one without; "
            "remove detach(), item() and no_grad() from it, and make sure the parameters require gradients"
        )


@contextmanager
def _named_errors() -> Iterator[None]:
    """Say what a failed second derivative means and what works instead."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"this loss cannot be differentiated twice ({str(error).splitlines()[0]}); run the model eagerly and "
            "without fused kernels, or use critical_sharpness, which needs forward passes only"
        ) from error
