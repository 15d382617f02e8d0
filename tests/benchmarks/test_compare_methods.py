"""The comparison of methods: its record, tables of results, and strengths of equal side effects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from benchmarks.compare.compare_methods import EQUAL, Job, Setting, at_limits, open_jobs, run_all
from benchmarks.compare.compare_methods_page import load, page
from benchmarks.compare.compare_record import add, read
from benchmarks.compare.compare_rows import REFERENCE, UNSTEERED, rows
from benchmarks.compare.methods_table import table as methods_table
from benchmarks.real.real_setup import working_dtype
from finesteer_hf import CAAConfig, SteeringAdapter, steering_methods
from finesteer_hf.method_api import DosePoint


ITEMS = 20
SUBJECT = "playground-truthful"


def write(
    record: Path,
    label: str,
    hits: int,
    seed: int = 0,
    first: int = 0,
    fitted: bool = True,
    parts: tuple[str, ...] = ("own", "equal"),
) -> dict[str, Any]:
    """Add a row's result on one split, with items numbered from `first` on, to the record; returns what was added."""
    asked: dict[str, Any] = {
        "ids": [f"item {first + i}" for i in range(ITEMS)],
        "scores": [float(i < hits) for i in range(ITEMS)],
        "others": {"neither": [0.0] * ITEMS, "words": [-0.12345] * ITEMS},
        "identical": [True] * 9 + [False],
        "texts": [["question", f"{label} says"]] * 9,
    }
    found: dict[str, Any] = {"label": label, "note": "", "own": asked, "device": "cpu", "dtype": "float32"}
    if fitted:
        equal = {**asked, "strength": 2.0, "limit": "own_words", "kl": 0.01}
        found |= {"equal": equal, "bytes": 1500, "seconds": {"all": 12.0}, "settings": {"strength": 2.0}}
    found = {name: value for name, value in found.items() if name not in {"own", "equal"} - set(parts)}
    add(record, SUBJECT, seed, label.lower(), found)
    return found


def table(record: Path, remarks: Path, equal: bool = False) -> dict[str, list[str]]:
    """Cells by method from the page's first table, or from the first at equal side effects."""
    text = page(record, remarks).split("<details>")[0].split("### At equal")[equal].split("The rows that")[0]
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
    assert found[UNSTEERED][3] == "" and found["ONE"][3].startswith("1 [")
    assert found["ONE"][4].startswith("90.0%") and found["ONE"][5:] == ["12 s", "1.5 kB", "1"]


def test_equal_side_effects_have_a_table_of_paired_differences(tmp_path: Path, remarks: Path) -> None:
    write(tmp_path, UNSTEERED, 0, fitted=False)
    for label, hits in ((REFERENCE, 10), ("ONE", 16), ("TWO", 10)):
        write(tmp_path, label, hits)
    found = table(tmp_path, remarks, equal=True)
    assert UNSTEERED not in found and found["ONE"][2].endswith("p = 0.031") and found["TWO"][2].endswith("p = 1.000")
    assert found["ONE"][3].startswith("1 [") and found["ONE"][5:] == ["own words", "1"]


def test_an_item_of_several_splits_counts_once(tmp_path: Path, remarks: Path) -> None:
    write(tmp_path, REFERENCE, 20, seed=0)
    write(tmp_path, REFERENCE, 0, seed=1, first=10)
    (row,) = load(tmp_path, "playground-truthful")
    items = row.items()
    assert len(items) == 30 and np.mean(list(items.values())) == pytest.approx((10 + 10 * 0.5) / 30)
    assert table(tmp_path, remarks)[REFERENCE][-1] == "2"


def test_equal_side_effects_are_of_the_splits_that_most_rows_have(tmp_path: Path, remarks: Path) -> None:
    for label in (REFERENCE, "ONE", "TWO"):
        write(tmp_path, label, 20)
        write(tmp_path, label, 0, seed=1, first=20, parts=("own",) if label == "TWO" else ("own", "equal"))
    assert table(tmp_path, remarks)["TWO"][1].startswith("50.0%")
    found, text = table(tmp_path, remarks, equal=True), page(tmp_path, remarks)
    assert all(found[label][1].startswith("100.0%") and found[label][-1] == "1" for label in (REFERENCE, "ONE", "TWO"))
    further = text.partition("further splits too")[2].partition("<details>")[0]
    assert "| ONE | 50.0%" in further and f"| {REFERENCE} | 50.0%" in further and "| TWO |" not in further


def test_there_is_no_table_of_equal_side_effects_without_the_reference(tmp_path: Path, remarks: Path) -> None:
    write(tmp_path, REFERENCE, 5, parts=("own",))
    for label in ("ONE", "TWO", "THREE"):
        write(tmp_path, label, 5)
    assert "### At equal" not in page(tmp_path, remarks)


def test_the_table_of_methods_leaves_out_what_the_record_lacks(tmp_path: Path) -> None:
    write(tmp_path, REFERENCE, 5)
    found = next(line for line in methods_table(tmp_path) if "[FINESTEER]" in line)
    assert "| 1.5 kB / - | 25%, - | -, - |" in found


def test_a_split_of_few_rows_has_a_table_of_its_own(tmp_path: Path, remarks: Path) -> None:
    for label, hits in ((REFERENCE, 10), ("ONE", 16), ("TWO", 12)):
        write(tmp_path, label, hits)
    for label, hits in ((REFERENCE, 5), ("ONE", 0)):
        write(tmp_path, label, hits, seed=1, first=20)
    few = page(tmp_path, remarks).partition("further splits too")[2].partition("### At equal")[0]
    assert table(tmp_path, remarks)["ONE"][1].startswith("80.0%")  # 40% with the other split, which TWO lacks
    assert "| ONE | 40.0%" in few and "| FINESTEER | 37.5%" in few and "TWO" not in few
    assert "| 50%, - |" in next(line for line in methods_table(tmp_path) if "[FINESTEER]" in line)


# -- record -----------------------------------------------------------------------------------------------------------


def test_a_row_comes_back_from_the_record_with_its_items_hashed(tmp_path: Path) -> None:
    found = write(tmp_path, "ONE", 7)
    row = read(tmp_path, SUBJECT, 0)["one"]
    for part in ("own", "equal"):
        assert row[part]["scores"] == found[part]["scores"] and row[part]["identical"] == [1.0] * 9 + [0.0]
        assert row[part]["others"] == {"neither": [0.0] * ITEMS, "words": [-0.1235] * ITEMS}
        assert len(set(row[part]["ids"])) == ITEMS and len(row[part]["texts"]) == 3
    assert row["equal"]["limit"] == "own_words" and row["version"]
    assert "item 3" not in next(tmp_path.iterdir()).read_text()


def test_parts_of_a_row_are_added_one_by_one(tmp_path: Path) -> None:
    write(tmp_path, "ONE", 7, parts=("own",))
    write(tmp_path, "TWO", 3)
    assert "equal" not in read(tmp_path, SUBJECT, 0)["one"]
    write(tmp_path, "ONE", 7, parts=("equal",))
    found = read(tmp_path, SUBJECT, 0)
    assert list(found) == ["one", "two"] and set(found["one"]) == set(found["two"])


def test_rows_of_other_items_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "ONE", 7)
    before = next(tmp_path.iterdir()).read_text()
    with pytest.raises(ValueError, match=r"playground-truthful-0.json is of other held-out items than two"):
        write(tmp_path, "TWO", 7, first=1)
    assert next(tmp_path.iterdir()).read_text() == before


def test_what_the_record_has_is_not_measured_again(tmp_path: Path) -> None:
    record, setting = tmp_path / "record", Setting(tmp_path, False, "", tmp_path, "cpu")
    write(record, "CAA", 7, parts=("own",))
    jobs = [Job(SUBJECT, 0, slug, part) for slug in ("caa", "cast") for part in ("own", "equal")]
    assert open_jobs(jobs, setting, record) == [jobs[2]]  # no adapter lies here
    CAAConfig(strength=2.0).save_pretrained(jobs[1].adapter(tmp_path))
    assert open_jobs(jobs, setting, record) == [jobs[1], jobs[2]]


def test_another_fit_s_adapter_is_not_taken_for_a_recorded_row(tmp_path: Path) -> None:
    record, setting, job = (
        tmp_path / "record",
        Setting(tmp_path, False, "", tmp_path, "cpu"),
        Job(SUBJECT, 0, "caa", "equal"),
    )
    write(record, "CAA", 7, parts=("own",))
    CAAConfig(strength=1.5).save_pretrained(job.adapter(tmp_path))
    assert open_jobs([job], setting, record) == []


def test_a_method_that_cannot_be_made_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.logging, "set_verbosity_error", lambda: None)  # would outlast the test
    monkeypatch.setattr(transformers.utils.logging, "disable_progress_bar", lambda: None)
    jobs = [Job(SUBJECT, 0, slug, "own") for slug in ("no-method", "neither")]
    setting = Setting(tmp_path, True, "", tmp_path, "cpu")
    found = list(run_all(jobs, setting, tmp_path / "record", workers=1, seconds=60))
    assert [job for job, _ in found] == jobs
    assert all(isinstance(why, str) and f"KeyError: '{job.slug}'" in why for job, why in found)


def test_equal_side_effects_wait_for_the_row_and_splits_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, setting = tmp_path / "record", Setting(tmp_path, False, "", tmp_path, "cpu")

    def fitted(job: Job, setting: Setting) -> tuple[Job, dict[str, Any]]:
        if job.part == "own":
            CAAConfig(strength=2.0).save_pretrained(job.adapter(tmp_path))
        return job, {}

    monkeypatch.setattr("benchmarks.compare.compare_methods.run", fitted)
    jobs = [Job(SUBJECT, seed, slug, part) for seed in (0, 1) for part in ("own", "equal") for slug in ("caa", "cast")]
    ran = []
    for job, _ in run_all(jobs, setting, record, workers=1, seconds=60):
        ran.append(job)
        write(record, job.slug.upper(), 7, seed=job.seed, parts=(job.part,))
    assert ran == jobs


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


# -- where it runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "capabilities", "dtype"),
    [
        ("cuda", {}, torch.bfloat16),
        ("cpu", {"avx512_bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_bf16": False}, torch.float32),
        ("cpu", {}, torch.float32),
    ],
)
def test_half_precision_is_left_to_devices_that_compute_in_it(
    monkeypatch: pytest.MonkeyPatch, device: str, capabilities: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert working_dtype(device) is dtype


# -- rows -------------------------------------------------------------------------------------------------------------


def test_every_method_has_a_row_and_published_settings_can_be_made() -> None:
    found = rows()
    assert {row.label for row in found.values()} >= set(steering_methods()) - {"CONSTANT"}
    sizes = {"layers": 30, "width": 576}
    for row in found.values():
        if row.config is not None:
            assert SimpleNamespace(config=row.config(sizes)).config.strength is not None
    assert rows()["reps-published"].config(sizes).layer == 12  # type: ignore[misc, attr-defined]
