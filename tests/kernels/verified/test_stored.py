"""The committed verdicts are on the kernels as they are, and complete; needs no verifier."""

import ast
import json
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is a Linux package")

from sharpkern import ops  # noqa: E402
from tests.kernels.verified import formulas  # noqa: E402
from tests.kernels.verified.cases import ARCHITECTURES, CASES, code_of, question  # noqa: E402
from tests.kernels.verified.edits import REASONS, replaced  # noqa: E402
from tests.kernels.verified.planted import FAULTS  # noqa: E402
from tests.kernels.verified.record import TABLE, VERIFIER, code_mark_of, committed, source_of  # noqa: E402

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def stored():
    found = committed()
    if found is None:
        pytest.skip(f"no verdicts with this Triton; there are some with {', '.join(json.loads(TABLE.read_text()))}")
    return found


def test_every_kernel_has_a_verdict():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "kernels").glob("*.py")]
    names = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    kernels = {name for name in names if name.endswith("_kernel")}
    assert kernels == {case.launch("sm_90").kernel.__name__ for case in CASES.values()} != set()


def test_the_record_is_complete(stored):
    assert stored["verifier"] == VERIFIER
    assert {name: set(rows) for name, rows in stored["cases"].items()} == {name: set(ARCHITECTURES) for name in CASES}
    assert stored["planted"].keys() == FAULTS.keys()
    for name, rows in stored["cases"].items():
        assert {row["edits"] for row in rows.values()} == {CASES[name].letters}
        assert set(CASES[name].letters) <= REASONS.keys()


@pytest.mark.parametrize("name", CASES)
def test_verdicts_are_on_these_kernels(name, stored):
    for architecture in ARCHITECTURES:
        row = stored["cases"][name][architecture]
        # A line that has moved changes the mark of the source, and not what is compiled.
        same = row["source"] == source_of(name, architecture) or row["code"] == code_mark_of(name, architecture)
        assert same, "the verdict is on another kernel: python -m bench.verified_table, with the extra verify"


def test_planted_faults_were_found(stored):
    assert {name: row["proved"] for name, row in stored["planted"].items()} == {
        name: fault.left for name, fault in FAULTS.items()
    }


def test_the_version_is_pinned():
    name, version = VERIFIER.split()
    assert f'"{name}=={version}; ' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("letter", REASONS)
def test_edited_kernels_are_still_ptx(letter, tmp_path):
    name = next(name for name, case in CASES.items() if letter in case.letters)
    (tmp_path / "kernel.ptx").write_text(question(CASES[name], "sm_80", edited=True).ptx)
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [assembler, "-arch=sm_80", "-o", tmp_path / "kernel.cubin", tmp_path / "kernel.ptx"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_marks_tell_code_apart_and_not_its_lines():
    one, eight = (question(CASES[f"form fp32, K={k}"], "sm_90", edited=False).ptx for k in ("1, ragged", "8"))
    assert one != eight
    lines = one.replace("\tret;", "\t.loc\t1 7 3 // form.py:7:3\n$L__tmp1:\n\tret;", 1)
    assert lines != one
    assert code_of(lines) == code_of(one)


def test_an_edit_that_changes_nothing_is_no_edit():
    with pytest.raises(AssertionError, match="is not in the PTX"):
        replaced("bar.sync", "", "ret;")


class TestFormulas:
    """They are what torch computes, which the kernels are compared with too."""

    def test_of_weights(self, randn):
        W, D, alpha = randn(7), randn(7), torch.tensor([0.0, -0.5, 2.0])
        torch.testing.assert_close(
            formulas.Form(torch.float64)(W, D, alpha), ops.form(W, D, alpha, dtype=torch.float64)
        )

    @pytest.mark.parametrize("zero", [None, False])
    @pytest.mark.parametrize(("rule", "num_state", "options"), [
        ("sgd", 1, {"flag": True}),
        ("lion", 1, {"decoupled": True}),
        ("adam", 2, {"decoupled": True}),
        ("rmsprop", 3, {"flag": True}),
    ])  # fmt: skip
    def test_of_steps(self, randn, rule, num_state, options, zero):
        numbers = {
            "sgd": (0.1, 1.5, 0.7, 0.9, 0.7),
            "lion": (0.1, 1.5, 0.7, 0.9, 0.1),
            "adam": (0.1, 1.5, 0.7, 0.1, 0.999, 0.001, 10.0, formulas.ROOT_OF_CORRECTION, 1e-3),
            "rmsprop": (0.1, 1.5, 0.7, 0.9, 0.1, 1e-3, 0.9),
        }[rule]
        theta, grad, alpha = randn(7), randn(7), torch.tensor([-0.5, 2.0])
        state = [randn(7) for _ in range(num_state)]
        squares = {"adam": 1, "rmsprop": 0}.get(rule)
        if squares is not None:
            # Of RMSprop, the mean of squares exceeds the square of the mean.
            state[squares] = state[squares].abs() + 9
        given = [*state, None] if rule == "adam" else state
        expected = ops.form_step(rule, theta, grad, given, alpha, numbers, **options)
        step = formulas.Step(rule, torch.float32, zero)
        torch.testing.assert_close(step(theta, grad, *state, alpha, torch.tensor(numbers)), expected)

    def test_of_norms(self, randn):
        x, alpha = randn(2, 3, 8), torch.tensor([0.0, 0.5])
        vectors = [randn(8) for _ in range(4)]
        norm = formulas.Norm(2.0**-20, torch.float32)
        flat = x.view(6, 8)
        expected = ops.rms_norm(x, *vectors[:2], alpha, eps=2.0**-20)
        torch.testing.assert_close(norm(flat, *vectors[:2], alpha), expected)
        expected = ops.layer_norm(x, *vectors, alpha, eps=2.0**-20)
        torch.testing.assert_close(norm(flat, *vectors, alpha), expected)

    def test_of_linear_layers(self, randn):
        x, W, D, alpha = randn(2, 3, 8), randn(5, 8), randn(5, 8), torch.tensor([0.0, 0.5])
        torch.testing.assert_close(formulas.Linear(torch.float32)(x, W, D, alpha), ops.linear(x, W, D, alpha))

    def test_of_sums(self, randn):
        t, d, g = randn(7), randn(7), randn(7)
        torch.testing.assert_close(formulas.Sums()(t, d, g), ops.reduce([t], [d], [g]))

    def test_of_cross_entropy(self, randn):
        maximum, total, target, logits = randn(2), randn(2).abs(), torch.zeros(2), randn(2, 9)
        labels = torch.tensor([3, 8])
        expected = formulas.OnlineCrossEntropyAtLabel()(maximum, total, logits, labels)
        ops.online_cross_entropy_(maximum, total, target, logits, labels, 0)
        torch.testing.assert_close(expected, (maximum, total, target))

    @pytest.fixture
    def randn(self):
        generator = torch.Generator().manual_seed(0)
        return lambda *shape: torch.randn(shape, generator=generator)
