"""The table of faults and the tests are about the same things."""

from __future__ import annotations

import re
from pathlib import Path

from equipment.trio_faults import FAULTS

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()


def test_each_fault_has_its_row_and_each_row_its_fault() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", README, re.MULTILINE)
    assert sorted(rows) == sorted(FAULTS)


def test_each_file_of_tests_is_named_and_each_named_one_exists() -> None:
    named = set(re.findall(r"(test_\w+\.py)", README))
    there = {path.name for path in HERE.glob("test_*.py")} - {Path(__file__).name}
    assert named == there


def test_each_expression_of_a_command_chooses_a_test() -> None:
    for command in re.findall(r"`pytest (\S+) -k (\w+)`", README):
        path, words = command
        names = re.findall(r"def (test_\w+)", (HERE.parents[1] / path).read_text())
        assert any(words in name for name in names), command
