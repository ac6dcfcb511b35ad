"""What rounding Δθ to bf16 does to η_c, where the weights are bf16: ``python bench/bench_rounding.py --json PATH``.

A GPT is trained in bf16 with float32 masters. At some steps η_c is found along Δθ as it is and along Δθ in bf16: by
bisection in float64, where nothing else is rounded, and by the virtual engine in bf16. Measures no time.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import ledger
import torch
from bench_sample import _text_rows
from torch import Tensor, nn
from workloads import GPT, token_loss

import sharpkern

_ROWS, _HALVINGS = (16, 8), 28
_KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
    "SGD, momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}


def rounding(quick: bool) -> dict[str, Any]:
    """Train with each optimizer, and compare."""
    measured = (0, 4, 20, 60, 120) if not quick else (0, 2)
    rows = [row for name in _KINDS for row in _run(name, measured, _ROWS[quick])]
    ledger.show("What rounding Δθ to bf16 does to η_c", rows, " ".join(rows[0]))
    return {"rows": rows, "tokens": 64 * _ROWS[quick]}


def _run(name: str, measured: Sequence[int], num_rows: int) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    model = GPT(64, 3)
    held = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    model = model.bfloat16()
    weights = list(model.parameters())
    optimizer, generator = _KINDS[name](held), torch.Generator().manual_seed(1)
    for step in range(measured[-1] + 1):
        x, y = _text_rows(num_rows, generator)

        def loss_fn(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
            logits = model(x)
            return token_loss(logits if logits.dtype == torch.float64 else logits.float(), y)

        model.zero_grad()
        loss_fn().backward()
        for master, weight in zip(held, weights, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
        if step in measured:
            masters = dict(zip(weights, held, strict=True))
            exact = sharpkern.Direction.from_optimizer(optimizer, masters=masters, resident=True)
            yield {"optimizer": name, "step": step, **_compared(model, loss_fn, exact)}
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(held, weights, strict=True):
                weight.copy_(master)


def _compared(model: nn.Module, loss_fn: Callable[..., Tensor], exact: sharpkern.Direction) -> dict[str, Any]:
    deltas = {"fp32": list(exact.tensors), "bf16": [delta.bfloat16() for delta in exact.tensors]}
    assert all(delta.dtype == torch.float32 for delta in deltas["fp32"])
    critical, found = {}, {}
    for dtype, tensors in deltas.items():
        direction = sharpkern.Direction.from_tensors(dict(zip(exact.parameters, tensors, strict=True)), model)
        found[dtype] = sharpkern.critical_sharpness(model, loss_fn, direction, engine="virtual")
        critical[dtype] = _critical(model, loss_fn, tensors, found["fp32"].critical_lr)
    off = {
        f"measured_{dtype}": {"off": abs(one.critical_lr / critical["fp32"] - 1), "said": one.error}
        for dtype, one in found.items()
    }
    flat = {f"{name}_{key}": value for name, row in off.items() for key, value in row.items()}
    assert exact.slope is not None
    norms = [sum(float(p.grad.double().square().sum()) for p in exact.parameters if p.grad is not None), exact.norm_sq]
    cosine = exact.slope / math.sqrt(math.prod(norms))
    return {"cosine": cosine, "eta_c": critical["fp32"], "moved": abs(critical["bf16"] / critical["fp32"] - 1), **flat}


def _critical(model: nn.Module, loss_fn: Callable[..., Tensor], deltas: Sequence[Tensor], near: float) -> float:
    """η_c near one that was measured, in float64."""
    wide = copy.deepcopy(model).double()
    base = [parameter.detach().clone() for parameter in wide.parameters()]

    @torch.no_grad()
    def loss(eta: float) -> float:
        for parameter, theta, delta in zip(wide.parameters(), base, deltas, strict=True):
            parameter.copy_(theta - eta * delta.double())
        return float(loss_fn(wide))

    start, low, high = loss(0.0), 0.9 * near, 1.1 * near
    if not loss(low) <= start < loss(high):
        raise ValueError(f"η_c must be near {near}, where the loss rises, got another curve; measure at another step")
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if loss(middle) > start else (middle, high)
    return low


if __name__ == "__main__":
    ledger.main(__doc__, rounding)
