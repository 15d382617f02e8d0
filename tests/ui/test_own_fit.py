"""Pasted pairs become rows, and rows an adapter in a zip file."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from finesteer_hf import SteeringAdapter
from finesteer_hf.errors import DatasetError
from finesteer_hf.ui.answers import Question, answer_pair
from finesteer_hf.ui.own_fit import MOST_PAIRS, Fitted, Step, Wish, example_pairs, fit_own, read_pairs
from finesteer_hf.ui.workbench import Workbench


ROW = {"prompt": "Are bats blind?", "chosen": "No, they see.", "rejected": "Yes."}


@pytest.mark.parametrize(
    "text",
    [
        "Are bats blind?\tNo, they see.\tYes.",
        "Prompt\tWanted\tUnwanted\n\nAre bats blind? \tNo, they see.\tYes.\n",
        'Are bats blind?, "No, they see.", Yes.',
        'question,chosen,rejected\nAre bats blind?,"No, they see.",Yes.',
        json.dumps(ROW),
        json.dumps({"Question": "Are bats blind?", "wanted": "No, they see.", "unwanted": "Yes.", "id": 3}),
    ],
)
def test_pairs_are_read_in_each_form(text: str) -> None:
    assert read_pairs(text) == [ROW]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n", "no pairs yet"),
        ("a\tb\tc\na\tb", "Line 2 has 2 parts between tabs, not 3: 'a.tb'"),
        ("Are bats blind?", "Line 1 has 1 part between commas"),
        ("a, b, c, d", "Put a text with commas in double quotes"),
        ("a\t\tc", "Line 1: the chosen is empty"),
        ("a\tb\tb", "Line 1: both answers are the same"),
        ("prompt\twanted\tunwanted", "header and no pair"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": ', "Line 2 is not valid JSON"),
        ('{"prompt": "a", "chosen": "b"}', r"Line 1 has no \['rejected'\]; it has \['chosen', 'prompt'\]"),
        ('{"prompt": "a", "chosen": "b", "rejected": 3}', "the rejected is not a text"),
        ("a\tb\tc\n" * (MOST_PAIRS + 1), "finesteer fit MODEL"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_pairs(text)


@pytest.mark.slow
def test_a_fit_tells_its_progress_and_ends_in_a_zip(bench: Workbench, tmp_path: Path) -> None:
    pairs = "\n".join(example_pairs(bench).splitlines()[:13])
    *steps, fitted = fit_own(bench, Wish(pairs, "my own", "CAA"))
    assert steps and all(isinstance(step, Step) and 0 <= step.done <= step.total for step in steps)
    assert isinstance(fitted, Fitted) and fitted.rows == 12 and fitted.name == "my-own"
    *_, last = answer_pair(bench, Question("Tell me something about shaved hair.", fitted.name))
    assert last.done and last.steered
    with zipfile.ZipFile(fitted.archive) as archive:
        archive.extractall(tmp_path)
    read = SteeringAdapter.from_pretrained(tmp_path / "my-own")
    assert read.config.steering_type == "CAA" and read.config.strength == fitted.strength


def test_errors_of_a_fit_reach_the_reader(bench: Workbench) -> None:
    pairs = "\n".join(example_pairs(bench).splitlines()[:6])
    with pytest.raises(DatasetError, match="at least 10 rows"):
        list(fit_own(bench, Wish(pairs)))
    with pytest.raises(ValueError, match="fits FINESTEER, CAA"):
        next(fit_own(bench, Wish(pairs, method="WAS")))
    assert bench.lock.acquire(timeout=10)


def test_a_reader_who_leaves_stops_the_fit(bench: Workbench) -> None:
    steps = fit_own(bench, Wish(example_pairs(bench)))
    assert isinstance(next(steps), Step)
    steps.close()
    assert bench.lock.acquire(timeout=60)
    assert list(bench.model.steering_adapters) == ["truthful", "safety"]
