"""What a measurement says of itself, and its picture."""

import math
import sys

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import sharpkern
from sharpkern import Direction, Measurement


def measured() -> Measurement:
    """L(θ − ηΔθ) = 2(1 − 2η)², η_c = 1."""
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.ones_(model.weight)
    loss_fn = lambda: model.weight.square().sum()
    loss_fn().backward()
    direction = Direction.from_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    return sharpkern.critical_sharpness(model, loss_fn, direction, rtol=1e-3)


def failed(status: str, critical_lr: float = math.nan, base_loss: float = 1.0) -> Measurement:
    sharpness = 2 / critical_lr if critical_lr else math.inf
    probes = ((0.1, 2.0), (0.2, math.nan))
    return Measurement(
        critical_lr,
        sharpness,
        (0.0, math.inf),
        base_loss,
        None,
        None,
        math.inf,
        None,
        probes,
        3,
        status,
        "virtual",
        1,
        0,
    )


ALL = [
    failed("unresolved"),
    failed("ascent", 0.0),
    failed("unbounded", 1e3),
    failed("nonfinite", base_loss=math.nan),
]


def test_print_says_it_in_a_line_and_repr_is_short() -> None:
    m = measured()
    assert str(m).startswith("λ_c 2, η_c 1 ± ")
    assert "% = 10 × lr (converged); loss 2; " in str(m)
    assert repr(m) == "Measurement(λ_c = 2, η_c = 1, converged)"
    assert m.lr == 0.1
    assert "<tr><th>η_c</th><td>1" in m._repr_html_()
    for other in ALL:
        assert f"({other.status}); loss" in str(other)
        assert "\n" not in str(other)
        assert other.status in other._repr_html_()
    assert str(ALL[2]) == "λ_c 0.002, η_c 1000 (unbounded); loss 1; 3 forward passes, 0 s, virtual engine"


def drawn(axes) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_xdata()) for line in axes.lines}


def test_the_plot_shows_probes_bracket_crossing_and_learning_rate(tmp_path) -> None:
    m = measured()
    figure = m.plot()
    (axes,) = figure.axes
    shown = drawn(axes)
    assert sorted([*shown["probes"], *shown.get("probes above", [])]) == sorted(eta for eta, _ in m.probes)
    assert shown["learning rate 0.1"][0] == 0.1
    assert shown[r"$\eta_c$ = 1"][0] == m.critical_lr
    assert "bracket" in [patch.get_label() for patch in axes.patches]
    assert axes.get_xscale() == "log"
    assert figure._repr_png_()[:4] == b"\x89PNG"
    assert m.plot(tmp_path / "m.png") is None
    assert matplotlib.image.imread(tmp_path / "m.png").ndim == 3


def test_a_finer_curve_and_axes_of_ones_own() -> None:
    m = measured()
    etas = torch.linspace(-0.2, 3.0, 17)
    losses = 2 * (1 - 2 * etas) ** 2
    axes = Figure().subplots()
    assert m.plot(ax=axes, curve=(etas, losses)) is None
    assert drawn(axes)["loss curve"] == pytest.approx(etas.tolist())
    assert axes.get_xscale() == "linear"
    # Far rises do not squeeze the fall.
    assert axes.get_ylim()[1] < 6
    with pytest.raises(ValueError, match="zip"):
        m.plot(ax=axes, curve=(etas, losses[1:]))


@pytest.mark.parametrize("m", ALL, ids=lambda m: m.status)
def test_every_status_can_be_drawn(m: Measurement, tmp_path) -> None:
    m.plot(tmp_path / "m.svg")
    assert "<svg" in (tmp_path / "m.svg").read_text()


def test_a_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plotting needs matplotlib.*pip install 'sharpkern\[plot\]'"):
        measured().plot()
