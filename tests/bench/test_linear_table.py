"""Whether the way that is taken through a linear layer is the one that was measured to be quickest."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def linear_table(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("linear_table")


def sitting(shares, tokens=1024, at_once=8, gpu=None, quick=False, dtype="float32"):
    """A sitting in which ways had these shares on one shape."""
    row = {"at_once": at_once, "tokens": tokens, "dtype": dtype}
    rows = [{"way": way, "share": share, **row} for way, share in shares.items()]
    environment = {"gpu": gpu, "architecture": "sm_90" if gpu else None, "machine": "x86_64"}
    return {"environment": environment, "quick": quick, "sections": {"linear": {"cases": {"one": {"rows": rows}}}}}


def test_the_choice_agrees_with_the_committed_results(linear_table):
    found = linear_table.lines(json.loads(linear_table.RESULTS.read_text(encoding="utf-8")))
    assert {line.summary.at_once for line in found} == {1, 4, 8}
    assert [str(line) for line in found if not line.agrees] == []


@pytest.mark.parametrize(
    ("shares", "code", "said"),
    [
        ({"formed": 0.9, "products": 0.5}, 0, "takes formed: agrees"),
        ({"formed": 0.91, "products": 1.0}, 0, "takes formed: agrees"),
        ({"formed": 0.89, "products": 1.0}, 1, "takes formed: DISAGREES, 11% slower"),
        ({"products": 0.5}, 1, "takes formed: DISAGREES, 100% slower"),
    ],
    ids=["quickest", "nearly", "slower by more than a tenth", "not right, hence not timed"],
)
def test_a_choice_more_than_a_tenth_slower_is_wrong(linear_table, shares, code, said, tmp_path, capsys):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps([sitting(shares)]))
    assert linear_table.main(path) == code
    printed = capsys.readouterr().out
    assert said in printed
    assert f"{code} of 1 lines disagree with engines/virtual/linear.py" in printed


def test_only_full_passes_are_held_against_the_choice(linear_table, tmp_path, capsys):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps([sitting({"formed": 0.1, "products": 1.0}, at_once=4)]))
    assert linear_table.main(path) == 0
    assert "takes" not in capsys.readouterr().out


def test_each_architecture_counts_once_by_its_last_full_sitting(linear_table):
    old, new = sitting({"formed": 0.1, "products": 1.0}), sitting({"formed": 1.0, "products": 0.1})
    quick = sitting({"formed": 0.1, "products": 1.0}, quick=True)
    without = {**new, "sections": {}}
    gpu = sitting({"formed": 0.2, "fused": 1.0}, gpu="NVIDIA H200", dtype="bfloat16")
    found = linear_table.lines([old, new, quick, without, gpu])
    assert [(line.architecture, line.summary.dtype, line.summary.best) for line in found] == [
        ("x86_64", "float32", "formed"),
        ("sm_90", "bfloat16", "fused"),
    ]


def test_nothing_measured_is_no_agreement(linear_table, tmp_path, capsys):
    path = tmp_path / "bench.json"
    path.write_text("[]")
    assert linear_table.main(path) == 1
    assert "Nothing was measured yet" in capsys.readouterr().out
