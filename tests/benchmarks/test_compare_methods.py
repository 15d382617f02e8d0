"""The comparison of methods: tables of results, and strengths of equal side effects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.compare.compare_methods import EQUAL, Job, at_limits
from benchmarks.compare.compare_methods_page import load, page
from benchmarks.compare.compare_rows import REFERENCE, UNSTEERED, rows
from finesteer_hf import CAAConfig, SteeringAdapter, steering_methods
from finesteer_hf.method_api import DosePoint


ITEMS = 20


def write(out: Path, label: str, hits: int, seed: int = 0, first: int = 0, fitted: bool = True) -> None:
    """A row's result on one split, with items numbered from `first` on."""
    asked: dict[str, Any] = {
        "ids": [f"item {first + i}" for i in range(ITEMS)],
        "scores": [float(i < hits) for i in range(ITEMS)],
        "others": {"neither": [0.0] * ITEMS},
        "identical": [True] * 9 + [False],
        "texts": [["question", f"{label} says"]] * 3,
    }
    found: dict[str, Any] = {"label": label, "note": "", "own": asked, "seed": seed, "device": "cpu"}
    if fitted:
        equal = {**asked, "strength": 2.0, "limit": "own_words", "kl": 0.01}
        found |= {"equal": equal, "bytes": 1500, "seconds": {"all": 12.0}}
    file = Job("playground-truthful", seed, label.lower()).file(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found))


def table(out: Path, remarks: Path) -> dict[str, list[str]]:
    """Cells by method from the page's first table."""
    text = page(out, remarks).split("<details>")[0]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if "| " in line]
    return {row[0]: row for row in cells}


@pytest.fixture
def remarks(tmp_path: Path) -> Path:
    file = tmp_path / "remarks.md"
    file.write_text("What they show.\n")
    return file


def test_a_star_marks_what_is_significant_over_all_rows(tmp_path: Path, remarks: Path) -> None:
    write(tmp_path, UNSTEERED, 0, fitted=False)
    for label, hits in ((REFERENCE, 10), ("ONE", 16), ("TWO", 10)):
        write(tmp_path, label, hits)
    found = table(tmp_path, remarks)
    # Ten items lost and none gained: p = 2 / 2^10 = .002, which four rows make .008. Six gained: .031, and .094.
    assert found[UNSTEERED][2].startswith("-50.0 [") and found[UNSTEERED][2].endswith("p = 0.002*")
    assert found["ONE"][2].startswith("+30.0 [") and found["ONE"][2].endswith("p = 0.031")
    assert found[REFERENCE][2] == "" and found["TWO"][2].endswith("p = 1.000")
    assert found[UNSTEERED][3] == "" and found["ONE"][3].startswith("1 [") and found["ONE"][5].endswith("(own words)")
    assert found["ONE"][4].startswith("90.0%") and found["ONE"][7:] == ["12 s", "1.5 kB", "1"]


def test_an_item_of_several_splits_counts_once(tmp_path: Path, remarks: Path) -> None:
    write(tmp_path, REFERENCE, 20, seed=0)
    write(tmp_path, REFERENCE, 0, seed=1, first=10)
    (row,) = load(tmp_path, "playground-truthful")
    items = row.items()
    assert len(items) == 30 and np.mean(list(items.values())) == pytest.approx((10 + 10 * 0.5) / 30)
    assert table(tmp_path, remarks)[REFERENCE][-1] == "2"


def test_failed_rows_are_left_out(tmp_path: Path, remarks: Path) -> None:
    write(tmp_path, REFERENCE, 5)
    failed = Job("playground-truthful", 0, "broken").file(tmp_path).with_suffix(".failed.json")
    failed.write_text(json.dumps({"label": "BROKEN", "reason": "no"}))
    assert list(table(tmp_path, remarks)) == ["method", "---", REFERENCE] or "BROKEN" not in table(tmp_path, remarks)


# -- equal side effects -----------------------------------------------------------------------------------------------


class Runner:
    """Side effects by formula."""

    def __init__(self, kl: float, words: float) -> None:
        self.kl, self.words = kl, words
        self.asked: list[float] = []

    def run(self, build: Any, strengths: Sequence[float]) -> list[DosePoint]:
        self.asked += strengths
        return [
            DosePoint(s, 0.0, 0.0, kl=self.kl * s**2, own_words=-1.0 - self.words * s, repeated=0.0) for s in strengths
        ]


def adapter(strength: float, length: float = 1.0) -> SteeringAdapter:
    config = CAAConfig(layer=1, strength=strength, positions="all", hidden_size=4, num_hidden_layers=2)
    config.fit = {"report": {"vector": {"vector_norm": length, "state_norm": 10.0}}}
    return SteeringAdapter(config, {"vector": torch.ones(4)})


@pytest.mark.parametrize("strength", [1e-6, 0.3, 4.0, 100.0])
@pytest.mark.parametrize(
    ("kl", "words", "limit", "highest"), [(0.01, 0.0, "general_kl", 5**0.5), (0, 0.1, "own_words", 2)]
)
def test_the_highest_strength_within_the_limits_is_found_from_any_start(
    strength: float, kl: float, words: float, limit: str, highest: float
) -> None:
    found = at_limits(Runner(kl, words), adapter(strength))  # type: ignore[arg-type]
    assert found["limit"] == limit and 0.85 * highest < found["strength"] <= highest * 1.0001
    assert found["kl"] <= EQUAL.general_kl


def test_a_method_that_spares_everything_has_no_limit() -> None:
    runner = Runner(0.0, 0.0)
    found = at_limits(runner, adapter(1e-6, length=0.01))  # type: ignore[arg-type]
    # From a twentieth of the state's norm, however short the vector is.
    assert min(s for s in runner.asked if s) == pytest.approx(0.05 * 10 / 0.01) and found["limit"] is None


# -- rows -------------------------------------------------------------------------------------------------------------


def test_every_method_has_a_row_and_published_settings_can_be_made() -> None:
    found = rows()
    assert {row.label for row in found.values()} >= set(steering_methods()) - {"CONSTANT"}
    sizes = {"layers": 30, "width": 576}
    for row in found.values():
        if row.config is not None:
            assert SimpleNamespace(config=row.config(sizes)).config.strength is not None
    assert rows()["reps-published"].config(sizes).layer == 12  # type: ignore[misc, attr-defined]
