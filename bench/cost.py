"""Time and memory of one measurement, in plain no-grad forward passes and bytes of tensors."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from runs import GPT, text, token_loss
from torch import Tensor

import sharpkern
from tests.memory import peak_bytes

ENGINES = ("virtual", "inplace")


def cost_rows(num_tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Measure a GPT of 5 million parameters in training, by each engine, beside its plain forward pass.

    The passes and the measurements take turns, and medians are compared, so that a busy machine slows both.

    Args:
        num_tokens: Length of the one sequence in the batch.
        repeats: Rounds.

    Returns:
        One row per engine.
    """
    torch.manual_seed(0)
    model = GPT(width=256, num_layers=6, num_heads=8, context=1024)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = text()
    for step in range(10):
        start = step * num_tokens
        tokens = data[None, start : start + num_tokens + 1]
        optimizer.zero_grad()
        token_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
        if step < 9:
            optimizer.step()

    def loss_fn() -> Tensor:
        return token_loss(model(tokens[:, :-1]), tokens[:, 1:])

    def forward() -> None:
        with torch.no_grad():
            loss_fn()

    direction = sharpkern.Direction.from_optimizer(optimizer)

    def measure(engine: str) -> sharpkern.Measurement:
        return sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine)

    found = {engine: measure(engine) for engine in ENGINES}
    values = [measurement.sharpness for measurement in found.values()]
    if not abs(values[0] / values[1] - 1) < 1e-3:
        raise RuntimeError(f"engines disagree, nothing is timed: {dict(zip(ENGINES, values, strict=True))}")
    plain: list[float] = []
    building: list[float] = []
    seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    for _ in range(repeats):
        plain.append(_seconds(forward))
        building.append(_seconds(lambda: sharpkern.Direction.from_optimizer(optimizer)))
        for engine in ENGINES:
            # Forwards differ between rounds: now and then a measurement checks the slope as well.
            started = time.perf_counter()
            forwards = measure(engine).forwards
            seconds[engine].append((time.perf_counter() - started) / forwards)
            plain.append(_seconds(forward))
    parameters = [p.numel() * p.element_size() for p in model.parameters()]
    forward_peak = peak_bytes(forward)
    rows = []
    for engine in ENGINES:
        peak = peak_bytes(lambda e=engine: measure(e))
        rows.append(
            {
                "tokens": num_tokens,
                "parameters": sum(p.numel() for p in model.parameters()),
                "engine": engine,
                "forwards": found[engine].forwards,
                "status": found[engine].status,
                "plain_forward_ms": 1e3 * median(plain),
                "ratio_to_plain_forwards": median(seconds[engine]) / median(plain),
                "direction_in_plain_forwards": median(building) / median(plain),
                "extra_bytes": peak - forward_peak,
                "largest_matrix_bytes": max(parameters),
                "parameter_bytes": sum(parameters),
            }
        )
    return rows


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
