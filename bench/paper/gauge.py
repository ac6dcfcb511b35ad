"""All sharpnesses of one loss at one step of a training loop: λ_c, λ_dir and λ_max."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from sharpkern import Direction, Monitor, directional_sharpness, hessian_sharpness, stability_threshold

LossFn = Callable[[], Tensor]
# Residual to stop at of λ_max, which is approached from below: what λ_dir may seem to exceed it by.
TOLERANCE = 0.01


class Gauge:
    """Measures at chosen steps; call it after ``backward()`` and before ``optimizer.step()``."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, due: Callable[[int], bool]) -> None:
        self._model, self._optimizer = model, optimizer
        self._monitor = Monitor(model, optimizer, every=due)
        self._preconditioner = optimizer if isinstance(optimizer, AdamW) else None
        # Each Lanczos iteration starts from the eigenvector of the last.
        self._eigenvector: Tensor | None = None

    def __call__(self, loss_fn: LossFn, heldout: LossFn | None = None) -> dict[str, Any] | None:
        """Measure if this step is due."""
        measured = self._monitor(loss_fn, heldout)
        if measured is None:
            return None
        record = self._monitor.history[-1]
        top = hessian_sharpness(
            self._model, loss_fn, preconditioner=self._preconditioner, tol=TOLERANCE, v0=self._eigenvector
        )
        self._eigenvector = top.vector
        row = {
            "step": record.step,
            "lr": record.lr,
            "loss": measured.base_loss,
            "lambda_c": measured.sharpness,
            "status": measured.status,
            "error": measured.error,
            "heldout_lambda_c": record.heldout and record.heldout.sharpness,
            "heldout_status": record.heldout and record.heldout.status,
            "lambda_dir": self._along(loss_fn, Direction.from_optimizer(self._optimizer)),
            "lambda_max": top.value,
            "residual": top.residual,
            "threshold": stability_threshold(self._optimizer),
        }
        if self._preconditioner is not None:
            plain = Direction.from_gradients(self._model, preconditioner=self._preconditioner)
            row["lambda_dir_plain"] = self._along(loss_fn, plain)
        return row

    def _along(self, loss_fn: LossFn, direction: Direction) -> float:
        return directional_sharpness(self._model, loss_fn, direction, method="hvp")
