"""The page of habits: every row names existing tests."""

import re
from pathlib import Path

import pytest

from finesteer_hf.testing import FEATURES


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "habits.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines() if line.startswith("|")]
HABITS = {habit: (said, shown) for habit, said, shown in ROWS[2:]}
KNOWN = {
    name
    for file in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))
}


def test_it_is_a_table_of_habits():
    assert len(HABITS) == len(ROWS) - 2 == 25


@pytest.mark.parametrize("habit", HABITS)
def test_the_tests_of_a_habit_exist(habit):
    said, shown = HABITS[habit]
    named = re.findall(r"`(test_\w+)(?:\[(\w+)\])?`", shown)
    assert said and len(named) >= 2 and len(named) == shown.count("`") // 2
    assert {name for name, _ in named} <= KNOWN
    assert {feature for _, feature in named if feature} <= set(FEATURES)
