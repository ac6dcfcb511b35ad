"""Figures 2 and 3 of the paper: the scripts, what the committed results show, and how numbers are made of rows."""

import importlib
import io
import pickle
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
NAMES = ("figure2", pytest.param("figure3", marks=pytest.mark.long))
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.syspath_prepend(ROOT / "bench" / "paper")


def script(name):
    return importlib.import_module(name)


def make(figure, folder, *arguments):
    script("scaffold").main(figure, ["--quick", "--output", str(folder), *map(str, arguments)])


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Each figure's quick version, run through, as the folder of its files."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make(script(name).FIGURE, made[name])
        return made[name]

    return folder


def never():
    raise AssertionError("this piece was done before")


def stop():
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", NAMES)
def test_the_quick_version_makes_table_and_picture(name, quick):
    folder = quick(name)
    rows = script("scaffold").read_rows(name, folder)
    assert len(dict.fromkeys(row["run"] for row in rows)) == 3
    assert all(row["residual"] <= script("runs").TOLERANCE for row in rows)
    assert matplotlib.image.imread(folder / f"{name}.png").ndim == 3
    assert (folder / f"{name}.json").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_that_was_stopped_goes_on_to_the_same_table(name, quick, tmp_path):
    figure = script(name).FIGURE

    def with_pieces(**changes):
        return replace(figure, pieces=lambda *given: {**figure.pieces(*given), **changes})

    first, second, _ = figure.pieces(figure.settings[1], tmp_path, None)
    with pytest.raises(KeyboardInterrupt):
        make(with_pieces(**{second: stop}), tmp_path)
    assert not (tmp_path / f"{name}.csv").exists()
    make(with_pieces(**{first: never}), tmp_path)
    assert (tmp_path / f"{name}.csv").read_bytes() == (quick(name) / f"{name}.csv").read_bytes()


@pytest.mark.parametrize(("name", "column"), [("figure2", "lambda_dir"), ("figure3", "lambda_dir_plain")])
def test_directional_sharpness_is_at_most_the_largest_eigenvalue_in_the_results(name, column):
    rows = script("scaffold").read_rows(name)
    assert len(rows) > 150
    assert all(row["residual"] <= script("runs").TOLERANCE for row in rows)
    assert all(row[column] <= row["lambda_max"] * (1 + script("runs").TOLERANCE) for row in rows)


def test_the_results_show_the_edge_of_stability():
    full = [row for row in script("scaffold").read_rows("figure2") if row["run"] == "full batch"]
    assert all(row["status"] == "converged" for row in full)
    jump = next(i for i, row in enumerate(full) if row["lambda_c"] >= row["threshold"] / 2)
    before, after = full[:jump], full[jump:]
    assert len(before) > 20
    assert len(after) > 60
    runs, median = script("runs"), script("scaffold").median
    assert max(runs.ratios(before, "lambda_c", "threshold")) < 0.1
    assert median(runs.ratios(after, "lambda_c", "threshold")) == pytest.approx(1, abs=0.1)
    assert median(runs.ratios(after, "lambda_max", "threshold")) == pytest.approx(1, abs=0.15)
    assert runs.ratios(after, "lambda_c", "lambda_dir") == pytest.approx([1] * len(after), abs=0.25)


def test_what_the_page_says_of_adamw_is_so():
    runs = script("runs").by_run(script("scaffold").read_rows("figure3"))
    assert len(runs) == 3
    for run in runs:
        assert all(row["lambda_c"] < row["two_over_lr"] for row in run if row["lambda_c"] < float("inf"))
        found = script("figure3").numbers(run)
        for phase in ("warm-up", "decay"):
            start, end = map(float, found[f"{run[0]['run']}: λ_c in the {phase}"].split(" to "))
            assert end > start
        own, other = (
            float(found[f"{run[0]['run']}: median λ_c{words} in the stable phase"].split()[0])
            for words in ("", " of another batch's loss")
        )
        assert own < other < 1


def test_results_and_pictures_are_small():
    for name in ("figure2", "figure3"):
        results = script("scaffold").RESULTS
        assert (results / f"{name}.csv").stat().st_size < 150_000
        assert (results / f"{name}.png").stat().st_size < 250_000


def sgd_rows(lambda_c, lambda_dir, lambda_max, *, own=0.4, heldout=1.0, status="converged"):
    """Rows of figure 2 with chosen curves of the full batch, 2/η = 20, and mini-batches at chosen shares of 2/η."""
    fixed = {"data": "digits", "width": 8.0, "lr": 0.1, "threshold": 20.0, "status": status}
    curves = zip(lambda_c, lambda_dir, lambda_max, strict=True)
    rows = [
        {
            "run": "full batch",
            "batch": 100.0,
            "step": float(i),
            "lambda_c": c,
            "lambda_dir": d,
            "lambda_max": h,
            **fixed,
        }
        for i, (c, d, h) in enumerate(curves)
    ]
    mini = {"lambda_c": 20 * own, "lambda_dir": 8.0, "lambda_max": 21.0, "heldout_lambda_c": 20 * heldout, **fixed}
    return rows + [{"run": "small batch", "batch": 8.0, "step": float(i), **mini} for i in range(5)]


def test_figure2_has_the_edge_of_stability_in_numbers():
    rows = sgd_rows([0.2] * 4 + [19.0] * 6, [-1.0] * 4 + [20.0] * 6, [1.0] * 3 + [22.0] * 7)
    assert script("figure2").numbers(rows) == {
        "full batch: images": "100 digits",
        "full batch: λ_max at the first step": "1",
        "full batch: first step with λ_max at 2/η": "3",
        "full batch: first step with λ_c at half of 2/η": "4",
        "before it: median and last λ_c": "0.01 × 2/η, 0.01 × 2/η",
        "before it: λ_c within 25 % of λ_dir": "0 % of 4 points, median deviation 120 %",
        "before it: λ_dir not positive": "4 of 4 points",
        "from there on: median λ_c": "0.95 × 2/η",
        "from there on: median λ_dir": "1.00 × 2/η",
        "from there on: median λ_max": "1.10 × 2/η",
        "from there on: λ_c within 25 % of λ_dir": "100 % of 6 points, median deviation 5 %",
        "batches of 8, last 40 %: median λ_c": "0.40 × 2/η",
        "batches of 8, last 40 %: median λ_max": "1.05 × 2/η",
        "batches of 8, last 40 %: median λ_c of the full set": "1.00 × 2/η",
        "all runs: largest λ_dir over λ_max": "0.91 of 15 points",
        "all runs: searches that did not converge": "none of 15",
    }


def adamw_rows(warmup, stable, decay, *, lambda_max=3e3, plain=1e3, absence=5.0, heldout=500.0):
    """Rows of figure 3 with chosen λ_c in each phase, 2/η = 1000."""
    phases = [("warm-up", c) for c in warmup] + [("stable", c) for c in stable] + [("decay", c) for c in decay]
    fixed = {"run": "η = 0.002", "two_over_lr": 1e3, "threshold": 19e3, "status": "converged"}
    own = {"lambda_dir": 200.0, "lambda_dir_plain": plain, "lambda_max": lambda_max}
    return [
        {"phase": phase, "lambda_c": c, "heldout_lambda_c": heldout, "absence": absence, **own, **fixed}
        for phase, c in phases
    ]


def test_figure3_has_the_phases_in_numbers():
    rows = adamw_rows([400.0] * 4 + [200.0] * 4, [200.0] * 6, [220.0, 300.0, 1400.0])
    rows[0] |= {"lambda_max": 2e4, "absence": INF, "heldout_status": "ascent", "heldout_lambda_c": INF}
    assert script("figure3").numbers(rows) == {
        "η = 0.002: λ_c in the warm-up": "400 to 200",
        "η = 0.002: median λ_c in the stable phase": "0.20 × 2/η",
        "η = 0.002: λ_c in the decay": "200 to 1400",
        "η = 0.002: λ_c below 2/η": "16 of 17 points",
        "η = 0.002: median λ_c of another batch's loss in the stable phase": "0.50 × 2/η",
        "after the warm-up: λ_c within 25 % of λ_dir": "78 % of 9 points, median deviation 0 %",
        "all runs: largest λ_dir of P⁻¹g over λ_max": "0.33 of 17 points",
        "all runs: λ_max above its threshold": "1 of 17 points",
        "of these in the warm-up": "1",
        "of these with a byte that no batch held before": "1 of 1",
        "of the others with such a byte": "0 of 16",
        "of the others: median λ_max over its threshold": "0.16",
        "all runs: searches that did not converge": "1 ascent of 18",
    }


def test_shares_of_rows_are_of_those_that_have_both():
    runs = script("runs")
    rows = [{"lambda_dir": value, "lambda_max": top} for value, top in [(0.5, 1.0), (0.5, NAN), (INF, 1.0), (-3, -2)]]
    assert runs.largest_share(rows, "lambda_dir") == "inf of 2 points"
    assert runs.largest_share(rows[3:], "lambda_dir") == "nan of 0 points"
    assert [runs.times(value) for value in (0.97, 0.0123, INF, NAN)] == ["0.97 × 2/η", "0.012 × 2/η", "∞", "no value"]
    percents = [script("scaffold").percent(share) for share in (0.0, 0.001, 0.5, 0.999, 1.0, NAN)]
    assert percents == ["0 %", "1 %", "50 %", "99 %", "100 %", "no value"]


@pytest.mark.parametrize(
    ("rows", "name", "value"),
    [
        (sgd_rows([9.8] * 3, [9.0] * 3, [10.0] * 3), "first step with λ_c at half of 2/η", "never"),
        (sgd_rows([9.8] * 3, [9.0] * 3, [10.0] * 3), "first step with λ_max at 2/η", "never"),
        (sgd_rows([19.0] * 3, [9.0] * 3, [10.0] * 3), "median and last λ_c", "no value"),
        (sgd_rows([NAN, 19.0], [1.0] * 2, [10.0] * 2), "before it: λ_c within 25 %", "0 % of 0 points"),
        (sgd_rows([NAN] * 2, [NAN] * 2, [NAN] * 2, own=NAN, heldout=NAN), "from there on: median λ_c", "no value"),
        (sgd_rows([INF] * 2, [1.0] * 2, [INF] * 2, own=INF, heldout=INF), "from there on: median λ_c", "∞"),
        (sgd_rows([19.0] * 2, [1.0] * 2, [9.0] * 2, status="unbounded"), "did not converge", "7 unbounded of 7"),
    ],
)  # fmt: skip
def test_figure2_tells_odd_rows_truly_and_draws_them(rows, name, value, tmp_path):
    assert next(text for key, text in script("figure2").numbers(rows).items() if name in key).startswith(value)
    script("figure2").draw([{"loss": 1.0, "heldout_status": "converged", **row} for row in rows], tmp_path / "x.png")


@pytest.mark.parametrize(
    ("rows", "name", "value"),
    [
        (adamw_rows([INF] * 4, [INF] * 3, [INF] * 3), "in the warm-up", "∞ to ∞"),
        (adamw_rows([400.0, 200.0], [298.0] * 3, []), "in the decay", "298 to no value"),
        (adamw_rows([], [], [300.0] * 3), "in the warm-up", "no value to no value"),
        (adamw_rows([], [], [300.0] * 3), "median λ_c in the stable phase", "no value"),
        (adamw_rows([4.0] * 2, [4.0] * 2, [4.0] * 2, lambda_max=NAN), "above its threshold", "0 of 0 points"),
        (adamw_rows([4.0] * 2, [4.0] * 2, [4.0] * 2, lambda_max=2e4), "above its threshold", "6 of 6 points"),
    ],
)
def test_figure3_tells_odd_rows_truly(rows, name, value):
    assert next(text for key, text in script("figure3").numbers(rows).items() if name in key) == value


def test_no_measurement_is_left_out_of_the_picture(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: figures.append(figure))
    statuses = ("converged", "ascent", "unbounded", "unresolved", "nonfinite", "converged")
    values = (1.0, float("inf"), 0.5, float("nan"), float("nan"), 2.0)
    rows = sgd_rows(values, [-1.0] * 6, [3.0, NAN, 3.0, INF, 3.0, 3.0])
    for row, status in zip(rows, statuses, strict=False):
        row |= {"status": status, "loss": 1.0}
    script("figure2").draw([{"loss": 1.0, "heldout_status": "converged", **row} for row in rows], tmp_path / "x.png")
    (figure,) = figures
    (legend,) = figure.legends
    labels = {text.get_text() for text in legend.get_texts()}
    meanings = {
        "uphill at once",
        "no rise found: upper bound",
        "unresolved",
        "loss not finite",
        "at or below zero",
        "no value",
    }
    assert meanings < labels
    drawn = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert [drawn[meaning] for meaning in ("uphill at once", "unresolved", "loss not finite")] == [[1], [3], [4]]
    assert drawn["at or below zero"] == list(range(6))
    assert drawn["no value"] == [1, 3]


def test_all_sharpnesses_of_a_quadratic_agree():
    curvatures = torch.tensor([1.0, 3.0, 2.0] + [0.5] * 9)
    model = nn.Linear(12, 1, bias=False)
    nn.init.zeros_(model.weight)
    with torch.no_grad():
        model.weight[0, 1] = 1.0
    for optimizer in (torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.AdamW(model.parameters(), lr=0.1)):
        gauge = script("runs").Gauge(model, optimizer, due=lambda step: step > 0)
        rows = []
        for _ in range(2):
            optimizer.zero_grad()
            loss_fn = lambda: 0.5 * (curvatures * model.weight**2).sum()
            loss_fn().backward()
            rows.append(gauge(loss_fn, heldout=loss_fn))
            optimizer.step()
        assert rows[0] is None
        row = rows[1]
        assert row["lambda_c"] == pytest.approx(row["heldout_lambda_c"], rel=0.01)
        assert row["lambda_c"] == pytest.approx(row["lambda_dir"], rel=0.01)
        if type(optimizer) is torch.optim.SGD:
            # The weight lies along the largest eigenvector.
            assert row["lambda_max"] == pytest.approx(3, rel=1e-3)
            assert row["lambda_dir"] == pytest.approx(3, rel=1e-3)
            assert row["threshold"] == 20
        else:
            assert row["lambda_dir_plain"] <= row["lambda_max"]
            assert row["threshold"] == pytest.approx(380 - 0.01)


class Python2Pickler(pickle._Pickler):
    """Writes pickles as Python 2 did, whose strings were bytes: what CIFAR-10's files are."""

    def save_string(self, value):
        data = value if isinstance(value, bytes) else value.encode()
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_string, str: save_string}  # noqa: RUF012


def write_batch(path, pixels, labels, **more):
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump({"data": pixels, "labels": labels, "filenames": ["a.png"], **more})
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(buffer.getvalue().replace(b"numpy._core", b"numpy.core"))


@pytest.fixture
def cifar(tmp_path):
    """A folder of CIFAR-10's form: two files of 200 images."""
    generator = np.random.default_rng(0)
    for i in (1, 2):
        pixels = generator.integers(0, 256, (200, 3072)).astype(np.uint8)
        write_batch(
            tmp_path / "cifar-10-batches-py" / f"data_batch_{i}", pixels, generator.integers(10, size=200).tolist()
        )
    return tmp_path


def test_cifar_is_read_from_files_of_python_2(cifar):
    inputs, labels = script("cifar").cifar10(cifar, 300)
    assert (inputs.shape, inputs.dtype, labels.shape, labels.dtype) == ((300, 3072), torch.float32, (300,), torch.int64)
    colors = inputs.view(300, 3, 1024)
    assert torch.allclose(colors.mean((0, 2)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(colors.std((0, 2)), torch.ones(3))
    again, _ = script("cifar").cifar10(cifar / "cifar-10-batches-py", 300)
    assert torch.equal(inputs, again)
    with pytest.raises(
        ValueError, match=r"data_batch_3 must be a file of CIFAR-10, .*No such file.*unpack cifar-10-python"
    ):
        script("cifar").cifar10(cifar, 500)


def test_figure2_takes_cifar(cifar, tmp_path, capsys):
    make(script("figure2").FIGURE, tmp_path / "made", "--data", cifar)
    assert "| full batch: images | 200 images of CIFAR-10 |" in capsys.readouterr().out
    rows = script("scaffold").read_rows("figure2", tmp_path / "made")
    assert {(row["width"], row["lr"]) for row in rows} == {(16, 0.03)}


def test_a_file_that_is_not_cifar_is_refused_by_name(cifar, tmp_path):
    path = cifar / "cifar-10-batches-py" / "data_batch_1"
    ran = tmp_path / "ran"
    path.write_bytes(pickle.dumps(Evil(ran)))
    with pytest.raises(ValueError, match=r"data_batch_1 must be a file of CIFAR-10, got one that fails \(it asks for"):
        script("cifar").cifar10(cifar, 1)
    assert not ran.exists()
    path.write_bytes(b"words")
    with pytest.raises(ValueError, match=r"must be a file of CIFAR-10, got one that fails"):
        script("cifar").cifar10(cifar, 1)
    for pixels, labels in (
        (np.zeros((2, 3071), np.uint8), [1, 2]),
        (np.zeros((2, 3072), np.float32), [1, 2]),
        (np.zeros((2, 3072), np.uint8), [1, 10]),
        (None, [1, 2]),
    ):
        write_batch(path, pixels, labels)
        with pytest.raises(ValueError, match=r"n labels of 0 to 9, got others|got one that fails \('NoneType'"):
            script("cifar").cifar10(cifar, 1)


class Evil:
    """Runs code when an ordinary unpickler loads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_warm_ups_are_summed_up_by_their_quarters():
    warm_up = script("warm_up")
    rows = warm_up.train("as in figure 3", replace(warm_up.BASE, warm_up=8, rows=2), seed=0, measurements=8)
    assert [row["share"] for row in rows] == [k / 8 for k in range(8)]
    # At the first step m is a tenth of the gradient, and √v √0.05 of it.
    assert rows[0]["uncorrected"] == pytest.approx(rows[0]["lambda_c"] * 0.1 / 0.05**0.5)
    values = [1, 1, 8, 8, 4, 4, 2, 2]
    planted = [{**row, "lambda_c": one, "status": "converged"} for row, one in zip(rows, values, strict=True)]
    numbers = warm_up.numbers(planted)
    assert numbers["as in figure 3"] == "1 / 8 / 4 / 2, has fallen at the end with 1 of 1 seeds"
