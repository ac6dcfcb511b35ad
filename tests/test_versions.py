"""The guide gives the results that the script of other versions has recorded, and what it leaves out exists."""

import json
import re
from pathlib import Path

import pytest

from tests.versions import LEFT_OUT, left_out

ROOT = Path(__file__).parents[1]
RECORDS = json.loads((ROOT / "bench" / "results" / "versions.json").read_text(encoding="utf-8"))


def test_the_table_of_versions_is_the_records() -> None:
    guide = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    latest = {}
    for record in RECORDS:
        environment = record["environment"]
        key = environment["torch"].partition("+")[0], environment["python"]
        latest[key] = f"| {' | '.join(key)} | {record['passed']} | {record['failed']} | {record['skipped']} |"
    assert re.findall(r"^\| \d+\.\d+\.\d+ \| .*\|$", guide, re.MULTILINE) == list(latest.values())


def test_the_lowest_torch_that_was_run_is_the_one_that_is_asked_for() -> None:
    (asked,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lowest = min(tuple(map(int, record["environment"]["torch"].partition("+")[0].split("."))) for record in RECORDS)
    assert lowest[:2] == tuple(map(int, asked.split(".")))


@pytest.mark.parametrize(
    "test", sorted({test for table in LEFT_OUT.values() for one in table.values() for test in one})
)
def test_what_is_left_out_exists(test: str) -> None:
    path, _, name = test.partition("::")
    source = (ROOT / path).read_text(encoding="utf-8")
    assert not name or f"def {name.partition('[')[0]}(" in source


def test_less_is_left_out_on_a_newer_torch() -> None:
    assert set(left_out("2.14.1")) < set(left_out("2.6.0"))
    assert set(left_out("2.7.0")) == set(left_out("2.14.1"))
