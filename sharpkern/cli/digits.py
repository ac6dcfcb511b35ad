"""The demo's run: full-batch gradient descent on handwritten digits, with every sharpness measured on the way."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sharpkern._support.optional import missing
from sharpkern.directions.direction import Direction
from sharpkern.measures.directional import directional_sharpness
from sharpkern.measures.hessian import hessian_sharpness
from sharpkern.measures.thresholds import stability_threshold
from sharpkern.monitoring.monitor import Monitor, Record

# Odd, both: at the edge of stability the iterate swings from side to side with a period of two steps, and an even
# stride would only ever see one of the sides.
MONITOR_EVERY = 3
HESSIAN_EVERY = 15


@dataclass(frozen=True)
class HessianPoint:
    """What second derivatives say at one step.

    Attributes:
        step: The step.
        hessian_sharpness: λ_max(H), in 1/learning-rate.
        directional_sharpness: ΔθᵀHΔθ/Δθᵀg, in 1/learning-rate.
        products: Hessian-vector products that λ_max took.
    """

    step: int
    hessian_sharpness: float
    directional_sharpness: float
    products: int


@dataclass
class DemoRun:
    """A training run and what was measured in it.

    Attributes:
        lr: Learning rate η.
        threshold: 2/η.
        num_samples: Size of the full batch.
        num_steps: Steps that were asked for.
        history: The Monitor's records.
        hessian: What Lanczos saw.
        diverged_at: The step at which the loss was no longer finite, or None.
    """

    lr: float
    threshold: float
    num_samples: int
    num_steps: int
    history: list[Record] = field(default_factory=list)
    hessian: list[HessianPoint] = field(default_factory=list)
    diverged_at: int | None = None


def digits(num_samples: int = 1797, seed: int = 0, noisy_share: float = 0.2) -> tuple[Tensor, Tensor]:
    """Load scikit-learn's handwritten digits, some with a random label, which keeps the loss from reaching zero."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing("scikit-learn", "demo", "the digits data set") from error
    pixels, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.tensor(pixels[:num_samples], dtype=torch.float32) / 8
    clean = torch.tensor(labels[:num_samples])
    replaced = torch.rand(len(clean), generator=generator) < noisy_share
    return inputs, torch.where(replaced, torch.randint(10, clean.shape, generator=generator), clean)


def network(seed: int = 0, width: int = 128) -> nn.Sequential:
    """Build an MLP of four linear layers with GELU between them, in torch's default initialization."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(64, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, 10),
        )


def train(
    num_steps: int, lr: float, num_samples: int, seed: int, on_step: Callable[[Monitor], None] = lambda monitor: None
) -> DemoRun:
    """Run gradient descent and measure all three sharpnesses on the way."""
    inputs, labels = digits(num_samples, seed)
    model = network(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    monitor = Monitor(model, optimizer, every=MONITOR_EVERY)
    threshold = stability_threshold(optimizer)
    assert isinstance(threshold, float)
    run = DemoRun(lr, threshold, num_samples, num_steps, history=monitor.history)

    def loss_fn() -> Tensor:
        return F.cross_entropy(model(inputs), labels)

    eigenvector = None
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = loss_fn()
        if not loss.isfinite():
            run.diverged_at = step
            break
        loss.backward()
        monitor(loss_fn)
        if step % HESSIAN_EVERY == 0:
            top = hessian_sharpness(model, loss_fn, v0=eigenvector)
            eigenvector = top.vector
            along = directional_sharpness(model, loss_fn, Direction.from_optimizer(optimizer), method="hvp")
            run.hessian.append(HessianPoint(step, top.value, along, top.iterations))
        optimizer.step()
        on_step(monitor)
    return run
