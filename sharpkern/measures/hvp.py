"""Exact Hessian-vector products: one loss evaluation, its gradient with a graph, one more backward per vector.

Autograd does not say where the graph of a gradient has holes: what a fused kernel or ``@once_differentiable`` computes
out of its sight counts as constant in the second derivative. Two checks find them:

- every gradient is linear in what is fed into the backward pass, its seed 1, so that ∂g/∂seed must be g: looked at
  along g itself, where no rounding cancels;
- a Hessian is symmetric.

Neither finds an operator that keeps its own derivative, made without a graph, and multiplies by it. Operators whose
gradients are not torch's own, and that pass, are told of by a warning.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpkern.distributed.flat import is_flat
from sharpkern.distributed.lockstep import reducers_of, replicate_state
from sharpkern.distributed.sharding import is_sharded
from sharpkern.engines.evaluation.closure import LossFn, check_loss
from sharpkern.engines.evaluation.guard import evaluating
from sharpkern.engines.session import Session
from sharpkern.errors import UncheckedWarning, warn
from sharpkern.ops.reductions import inner_product, total

_HIDDEN = (
    "an operator of the model computes its gradient out of autograd's sight: run without fused kernels, or use "
    "critical_sharpness, which needs forward passes only"
)


class GradientGraph:
    """The gradient of a loss at θ, kept differentiable, so that H·v costs one backward pass through it.

    The closure is called once: every product sees the same batch and the same dropout masks. Gradient and products are
    means over the ranks of the session, which all have to ask for the same products; a data-parallel reducer takes no
    part.

    Attributes:
        loss: L(θ), the mean over the ranks.
        gradient: ∂L/∂θ, one tensor per parameter, zeros where the loss does not depend on it.
        length: its norm.
        rounding: relative error that the products' arithmetic shows, no less than that of the parameters' dtype.
    """

    gradient: tuple[Tensor, ...]

    def __init__(self, session: Session, loss_fn: LossFn, parameters: Sequence[Tensor]) -> None:
        self._parameters = tuple(parameters)
        refuse_shards(session, self._parameters)
        self._session = session
        with session.in_step():
            # The fused attention kernels have no second derivative; plain matrix products do.
            with sdpa_kernel(SDPBackend.MATH), no_reducers(session.outer), _evaluated(loss_fn):
                loss = check_differentiable(loss_fn())
            self._foreign = _foreign_operators(loss)
            self._seed = torch.ones_like(loss, requires_grad=True)
            with _named_errors():
                self._local = torch.autograd.grad(
                    loss,
                    self._parameters,
                    grad_outputs=self._seed,
                    create_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
        (mean,) = self._mean([loss])
        self.loss = float(mean)
        self.gradient = self._mean(self._local)
        self.length = math.sqrt(total(inner_product(g, g) for g in self.gradient))
        self.rounding = max(torch.finfo(parameter.dtype).eps for parameter in self._parameters)
        self._check_linearity()

    def product(self, vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return H·v."""
        *products, seen = self._mean(self._derivative(vectors, (*self._parameters, self._seed)))
        self._note_rounding(vectors, float(seen))
        return tuple(products)

    def tell_unchecked(self) -> None:
        """Warn of operators whose products had to be believed."""
        if self._foreign:
            warn(
                f"the second derivative of {', '.join(sorted(self._foreign))} cannot be checked: where its backward "
                "multiplies by what its forward saved as a derivative, a part of the Hessian is missing; compare "
                "directional_sharpness by both methods",
                UncheckedWarning,
            )

    def _mean(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the means over the ranks, without a graph."""
        # Zeros that stand for what is not used come with a graph before torch 2.7.
        return tuple(self._session.ranks.mean(tensor.detach()) for tensor in tensors)

    def _derivative(self, vectors: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return this rank's ∂(vᵀg)/∂input."""
        with self._session.in_step(), _named_errors():
            curved = [(g, v.to(g)) for g, v in zip(self._local, vectors, strict=True) if g.requires_grad]
            if not curved:
                # Other ranks wait for this one's share, even where it is nothing.
                return tuple(torch.zeros_like(tensor) for tensor in inputs)
            outputs, weights = zip(*curved, strict=True)
            return torch.autograd.grad(
                outputs,
                inputs,
                grad_outputs=weights,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )

    def _check_linearity(self) -> None:
        """Refuse a gradient that does not follow its seed."""
        (seen,) = self._mean(self._derivative([gradient.detach() for gradient in self._local], (self._seed,)))
        (there,) = self._mean([torch.stack([inner_product(g.detach(), g.detach()) for g in self._local]).sum()])
        # A gradient that is rounding and nothing else follows nothing.
        floor = (self.rounding * max(1.0, abs(self.loss))) ** 2
        if abs(float(seen) - float(there)) > max(0.1 * float(there), floor):
            raise RuntimeError(
                f"gradients must be differentiable, got |g|² = {float(there):.3g} of which autograd sees "
                f"{float(seen):.3g}; {_HIDDEN}"
            )

    def _note_rounding(self, vectors: Sequence[Tensor], seen: float) -> None:
        """See from ``seen``, which is vᵀ∂g/∂seed and would be vᵀg, how much rounding the products hold."""
        pairs = [(g, v.detach()) for g, v in zip(self.gradient, vectors, strict=True)]
        there = total(inner_product(g, v) for g, v in pairs)
        norms = total(inner_product(v, v) for _, v in pairs)
        # What it is along a random vector of this length.
        typical = self.length * math.sqrt(norms / sum(v.numel() for _, v in pairs))
        scale = max(abs(there), typical)
        if scale and math.isfinite(seen):
            self.rounding = max(self.rounding, abs(seen - there) / scale)


@contextmanager
def _evaluated(loss_fn: LossFn) -> Iterator[None]:
    """Let a `MicroBatch` know that this is no call of training."""
    evaluating.append(loss_fn)
    try:
        yield
    finally:
        evaluating.clear()


@contextmanager
def no_reducers(model: nn.Module) -> Iterator[None]:
    """Keep data-parallel wrappers from taking part in a forward and a backward pass."""
    with ExitStack() as stack:
        for module, reducer in reducers_of(model):
            # Which tells its reducer anew in every pass.
            if (state := replicate_state(module)) is not None:
                stack.callback(setattr, state, "_no_sync", state._no_sync)
                state._no_sync = True
            stack.enter_context(reducer.no_sync())
            # Either flag hangs a node behind the output that starts a reduction.
            for flag in ("find_unused_parameters", "static_graph"):
                stack.callback(setattr, reducer, flag, getattr(reducer, flag))
                setattr(reducer, flag, False)
        yield


def check_symmetry(forth: float, back: float, scale: float) -> None:
    """Refuse a Hessian that is not symmetric by more than low precision explains.

    Where an operator hides from autograd how its gradient depends on some of its inputs nothing raises: blocks of the
    Hessian are simply missing.
    """
    if abs(forth - back) > 0.1 * scale:
        raise RuntimeError(
            f"Hessian-vector products must be symmetric, got uᵀHv = {forth:.3g} and vᵀHu = {back:.3g}; {_HIDDEN}"
        )


def refuse_shards(session: Session, parameters: Sequence[Tensor]) -> None:
    """Refuse parameters whose gradients this rank has no more than its shards of."""
    got = "a model that is split over ranks" if session.ranks.splits else ""
    got = "shards of FSDP1" if any(map(is_flat, parameters)) else got
    got = "DTensors (FSDP2 or tensor parallelism)" if any(map(is_sharded, parameters)) else got
    if got:
        raise TypeError(
            f"parameters must be plain tensors for Hessian-vector products, got {got}; use critical_sharpness, or "
            "directional_sharpness(method='forward'), which need forward passes only"
        )


def check_differentiable(loss: Tensor | None) -> Tensor:
    """Return the loss, refused by name where it cannot be differentiated."""
    check_loss(loss)
    assert loss is not None
    if not loss.requires_grad:
        raise ValueError(
            "loss_fn must return a loss with its graph, got one without; "
            "remove detach(), item(), no_grad() and inference_mode() from and around it, and make sure that the "
            "parameters require gradients"
        )
    return loss


def _foreign_operators(loss: Tensor) -> set[str]:
    """Return the names of the operators in a loss's graph whose gradients are not torch's own."""
    names: set[str] = set()
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
            if isinstance(node, BackwardCFunction):
                names.add(type(node).__name__.removesuffix("Backward"))
    if "CheckpointFunction" in names:
        raise RuntimeError(
            "loss_fn must use torch.utils.checkpoint with use_reentrant=False, got True, which hides parameters from "
            "torch.autograd.grad; change it, or use critical_sharpness, which needs forward passes only"
        )
    return names


@contextmanager
def _named_errors() -> Iterator[None]:
    """Differentiate, and say what a failed second derivative means and what works instead."""
    try:
        # What is computed anew on the way back, between checkpoints, has to be what it was.
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"this loss cannot be differentiated twice ({str(error).splitlines()[0]}); run the model eagerly and "
            "without fused kernels, or use critical_sharpness, which needs forward passes only"
        ) from error
