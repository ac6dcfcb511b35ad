"""The noise that is taken for granted when the caller says nothing."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import sharpkern
from sharpkern.engines.evaluation.precision import _is_tf32
from tests.helpers.models import MLP
from tests.helpers.oracle import engine_on, random_direction


def noise_of(model: torch.nn.Module, loss_fn, engine: str = "virtual") -> float:
    with engine_on(engine, model, loss_fn, random_direction(model)) as (opened, closure):
        opened.losses([0.0])
        return closure.precision.noise()


@pytest.mark.parametrize("engine", ["virtual", "inplace"])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, 1e-14),
        (torch.float32, 2e-7),
        (torch.bfloat16, 1.5 * 2**-8 / 8),
        (torch.float16, 1.5 * 2**-11 / 8),
    ],
)
def test_noise_follows_the_arithmetic_and_the_number_of_targets(
    dtype: torch.dtype, expected: float, engine: str
) -> None:
    model = MLP().to(dtype)
    x, y = torch.randn(64, 16, dtype=dtype), torch.randint(0, 10, (64,))
    assert noise_of(model, lambda: F.cross_entropy(model(x), y), engine) == pytest.approx(expected)


def test_autocast_inside_the_closure_is_seen() -> None:
    model = MLP()
    x, y = torch.randn(64, 16), torch.randint(0, 10, (64,))

    def loss_fn() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        return F.cross_entropy(logits.float(), y)

    assert noise_of(model, loss_fn) == pytest.approx(1.5 * 2**-8 / 8)


def test_a_loss_of_its_own_making_has_a_cautious_default() -> None:
    model = MLP().bfloat16()
    x = torch.randn(64, 16, dtype=torch.bfloat16)
    assert noise_of(model, lambda: model(x).float().square().mean()) == 1e-4


@pytest.mark.parametrize("by", ["matmul", "everything", "former name"])
def test_tf32_is_recognised_by_whichever_name_it_was_chosen(by: str) -> None:
    """The questions of before torch 2.9 raise once the answer was given by the new names."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch before 2.9 has one name")
    assert not _is_tf32("linear")
    try:
        if by == "matmul":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        elif by == "everything":
            torch.backends.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        assert _is_tf32("linear")
    finally:
        torch.backends.fp32_precision = "none"
        torch.backends.cuda.matmul.fp32_precision = "none"
    assert not _is_tf32("linear")


def test_convolutions_are_in_tf32_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _is_tf32("conv2d")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert not _is_tf32("conv2d")


@pytest.mark.parametrize("steps", [60, 100, 150, 300, 500])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_a_loss_made_of_the_rounding_of_outputs_is_unresolved_and_not_wrong(offset: float, steps: int) -> None:
    """Near interpolation a float32 squared error is noise to a thousandth, or altogether, not to 2e-7."""
    for seed in range(6):
        torch.manual_seed(seed)
        model, x = torch.nn.Linear(30, 1), torch.randn(20, 30)
        y, optimizer = torch.randn(20, 1) + offset, torch.optim.SGD(model.parameters(), lr=0.2)

        def loss_fn(model=model, x=x, y=y) -> torch.Tensor:
            return F.mse_loss(model(x), y)

        for _ in range(steps + 1):
            optimizer.step()
            optimizer.zero_grad()
            loss_fn().backward()
        if not all(p.grad.any() and p.isfinite().all() for p in model.parameters()):
            continue
        direction = sharpkern.Direction.from_optimizer(optimizer)
        with warnings.catch_warnings():
            # Steps of a few roundings of a weight are warned of.
            warnings.simplefilter("ignore", sharpkern.RetainedWarning)
            m = sharpkern.critical_sharpness(model, loss_fn, direction)
        # In float64 the loss is a parabola: −2⟨r, d⟩η + |d|²η².
        w, b = (p.detach().double() for p in model.parameters())
        dw, db = (t.double() for t in direction.tensors)
        residual, moved = x.double() @ w.T + b - y.double(), x.double() @ dw.T + db
        crossing = float(2 * (residual * moved).sum() / moved.square().sum())
        assert m.status in ("converged", "unresolved")
        assert m.status == "unresolved" or abs(m.critical_lr / crossing - 1) < max(0.05, 2 * m.error)
