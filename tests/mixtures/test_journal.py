"""Rows on the disk as they come."""

import json
import math

import pytest

from sharpkern.errors import SharpkernWarning
from sharpkern.mixtures.resume import ResumableLog
from tests.test_files import full_disk

SETTINGS = {"ratios": (0.0, 0.5), "seed": 0}


def test_rows_are_found_again_to_the_last_bit(tmp_path):
    path = tmp_path / "made" / "anew.jsonl"
    journal = ResumableLog(path, SETTINGS)
    rows = [{"value": 0.1 + 0.2, "task": "é"}, {"value": math.inf}, {"value": [1, None]}]
    for row in rows:
        journal.add(row)
    assert ResumableLog(path, SETTINGS).rows == journal.rows == rows
    assert ResumableLog(None, SETTINGS).rows == []


def test_a_line_that_was_not_finished_is_cut_off_and_written_anew(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = ResumableLog(path, SETTINGS)
    journal.add({"value": 1})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"value": 2')
    again = ResumableLog(path, SETTINGS)
    assert again.rows == [{"value": 1}]
    assert path.read_bytes() == whole
    again.add({"value": 2})
    assert ResumableLog(path, SETTINGS).rows == [{"value": 1}, {"value": 2}]


@pytest.mark.parametrize("content", [b"", b'{"setti'])
def test_a_file_without_a_finished_line_is_begun_anew(tmp_path, content):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    ResumableLog(path, SETTINGS).add({"value": 1})
    head, row = map(json.loads, path.read_text().splitlines())
    assert head == {"settings": {"ratios": [0.0, 0.5], "seed": 0}}
    assert row == {"run": row["run"], "value": 1}


def test_a_file_whose_rows_do_not_name_their_run_is_gone_on_with(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"settings": {"ratios": [0.0, 0.5], "seed": 0}}\n{"value": 1}\n')
    ResumableLog(path, SETTINGS).add({"value": 2})
    assert ResumableLog(path, SETTINGS).rows == [{"value": 1}, {"value": 2}]
    with pytest.warns(SharpkernWarning):
        assert ResumableLog(path, {**SETTINGS, "seed": 1}).rows == []


def test_runs_of_other_settings_are_kept_apart_in_one_file(tmp_path):
    path = tmp_path / "journal.jsonl"
    first = ResumableLog(path, SETTINGS)
    first.add({"value": 1})
    message = (
        r"other settings: seed was 0, is 1; tasks was None, is \['a'\]; they are kept, and those of these settings are "
        "measured and added"
    )
    other = {**SETTINGS, "seed": 1, "tasks": ["a"]}
    with pytest.warns(SharpkernWarning, match=message):
        second = ResumableLog(path, other)
    # Both may be at work at once.
    second.add({"value": 2})
    first.add({"value": 3})
    second.add({"value": 4})
    assert ResumableLog(path, SETTINGS).rows == first.rows == [{"value": 1}, {"value": 3}]
    assert ResumableLog(path, other).rows == second.rows == [{"value": 2}, {"value": 4}]


@pytest.mark.parametrize(
    "content", ['{"settings": {"color": "red"}}\n', '{"settings": {"ratios": [], "seed": 1}, "data": [1, 2]}\n']
)
def test_one_line_that_is_not_ours_is_not_begun_anew(tmp_path, content):
    path = tmp_path / "settings.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"settings\.json must be a journal that this function wrote, got something"):
        ResumableLog(path, SETTINGS)
    assert path.read_text(encoding="utf-8") == content


@pytest.mark.parametrize(
    "content", ["step,loss\n1,2\n", "[1]\n", '{"value": 1}\n', "\ufeff\x00\n", "one line", '{"settings": 1}\n']
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "table.csv"
    path.write_text(content, encoding="utf-16" if "\ufeff" in content else "utf-8")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"table\.csv must be a journal that this function wrote, got something else"):
        ResumableLog(path, SETTINGS)
    assert path.read_bytes() == before


def test_losses_may_differ_by_rounding_alone(tmp_path):
    path = tmp_path / "journal.jsonl"
    ResumableLog(path, SETTINGS, losses={"a": 2.0, "b": math.nan, "c": math.inf}).add({"value": 1})
    assert ResumableLog(path, SETTINGS, losses={"a": 2.001, "b": math.nan, "c": math.inf}).rows == [{"value": 1}]
    with pytest.warns(SharpkernWarning, match=r"the loss of a was 2\.0, is 2\.1; the loss of d was None, is 0\.5"):
        assert not ResumableLog(path, SETTINGS, losses={"a": 2.1, "b": math.nan, "c": math.inf, "d": 0.5}).rows


def refuse_other_rows(row):
    if row["value"] < 0:
        raise ValueError("value is negative")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"value": -1}', "value is negative"),
        ('{"other": 1}', "'value'"),
        ('{"value": "x"}', "not supported between"),
        ("[1]", "it is a list"),
        ('{"value": 1', "Expecting"),
        ('{"settings": {}}', "'value'"),
    ],
)
def test_a_row_that_was_not_written_so_is_refused_by_its_line(tmp_path, line, reason):
    path = tmp_path / "journal.jsonl"
    ResumableLog(path, SETTINGS).add({"value": 1})
    path.write_text(path.read_text() + line + "\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"rows that this function wrote, got another in line 3 \(.*{reason}.*delete"):
        ResumableLog(path, SETTINGS, check=refuse_other_rows)
    assert path.read_bytes() == before


def test_a_full_disk_leaves_whole_lines(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = ResumableLog(path, SETTINGS)
    journal.add({"value": 1})
    before = path.read_bytes()
    with full_disk(), pytest.raises(OSError, match="File too large"):
        journal.add({"value": "long " * 200})
    assert path.read_bytes() == before
    journal.add({"value": 2})
    assert ResumableLog(path, SETTINGS).rows == journal.rows == [{"value": 1}, {"value": 2}]
