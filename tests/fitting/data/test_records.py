"""Data sets of any length: read row by row, checked to the end, and sampled by whole prompts."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finesteer_hf.errors import DatasetError
from finesteer_hf.fitting.data.records import PromptSample
from finesteer_hf.fitting.data.rows import PreferenceRow, check_contrast, read_preferences, read_prompts


def rows(count: int, repeats: int = 1) -> Iterator[dict[str, Any]]:
    """Rows; `repeats` of them share a prompt but are not adjacent."""
    for number in range(count):
        prompt = [{"role": "user", "content": f"question {number % (count // repeats)}?"}]
        yield {"prompt": prompt, "chosen": f"yes {number}", "rejected": f"no {number}"}


def kept(records: Any, most: int | None, seed: int = 0) -> list[PreferenceRow]:
    return read_preferences(records, max_rows=most, seed=seed).rows


def contents(found: list[PreferenceRow]) -> set[str]:
    return {str((row.prompt, row.chosen)) for row in found}


def test_the_sample_is_the_same_in_any_order() -> None:
    records = list(rows(3000, repeats=3))
    shuffled = [records[i] for i in np.random.default_rng(0).permutation(len(records))]
    sample = kept(records, 500)
    assert contents(kept(shuffled, 500)) == contents(sample)
    assert contents(kept(reversed(records), 500)) == contents(sample)
    assert contents(kept(records, 500, seed=1)) != contents(sample)


def test_prompts_are_kept_whole_in_order_and_with_their_numbers() -> None:
    records = list(rows(3000, repeats=3))
    sample = kept(iter(records), 500)
    assert 498 <= len(sample) <= 500
    assert all(sum(row.prompt == other.prompt for other in sample) == 3 for row in sample[:20])
    assert [row.number for row in sample] == sorted(row.number for row in sample)
    assert all(records[row.number]["prompt"] == row.prompt for row in sample)


def test_a_larger_limit_only_adds_prompts() -> None:
    records = list(rows(2000, repeats=2))
    samples = [contents(kept(records, most)) for most in (10, 11, 100, 1000, 1999, 2000, None)]
    assert all(smaller <= larger for smaller, larger in pairwise(samples))
    assert [len(sample) for sample in samples] == [10, 10, 100, 1000, 1998, 2000, 2000]


def test_every_prompt_is_equally_likely() -> None:
    counts = np.zeros(100)
    for seed in range(400):
        sample: PromptSample[None] = PromptSample(25, seed)
        for number in range(100):
            sample.add(f"p{number}", number, None)
        counts[[number for number, _ in sample.rows()]] += 1
    # 100 of 400 draws each; five standard deviations of a binomial.
    assert counts.sum() == 400 * 25 and np.abs(counts - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)


def test_prompts_of_many_rows_are_kept_whole_or_not_at_all() -> None:
    sizes = np.random.default_rng(0).integers(1, 40, 200)
    keys = np.random.default_rng(1).permutation(np.repeat(np.arange(200), sizes))
    sample: PromptSample[int] = PromptSample(300)
    for number, key in enumerate(keys):
        sample.add(str(key), number, int(key))
    found = [key for _, key in sample.rows()]
    assert 260 < len(found) <= 300 and sample.prompts == len(set(found))
    assert all(found.count(key) == sizes[key] for key in set(found))


def test_both_counts_are_kept_and_reported() -> None:
    read = read_preferences(rows(1000), max_rows=100)
    whole = read_preferences(rows(1000))
    assert (read.source.rows, read.source.taken) == (1000, 100)
    assert read.source.sha256 == whole.source.sha256
    assert read.findings == [
        "train_dataset has 1,000 rows; 100 of them are used, from 100 prompts drawn at random (max_rows=100; None "
        "uses all)"
    ]
    assert whole.findings == [] == read_preferences(rows(100), max_rows=100).findings
    assert read_prompts(rows(50), max_rows=20).source.taken == 20


def test_data_is_named_without_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(4)))
    source = read_preferences(str(path)).source
    assert source.name == "mine.jsonl" and source.sha256 == read_preferences(rows(4)).source.sha256


def test_a_limit_that_leaves_one_prompt_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"300 rows; max_rows=100 leaves those of 0 prompts"):
        read_preferences(rows(300, repeats=150), max_rows=100)
    with pytest.raises(DatasetError, match="all 300 rows have the same prompt"):
        check_contrast(read_preferences(rows(300, repeats=300)).rows)
    for wrong in (1, 0, 2.5, True):
        with pytest.raises(ValueError, match="max_rows must be"):
            read_preferences(rows(3), max_rows=wrong)  # type: ignore[arg-type]


def with_bad_row(number: int, bad: Any) -> Iterator[Any]:
    for at, row in enumerate(rows(30_000)):
        yield bad(row) if at == number else row


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda row: {**row, "chosen": " "}, "chosen is empty"),
        (lambda row: {**row, "rejected": None}, "no 'rejected'"),
        (lambda row: {**row, "category": "x"}, "no category, but the others do"),
        (lambda row: "text", "a row must be a dict, got str"),
    ],
)
def test_a_bad_row_late_in_the_stream_is_named(bad: Any, message: str) -> None:
    number = "0, 1, 2, 3" if "category" in message else "29000 "
    with pytest.raises(DatasetError, match=f"rows? {number}.*{message}"):
        read_preferences(with_bad_row(29_000, bad), max_rows=10)


def peak_bytes(count: int) -> int:
    stream = ({"prompt": f"question {i}? ", "chosen": "yes", "rejected": "no"} for i in range(count))
    tracemalloc.start()
    try:
        read_preferences(stream, max_rows=1000)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_rows() -> None:
    assert abs(peak_bytes(60_000) - peak_bytes(10_000)) < 1 << 20
