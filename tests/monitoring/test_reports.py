"""What a Monitor tells of its history: blocks, summary, lines of JSON, data frames, pictures of runs."""

import json
import math
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import sharpkern
from sharpkern.monitoring.plot import draw_history
from sharpkern.monitoring.reports import RunSummary
from tests.monitoring.test_monitor import Loop
from tests.monitoring.test_plot import record


def test_blocks_are_measured_logged_and_listed(tmp_path: Path) -> None:
    sent: list[dict[str, float]] = []
    loop = Loop(every=2, blocks=True, log=lambda values, step: sent.append(values))
    loop.run(5)
    assert [list(r.blocks) for r in loop.monitor.history] == [["0", "2", "4"]] * 3
    for values, r in zip(sent, loop.monitor.history, strict=True):
        assert values["sharpness/by_block/4"] == r.blocks["4"].sharpness
        assert (values["sharpness/lr"], values["sharpness/loss"]) == (0.1, r.measurement.base_loss)
        assert sum(m.slope for m in r.blocks.values()) == pytest.approx(r.measurement.slope)
    # Each block's next search starts warm.
    assert sum(m.forwards for m in loop.monitor.history[2].blocks.values()) < 15
    loop.monitor.to_csv(tmp_path / "run.csv")
    assert "by_block/0,by_block/2,by_block/4" in (tmp_path / "run.csv").read_text().splitlines()[0]
    # The run is the run without them.
    assert all(map(math.isfinite, (m.sharpness for m in loop.monitor.history[2].blocks.values())))
    plain = Loop(every=2)
    plain.run(5)
    assert [r.measurement.critical_lr for r in plain.monitor.history] == [
        r.measurement.critical_lr for r in loop.monitor.history
    ]


def test_blocks_of_ones_own_and_bad_ones() -> None:
    loop = Loop(blocks={"first": "0.*", "rest": ["2", "4"]})
    loop.run(1)
    assert list(loop.monitor.history[0].blocks) == ["first", "rest"]
    with pytest.raises(ValueError, match="got '9', which matches none"):
        Loop(blocks={"none": "9"})
    with pytest.raises(TypeError, match="blocks must map names to what moves, got list"):
        Loop(blocks=["0"])


def test_the_heat_map_has_a_row_for_every_block_and_a_column_for_every_step(tmp_path: Path) -> None:
    loop = Loop(every=2, blocks=True)
    loop.run(5)
    figure = loop.monitor.plot_blocks()
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2", "4"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2", "4"]
    values = axes.images[0].get_array()
    assert values[2, 1] == loop.monitor.history[1].blocks["4"].sharpness
    loop.monitor.plot_blocks(tmp_path / "blocks.png")
    assert (tmp_path / "blocks.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="must hold λ_c of blocks to draw, got none; pass Monitor"):
        Loop().monitor.plot_blocks()


def test_each_measurement_is_a_line_of_the_file_as_it_is_made(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    loop = Loop(every=2, log=path)
    for count in (1, 2, 3):
        loop.run(2)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(0, 2 * count, 2))
    assert rows[-1]["lambda_c"] == loop.monitor.history[-1].measurement.sharpness
    assert rows[-1]["status"] == "converged"
    # A crash has torn the last line: the next one is whole.
    path.write_bytes(path.read_bytes()[:-20])
    loop.run(2)
    lines = path.read_text().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[-1])["step"] == 6


def test_numbers_that_json_has_not_are_null(tmp_path: Path) -> None:
    loop = Loop(log=str(tmp_path / "run.jsonl"), max_forwards=2)
    loop.run(1)
    (row,) = map(json.loads, (tmp_path / "run.jsonl").read_text().splitlines())
    assert (row["status"], row["lambda_c"]) == ("unresolved", None)


HISTORY = [
    record(0, 1.0, lr=0.01),
    record(1, math.inf, "ascent", lr=0.1),
    record(2, 15.0, lr=0.1),
    record(3, 30.0, lr=0.1),
    record(4, 2.0, lr=0.1),
    record(5, 25.0, lr=0.1),
    record(6, 19.0, lr=0.1),
    record(7, 3.0, "unbounded", lr=0.1),
]


def test_the_summary_says_where_the_run_stands() -> None:
    found = RunSummary.of(HISTORY, num_skipped=2)
    assert found.largest == (3, 30.0)
    assert found.smallest_headroom == (1, 0.0)
    assert found.at_edge_since == 1
    assert found.statuses == {"converged": 6, "ascent": 1, "unbounded": 1}
    assert (found.num_measured, found.num_skipped, found.forwards) == (8, 2, 24)
    assert str(found).splitlines() == [
        "measured: 8 steps: 6 converged, 1 ascent, 1 unbounded, 2 skipped",
        "largest λ_c: 30 at step 3",
        "smallest η_c / lr: 0 at step 1",
        "at the edge: since step 1",
        "cost: 24 forward passes, 0 s",
    ]
    assert "<tr><th>largest λ_c</th><td>30 at step 3</td></tr>" in found._repr_html_()
    assert RunSummary.of(HISTORY[:1], 0).at_edge_since is None
    assert "at the edge: not at the end" in str(RunSummary.of(HISTORY[:1], 0))
    assert str(RunSummary.of([], 0)) == "measured: 0 steps: \ncost: 0 forward passes, 0 s"


def test_the_summary_counts_blocks_and_held_out_losses() -> None:
    loop = Loop(blocks=True)
    loop.run(2, heldout=loop.loss)
    every = [m for r in loop.monitor.history for m in (r.measurement, r.heldout, *r.blocks.values())]
    assert loop.monitor.summary().forwards == sum(m.forwards for m in every)
    assert loop.monitor._repr_html_() == loop.monitor.summary()._repr_html_()


def test_a_data_frame_by_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(every=2, blocks=True)
    assert len(loop.monitor.to_pandas()) == 0
    loop.run(3)
    frame = loop.monitor.to_pandas()
    assert list(frame.index) == [0, 2]
    assert frame["by_block/0"][2] == loop.monitor.history[1].blocks["0"].sharpness
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"a data frame needs pandas.*pip install 'sharpkern\[pandas\]'"):
        loop.monitor.to_pandas()


def test_runs_are_compared_in_one_picture(tmp_path: Path) -> None:
    loops = [Loop(lr=lr) for lr in (0.1, 0.2, 0.3)]
    for loop in loops:
        loop.run(2)
    first, second, third = (loop.monitor for loop in loops)
    figure = first.plot(runs=[second, third])
    labels = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(labels[r"$\lambda_c$ of run 3"].get_ydata()) == [r.measurement.sharpness for r in third.history]
    assert len(figure.axes[2].lines) == 3
    axes = Figure().subplots()
    assert first.plot(ax=axes, runs={"twice": second}) is None
    assert r"$\lambda_c$ of twice" in [line.get_label() for line in axes.lines]
    assert first.plot(tmp_path / "runs.png", runs=[second]) is None
    assert (tmp_path / "runs.png").exists()


def test_the_schedule_stands_beside_the_band_of_critical_learning_rates() -> None:
    loop = Loop()
    loop.run(6)
    _, axes, _ = loop.monitor.plot().axes
    (band,) = axes.collections
    values = [r.measurement.critical_lr for r in loop.monitor.history]
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(min(values))
    assert list(axes.lines[1].get_ydata()) == [0.1] * 6


def limits(*sharpness: float, lr: float | None) -> tuple[Figure, float, float]:
    axes = Figure().subplots()
    draw_history(axes, [record(i, value, lr=lr) for i, value in enumerate(sharpness)])
    return axes, *axes.get_ylim()


def test_neither_an_outlier_nor_a_far_threshold_squeezes_the_axis() -> None:
    bulk = [1 + i / 20 for i in range(20)]
    axes, low, high = limits(*bulk, 1e6, 1e-6, lr=None)
    assert 0.1 < low < 1
    assert 2 < high < 20
    marked = {tuple(line.get_xdata()) for line in axes.lines if line.get_label() == "beyond the axis"}
    assert marked == {(20,), (21,)}
    axes, _, high = limits(*bulk, lr=1e-5)
    assert high < 20
    assert [text.get_text() for text in axes.texts] == ["2/η from 2e+05 to 2e+05, off the axis"]
    # A bound is marked too where it lies below.
    axes = Figure().subplots()
    history = [record(i, value) for i, value in enumerate(bulk)]
    draw_history(axes, [*history, record(20, 0.15, "unbounded"), record(21, 0.9, "unbounded")])
    assert axes.get_ylim()[0] > 0.15
    assert [list(line.get_xdata()) for line in axes.lines if line.get_label() == "beyond the axis"] == [[20]]
    # A near one is seen.
    axes, _, high = limits(*bulk, lr=0.5)
    assert 4 < high < 20
    assert not axes.texts


def test_helps_list_the_public_names() -> None:
    import pydoc

    text = pydoc.plain(pydoc.render_doc(sharpkern))
    assert all(name in text for name in ("losses_along(", "blockwise_critical_sharpness(", "class Monitor"))
