"""Plots: every measurement is drawn, the file is modest, and nobody's backend is touched."""

import math
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from sharpkern.measures.result import Measurement
from sharpkern.monitoring.monitor import Record
from sharpkern.monitoring.plot import plot_history


def record(step, sharpness, status="converged", lr=0.1, heldout=None):
    measurement = Measurement(
        critical_lr=2 / sharpness if sharpness else math.nan,
        sharpness=sharpness,
        bracket=(0.0, math.inf),
        base_loss=math.nan if status == "nonfinite" else 2 - step / 100,
        slope=1.0,
        directional_sharpness=None,
        error=0.01,
        exponent=None,
        probes=(),
        forwards=3,
        status=status,
        engine="virtual",
        retained=1.0,
        seconds=0.0,
    )
    return Record(step, lr, measurement, heldout)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def lines(figure):
    """What the sharpness panel shows, {label: (steps, values)}."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines}


def test_writes_a_modest_image_with_both_panels(tmp_path, drawn):
    history = [record(step, 1 + step) for step in range(0, 100, 2)]
    plot_history(history, tmp_path / "run.png", title="A run")
    height, width, _ = matplotlib.image.imread(tmp_path / "run.png").shape
    assert (width, height) == (1050, 700)
    assert (tmp_path / "run.png").stat().st_size < 150_000
    (figure,) = drawn
    sharpness, loss = figure.axes
    assert sharpness.get_yscale() == "log"
    assert list(loss.lines[0].get_ydata()) == [2 - step / 100 for step in range(0, 100, 2)]
    assert figure.get_suptitle() == "A run"


def test_the_threshold_follows_the_learning_rate(tmp_path, drawn):
    history = [record(0, 1.0, lr=0.1), record(1, 1.0, lr=0.2), record(2, 1.0, lr=None)]
    plot_history(history, tmp_path / "run.png")
    assert lines(drawn[0])[r"$2/\eta$"] == ([0, 1], [20.0, 10.0])


def test_no_measurement_is_dropped(tmp_path, drawn):
    history = [
        record(0, 1.0),
        record(1, math.inf, "ascent"),
        record(2, 3.0, "unbounded"),
        record(3, math.nan, "unresolved"),
        record(4, math.nan, "nonfinite"),
        record(5, 2.0),
    ]
    plot_history(history, tmp_path / "run.png")
    shown = lines(drawn[0])
    steps, values = shown[r"critical sharpness $\lambda_c$"]
    assert [step for step, value in zip(steps, values, strict=True) if math.isfinite(value)] == [0, 5]
    assert shown["no rise found: upper bound"] == ([2], [3.0])
    assert shown["uphill at once"][0] == [1]
    assert shown["unresolved"][0] == [3]
    assert shown["loss not finite"][0] == [4]
    named = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert set(shown) == set(named)
    assert len(named) == len(set(named))


def test_a_bound_far_below_the_curve_stands_at_the_edge_and_leaves_the_axis_alone(tmp_path, drawn):
    history = [record(0, 1.0), record(1, 2e-9, "unbounded"), record(2, 0.5, "unbounded"), record(3, 2.0)]
    plot_history(history, tmp_path / "run.png")
    axes = drawn[0].axes[0]
    assert axes.get_ylim()[0] > 0.1
    bounds = [line for line in axes.lines if line.get_label() == "no rise found: upper bound"]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in bounds] == [([2], [0.5]), ([1], [0.03])]
    # Where there is nothing but bounds they are all there is to see.
    plot_history([record(0, 2e-9, "unbounded", lr=None)], tmp_path / "run.png")
    assert lines(drawn[1])["no rise found: upper bound"] == ([0], [2e-9])


def test_held_out_and_extra_curves(tmp_path, drawn):
    held = record(0, 15.0).measurement
    history = [record(0, 5.0, heldout=held), record(2, 6.0, heldout=held)]
    plot_history(history, tmp_path / "run.png", extra={"other": [(0, 7.0), (1, -3.0), (2, 8.0)]})
    shown = lines(drawn[0])
    assert shown[r"held-out $\lambda_c$"] == ([0, 2], [15.0, 15.0])
    assert shown["other"][1][::2] == [7.0, 8.0]
    assert shown["at or below zero"][0] == [1]
    assert len(drawn[0].axes[1].lines) == 2


def test_a_single_measurement_is_visible(tmp_path, drawn):
    plot_history([record(0, 1.0)], tmp_path / "run.png")
    (line,) = (line for line in drawn[0].axes[0].lines if "critical" in line.get_label())
    assert (line.get_marker(), line.get_markevery()) == ("o", [0])


def test_a_point_between_two_gaps_is_visible(tmp_path, drawn):
    statuses = ["converged", "converged", "ascent", "converged", "unresolved", "converged", "converged"]
    history = [record(i, 1.0 + i, status) for i, status in enumerate(statuses)]
    plot_history(history, tmp_path / "run.png")
    (line,) = (line for line in drawn[0].axes[0].lines if "critical" in line.get_label())
    assert line.get_markevery() == [3]


def test_a_vector_format_by_the_ending(tmp_path):
    plot_history([record(0, 1.0), record(1, 2.0)], tmp_path / "run.svg")
    assert "<svg" in (tmp_path / "run.svg").read_text()


def test_an_empty_history_is_refused():
    with pytest.raises(
        ValueError, match="at least one record to draw, got none; call the monitor in the training loop"
    ):
        plot_history([], "never.png")


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plotting needs matplotlib.*pip install 'sharpkern\[plot\]'"):
        plot_history([record(0, 1.0)], "never.png")


def test_no_backend_is_chosen_for_the_user(tmp_path):
    # Only pyplot chooses one.
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_plot import plot_history, record
plot_history([record(0, 1.0), record(1, 2.0)], {str(tmp_path / "run.png")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
