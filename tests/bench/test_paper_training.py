"""Figures 2 and 3 of the paper: the scripts, what the committed results show, and that the words follow the numbers."""

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
NAMES = ("figure2", "figure3")


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
    assert all(row["residual"] <= script("gauge").TOLERANCE for row in rows)
    assert matplotlib.image.imread(folder / f"{name}.png").ndim == 3
    assert (folder / f"{name}.json").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_that_was_stopped_goes_on_to_the_same_table(name, quick, tmp_path):
    figure = script(name).FIGURE

    def with_pieces(**changes):
        return replace(figure, pieces=lambda order: {**figure.pieces(order), **changes})

    first, second, _ = figure.pieces(script("scaffold").Order(True, tmp_path))
    with pytest.raises(KeyboardInterrupt):
        make(with_pieces(**{second: stop}), tmp_path)
    assert not (tmp_path / f"{name}.csv").exists()
    make(with_pieces(**{first: never}), tmp_path)
    assert (tmp_path / f"{name}.csv").read_bytes() == (quick(name) / f"{name}.csv").read_bytes()


@pytest.mark.parametrize(("name", "column"), [("figure2", "lambda_dir"), ("figure3", "lambda_dir_plain")])
def test_directional_sharpness_is_at_most_the_largest_eigenvalue_in_the_results(name, column):
    rows = script("scaffold").read_rows(name)
    assert len(rows) > 150
    assert all(row["residual"] <= script("gauge").TOLERANCE for row in rows)
    assert all(row[column] <= row["lambda_max"] * (1 + script("gauge").TOLERANCE) for row in rows)


def test_the_results_show_the_edge_of_stability():
    full = [row for row in script("scaffold").read_rows("figure2") if row["run"] == "full batch"]
    assert all(row["status"] == "converged" for row in full)
    jump = next(i for i, row in enumerate(full) if row["lambda_c"] >= row["threshold"] / 2)
    before, after = full[:jump], full[jump:]
    assert len(before) > 20
    assert len(after) > 60
    facts = script("facts")
    assert max(facts.ratios(before, "lambda_c", "threshold")) < 0.1
    assert facts.median(facts.ratios(after, "lambda_c", "threshold")) == pytest.approx(1, abs=0.1)
    assert facts.median(facts.ratios(after, "lambda_max", "threshold")) == pytest.approx(1, abs=0.15)
    assert facts.ratios(after, "lambda_c", "lambda_dir") == pytest.approx([1] * len(after), abs=0.25)


def test_results_and_pictures_are_small():
    for name in NAMES:
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


def test_figure2_tells_of_the_edge_of_stability():
    said = script("figure2").findings(sgd_rows([0.2] * 4 + [19.0] * 6, [-1.0] * 4 + [20.0] * 6, [1.0] * 3 + [22.0] * 7))
    assert "learns 100 digits, with η = 0.1, so 2/η = 20." in said
    assert "λ_max starts at 1 and has reached 2/η by step 3." in said
    assert "first time at step 4: its median until then is 0.01 × 2/η, and its last value before 0.01 × 2/η." in said
    assert (
        "medians are 0.95 × 2/η (λ_c), 1.00 × 2/η (λ_dir), 1.10 × 2/η (λ_max), and λ_c is within 25 % of λ_dir" in said
    )
    assert "at 100 % of 6 points (median deviation 5 %, largest 5 %)" in said
    assert "λ_dir is at most λ_max at all 15 points; the largest ratio is 0.91." in said
    assert "at 0 % of 4 points (median deviation 120 %, largest 120 %), and λ_dir is not positive at 4." in said
    assert "With batches of 8 the medians over the last 40 % are 0.40 × 2/η (λ_c), 1.05 × 2/η (λ_max), 1.00" in said
    assert "own λ_c ends more than 25 % below 2/η in 1 of 1 such runs" in said
    assert "of the full training set along the same update within 25 % of it in 1 of 1;" in said
    assert "did not converge" not in said


def test_figure2_tells_the_opposite_when_the_numbers_are_the_opposite():
    said = script("figure2").findings(sgd_rows([0.2] * 10, [1.5] * 10, [1.0] * 10, own=1.0, heldout=0.5))
    assert "λ_max starts at 1 and never reaches 2/η: its largest value is 1." in said
    assert "λ_c does not reach half of 2/η: it is at most 0.01 × 2/η." in said
    assert "λ_dir exceeds λ_max by more than the solver's 1 % at 10 of 15 points; the largest ratio is 1.50." in said
    assert "λ_dir is not positive" not in said
    assert "ends more than 25 % below 2/η in 0 of 1 such runs" in said
    assert "within 25 % of it in 0 of 1;" in said
    said = script("figure2").findings(sgd_rows([19.0, 40.0], [20.0, 20.0], [22.0, 22.0], status="unbounded"))
    assert "first time at step 0. From" in said
    assert "at 50 % of 2 points (median deviation 52 %, largest 100 %)" in said
    assert "before λ_c is at half" not in said
    assert "Of 7 measurements of λ_c some did not converge: 7 unbounded (no rise found, λ_c is an upper bound)." in said


def adamw_rows(warmup, stable, decay, *, lambda_max=3e3, plain=1e3, absence=5.0, heldout=500.0):
    """Rows of figure 3 with chosen λ_c in each phase, 2/η = 1000."""
    phases = [("warm-up", c) for c in warmup] + [("stable", c) for c in stable] + [("decay", c) for c in decay]
    fixed = {"run": "η = 0.002", "two_over_lr": 1e3, "threshold": 19e3, "status": "converged"}
    own = {"lambda_dir": 200.0, "lambda_dir_plain": plain, "lambda_max": lambda_max}
    return [
        {"phase": phase, "lambda_c": c, "heldout_lambda_c": heldout, "absence": absence, **own, **fixed}
        for phase, c in phases
    ]


def test_figure3_tells_what_the_paper_found_where_it_is_so():
    said = script("figure3").findings(adamw_rows([400.0] * 4 + [200.0] * 4, [200.0] * 6, [220.0, 300.0, 400.0]))
    assert (
        "At η = 0.002 λ_c falls from 400 to 200 in the warm-up, has a median of 0.20 × 2/η in the stable phase" in said
    )
    assert "rises from 200 to 400 in the decay; it is below 2/η at all 17 points." in said
    assert "After the warm-up λ_c is within 25 % of λ_dir at 78 % of 9 points" in said
    assert "λ_dir of P⁻¹g is at most λ_max at all 17 points; the largest ratio is 0.33." in said
    assert "In the warm-up λ_c falls in all runs, as in the paper." in said
    assert "In the decay λ_c rises in all runs, as in the paper." in said
    assert "λ_max is above its own threshold at 0 of 17 points; its median is 0.16 of it." in said
    assert "a median of 0.50 × 2/η (η = 0.002)" in said


def test_figure3_tells_the_opposite_when_the_numbers_are_the_opposite():
    rows = adamw_rows(
        [100.0] * 4 + [1500.0] * 4, [1500.0] * 6, [900.0] * 3, lambda_max=9e5, plain=1e6, absence=float("inf")
    )
    rows[0] |= {"lambda_max": 1e6, "absence": 3.0, "heldout_status": "ascent", "heldout_lambda_c": float("inf")}
    said = script("figure3").findings(rows)
    assert "λ_c rises from 100 to 1500 in the warm-up" in said
    assert "falls from 1500 to 900 in the decay; it is below 2/η at 7 of 17 points." in said
    assert "λ_dir of P⁻¹g exceeds λ_max by more than the solver's 1 % at 16 of 17 points" in said
    assert "In 1 of 1 runs λ_c rises in the warm-up, where the paper has it fall." in said
    assert "In 1 of 1 runs λ_c falls in the decay, where the paper has it rise." in said
    assert "above its own threshold at 17 of 17 points, 8 of them in the warm-up" in said
    assert "8 of them in the warm-up. At 16 of the 17 the batch holds a byte that no batch held before: P" in said
    assert "Of 18 measurements of λ_c some did not converge: 1 ascent (uphill at once, λ_c = ∞)." in said


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([(1.005, 1.0), (0.5, 1.0)], "at most λ_max within the solver's 1 % at all 2 points, and above it by less than "
         "that at 1; the largest ratio is 1.00."),
        ([(0.5, 1.0), (0.5, NAN), (INF, 1.0)], "at most λ_max at all 1 points that have both, which 2 have not; the"),
        ([(-3.0, -2.0), (0.5, 1.0)], "at all 2 points; the largest ratio where λ_max is positive is 0.50."),
        ([(-3.0, -2.0)], "λ_dir is at most λ_max at all 1 points."),
        ([(NAN, 1.0)], "At no point have both λ_dir and λ_max a value."),
    ],
)  # fmt: skip
def test_the_bound_by_the_largest_eigenvalue_in_words(pairs, words):
    rows = [{"lambda_dir": value, "lambda_max": top} for value, top in pairs]
    assert words in script("facts").bound(rows, "lambda_dir", "λ_dir", 0.01)


@pytest.mark.parametrize(
    ("rows", "words", "never"),
    [
        (sgd_rows([9.8] * 3, [9.0] * 3, [10.0] * 3), "reach half of 2/η: it is at most 0.49 × 2/η.", "before λ_c"),
        (sgd_rows([9.8] * 3, [9.0] * 3, [10.0] * 3), "With the full batch λ_c is within 25 % of λ_dir at", "not pos"),
        (sgd_rows([0.2, 19.0], [1.0] * 2, [10.0] * 2)[:2], "its last value before 0.01 × 2/η", "such runs"),
        (sgd_rows([NAN, 19.0], [1.0] * 2, [NAN, 10.0]), "starts at 10 (at step 1, the first with a value)", "nan"),
        (sgd_rows([NAN, 19.0], [1.0] * 2, [10.0] * 2), "before λ_c is at half of 2/η, at no point have both", "nan"),
        (sgd_rows([NAN] * 2, [NAN] * 2, [NAN] * 2, own=NAN, heldout=NAN), "λ_c has no value at any step.", "nan"),
        (sgd_rows([INF] * 2, [1.0] * 2, [INF] * 2, own=INF, heldout=INF), "λ_max has no value at any step.", "nan"),
    ],
)  # fmt: skip
def test_figure2_tells_odd_rows_truly_and_draws_them(rows, words, never, tmp_path):
    said = script("figure2").findings(rows)
    assert words in said
    assert never not in said
    script("figure2").draw([{"loss": 1.0, "heldout_status": "converged", **row} for row in rows], tmp_path / "x.png")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (adamw_rows([200.0] * 4, [200.0] * 3, [200.0] * 3), "In 1 of 1 runs λ_c stays the same in the warm-up, where"),
        (adamw_rows([INF] * 4, [INF] * 3, [INF] * 3), "stays at ∞ in the warm-up, has a median of ∞ × 2/η in the"),
        (adamw_rows([INF] * 4, [INF] * 3, [INF] * 3), "In 1 of 1 runs λ_c stays the same in the decay, where the"),
        (adamw_rows([400.0, 200.0], [298.0] * 3, []), "phase, and is not known at both ends in the decay; it is"),
        (adamw_rows([400.0, 200.0], [298.0] * 3, []), "In the warm-up λ_c falls in all runs, as in the paper. In 1 of"),
        (adamw_rows([], [], [300.0] * 3), "is not known at both ends in the warm-up, has no value in the stable"),
        (adamw_rows([NAN] * 2, [NAN] * 2, [NAN] * 2, lambda_max=NAN, plain=NAN, heldout=NAN), "λ_c has no value."),
        (adamw_rows([4.0] * 2, [4.0] * 2, [4.0] * 2, lambda_max=NAN), "The preconditioned λ_max has no value."),
        (adamw_rows([4.0] * 2, [4.0] * 2, [4.0] * 2, lambda_max=2e4), "a byte that no batch held before. λ_c"),
    ],
)  # fmt: skip
def test_figure3_tells_odd_rows_truly(rows, words):
    said = script("figure3").findings(rows)
    assert words in said
    assert "nan" not in said
    assert "In the decay λ_c rises in all runs" not in said


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
        gauge = script("gauge").Gauge(model, optimizer, due=lambda step: step > 0)
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
    with pytest.raises(ValueError, match=r"data_batch_3 must be a file of CIFAR-10, got none; unpack cifar-10-python"):
        script("cifar").cifar10(cifar, 500)


def test_figure2_takes_cifar(cifar, tmp_path, capsys):
    make(script("figure2").FIGURE, tmp_path / "made", "--data", cifar)
    assert "4 linear layers of width 16 and learns 200 images of CIFAR-10, with η = 0.03" in capsys.readouterr().out


def test_a_file_that_is_not_cifar_is_refused_by_name(cifar, tmp_path):
    path = cifar / "cifar-10-batches-py" / "data_batch_1"
    ran = tmp_path / "ran"
    path.write_bytes(pickle.dumps(Evil(ran)))
    with pytest.raises(
        ValueError, match=r"data_batch_1 must be a pickle of CIFAR-10, got one that fails \(it asks for"
    ):
        script("cifar").cifar10(cifar, 1)
    assert not ran.exists()
    path.write_bytes(b"words")
    with pytest.raises(ValueError, match=r"must be a pickle of CIFAR-10, got one that fails"):
        script("cifar").cifar10(cifar, 1)
    for pixels, labels in (
        (np.zeros((2, 3071), np.uint8), [1, 2]),
        (np.zeros((2, 3072), np.float32), [1, 2]),
        (np.zeros((2, 3072), np.uint8), [1, 10]),
        (None, [1, 2]),
    ):
        write_batch(path, pixels, labels)
        with pytest.raises(
            ValueError, match=r"must hold pixels, uint8 \[n, 3072\], and n labels of 0 to 9, got others"
        ):
            script("cifar").cifar10(cifar, 1)


class Evil:
    """Runs code when an ordinary unpickler loads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
